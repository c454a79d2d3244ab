"""Who owns each KV block. Invariant: null block + free + in use == total, and a free block has no owner.

Blocks are numbered 0 .. num_blocks-1. Block 0 is the null block: never handed out, it pads block tables.
The free list is a doubly linked list threaded through the blocks, so that a cached block can leave its middle
in O(1) when a request hits it. It is ordered: blocks without cached contents first, then least recently freed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

NULL_BLOCK = 0


@dataclass(eq=False, slots=True)
class Block:
    """A physical block: its owners, its place in the free list, and what it caches when it is full."""

    id: int
    ref_count: int = 0
    previous: "Block | None" = None
    next: "Block | None" = None
    entry: "CacheEntry | None" = None
    num_hits: int = 0  # adoptions by later requests since it was cached
    last_used: int = 0  # when it was last adopted or released, in ticks of the KV manager
    priority: int = 0  # the most urgent of its users so far: lower is kept longer


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The cached contents of a full block: exact tokens, and the entry of the block before it."""

    serial: int  # never reused, unlike block ids and hashes
    block_hash: int
    token_ids: tuple[int, ...]
    parent: int | str  # serial of the entry one block earlier; for the first block, the namespace salt
    group: int = 0  # of layers; entries beside that of group 0 share its serial


class BlockPool:
    """A fixed set of blocks with reference counts and an ordered free list."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._head, self._tail = Block(-1), Block(-1)  # sentinels, so that unlinking needs no special case
        self._head.next, self._tail.previous = self._tail, self._head
        self.num_free = 0
        for block in self.blocks[1:]:
            self._link_before(self._tail, block)

    @property
    def num_usable(self) -> int:
        """Blocks that requests can own: all but the null block."""
        return len(self.blocks) - 1

    def first_free(self) -> Block:
        """The block that `take` would hand out next."""
        block = self._head.next
        assert block is not None and block is not self._tail, "no free block: ask num_free first"
        return block

    def take(self, block: Block | None = None) -> Block:
        """Hand out a free block, by default the first; it must no longer cache anything."""
        block = block or self.first_free()
        assert block.entry is None, f"block {block.id} still caches: evict it first"
        assert block.ref_count == 0, f"block {block.id} is in use"
        self._unlink(block)
        block.ref_count = 1
        return block

    def share(self, block: Block) -> None:
        """Add an owner; a free block leaves the free list with its contents, from wherever it stands."""
        if block.ref_count == 0:
            self._unlink(block)
        block.ref_count += 1

    def release(self, block: Block) -> None:
        """Drop an owner; the last one frees the block: empty ones to the front, cached ones to the back."""
        assert block.ref_count > 0, f"block {block.id} is freed twice"
        block.ref_count -= 1
        if block.ref_count == 0:
            self._link_before(self._tail if block.entry else self._after_head(), block)

    def free_ids(self) -> Iterator[int]:
        """Free blocks, in the order in which they would be taken."""
        block = self._head.next
        while block is not None and block is not self._tail:
            yield block.id
            block = block.next

    def move_to_front(self, block: Block) -> None:
        """A free block that just lost its contents is taken before any that still caches."""
        assert block.ref_count == 0, f"block {block.id} is in use"
        self._unlink(block)
        self._link_before(self._after_head(), block)

    def _after_head(self) -> Block:
        assert self._head.next is not None
        return self._head.next

    def _link_before(self, following: Block, block: Block) -> None:
        previous = following.previous
        assert previous is not None
        previous.next, block.previous = block, previous
        block.next, following.previous = following, block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        previous, following = block.previous, block.next
        assert previous is not None and following is not None, f"block {block.id} is not in the free list"
        previous.next, following.previous = following, previous
        block.previous = block.next = None
        self.num_free -= 1
