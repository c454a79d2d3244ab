"""One draw of each exercise whose answer is no code, worked out by hand: answers, typical wrong ones and their names.

tests/test_exercises.py compares answers with themselves over many draws; here the arithmetic is written out once more,
without a calculator. Where a question is changed so that it draws anew, run it and work its new numbers out.
"""

import re
from typing import NamedTuple

import pytest

from minivllm.course.exercises import exercises, find
from minivllm.course.exercises.claims import CLAIMS, Claim
from minivllm.course.exercises.exercise import Facts, Part, Problem, draw

SEED = "by hand"
NOTEBOOKS = ("00", "01", "02", "03", "05", "09")


class Asked(NamedTuple):
    """A part of a problem: its answer, the unit, and each slip's answer by the slip's name."""

    answer: object
    unit: str
    slips: dict[str, object]


def ridge(tflops: float, gb_per_s: float) -> Asked:
    """FLOPs per byte: TFLOP/s are 10^12, GB/s are 10^9."""
    per_byte = tflops * 1000 / gb_per_s
    return Asked(per_byte, "FLOP/byte", {
        "ridge upside down": gb_per_s / 1000 / tflops, "sparse FLOPs": per_byte + per_byte,
        "one FLOP for a multiply-add": tflops * 500 / gb_per_s, "TB for TiB": per_byte / 1.099511627776,
        "bits for bytes": tflops * 125 / gb_per_s,
    })  # fmt: skip


def percent_less(kept: float, base: float) -> Asked:
    return Asked(100 - 100 * kept / base, "%", {
        "share for its complement": 100 * kept / base, "factor for percent": base / kept,
        "share of 1 for percent": (base - kept) / base, "latent counted twice": 100 - 200 * kept / base,
        "bits for bytes": 100 - 12.5 * kept / base,
    })  # fmt: skip


def kilo(claimed: float, num_bytes: int) -> Asked:
    return Asked(num_bytes / 1000, "kB", {
        "claim repeated": claimed, "missing factor 2": num_bytes / 2000, "KiB for kB": num_bytes / 1024,
        "one byte for K and V together": num_bytes / 4000, "unit left out": num_bytes,
    })  # fmt: skip


def giga(claimed: float, num_bytes: int) -> Asked:
    return Asked(num_bytes / 1e9, "GB", {
        "claim repeated": claimed, "missing factor 2": num_bytes / 2e9, "GiB for GB": num_bytes / 1_073_741_824,
        "one byte for K and V together": num_bytes / 4e9, "unit left out": num_bytes,
    })  # fmt: skip


CLAIMED: dict[float, Asked] = {  # by what was claimed; layers × KV heads × size × 2 (K and V) × 2 bytes × tokens
    335: giga(335, 80 * 8 * 128 * 2 * 2 * 128_000),
    1500: kilo(1500, 40 * 40 * 128 * 2 * 2),
    3: giga(3, 40 * 40 * 128 * 2 * 2 * 2048),
    10: Asked(32_768 / 576, "times", {  # 2 × 128 × 128 numbers against 512 + 64
        "claim repeated": 10, "ratio upside down": 576 / 32_768, "share for its complement": 100 - 57_600 / 32_768,
        "percent for a factor": 3_276_800 / 576, "missing factor 2": 16_384 / 576,
    }),
    55: giga(55, 100 * 576 * 2 * 131_072),
}  # fmt: skip
CB, BW, OH = "compute", "bandwidth", "overhead"

BY_HAND: dict[str, tuple[tuple[str, ...], tuple[Asked, ...]]] = {
    "00.1": (("24.75 GiB",), (
        Asked(26.575110144, "GB", {  # × 1.073741824
            "GB for GiB": 24.75, "divided instead of multiplied": 24.75 / 1.073741824, "bits for bytes": 212.600881152,
            "one step of 1024 only": 25.344, "unit left out": 26_575_110_144,
        }),
    )),
    "00.2": (("708", "32", "23,040"), (
        Asked(22_624, "tokens", {  # 707 × 32
            "null block counted": 22_656, "blocks for slots": 707, "bytes for tokens": 521_256_960,
            "two blocks too few": 22_592, "divided by the block size": 22.09375,
        }),
    )),
    "00.3": (("31", "0.831", "40", "4.107"), (
        Asked(84, "ms", {  # 3276 ms / 39
            "first token's time counted": 102.675, "one token too many": 81.9, "tokens per second": 39 / 3.276,
            "unit left out": 0.084, "prompt counted": 46.8,  # 4107 / 40, 3276 / 40, 3276 / (39 + 31)
        }),
    )),
    "00.4": (("live: recorded",), (
        Asked("replay of a recorded run", "", {f"“{name}”": name for name in (
            "live on a GPU", "Triton kernel, interpreted on the CPU", "torch on the CPU", "a simulation",
            "live on a TPU")}),
    )),
    "01.1": (("a10g: 70 TFLOP/s", "600 GB/s", "h100-sxm: 989", "3,350", "a100-40gb-sxm: 312", "1,555"), (
        ridge(70, 600), ridge(989, 3350), ridge(312, 1555),
    )),
    "01.2": (("a10g", "116.7"), (
        Asked(175 / 3, "tokens", {  # 70e12 / 600e9 = 350 / 3 FLOP a byte; 2 FLOPs and 1 byte for each weight
            "bf16 weights": 350 / 3, "int8 products": 700 / 3, "halved twice": 175 / 6, "ridge upside down": 3 / 175,
            "bits for bytes": 1400 / 3,
        }),
    )),
    "01.3": (("[384, 1024] × [1024, 3072]",), (
        # 384 × 1024 = 3/8 Mi, 1024 × 3072 = 3 Mi, 384 × 3072 = 9/8 Mi numbers, 9/2 Mi in all; 2304 Mi FLOPs
        Asked(256, "FLOP/byte", {
            "activations forgotten": 384, "one FLOP for a multiply-add": 128, "one byte for each number": 512,
            "output forgotten": 2304 / (2 * 27 / 8), "bits for bytes": 32,
        }),
    )),
    "01.4": (("llama-2-7b", "6,738,415,616", "l4", "300 GB/s", "121 TFLOP/s"), (
        Asked(13.476831232 / 0.3, "ms", {
            "one byte for each number": 6.738415616 / 0.3, "compute instead of memory": 13.476831232 / 121,
            "unit left out": 0.013476831232 / 0.3, "bits for bytes": 107.814649856 / 0.3,
            "GiB for GB": 13.476831232 / 0.3221225472,
        }),
    )),
    "01.5": (("1. attention of 256", "2. decode of 32", "3. decode of 4", "4. decode of one request, 135M",
              "5. prefill of one", "6. prefill of 64"), (
        Asked((BW, BW, OH, OH, CB, CB), "", {
            "compute and bandwidth swapped": (CB, CB, OH, OH, BW, BW), "overhead overlooked": (BW, BW, BW, BW, CB, CB),
            "batch moves attention": (CB, BW, OH, OH, CB, CB), "everything bound by bandwidth": (BW,) * 6,
            "every decode bound by overhead": (OH, OH, OH, OH, CB, CB),
            "memory for bandwidth": ("memory", "memory", OH, OH, CB, CB),
        }),
    )),
    "02.1": (("71", "6", "2", "64", "384", "fp8"), (
        Asked(18_176, "bytes", {  # 2 × 71 layers × 2 KV heads × 64, 1 byte each
            "query heads": 54_528, "missing factor 2": 9_088, "layers forgotten": 256, "bits for bytes": 145_408,
            "unit left out": 17.75,
        }),
    )),
    "02.2": (("512 + 64", "60 layers", "95 layers", "8 KV heads", "6 bits"), (
        percent_less(576, 2 * 128 * 128), percent_less(60 * 576, 95 * 2 * 8 * 128),
        percent_less(60 * 576 * 6, 95 * 2 * 8 * 128 * 16),
    )),
    "02.3": (("80", "128", "28", "229,376"), (
        Asked(16, "KV heads", {  # 2 × 28 layers × 128 × 2 bytes = 14,336 bytes for each head
            "query heads": 80, "missing factor 2": 32, "one byte for each number": 64, "layers forgotten": 448,
            "bits for bytes": 256,
        }),
    )),
    "02.4": (("llama-3.2-1b, qwen2.5-72b, llama-3-8b, smollm2-135m, tinyllama-1.1b, llama-2-7b",), (
        # layers × KV heads × size: 32 32 128, 80 8 128, 32 8 128, 16 8 64, 30 3 64, 22 4 64; equals by their names
        Asked(("llama-2-7b", "qwen2.5-72b", "llama-3-8b", "llama-3.2-1b", "smollm2-135m", "tinyllama-1.1b"), "", {
            "ranked by parameters":
                ("qwen2.5-72b", "llama-3-8b", "llama-2-7b", "llama-3.2-1b", "tinyllama-1.1b", "smollm2-135m"),
            "query heads":
                ("qwen2.5-72b", "llama-2-7b", "llama-3-8b", "tinyllama-1.1b", "llama-3.2-1b", "smollm2-135m"),
            "upside down":
                ("tinyllama-1.1b", "smollm2-135m", "llama-3.2-1b", "llama-3-8b", "qwen2.5-72b", "llama-2-7b"),
            "ranked by layers":
                ("qwen2.5-72b", "llama-2-7b", "llama-3-8b", "smollm2-135m", "tinyllama-1.1b", "llama-3.2-1b"),
            "layers forgotten":
                ("llama-2-7b", "llama-3-8b", "qwen2.5-72b", "llama-3.2-1b", "tinyllama-1.1b", "smollm2-135m"),
        }),
    )),
    "02.5": (("335 GB", "10 times", "3 GB", "1,500 kB"), (CLAIMED[335], CLAIMED[10], CLAIMED[3], CLAIMED[1500])),
    "03.2": (("19",), (
        Asked(190, "token-forwards", {
            "square for the sum": 361, "last step left out": 171, "the last step's tokens": 19, "only one added": 39,
            "halving forgotten": 380,
        }),
        Asked(19, "token-forwards", {
            "no cache": 190, "square for the sum": 361, "last token left out": 18, "first token counted twice": 20,
            "K and V counted apart": 38,
        }),
    )),
    "03.3": ((), (
        Asked("a query is used once: later tokens bring their own", "", {f"“{words}”": words for words in (
            "queries are larger than keys", "queries are the same for all tokens",
            "queries change when new tokens come", "queries are kept, in the same blocks",
            "queries cannot be kept in bf16")}),
    )),
    "03.4": (("3  q, k = rope(q, position), rope(k, 0)", "2  position = len(cache)"), (
        Asked(3, "", {f"line {i} is right": i for i in (1, 2, 4, 5, 6)}),
    )),
    "05.1": (("[17, 1, 37, 15, 19]", "[3, 6, 8, 9, 18, 21, 27, 29, 30, 39]"), (
        Asked((139, 142, 8, 9, 298, 301, 123, 125, 126, 159), "slots", {  # 17 × 8 = 136, 8, 296, 120, 152
            "logical block for physical": (3, 6, 8, 9, 18, 21, 27, 29, 30, 39),
            "offset forgotten": (136, 136, 8, 8, 296, 296, 120, 120, 120, 152),
            "block forgotten": (3, 6, 0, 1, 2, 5, 3, 5, 6, 7),
            "block for slot": (17, 17, 1, 1, 37, 37, 15, 15, 15, 19),
            "counted from one": (140, 143, 9, 10, 299, 302, 124, 126, 127, 160),
            "next block": (11, 14, 296, 297, 122, 125, 155, 157, 158, 143),
        }),
    )),
    "05.5": (("A: a prompt of 57", "26", "B: a prompt of 73", "21", "C: a prompt of 72", "22", "D: a prompt of 5", "6",
              "C finished"), (
        Asked(25, "blocks", {  # ⌈83 / 8⌉ + ⌈94 / 8⌉ + ⌈11 / 8⌉ = 11 + 12 + 2; C's 94 tokens had 12
            "all tokens pooled": 24, "rounded down": 22, "finished request counted": 37, "prompts only": 19,
            "one block too many": 28, "slots for blocks": 188,
        }),
    )),
    "05.6": (("5  A frees block 3", "6  A frees block 3"), (
        Asked(6, "", {f"line {i} is right": i for i in (1, 2, 3, 4, 5, 7, 8)}),
    )),
    "09.1": (("[28, 3, 11, 10, 27, 5]", "2"), (
        Asked(66, "steps", {  # 28 + 11 + 27
            "one after the other": 84, "longest of all": 28, "refilled seats": 51, "shortest of each batch": 18,
            "evenly spread": 42,
        }),
        Asked(51, "steps", {  # one seat: 28, then 5; the other: 3, 11, 10, 27, which end at 3, 14, 24, 51
            "one after the other": 84, "batch by batch": 66, "longest of all": 28, "evenly spread": 42,
            "one seat more": 38,  # 28 | 3, 10, 5 | 11, 27
        }),
    )),
    "09.2": (("2.5", "50", "15"), (
        Asked(1.875, "requests", {  # 2.5 × 50 × 0.015 s
            "milliseconds for seconds": 1875, "divided instead of multiplied": 10 / 3, "outputs forgotten": 0.0375,
            "rate forgotten": 0.75, "steps for seconds": 125, "half of it": 0.9375,
        }),
    )),
    "09.3": (("96", "32", "805", "253"), (
        Asked(32, "requests", {  # 253 tokens take 16 blocks, 805 blocks hold 50 such requests
            "seats alone": 96, "pool alone": 50, "blocks for requests": 805, "tokens for blocks": 3, "added up": 178,
        }),
    )),
}  # fmt: skip

WHY = {  # a word that stands in the explanation of that slip, and of no other
    "00.1": {"divided instead of multiplied": "smaller", "one step of 1024 only": "three steps", "GB for GiB": "7.4%"},
    "00.4": {"“live on a GPU”": "says cuda", "“Triton kernel, interpreted on the CPU”": "TRITON_INTERPRET",
             "“torch on the CPU”": "attention: torch", "“a simulation”": "simulated", "“live on a TPU”": "CUDA GPUs"},
    "03.3": {"“queries are larger than keys”": "size", "“queries are the same for all tokens”": "own query",
             "“queries change when new tokens come”": "mask", "“queries are kept, in the same blocks”": "K and V only",
             "“queries cannot be kept in bf16”": "type"},
    "03.4": {"line 1 is right": "projection", "line 2 is right": "has position n", "line 4 is right": "sees itself",
             "line 5 is right": "one score", "line 6 is right": "softmax"},
    "05.5": {"all tokens pooled": "its own last block", "finished request counted": "gave its blocks back",
             "prompts only": "decode step", "slots for blocks": "divide"},
    "05.6": {"line 1 is right": "B takes block 1", "line 3 is right": "A takes block 3",
             "line 5 is right": "A frees block 3", "line 8 is right": "B takes block 6"},
}  # fmt: skip


WORKING = {
    "00.1": "26,575,110,144 B", "00.2": "22,624 tokens", "00.4": "replay of a recorded run", "02.2": "= 82.2%",
    "03.4": "line 3 must read: q, k = rope(q, position), rope(k, position)", "05.1": "126, 159]",
    "05.5": "sum: 25 blocks", "05.6": "line 6: A frees block 3",
}  # fmt: skip


def numbers_only(id_: str, facts: Facts) -> Problem:
    problem = draw(find(id_), SEED, facts)
    assert isinstance(problem, Problem)
    return problem


def assert_same(part: Part, asked: Asked) -> None:
    assert part.unit == asked.unit
    assert is_same(part.answer, asked.answer), (part.answer, asked.answer)
    found = {slip.name: slip.answer for slip in part.slips}
    assert set(found) == set(asked.slips)
    wrong = {name: (found[name], value) for name, value in asked.slips.items() if not is_same(found[name], value)}
    assert wrong == {}, "the exercise's, and by hand"


def is_same(one: object, other: object) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == pytest.approx(other, rel=1e-9)
    return one == other


def test_every_exercise_without_code_is_worked_out() -> None:
    drawn = {id_: draw(find(id_), SEED, {}) for id_ in exercises() if id_[:2] in NOTEBOOKS}
    assert set(BY_HAND) == {id_ for id_, problem in drawn.items() if isinstance(problem, Problem)}


@pytest.mark.parametrize("id_", BY_HAND)
def test_answers_and_slips_are_those_worked_out_by_hand(id_: str) -> None:
    problem, (shown, parts) = numbers_only(id_, {}), BY_HAND[id_]
    for told in shown:
        assert re.search(rf"(?<![\w.]){re.escape(told)}(?!\w|[.,]\d)", problem.question), told
    for part, asked in zip(problem.parts, parts, strict=True):
        assert_same(part, asked)


@pytest.mark.parametrize("id_", WORKING)
def test_the_working_ends_where_ours_does(id_: str) -> None:
    assert WORKING[id_] in "\n".join(numbers_only(id_, {}).working)


@pytest.mark.parametrize(("id_", "name"), [(id_, name) for id_, words in WHY.items() for name in words])
def test_the_explanation_of_a_slip_is_its_own(id_: str, name: str) -> None:
    [part] = numbers_only(id_, {}).parts
    told = WHY[id_][name]
    named = [slip.name for slip in part.slips if told.lower() in slip.why.lower()]
    assert named == [name], told


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.claimed}{claim.unit}")
def test_each_published_claim_is_set_right(claim: Claim) -> None:
    assert_same(claim.part(), CLAIMED[claim.claimed])


def test_facts_of_a_run_are_worked_with() -> None:
    """An engine of 24 blocks of 8; 11 tokens in 1.5 s, the first after 0.5 s; a card that says torch."""
    pool = {"num_blocks": 24, "block_size": 8, "kv_bytes_per_token": 1000}
    assert_same(numbers_only("00.2", pool).parts[0], Asked(184, "tokens", {
        "null block counted": 192, "blocks for slots": 23, "bytes for tokens": 184_000, "two blocks too few": 176,
        "divided by the block size": 2.875,
    }))  # fmt: skip
    run = {"first_s": 0.5, "total_s": 1.5, "num_prompt": 15, "num_new": 11}
    assert_same(numbers_only("00.3", run).parts[0], Asked(100, "ms", {
        "first token's time counted": 1500 / 11, "one token too many": 1000 / 11, "tokens per second": 10,
        "unit left out": 0.1, "prompt counted": 40,
    }))  # fmt: skip
    card = numbers_only("00.4", {"mode": "torch on the CPU", "card": "device: cpu; attention: torch"})
    assert card.parts[0].answer == "torch on the CPU" and "device: cpu; attention: torch" in card.question
