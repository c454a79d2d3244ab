"""Notebook 06, Same equation, new addresses: six puzzles about one program of the paged decode kernel."""

import math
from random import Random

from minivllm.course.calculators import accelerators, achieved_share
from minivllm.course.exercises import nb06_code
from minivllm.course.exercises.exercise import Case, CodeProblem, Exercise, Facts, Part, Problem, call, named
from minivllm.course.exercises.place import Place

SPLIT_KV = "minivllm_kernels.split_kv"
CHIPS = ("a100-80gb-sxm", "h100-sxm", "h200-sxm", "l40s")


def numbers(random: Random, count: int) -> list[float]:
    return [random.uniform(-2, 2) for _ in range(count)]


def masked_tail(random: Random, facts: Facts) -> CodeProblem:
    """Tiles that end inside the request, at its end and beyond it; garbage rows are NaN, infinite or large."""
    cases: list[Case] = [([1.0, 0.0], [[2.0, 5.0], [math.nan, 1.0]], 0, 1)]
    cases.append(([1.0, 0.0], [[2.0, 5.0], [3.0, 1.0]], 4, 6))
    for _ in range(40):
        tile, start = random.choice((2, 4, 8)), 4 * random.randrange(5)
        num_tokens = start + random.randrange(1, tile + 3)
        rows = [numbers(random, 3) for _ in range(tile)]
        for i in range(num_tokens - start, tile):
            rows[i] = [random.choice((math.nan, math.inf, 1e30))] * 3
        cases.append((numbers(random, 3), rows, start, num_tokens))
    question = (
        "masked_scores gives the dot product of q with each row of a tile of keys; the tile begins at token `start`. "
        "Tokens from num_tokens on do not exist: their rows hold garbage, NaN too, and their score is −math.inf."
    )
    stub = "def masked_scores(q, k_tile, start, num_tokens):\n    ..."
    return CodeProblem(question, stub, nb06_code.masked_scores, tuple(cases), named(nb06_code.MASK_SLIPS), call)


def indirection(random: Random, facts: Facts) -> CodeProblem:
    """Tiles within one block, at its end, and over several."""
    cases: list[Case] = []
    for tile in (1, 2, 3, 5, 8) * 8:
        size, num_blocks = random.choice((2, 4)), random.randrange(4, 7)
        cache = [[float(slot), random.uniform(-1, 1)] for slot in range(20 * size)]
        start = random.randrange(num_blocks * size - tile + 1)
        cases.append((cache, random.sample(range(20), num_blocks), size, start, tile))
    question = (
        "gather returns the rows of the cache for tokens start .. start + tile − 1 of a request. cache has one row for "
        "each slot; block_ids is the request's block table. A tile may be longer than a block."
    )
    stub = "def gather(cache, block_ids, block_size, start, tile):\n    ..."
    return CodeProblem(question, stub, nb06_code.gather, tuple(cases), named(nb06_code.GATHER_SLIPS), call)


def softmax_update(random: Random, facts: Facts) -> CodeProblem:
    """From a running state, or from nothing, over one tile."""
    cases: list[Case] = [(-math.inf, 0.0, [0.0, 0.0], [1.0], [[2.0, 4.0]])]
    for _ in range(40):
        tile = random.choice((1, 2, 4))
        total = random.uniform(0.5, 3)
        values = [numbers(random, 2) for _ in range(tile)]
        cases.append((random.uniform(-4, 4), total, numbers(random, 2), numbers(random, tile), values))
    question = (
        "online_update adds a tile to a running softmax. Given the maximum so far, the sum of exponentials, the output "
        "(not yet divided), the tile's scores and its rows of V, return the new (peak, total, output). Use math.exp."
    )
    stub = "def online_update(peak, total, output, scores, values):\n    ..."
    reference, slips = nb06_code.online_update, named(nb06_code.UPDATE_SLIPS)
    return CodeProblem(question, stub, reference, tuple(cases), slips, call)


def head_grouping(random: Random, facts: Facts) -> CodeProblem:
    """Every query head of several shapes."""
    shapes = [(9, 3), (32, 8), (14, 2), (16, 8), (8, 1), (12, 12), (28, 4)]
    cases = tuple((head, *shape) for shape in random.sample(shapes, len(shapes)) for head in range(shape[0]))
    question = "kv_head_of returns the KV head that a query head reads, with num_heads / num_kv_heads heads to a group."
    stub = "def kv_head_of(query_head, num_heads, num_kv_heads):\n    ..."
    return CodeProblem(question, stub, nb06_code.kv_head_of, cases, named(nb06_code.HEAD_SLIPS), call)


def split_merge(random: Random, facts: Facts) -> CodeProblem:
    """Two to five partial results."""
    cases: list[Case] = [([(0.0, 1.0, [1.0]), (1.0, 1.0, [3.0])],)]
    for _ in range(40):
        parts = [
            (random.uniform(-4, 4), random.uniform(0.5, 5), numbers(random, 2)) for _ in range(random.randrange(2, 6))
        ]
        cases.append((parts,))
    question = (
        "merge combines partial results of split-K: parts is a list of (m, l, o), the maximum, the sum of exponentials "
        "against it, and the output as a list, not yet divided by l. Return the output of all keys, a list."
    )
    stub = "def merge(parts):\n    ..."
    return CodeProblem(question, stub, nb06_code.merge, tuple(cases), named(nb06_code.MERGE_SLIPS), call)


def share_of_peak(random: Random, facts: Facts) -> Problem:
    """Percent of peak of a decode step's attention, measured (facts time_us) or drawn, and what indirection costs."""
    name = str(facts.get("chip", random.choice(CHIPS)))
    batch, length = random.choice((16, 32, 64)), 1024 * random.randrange(2, 9)
    kv_heads, size = random.choice((4, 8)), 128
    num_bytes = batch * length * 2 * kv_heads * size * 2
    bandwidth = accelerators()[name].bandwidth
    micros = float(f"{num_bytes / bandwidth / random.uniform(0.55, 0.93) * 1e6:.4g}")
    if "time_us" in facts:
        batch, length, kv_heads, size = (
            int(str(facts[key])) for key in ("num_requests", "num_tokens", "num_kv_heads", "head_size")
        )
        num_bytes, micros = batch * length * 2 * kv_heads * size * 2, float(str(facts["time_us"]))
    worked = achieved_share(num_bytes, micros / 1e3, name)
    answer = float(worked)
    slower, share, factor = random.randrange(15, 30), random.randrange(10, 40), random.choice((1.5, 2.0, 2.5, 3.0))
    gain = factor / (1 + slower * share / 1e4)
    slips = {
        "K only": answer / 2,
        "bits for bytes": answer * 8,
        "time upside down: rate = bytes / time": 1e4 / answer,
        "share of 1 for percent: multiply by 100": answer / 100,
        "one request": answer / batch,
        "µs taken for ms: 1 µs is 10^-6 s": answer / 1000,
        "µs taken for ns: 1 µs is 10^-6 s": answer * 1000,
    }
    slips_gain = {
        "kernel's slowdown for the step's: attention is only a part of the step": factor / (1 + slower / 100),
        "indirection forgotten: the step does get a little longer": factor,
        "gain forgotten: more requests share the step": 1 / (1 + slower * share / 1e4),
        "slowdown multiplied: a longer step gives fewer tokens a second; divide": factor * (1 + slower * share / 1e4),
        "share left over for share: the rest of the step is not slower": factor / (1 + slower * (100 - share) / 1e4),
    }
    question = (
        f"1. {batch} requests of {length:,} tokens, {kv_heads} KV heads of size {size}, bf16: decode attention of one "
        f"layer took {micros:g} µs on the chip {name} ({bandwidth / 1e9:,.4g} GB/s). Which percent of peak is "
        "that, counting K and V alone?\n"
        f"2. A paged kernel is {slower}% slower than a contiguous one, attention is {share}% of a step, and paging "
        f"admits {factor:g} times as many requests (the rest of the step stays as it is). By which factor do tokens "
        "per second change?\nGive a list of two."
    )
    working = (
        *worked.derivation,
        f"{factor:g} / (1 + {slower / 100:g} × {share / 100:g}) = {gain:.4g}",
    )
    parts = (Part(answer, named(slips), "%", label="share of peak"), Part(gain, named(slips_gain), "×", label="gain"))
    return Problem(question, parts, working, {"num_bytes": num_bytes, "time_us": micros, "chip": name})


EXERCISES = (
    Exercise("06.1", "Mask the tail", (
        "Which token does row i of the tile hold, when the tile begins at `start`?",
        "A token exists if start + i < num_tokens.",
        "Choose with if/else, as tl.where does: −math.inf where there is no token. Multiplying would keep NaN.",
    ), Place(SPLIT_KV, "attend_tiles"), masked_tail),
    Exercise("06.2", "Load through the table", (
        "Translate each token of the tile by itself: neighbours may lie in different blocks.",
        "slot = block_ids[token // block_size] * block_size + token % block_size.",
        "[cache[slot of t] for t in range(start, start + tile)]",
    ), Place(SPLIT_KV, "attend_tiles"), indirection),
    Exercise("06.3", "Update the softmax", (
        "The new maximum is the largest of the old one and the tile's scores.",
        "All that was summed against the old maximum shrinks by e^(old − new): the sum and the output.",
        "total * shrink + sum(p) and output * shrink + Σ p · v, with p = e^(score − new maximum).",
    ), Place(SPLIT_KV, "attend_tiles"), softmax_update),
    Exercise("06.4", "Group the heads", (
        "How many query heads share one KV head?",
        "group = num_heads // num_kv_heads; heads 0 .. group − 1 belong to KV head 0.",
        "query_head // group",
    ), Place("minivllm_kernels.paged_decode", "stream_kernel"), head_grouping),
    Exercise("06.5", "Merge the splits", (
        "Sums and outputs of different maxima cannot be added as they are.",
        "Take m = max m_i and scale each part's l and o by e^(m_i − m).",
        "Add the scaled outputs, add the scaled sums, divide once.",
    ), Place(SPLIT_KV, "merge_partials"), split_merge),
    Exercise("06.6", "Percent of peak, and was it worth it?", (
        "Bytes: requests × tokens × 2 (K and V) × KV heads × head size × 2.",
        "percent = 100 × bytes / seconds / peak bytes per second; 1 µs is 10^-6 s.",
        "2: the step gets 1 + slowdown × share times as long and serves `factor` times as many requests.",
    ), Place("minivllm.course.calculators.roofline", "achieved_share"), share_of_peak),
)  # fmt: skip
