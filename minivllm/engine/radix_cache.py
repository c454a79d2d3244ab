"""Which full blocks are already computed: a radix tree of their tokens, as in SGLang (arXiv 2312.07104, section 3).

An edge holds the tokens that all paths below it share, so two contents part at the exact token, not at a block's end.
A block belongs to the node on whose edge its LAST token lies: where paths part inside a block, every child has a block
of its own that repeats the first tokens. Invariants: a node that is no root has a non-empty edge and either no child or
several, whose edges start with different tokens; the blocks on a path stand end to end from its root to its leaf.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from minivllm.engine.block_pool import Block, CacheEntry
from minivllm.engine.prefix_cache import BlockHash, Hit, Parent
from minivllm.request import Request


@dataclass(eq=False, slots=True)
class _Node:
    """An edge and its lower end. Nodes name each other by number, so that a deep copy needs no deep recursion."""

    id: int
    parent: int | None = None  # None: a root, which has an empty edge
    start: int = 0  # tokens before the edge
    tokens: "array[int]" = field(default_factory=lambda: array("q"))  # compared and cut at memory speed
    blocks: list[Block] = field(default_factory=list)
    children: dict[int, int] = field(default_factory=dict)  # first token of the child's edge -> number of the child

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A picture of a node and all below it; it holds nothing that lives."""

    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    ref_counts: tuple[int, ...]
    children: tuple["TreeNode", ...]


class RadixCache:
    """A prefix cache that finds every token it holds; one tree for each namespace salt."""

    deduplicates = True

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._nodes: dict[int, _Node] = {}
        self._roots: dict[str, _Node] = {}
        self._places: dict[int, tuple[int, int]] = {}  # serial of an entry -> (its node, its index in a block table)
        self._last_node = self._last_serial = 0

    @property
    def num_nodes(self) -> int:
        """Nodes of all trees, roots included."""
        return len(self._nodes)

    def match(self, request: Request, most_tokens: int) -> Hit:
        """The longest known start of the request, at most `most_tokens`; of the last block it may need only a part.

        Any block that starts with that part will do: it is to be copied before the request writes to it. Taken is the
        one in the youngest branch, which costs no search; matching changes nothing.
        """
        root = self._roots.get(request.salt)
        if root is None:
            return Hit([], 0)
        path = [root]
        num_tokens = self._follow(path, 0, array("q", request.token_ids[:most_tokens]))
        num_blocks = -(-num_tokens // self.block_size)
        blocks = [block for node in path for block in node.blocks]
        node = path[-1]
        while len(blocks) < num_blocks:  # paths part between the last token found and the end of its block
            node = self._nodes[next(reversed(node.children.values()))]
            blocks += node.blocks[:1]
        return Hit(blocks[:num_blocks], num_tokens)

    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Remember a full block; return the serial that stands for its contents, None when its start was evicted.

        Equal contents that another block caches already keep their place: `block` can then be exchanged for that one.
        """
        assert len(token_ids) == self.block_size, f"block {block.id} is not full"
        if isinstance(parent, int) and parent not in self._places:
            return None
        node, depth = self._end_of(parent)
        path, tokens = [node], array("q", token_ids)
        num_known = self._follow(path, depth, tokens)
        if num_known == len(tokens):
            return _serial(self._block_at(path[-1], depth // self.block_size))
        assert block.entry is None, f"block {block.id} caches other contents: evict them first"
        self._last_serial += 1
        block.entry = CacheEntry(self._last_serial, block_hash, tuple(token_ids), parent)
        block.num_hits = 0
        node = self._extend(path[-1], depth + num_known, tokens[num_known:])
        node.blocks.append(block)
        self._places[self._last_serial] = (node.id, depth // self.block_size)
        return self._last_serial

    def evict(self, block: Block) -> None:
        """Forget what a leaf holds, and the tokens that nothing else keeps."""
        assert self.is_leaf(block), f"block {block.id} has cached contents behind it"
        assert block.entry is not None
        node_id, index = self._places.pop(block.entry.serial)
        node = self._nodes[node_id]
        node.blocks.pop()
        if node.blocks:
            del node.tokens[index * self.block_size - node.start :]
        else:
            self._remove(node, block.entry.parent)
        block.entry = None

    def holder(self, serial: int) -> Block | None:
        """The block that caches an entry; None when it was evicted."""
        if serial not in self._places:
            return None
        node_id, index = self._places[serial]
        return self._block_at(self._nodes[node_id], index)

    def is_leaf(self, block: Block) -> bool:
        """Whether no cached block continues this one."""
        if block.entry is None:
            return False
        node = self._nodes[self._places[block.entry.serial][0]]
        return not node.children and node.blocks[-1] is block

    def parent_of(self, block: Block) -> Block | None:
        """The cached block one block earlier, if there is one."""
        parent = block.entry.parent if block.entry else None
        return self.holder(parent) if isinstance(parent, int) else None

    def snapshot(self) -> dict[str, TreeNode]:
        """The tree of each namespace as it stands, for a view to draw."""
        return {salt: self._picture(root) for salt, root in self._roots.items()}

    def _end_of(self, parent: Parent) -> tuple[_Node, int]:
        """Where a block that continues `parent` starts: a node, and how many tokens stand before."""
        if isinstance(parent, str):
            if parent not in self._roots:
                self._roots[parent] = self._add_node(None, 0)
            return self._roots[parent], 0
        node_id, index = self._places[parent]
        return self._nodes[node_id], (index + 1) * self.block_size

    def _follow(self, path: list[_Node], depth: int, tokens: "array[int]") -> int:
        """Walk down from `depth` tokens, a point on the edge of path[-1]; how many of `tokens` the tree knows there."""
        node, num_known = path[-1], 0
        edge = node.tokens[depth - node.start : depth - node.start + len(tokens)]
        while edge == tokens[num_known : num_known + len(edge)]:
            num_known += len(edge)
            if num_known == len(tokens) or tokens[num_known] not in node.children:
                return num_known
            node = self._nodes[node.children[tokens[num_known]]]
            path.append(node)
            edge = node.tokens
        return num_known + num_common(edge, tokens[num_known:])

    def _extend(self, node: _Node, depth: int, tokens: "array[int]") -> _Node:
        """Let `tokens` follow the first `depth` tokens of the path to `node`; the node that then ends with them."""
        if depth < node.end:
            self._split(node, depth)
        if node.children or node.parent is None:
            node = self._add_node(node, depth)
            assert node.parent is not None
            self._nodes[node.parent].children[tokens[0]] = node.id
        node.tokens.extend(tokens)
        return node

    def _split(self, node: _Node, depth: int) -> None:
        """Cut an edge in two: `node` keeps what stands before `depth`, a new child gets the rest and all below."""
        num_kept = depth // self.block_size - node.start // self.block_size
        lower = self._add_node(node, depth)
        lower.tokens, lower.blocks, lower.children = (
            node.tokens[depth - node.start :],
            node.blocks[num_kept:],
            node.children,
        )
        del node.tokens[depth - node.start :], node.blocks[num_kept:]
        node.children = {lower.tokens[0]: lower.id}
        self._settle(lower)

    def _remove(self, node: _Node, parent_entry: Parent) -> None:
        """Take out a node without blocks, and mend what it leaves: a root without a tree, a node with an only child."""
        assert node.parent is not None
        above = self._nodes[node.parent]
        del self._nodes[node.id], above.children[node.tokens[0]]
        if above.parent is not None and len(above.children) == 1:
            self._absorb_only_child(above)
        elif isinstance(parent_entry, str) and not above.children:  # the last block of this namespace
            del self._nodes[above.id], self._roots[parent_entry]

    def _absorb_only_child(self, node: _Node) -> None:
        child = self._nodes.pop(*node.children.values())
        node.tokens.extend(child.tokens)
        node.blocks.extend(child.blocks)
        node.children = child.children
        self._settle(node)

    def _settle(self, node: _Node) -> None:
        """Have the blocks and children that a node was given know where they are."""
        for child in node.children.values():
            self._nodes[child].parent = node.id
        for index, block in enumerate(node.blocks, node.start // self.block_size):
            self._places[_serial(block)] = (node.id, index)

    def _add_node(self, parent: _Node | None, start: int) -> _Node:
        self._last_node += 1
        node = _Node(self._last_node, parent.id if parent else None, start)
        self._nodes[node.id] = node
        return node

    def _block_at(self, node: _Node, index: int) -> Block:
        """The block whose last token is on this node's edge and that stands at `index` in a block table."""
        return node.blocks[index - node.start // self.block_size]

    def _picture(self, root: _Node) -> TreeNode:
        pictures: dict[int, TreeNode] = {}
        for node in reversed(list(self._depth_first(root))):  # children before their parents, at any depth
            pictures[node.id] = TreeNode(
                tuple(node.tokens),
                tuple(block.id for block in node.blocks),
                tuple(block.ref_count for block in node.blocks),
                tuple(pictures.pop(child) for child in node.children.values()),
            )
        return pictures[root.id]

    def _depth_first(self, root: _Node) -> Iterator[_Node]:
        to_visit = [root]
        while to_visit:
            node = to_visit.pop()
            yield node
            to_visit.extend(self._nodes[child] for child in node.children.values())


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the start agree: num_common([1, 2, 3], [1, 2, 4]) == 2; compares halves, not tokens."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    num_equal, num_unequal = 0, length  # a and b agree on the first `num_equal` tokens, not on the first `num_unequal`
    while num_unequal - num_equal > 1:
        middle = (num_equal + num_unequal) // 2
        if a[num_equal:middle] == b[num_equal:middle]:
            num_equal = middle
        else:
            num_unequal = middle
    return num_equal


def dfs_order(requests: Sequence[Request]) -> list[Request]:
    """A queue in the order of a depth-first walk through the tree of its prompts.

    Served so, one after the other, they reach the optimal hit rate with a cache that holds no more than the longest of
    them (arXiv 2312.07104, theorem 3.1). Sorting prompts like words is such a walk; equal ones keep their order.
    """
    return sorted(requests, key=lambda request: (request.salt, request.token_ids))


def _serial(block: Block) -> int:
    assert block.entry is not None, f"block {block.id} caches nothing"
    return block.entry.serial
