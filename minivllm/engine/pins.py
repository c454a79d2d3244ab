"""Pinned prefixes: a name owns the cached blocks of a prompt's start, so that no pressure evicts them."""

from collections.abc import Sequence

from minivllm.engine.block_pool import Block
from minivllm.engine.kv_manager import KVManager
from minivllm.errors import RequestError
from minivllm.events import Pinned, Unpinned
from minivllm.request import Request, SamplingParams


class Pins:
    """Names and the blocks they own; an owner counts like a request does (I1)."""

    def __init__(self, kv: KVManager) -> None:
        self._kv = kv
        self.blocks_of: dict[str, list[Block]] = {}

    def pin(self, name: str, token_ids: Sequence[int], salt: str = "") -> int:
        """Pin what the cache holds of `token_ids`; returns how many tokens that is.

        Raises RequestError for a name in use, for a prefix that is not cached, and when what is left of the pool could
        not hold one request of max_model_len.
        """
        self.require_room(name, 0)
        probe = Request("", [*token_ids, -1], len(token_ids), SamplingParams(), 1, salt=salt)
        hit = self._kv.match(probe).without_part(self._kv.block_size)
        blocks = [block for table in hit.tables for block in table]
        if not blocks:
            raise RequestError(
                f"pin {name!r}: no full block of these {len(token_ids)} tokens is cached; run them first"
            )
        self._require_rest(name, len(self._pinned() | {block.id for block in blocks}))
        for block in blocks:
            self._kv.share(block)
        self.blocks_of[name] = blocks
        self._kv.events.emit(Pinned(self._kv.step, name, tuple(block.id for block in blocks)))
        return hit.num_tokens

    def require_room(self, name: str, num_tokens: int) -> None:
        """Raise RequestError when a pin of this name and of `num_tokens` new tokens could never be."""
        if not isinstance(name, str) or not name:
            raise RequestError(f"pin: the name must be a string that is not empty, not {name!r}")
        if name in self.blocks_of:
            raise RequestError(f"pin {name!r}: the name is in use; unpin it first")
        self._require_rest(name, num_tokens // self._kv.block_size)

    def _require_rest(self, name: str, num_pinned: int) -> None:
        """What is not pinned must hold one request of max_model_len."""
        num_left, longest = self._kv.pool.num_usable - num_pinned, self._kv.config.max_model_len
        if num_left < self._kv.config.most_blocks(longest):
            raise RequestError(
                f"pin {name!r}: with {num_pinned} blocks pinned a request of max_model_len {longest} would never fit; "
                "lower max_model_len, unpin another prefix or give more blocks"
            )

    def _pinned(self) -> set[int]:
        return {block.id for blocks in self.blocks_of.values() for block in blocks}

    def blocks_of_ids(self) -> dict[str, list[int]]:
        """Names and the ids of the blocks they own."""
        return {name: [block.id for block in blocks] for name, blocks in self.blocks_of.items()}

    def unpin(self, name: str) -> None:
        """Let a pinned prefix go; it stays cached until it is evicted. Raises RequestError for an unknown name."""
        if not isinstance(name, str) or name not in self.blocks_of:
            raise RequestError(f"unpin {name!r}: nothing is pinned under this name; known: {sorted(self.blocks_of)}")
        blocks = self.blocks_of.pop(name)
        self._kv.events.emit(Unpinned(self._kv.step, name, tuple(block.id for block in blocks)))
        for block in reversed(blocks):
            self._kv.let_go(block)
