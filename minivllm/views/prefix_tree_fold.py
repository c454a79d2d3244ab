"""From events to the tree of cached blocks: who continues whom, who uses them, and who is forgotten next.

Events name no parent. It is the content one block earlier in the request's table, and that is known from four facts:
blocks found in the cache (PrefixHit) continue each other; a request's own blocks were cached in order; a duplicate that
was exchanged (radix) names its twin; a duplicate that was kept (hash chain) has the content of the one block that
continues its parent. Where several do, the edge stays unknown until a hit tells it.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minivllm.events import (
    Admitted,
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    Event,
    Evicted,
    Finished,
    Forked,
    Pinned,
    PrefixHit,
    StepRan,
    Unpinned,
)
from minivllm.views.pool_fold import PoolFold
from minivllm.views.prefix_tree_state import NodeState, TreeState
from minivllm.views.sentences import sentence

NUM_DECISIONS = 8


@dataclass(slots=True)
class _Node:
    """A cached block of the first group of layers while it is folded."""

    id: int  # counts cached blocks from 1; block ids are used again
    block_id: int
    index: int  # in the table of whoever wrote it
    writer: str
    parent: int | None  # None: a root, or unknown
    is_parent_known: bool
    born: int  # step
    hit: int = 0  # step of the last hit
    num_hits: int = 0
    last_use: int = 0  # tick of the LRU clock
    freed: int = 0  # counts blocks that nobody uses any more


class PrefixTreeFold:
    """Applies events one by one; a pool's fold beside it knows tables and owners."""

    def __init__(self, header: Mapping[str, object]) -> None:
        self.pool = PoolFold(header)
        self._is_radix = header.get("prefix_cache") == "radix"
        self._policy = header.get("eviction_policy", "lru")
        self._nodes: dict[int, _Node] = {}  # by node id
        self._at: dict[int, _Node] = {}  # by block id
        self._beside: set[int] = set()  # cached blocks of other groups of layers
        self._chains: dict[str, list[int | None]] = {}  # request -> node with the content of its i-th block
        self._ghosts: list[_Node] = []  # evicted in the step that is shown
        self._clock = self._num_nodes = self._num_freed = 0
        self._num_hit_tokens = self._num_prompt_tokens = 0
        self._just_hit = ""
        self._prompts: dict[str, int] = {}
        self._decisions: deque[str] = deque(maxlen=NUM_DECISIONS)

    @property
    def step(self) -> int:
        return self.pool.step

    def apply(self, event: Event) -> None:
        if event.step > self.step:
            self._ghosts = []
        if isinstance(event, Evicted):
            self._evict(event.block_id)
        self.pool.apply(event)
        match event:
            case PrefixHit():
                self._find(event)
            case Admitted():
                self._admit(event)
            case BlockCached(group=0):
                self._cache(event)
            case BlockCached(block_id=block_id):
                self._beside.add(block_id)
            case BlockExchanged(request_id=request_id, block_id=old, cached_id=new):
                self._exchange(request_id, old, new)
            case Forked():
                self._fork(event)
            case BlocksReleased(block_ids=block_ids):
                self._clock += 1
                self._use(reversed(block_ids))
            case BlocksDropped(block_ids=block_ids) | Pinned(block_ids=block_ids) | Unpinned(block_ids=block_ids):
                self._use(block_ids)
            case BlockCopied(source_id=source_id):
                self._use([source_id])
            case Finished(request_id=request_id):
                self._chains.pop(request_id, None)
            case StepRan():
                self._fill_chains(event)
        if (words := sentence(event)) and isinstance(event, PrefixHit | Evicted | BlockExchanged | Pinned | Unpinned):
            self._decisions.append(words)

    def state(self) -> TreeState:
        nodes = [self._frozen(node) for node in self._nodes.values()]
        ghosts = [self._frozen(node, is_evicted=True) for node in self._ghosts]
        return TreeState(
            self.step, self.pool.block_size, self._clock, tuple(nodes), tuple(ghosts), len(self._beside), self._next(),
            self._num_hit_tokens, self._num_prompt_tokens,
            {request_id: tuple(self.pool.table(request_id)) for request_id in self._chains}, tuple(self._decisions),
        )  # fmt: skip

    def _frozen(self, node: _Node, is_evicted: bool = False) -> NodeState:
        is_cut = node.parent is not None and node.parent not in self._nodes
        num_owners = 0 if is_evicted else self.pool.num_owners(node.block_id)
        return NodeState(
            node.id, node.block_id, node.index, node.writer, None if is_cut else node.parent, is_cut,
            node.is_parent_known, num_owners, node.num_hits, node.last_use, node.born == self.step,
            node.hit == self.step, is_evicted,
        )  # fmt: skip

    def _next(self) -> int | None:
        """The node that LRU would evict next, None under other policies: vLLM's free list, or SGLang's oldest leaf."""
        idle = [node for node in self._nodes.values() if not self.pool.num_owners(node.block_id)]
        if self._policy != "lru" or not idle or self._beside:
            return None
        if not self._is_radix:
            return min(idle, key=lambda node: node.freed).id
        parents = {node.parent for node in self._nodes.values()}
        leaves = [node for node in idle if node.id not in parents]
        return min(leaves, key=lambda node: (node.last_use, -node.id)).id if leaves else None

    def _find(self, event: PrefixHit) -> None:
        """Blocks of a hit continue each other; the last may be used in part."""
        if event.group:
            return
        self._clock += 1
        self._just_hit = event.request_id
        self._use(event.block_ids)
        found = [self._at.get(block_id) for block_id in event.block_ids]
        for parent, node in zip([None, *found], found, strict=False):
            if node is None:
                continue
            node.hit, node.num_hits = event.step, node.num_hits + 1
            if not node.is_parent_known:
                node.parent, node.is_parent_known = (parent.id if parent else None), True
        num_whole = event.num_tokens // self.pool.block_size
        chain = self._chains.setdefault(event.request_id, [])
        chain[:num_whole] = [node.id if node else None for node in found[:num_whole]]

    def _admit(self, event: Admitted) -> None:
        if self._just_hit != event.request_id and event.reason != "swapped_in":
            self._clock += 1  # an admission without a hit is a use of the cache as well
        self._just_hit = ""
        chain = self._chains.setdefault(event.request_id, [])  # after a preemption its contents are published again
        num_there = next((i for i, node_id in enumerate(chain) if node_id not in self._nodes), len(chain))
        del chain[num_there:]
        if event.num_preemptions == 0:
            self._num_hit_tokens += event.num_computed
            self._num_prompt_tokens += self.pool.num_prompt(event.request_id)

    def _cache(self, event: BlockCached) -> None:
        """A new node: it continues what stands before it in its writer's table."""
        index = self.pool.table(event.request_id).index(event.block_id)
        self._fill_chain(event.request_id, index)
        chain = self._chains[event.request_id]
        parent = chain[index - 1] if index else None
        self._num_nodes += 1
        is_known = index == 0 or parent is not None
        node = _Node(self._num_nodes, event.block_id, index, event.request_id, parent, is_known, event.step)
        self._nodes[node.id] = self._at[node.block_id] = node
        chain[index:] = [node.id]

    def _exchange(self, request_id: str, old: int, new: int) -> None:
        index = self.pool.table(request_id).index(new)
        self._fill_chain(request_id, index)
        self._chains[request_id][index:] = [self._at[new].id] if new in self._at else [None]
        self._use([new, old])

    def _fork(self, event: Forked) -> None:
        self._chains[event.request_id] = list(self._chains.get(event.parent_id, []))
        if event.block_ids:
            self._clock += 1
            self._use(event.block_ids)

    def _evict(self, block_id: int) -> None:
        self._beside.discard(block_id)
        node = self._at.pop(block_id, None)
        if node is not None:
            del self._nodes[node.id]
            self._ghosts.append(node)

    def _use(self, block_ids: Iterable[int]) -> None:
        """Tick the blocks that gained or lost an owner; note in which order they became idle."""
        for block_id in block_ids:
            node = self._at.get(block_id)
            if node is not None:
                node.last_use = self._clock
                if not self.pool.num_owners(block_id):
                    self._num_freed += 1
                    node.freed = self._num_freed

    def _fill_chains(self, event: StepRan) -> None:
        """Whose block became full in this step and was not cached holds what another block caches already."""
        for place, (request_id, _, num_stored) in enumerate(event.scheduled):
            if request_id in self._chains:
                later = {request_id for request_id, _, _ in event.scheduled[place + 1 :]}
                self._fill_chain(request_id, num_stored // self.pool.block_size, later)

    def _fill_chain(self, request_id: str, num_full: int, later: Iterable[str] = ()) -> None:
        """Contents of the first `num_full` blocks. `later` published after this request in the same step."""
        chain, table = self._chains.setdefault(request_id, []), self.pool.table(request_id)
        for index in range(len(chain), min(num_full, len(table))):
            node = self._at.get(table[index])
            parent = chain[index - 1] if index else None
            if node is None and (index == 0 or parent is not None):
                node = self._twin(index, parent, later)
            chain.append(node.id if node else None)

    def _twin(self, index: int, parent: int | None, later: Iterable[str]) -> _Node | None:
        """The cached block that continues `parent`, if no other can be meant."""
        twins = [
            node
            for node in self._nodes.values()
            if node.index == index
            and (node.parent == parent or not node.is_parent_known)
            and not (node.born == self.step and node.writer in later)
        ]
        return twins[0] if len(twins) == 1 and twins[0].is_parent_known else None
