"""The radix prefix cache: what it finds, where it splits, what it forgets; its twin is a list of all it was given."""

from collections.abc import Sequence
from copy import deepcopy
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.engine.block_pool import Block
from minivllm.engine.cache_study import achieved, measure_radix, optimum
from minivllm.engine.prefix_cache import Hit
from minivllm.engine.radix_cache import RadixCache, TreeNode, dfs_order, num_common
from minivllm.request import Request, SamplingParams

BASES = [[Random(seed).randrange(3) for _ in range(60)] for seed in range(2)]


def prompt(token_ids: Sequence[int], salt: str = "", name: str = "") -> Request:
    return Request(name, list(token_ids), len(token_ids), SamplingParams(), 1, salt=salt)


def keep(cache: RadixCache, token_ids: Sequence[int], first_id: int = 1, salt: str = "") -> list[Block]:
    """Cache the full blocks of a prompt; every block of its path, whether it was there or is new."""
    path: list[Block] = []
    parent: int | str = salt
    for start in range(0, len(token_ids) - cache.block_size + 1, cache.block_size):
        new = Block(first_id + len(path))
        serial = cache.insert(new, parent, 0, token_ids[start : start + cache.block_size])
        assert serial is not None
        holder = cache.holder(serial)
        assert holder is not None and (holder is new) == (new.entry is not None)
        path.append(holder)
        parent = serial
    return path


def find(cache: RadixCache, token_ids: Sequence[int], salt: str = "") -> Hit:
    return cache.match(prompt(token_ids, salt), len(token_ids))


def check_tree(cache: RadixCache) -> None:
    """The tree's invariants, read off its own nodes."""
    seen: list[int] = []
    reached = set()
    for salt, root in cache._roots.items():
        assert root.parent is None and not root.tokens and not root.blocks and root.children, f"bad root {salt!r}"
        to_visit: list[tuple[int, list[int], int | str]] = [(root.id, [], salt)]
        while to_visit:
            node_id, before, parent = to_visit.pop()
            node = cache._nodes[node_id]
            reached.add(node_id)
            tokens = before + node.tokens.tolist()
            assert node.start == len(before) and node.id == node_id
            if node is not root:
                assert node.tokens, "an edge is empty"
                assert len(node.children) != 1, "an only child was not merged"
                assert node.children or len(tokens) % cache.block_size == 0, "tokens that no block keeps"
            first = node.start // cache.block_size
            assert len(node.blocks) == len(tokens) // cache.block_size - first, "a path has a gap"
            for index, block in enumerate(node.blocks, first):
                entry, size = block.entry, cache.block_size
                assert entry is not None and entry.parent == parent
                assert list(entry.token_ids) == tokens[index * size : (index + 1) * size]
                assert cache.holder(entry.serial) is block
                seen.append(entry.serial)
                parent = entry.serial
            for first_token, child in node.children.items():
                assert cache._nodes[child].tokens[0] == first_token and cache._nodes[child].parent == node.id
                to_visit.append((child, tokens, parent))
    assert sorted(seen) == sorted(cache._places), "a block is not in exactly one node"
    assert reached == set(cache._nodes), "a node that no root reaches"


class RadixMachine(RuleBasedStateMachine):
    """Random lives of a cache; `paths` maps (salt, all tokens up to a block's end) to the block."""

    cache: RadixCache
    paths: dict[tuple[str, tuple[int, ...]], Block]

    @initialize(block_size=st.sampled_from((1, 2, 3, 5, 16)))
    def start(self, block_size: int) -> None:
        self.cache, self.paths, self.num_blocks = RadixCache(block_size), {}, 0

    prompts = st.builds(
        lambda base, cut, tail: BASES[base][:cut] + tail,
        st.integers(0, 1), st.integers(0, 60), st.lists(st.integers(0, 2), max_size=20),
    )  # fmt: skip
    salts = st.sampled_from(("", "", "1"))

    @rule(token_ids=prompts, salt=salts)
    def insert(self, token_ids: list[int], salt: str) -> None:
        path = keep(self.cache, token_ids, self.num_blocks, salt)
        self.num_blocks += len(path)
        for index, block in enumerate(path):
            end = (index + 1) * self.cache.block_size
            assert self.paths.setdefault((salt, tuple(token_ids[:end])), block) is block, "a path was cached twice"

    @rule(token_ids=prompts, salt=salts, num_less=st.integers(0, 3))
    def match(self, token_ids: list[int], salt: str, num_less: int) -> None:
        most = max(0, len(token_ids) - num_less)
        hit = self.cache.match(prompt(token_ids, salt), most)
        lengths = [common(token_ids[:most], tokens) for name, tokens in self.paths if name == salt]
        assert hit.num_tokens == max(lengths, default=0)
        size = self.cache.block_size
        assert len(hit.blocks) == -(-hit.num_tokens // size)
        for index, block in enumerate(hit.blocks):
            needed = tuple(token_ids[: min(hit.num_tokens, (index + 1) * size)])
            fits = [b for (s, t), b in self.paths.items() if (s, t[: len(needed)]) == (salt, needed)]
            assert block in [b for b in fits if self.end_of(b) == (index + 1) * size]

    def end_of(self, block: Block) -> int:
        return next(len(tokens) for (_, tokens), holder in self.paths.items() if holder is block)

    @precondition(lambda self: self.paths)
    @rule(choice=st.integers(0, 10**6), num_evicted=st.integers(1, 12))
    def evict(self, choice: int, num_evicted: int) -> None:
        for _ in range(min(num_evicted, len(self.paths))):
            leaves = [place for place, block in self.paths.items() if self.cache.is_leaf(block)]
            block = self.paths.pop(leaves[choice % len(leaves)])
            self.cache.evict(block)
            assert block.entry is None

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "paths"):
            return
        check_tree(self.cache)
        assert len(self.cache._places) == len(self.paths)
        size = self.cache.block_size
        inner = {(salt, tokens[:-size]) for salt, tokens in self.paths}
        for (salt, tokens), block in self.paths.items():
            assert self.cache.is_leaf(block) == ((salt, tokens) not in inner)
            assert self.cache.parent_of(block) is self.paths.get((salt, tokens[:-size]))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """On how many tokens two contents agree from the start, one by one."""
    return sum(a[:end] == list(b[:end]) for end in range(1, min(len(a), len(b)) + 1))


RadixMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestRadixMachine = RadixMachine.TestCase


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16])
def test_tree_filled_and_emptied_in_random_order_leaves_nothing(block_size: int) -> None:
    random, cache = Random(block_size), RadixCache(block_size)
    blocks = set()
    for _ in range(80):
        blocks.update(keep(cache, BASES[random.randrange(2)][: random.randrange(60)] + random.choices(range(3), k=20)))
    while blocks:
        block = random.choice(sorted((b for b in blocks if cache.is_leaf(b)), key=lambda b: b.entry.serial))  # type: ignore[union-attr]
        blocks.remove(block)
        cache.evict(block)
        check_tree(cache)
    assert (cache.num_nodes, cache._roots, cache._places) == (0, {}, {})


def test_hit_ends_at_the_exact_token() -> None:
    cache = RadixCache(4)
    first, second = keep(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    hit = find(cache, [1, 2, 3, 4, 5, 6, 9])
    assert (hit.blocks, hit.num_tokens) == ([first, second], 6)


def test_whole_prompt_is_found_but_for_the_token_to_compute() -> None:
    cache = RadixCache(4)
    keep(cache, range(8))
    assert cache.match(prompt(range(8)), 7).num_tokens == 7


def test_hit_on_whole_blocks_names_no_block_in_part() -> None:
    cache = RadixCache(2)
    path = keep(cache, [1, 2, 3, 4, 5, 6])
    assert find(cache, [1, 2, 3, 4, 9]) == Hit(path[:2], 4)


def test_paths_that_part_inside_a_block_have_a_block_each() -> None:
    cache = RadixCache(4)
    one, other = keep(cache, [1, 2, 3, 4, 5, 6], 1)[0], keep(cache, [1, 2, 8, 9], 2)[0]
    assert cache.snapshot()[""].children[0] == TreeNode(
        (1, 2), (), (), (TreeNode((3, 4), (one.id,), (0,), ()), TreeNode((8, 9), (other.id,), (0,), ()))
    )


def test_partial_block_is_that_of_the_youngest_branch() -> None:
    cache = RadixCache(4)
    keep(cache, [1, 2, 3, 4], 1)
    young = keep(cache, [1, 2, 8, 9], 2)
    assert find(cache, [1, 2]) == Hit(young, 2)


def test_path_that_goes_on_extends_its_edge_in_place() -> None:
    cache = RadixCache(2)
    keep(cache, [1, 2, 3, 4])
    keep(cache, [1, 2, 3, 4, 5, 6], 3)
    (edge,) = cache.snapshot()[""].children
    assert (edge.token_ids, edge.block_ids, cache.num_nodes) == ((1, 2, 3, 4, 5, 6), (1, 2, 5), 2)


def test_only_child_is_merged_when_its_sibling_goes() -> None:
    cache = RadixCache(4)
    keep(cache, [1, 2, 3, 4], 1)
    (other,) = keep(cache, [1, 2, 8, 9], 2)
    cache.evict(other)
    assert cache.snapshot()[""].children == (TreeNode((1, 2, 3, 4), (1,), (0,), ()),)


def test_tokens_of_an_evicted_block_are_not_found() -> None:
    cache = RadixCache(2)
    path = keep(cache, [1, 2, 3, 4])
    cache.evict(path[1])
    assert find(cache, [1, 2, 3, 4]) == Hit(path[:1], 2)


def test_only_a_leaf_can_be_evicted() -> None:
    cache = RadixCache(1)
    first, _ = keep(cache, [1, 2])
    with pytest.raises(AssertionError, match="behind it"):
        cache.evict(first)


def test_namespaces_do_not_mix() -> None:
    cache = RadixCache(2)
    keep(cache, [1, 2, 3, 4], salt="alice")
    assert [find(cache, [1, 2, 3, 4], salt).num_tokens for salt in ("alice", "bob", "")] == [4, 0, 0]


def test_salt_is_never_taken_for_a_serial() -> None:
    cache = RadixCache(1)
    (first,) = keep(cache, [5])
    assert first.entry is not None
    keep(cache, [6], 2, salt=str(first.entry.serial))
    assert find(cache, [5, 6]).num_tokens == 1


def test_empty_namespace_leaves_no_root() -> None:
    cache = RadixCache(2)
    for block in reversed(keep(cache, [1, 2, 3, 4], salt="alice")):
        cache.evict(block)
    assert cache.num_nodes == 0


def test_block_whose_start_was_evicted_cannot_be_cached() -> None:
    cache, late = RadixCache(1), Block(2)
    (first,) = keep(cache, [1])
    assert first.entry is not None
    serial = first.entry.serial
    cache.evict(first)
    assert cache.insert(late, serial, 0, [2]) is None and late.entry is None


def test_equal_contents_keep_their_first_block() -> None:
    cache = RadixCache(2)
    first = keep(cache, [1, 2, 3, 4], 1)
    assert keep(cache, [1, 2, 3, 4], 3) == first


def test_deep_tree_is_copied_with_its_blocks() -> None:
    cache = RadixCache(1)
    for depth in range(300):  # a branch at every token
        keep(cache, [0] * depth + [1], 2000)
    copy = deepcopy(cache)
    assert find(copy, [0] * 300).num_tokens == find(cache, [0] * 300).num_tokens == 299
    check_tree(copy)


def test_common_start_is_that_of_a_loop() -> None:
    random = Random(0)
    for _ in range(500):
        a, b = (random.choices((0, 0, 0, 0, 1), k=random.randrange(20)) for _ in range(2))
        assert num_common(a, b) == common(a, b)


def test_dfs_order_keeps_prompts_with_a_common_start_together() -> None:
    queue = [prompt(p, name=n) for n, p in (("a", [1, 2]), ("b", [3]), ("c", [1, 4]), ("d", [3, 5]), ("e", [1, 2]))]
    assert [request.id for request in dfs_order(queue)] == ["a", "e", "c", "b", "d"]


def test_shared_prompts_reach_the_hit_rates_of_n73() -> None:
    prompts = [[*range(341), *([1000 + index] * 50)] for index in range(16)]
    cache, hits = RadixCache(16), []
    for token_ids in prompts:
        hits.append(cache.match(prompt(token_ids), len(token_ids) - 1).num_tokens)
        keep(cache, token_ids)
    assert achieved(prompts, hits) == optimum(prompts) == pytest.approx(0.818, abs=0.0005)
    assert (
        achieved(prompts, [hit // 16 * 16 for hit in hits]) == optimum(prompts, 16) == pytest.approx(0.806, abs=0.0005)
    )


def test_costs_are_measured_on_a_tree_of_the_size_asked_for() -> None:
    costs = measure_radix(num_blocks=60, block_size=4, num_prompt=50)
    assert costs.num_nodes > 2 and 0 < costs.match_ms <= costs.slowest_match_ms
