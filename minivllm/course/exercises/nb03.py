"""Notebook 03, What does the cache buy and what does it not change: the cached loop, counts, why not Q, a bug hunt."""

from collections.abc import Callable
from random import Random

from minivllm.course.calculators import token_forwards
from minivllm.course.exercises.exercise import (
    Case,
    CodeProblem,
    Exercise,
    Facts,
    Part,
    Problem,
    Slip,
    Subject,
    choice,
    named,
)
from minivllm.course.exercises.place import Place

Forward = Callable[[list[int], list[tuple[int, int]], int], int]
VOCABULARY = 997


def toy_forward(token_ids: list[int], cache: list[tuple[int, int]], first_position: int) -> int:
    """A "model" that keeps (token, position) as its K and V, and whose next token depends on all that is kept.

    Appends to the cache what is computed: toy_forward([5, 7], [], 0) leaves [(5, 0), (7, 1)].
    """
    cache.extend((token_id, first_position + i) for i, token_id in enumerate(token_ids))
    return sum((token_id + 1) * (3 * position + 7) for token_id, position in cache) % VOCABULARY


def generate(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    """Greedy tokens with a cache: the prompt once, then one token a step."""
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    for _ in range(num_new):
        num_computed = len(cache)
        token_ids.append(forward(token_ids[num_computed:], cache, num_computed))
    return token_ids[len(prompt) :]


def _recomputes(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_new):
        token_ids.append(forward(token_ids, [], 0))
    return token_ids[len(prompt) :]


def _feeds_all(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    for _ in range(num_new):
        token_ids.append(forward(token_ids, cache, 0))
    return token_ids[len(prompt) :]


def _restarts_positions(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    for _ in range(num_new):
        token_ids.append(forward(token_ids[len(cache) :], cache, 0))
    return token_ids[len(prompt) :]


def _shifts_positions(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    for _ in range(num_new):
        first = len(cache) + 1 if cache else 0
        token_ids.append(forward(token_ids[len(cache) :], cache, first))
    return token_ids[len(prompt) :]


def _feeds_last_again(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    forward(prompt, cache, 0)
    for _ in range(num_new):
        token_ids.append(forward(token_ids[-1:], cache, len(cache)))
    return token_ids[len(prompt) :]


def _recomputes_last(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    forward(prompt, cache, 0)
    for _ in range(num_new):
        token_ids.append(forward(token_ids[-1:], cache, len(token_ids) - 1))
    return token_ids[len(prompt) :]


def _returns_prompt(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    return prompt + generate(forward, prompt, num_new)


def _forgets_prompt(forward: Forward, prompt: list[int], num_new: int) -> list[int]:
    cache: list[tuple[int, int]] = []
    token_ids = list(prompt)
    for _ in range(num_new):
        token_ids.append(forward(token_ids[-1:], cache, len(token_ids) - 1))
    return token_ids[len(prompt) :]


def run_generate(subject: Subject, case: Case) -> object:
    """What was generated, and the positions in the order in which they were computed."""
    prompt, num_new = case
    assert isinstance(prompt, tuple), "cases hold the prompt as a tuple"
    positions: list[int] = []

    def forward(token_ids: list[int], cache: list[tuple[int, int]], first_position: int) -> int:
        positions.extend(range(first_position, first_position + len(token_ids)))
        return toy_forward(token_ids, cache, first_position)

    generated = subject(forward, list(prompt), num_new)
    if generated is None:
        raise NotImplementedError
    return generated, tuple(positions)


def cached_loop(random: Random, facts: Facts) -> CodeProblem:
    """The loop must give the tokens of the loop without cache, and compute every position once."""
    lengths = [(n, m) for n in (2, 3, 5, 17) for m in (2, 3, 9)]
    cases = tuple((tuple(random.randrange(1, VOCABULARY) for _ in range(n)), m) for n, m in lengths)
    wrong = {
        "nothing reused: The tokens are right, but every step computes all positions again": _recomputes,
        "whole sequence fed into a full cache: Tokens that the cache holds are computed and stored twice": _feeds_all,
        "positions restart at 0: A new token's position is the number of tokens before it": _restarts_positions,
        "positions off by one: The first new position equals the number of cached tokens, not one more":
            _shifts_positions,
        "last token of the prompt fed again: it is stored at a second position; the pass over the prompt already gives "
        "the first new token, so keep what it returns": _feeds_last_again,
        "last position computed again: the pass over the prompt has computed it, and gives the first new token; keep "
        "what it returns": _recomputes_last,
        "prompt returned: Return only what was generated": _returns_prompt,
        "prompt never computed: The first step must feed the whole prompt, the later ones one token": _forgets_prompt,
    }  # fmt: skip
    question = (
        "forward(token_ids, cache, first_position) computes these tokens, appends their K and V to the cache (a list) "
        "and returns the greedy next token. Write generate: num_new tokens, no position computed twice."
    )
    stub = "def generate(forward, prompt, num_new):\n    cache, token_ids = [], list(prompt)\n    ..."
    return CodeProblem(question, stub, generate, cases, named(wrong), run_generate)


def count_forwards(random: Random, facts: Facts) -> Problem:
    """Token-forwards without and with a cache."""
    count = random.randrange(12, 400)
    worked = token_forwards(count)
    without, cached = int(worked), int(worked.parts["cached"])
    slips = {
        "square for the sum": count * count,
        "last step left out: Step i computes i tokens, the last one all n": count * (count - 1) // 2,
        "the last step's tokens": count,
        "only one added: The sum n + (n + 1) is not that of 1 .. n": 2 * count + 1,
        "halving forgotten: Pairs that sum to n + 1, and there are n / 2 of them": count * (count + 1),
    }
    slips_cached = {
        "no cache: With one, every token is computed once": without,
        "square for the sum": count * count,
        "last token left out: Each of the n steps computes one token": count - 1,
        "first token counted twice: Each of the n steps computes one token": count + 1,
        "K and V counted apart: One forward computes both": 2 * count,
    }
    question = (
        f"Step i of n computes the next token after i tokens, i = 1 .. {count}. How many tokens go through the model "
        "in all, without a cache and with one? Give a list of two."
    )
    parts = (
        Part(without, named(slips), "token-forwards", label="without"),
        Part(cached, named(slips_cached), "token-forwards", label="with"),
    )
    return Problem(question, parts, worked.derivation, {"n": count})


def why_not_queries(random: Random, facts: Facts) -> Problem:
    """Why K and V are kept and Q is not."""
    right = "a query is used once: later tokens bring their own"
    wrong = {
        "queries are larger than keys": "Their size is not the reason; with MHA they are equally large.",
        "queries are the same for all tokens": "Each token has its own query.",
        "queries change when new tokens come": "Under a causal mask nothing about past tokens changes, queries too.",
        "queries are kept, in the same blocks": "The engine stores K and V only: see what store_kv writes.",
        "queries cannot be kept in bf16": "They are computed in the same type as keys.",
    }
    part = choice(right, wrong, random)
    return Problem("Why does the cache keep K and V but not Q?", (part,), (right,))


LINES = (
    "k, v, q = project(hidden)",
    "position = len(cache)",
    "q, k = rope(q, position), rope(k, position)",
    "cache.append((k, v))",
    "scores = [dot(q, key) * scale for key, _ in cache]",
    "out = weighted_sum(softmax(scores), [value for _, value in cache])",
)
BUGS = (
    (2, "position = 0"),
    (2, "position = max(len(cache) - 1, 0)"),
    (3, "q, k = rope(q, position), rope(k, 0)"),
    (3, "q, k = rope(q, position), k"),
    (4, "cache[:] = [(k, v)]"),
    (5, "scores = [dot(q, key) * scale for key, _ in cache[:-1]] + [0.0]"),
    (6, "out = weighted_sum(scores, [value for _, value in cache])"),
)
WHY_RIGHT = (
    "projection sees only the new token, as it should",
    "with n tokens cached, the new one has position n",
    "query and key are both turned to their position, values never",
    "the new token sees itself, so it is kept before the scores",
    "one score for each key, the new one's too",
    "weights are the softmax of the scores",
)


def find_the_bug(random: Random, facts: Facts) -> Problem:
    """One line of a decode step was changed; which?"""
    number, bug = random.choice(BUGS)
    lines = [bug if i == number else line for i, line in enumerate(LINES, 1)]
    wrong = tuple(
        Slip(f"line {i} is right", i, f"{why[0].upper()}{why[1:]}.")
        for i, why in enumerate(WHY_RIGHT, 1)
        if i != number
    )
    listing = "\n".join(f"{i}  {line}" for i, line in enumerate(lines, 1))
    question = f"One line of this decode step (one new token, one head) is wrong. Which? Give its number.\n{listing}"
    working = (f"line {number} must read: {LINES[number - 1]}",)
    return Problem(question, (Part(number, wrong),), working, {"lines": lines})


EXERCISES = (
    Exercise("03.1", "The cached decode loop", (
        "How many tokens has the cache at the start of a step? All after them are new.",
        "In the first step the whole prompt is new, in each later step the one token that was just appended.",
        "forward(token_ids[len(cache):], cache, len(cache)), and append what it returns.",
    ), Place("minivllm.engine.scheduler", "Scheduler._advance_running"), cached_loop),
    Exercise("03.2", "Count the work", (
        "Without a cache, step i computes i tokens.",
        "1 + 2 + ... + n: pair the first with the last.",
        "n (n + 1) / 2 without, n with.",
    ), Place("minivllm.course.calculators.batching", "token_forwards"), count_forwards),
    Exercise("03.3", "Why not cache Q?", (
        "Which numbers of token 3 does token 9 read?",
        "Token 9's own query meets the keys of tokens 0 .. 9.",
        "Nobody asks for an old query again.",
    ), Place("minivllm.attention.reference", "paged_attention_reference"), why_not_queries),
    Exercise("03.4", "Hunt the bug", (
        "Follow one token through the six lines. What does each line take, and what does the next one need of it?",
        "With n tokens cached the new one has position n, and its query and its key are turned by that angle.",
        "Every K and V stays in the cache, one score belongs to each key, and softmax makes weights of scores.",
    ), Place("minivllm.models.layers", "rotate"), find_the_bug),
)  # fmt: skip
