"""Pinned prefixes: a name owns the cached blocks of a prompt's start, so that no pressure evicts them."""

from collections.abc import Sequence

from minivllm.engine.allocators import blocks_needed
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
        if name in self.blocks_of:
            raise RequestError(f"pin {name!r}: the name is in use; unpin it first")
        probe = Request("", [*token_ids, -1], len(token_ids), SamplingParams(), 1, salt=salt)
        blocks = self._kv.match(probe).without_part(self._kv.block_size).blocks
        if not blocks:
            raise RequestError(
                f"pin {name!r}: no full block of these {len(token_ids)} tokens is cached; run them first"
            )
        pinned = {block for blocks_of_name in self.blocks_of.values() for block in blocks_of_name} | set(blocks)
        num_left = self._kv.pool.num_usable - len(pinned)
        if num_left < blocks_needed(self._kv.config.max_model_len, self._kv.block_size):
            raise RequestError(
                f"pin {name!r}: with {len(pinned)} blocks pinned a request of max_model_len would never fit; "
                "unpin another prefix or raise the KV pool"
            )
        for block in blocks:
            self._kv.share(block)
        self.blocks_of[name] = blocks
        self._kv.events.emit(Pinned(self._kv.step, name, tuple(block.id for block in blocks)))
        return len(blocks) * self._kv.block_size

    def blocks_of_ids(self) -> dict[str, list[int]]:
        """Names and the ids of the blocks they own."""
        return {name: [block.id for block in blocks] for name, blocks in self.blocks_of.items()}

    def unpin(self, name: str) -> None:
        """Let a pinned prefix go; it stays cached until it is evicted. Raises RequestError for an unknown name."""
        if name not in self.blocks_of:
            raise RequestError(f"unpin {name!r}: nothing is pinned under this name; known: {sorted(self.blocks_of)}")
        blocks = self.blocks_of.pop(name)
        self._kv.events.emit(Unpinned(self._kv.step, name, tuple(block.id for block in blocks)))
        for block in reversed(blocks):
            self._kv.let_go(block)
