"""The helpers of the course this one grew from, under their own names and with their own results, less their faults.

The names, arguments and shapes are those of `63_paged_attention_and_llm_serving/paged_attention.py` in the public
repository ffaisal93/ml_and_llm_learning, so that its readers' code runs here; the code is ours. Where results differ:
initial requests beyond the batch size wait instead of vanishing, the caller's requests stay as they were, a request
with no tokens left takes no seat, and a batch size, block size or length that makes no sense is refused.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

BYTES_FP16 = 2


def kv_bytes(num_layers: int, num_kv_heads: int, head_dim: int, seq_len: int, bytes_per_value: int = BYTES_FP16) -> int:
    """Bytes of one sequence's K and V: kv_bytes(32, 8, 128, 4096) == 536_870_912, 512 MiB.

    Heads are KV heads: with grouped queries (Llama-3-8B: 32 query heads, 8 KV heads) query heads give 4 times too much.
    """
    _need(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, bytes_per_value=bytes_per_value)
    _need(least=0, seq_len=seq_len)
    bytes_per_token = 2 * num_layers * num_kv_heads * head_dim * bytes_per_value  # 2: K and V
    return bytes_per_token * seq_len


def contiguous_reservation_waste(reserved_tokens: int, used_tokens: int) -> int:
    """Slots reserved and never used: contiguous_reservation_waste(8192, 3000) == 5192; 0 when it was outgrown."""
    _need(least=0, reserved_tokens=reserved_tokens, used_tokens=used_tokens)
    return max(reserved_tokens - used_tokens, 0)


def blocks_needed(seq_len: int, block_size: int) -> int:
    """Blocks that hold `seq_len` tokens: blocks_needed(3001, 128) == 24."""
    _need(least=0, seq_len=seq_len)
    _need(block_size=block_size)
    return -(-seq_len // block_size)


def paged_reserved_tokens(seq_len: int, block_size: int) -> int:
    """Slots in those blocks: paged_reserved_tokens(3001, 128) == 3072, of which 71 stay empty."""
    return blocks_needed(seq_len, block_size) * block_size


@dataclass
class Request:
    """A toy request: a name, and how many tokens it has yet to decode."""

    request_id: str
    remaining_tokens: int


def continuous_batch_schedule(
    initial_requests: Sequence[Request], arriving_requests: Sequence[Request], max_batch_size: int
) -> list[list[str]]:
    """Names in the batch, step by step: each decodes one token a step, and a seat is refilled as soon as it is free.

    First come, first served: the initial requests, then the arriving ones. Lengths 3, 1 and then 2, 1 in two seats:
    [[a, b], [a, c], [a, c], [d]].
    """
    _need(max_batch_size=max_batch_size)
    queue = [*initial_requests, *arriving_requests]
    for request in queue:
        _need(least=0, remaining_tokens=request.remaining_tokens)
    waiting = deque((request.request_id, request.remaining_tokens) for request in queue if request.remaining_tokens)
    running: list[tuple[str, int]] = []
    steps: list[list[str]] = []
    while running or waiting:
        while waiting and len(running) < max_batch_size:
            running.append(waiting.popleft())
        steps.append([name for name, _ in running])
        running = [(name, remaining - 1) for name, remaining in running if remaining > 1]
    return steps


def demo() -> None:
    """Print the values that the original prints."""
    print(f"KV cache of 4096 tokens: {kv_bytes(num_layers=32, num_kv_heads=8, head_dim=128, seq_len=4096)} bytes")
    print(f"Reserve 8192 slots, use 3000: {contiguous_reservation_waste(8192, 3000)} wasted")
    print(f"3000 tokens in blocks of 128: {blocks_needed(3000, 128)} blocks, {paged_reserved_tokens(3000, 128)} slots")
    initial, arriving = [Request("a", 3), Request("b", 1)], [Request("c", 2), Request("d", 1)]
    print(f"Two seats: {continuous_batch_schedule(initial, arriving, max_batch_size=2)}")


def _need(*, least: int = 1, **numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {number!r}")


if __name__ == "__main__":
    demo()
