"""What shared prefixes save: hit rates of one preamble, and the optimum of any set of prompts, a trie's size."""

from collections.abc import Sequence
from itertools import pairwise

from minivllm.course.calculators.checks import listed, whole
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work


def prefix_hit_rate(
    num_requests: Amounts, shared_tokens: Amount, unique_tokens: Amount, block_size: Amount = 1
) -> Worked:
    """Percent of prompt tokens found when N requests share P of P + U: (N - 1) P / (N (P + U)).

    Blocks cache whole blocks only: P counts as floor(P / B) x B; a radix tree of tokens has B = 1.
    """
    shared, unique = whole("shared_tokens", shared_tokens), whole("unique_tokens", unique_tokens, 0)
    size = whole("block_size", block_size)
    found = shared // size * size

    def of_requests(requests: Amount) -> Worked:
        count = whole("num_requests", requests)
        value = 100 * (count - 1) * found / (count * (shared + unique))
        formula = f"({count} − 1) × {found} / ({count} × ({shared} + {unique}))"
        formula += f" with ⌊{shared}/{size}⌋ × {size} = {found}" if found != shared else ""
        return work("hit rate", formula, value, "%")

    return for_each(num_requests, of_requests)


def shared_blocks(shared_tokens: Amounts, block_size: Amount = 16) -> Worked:
    """Full blocks of a shared prefix: 21 of 16 for 341 tokens, which leave 5 over."""
    size = whole("block_size", block_size)

    def of_length(length: Amount) -> Worked:
        tokens = whole("shared_tokens", length, 0)
        full, rest = divmod(tokens, size)
        left = work("left over", f"{tokens} − {full} × {size}", rest, "tokens")
        return work("full blocks", f"⌊{tokens} / {size}⌋", full, "blocks", left_over=left)

    return for_each(shared_tokens, of_length)


def trie_tokens(prompts: Sequence[Sequence[int]]) -> Worked:
    """Tokens that must be computed once at least: the size of the prompts' trie."""
    ordered = sorted(_lists(prompts))
    total = sum(map(len, ordered))
    common = sum(_common(a, b) for a, b in pairwise(ordered))
    return work("trie tokens", f"{total} − {common} shared by neighbours in sorted order", total - common, "tokens")


def optimal_hit_rate(prompts: Sequence[Sequence[int]]) -> Worked:
    """Highest possible hit rate in percent, 1 - trie / total, reached in depth-first order: SGLang, theorem 3.1."""
    lists = _lists(prompts)
    total, trie = sum(map(len, lists)), trie_tokens(lists)
    return work("optimal hit rate", f"1 − {int(trie)} / {total}", 100 * (total - int(trie)) / total, "%", trie)


def hit_rate_with_room_for_one(prompts: Sequence[Sequence[int]]) -> Worked:
    """Hit rate in percent, in the order given, of a cache that holds the last prompt only; sorted prompts reach the
    optimum even so."""
    lists = _lists(prompts)
    total = sum(map(len, lists))
    found = sum(_common(a, b) for a, b in pairwise(lists))
    return work("hit rate in this order", f"{found} / {total}", 100 * found / total, "%")


def _lists(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts in the order given; sorted is depth-first. Raises ConfigError where there is none."""
    lists = [listed(f"prompts[{i}]", prompt) for i, prompt in enumerate(listed("prompts", prompts))]
    return [[whole("a token id", token, 0) for token in prompt] for prompt in lists]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length
