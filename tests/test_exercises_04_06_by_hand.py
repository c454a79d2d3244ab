"""One draw of every exercise of notebooks 04 and 06, worked by hand: answers and slips as literal numbers."""

import math
from collections.abc import Mapping, Sequence

import pytest

from minivllm.course.exercises import find
from minivllm.course.exercises.compare import agrees
from minivllm.course.exercises.exercise import Case, CodeProblem, Problem, draw
from minivllm.course.judge import judge
from minivllm.course.learner_code import outcome

INF = math.inf
NUMBERS: Mapping[str, tuple[str, Sequence[tuple[object, Sequence[object]]]]] = {  # what the question says; the parts
    "04.1": (  # 9 × 1,536 = 13,824; 15,349 − 13,824 = 1,525
        "A pool of 15,349 slots; every request reserves max_model_len = 1,536 slots",
        [
            (9, [9.99283854, 10, 1525, 8, 959]),
            (9.93550068, [90.06449932, 99.28385417, 1525.0, 0.0993550068, 11.03153935]),
        ],
    ),
    "04.2": (  # 20.5 × 1,073,741,824 = 22,011,707,392; / 327,680 = 67,174.4
        "20.5 GiB are left for K and V, and a token takes 327,680 bytes",
        [(67_174, [62_561, 67_175, 33_587, 537_392, 4_198])],
    ),
    "04.4": (  # 0.447 × 13,447 = 6,010.809
        "44.7% of a pool of 13,447 slots is live while 9 requests run",
        [(667.8676667, [826.2434444, 6010.809, 1494.111111, 66786.76667, 3342.53045])],
    ),
    "04.5": (  # 1.05 × 645.5 − 630 = 47.775
        "over 630 − s .. 630 + s tokens. Contiguous memory reserves 630 + s for each request; paging with blocks of 32",
        [(47, [31, 65, 94, 677, 32])],
    ),
    "06.6": (  # 32 × 4,096 × 4,096 B = 536,870,912 B in 276.9 µs: 1,938.862 GB/s; 3 / (1 + 0.29 × 0.18) = 3 / 1.0522
        "32 requests of 4,096 tokens, 8 KV heads of size 128, bf16: decode attention of one layer took 276.9 µs on the "
        "chip h100-sxm (3,350 GB/s)",
        [
            (57.8764802, [28.9382401, 463.0118418, 172.781758, 0.578764802, 1.80864001, 0.0578764802, 57876.4802]),
            (2.85116898, [2.32558140, 3.0, 0.95038966, 3.1566, 2.42365487]),
        ],
    ),
}
ROWS = [[float(slot)] for slot in range(12)]
CODE: Sequence[tuple[str, Case, object, Sequence[object]]] = [  # a case, the answer, what each slip gives instead
    ("04.3", (16, 3), range(4), [
        range(4), range(4), range(16), range(4), range(4), range(2), range(3), range(3), range(12, 16),
    ]),
    ("04.3", (16, 4, 4), range(4, 8), [
        range(4, 8), range(4, 8), None, range(8, 12), range(4, 8), range(4, 8), range(4, 8), range(4, 8), range(8, 12),
    ]),
    ("04.3", (16, 4, 4, -1, -2, 16), range(16), [
        None, None, range(16), range(16), None, range(16), range(16), range(16), range(16),
    ]),
    ("04.3", (8, 2, 2, 2, 2, -3, -2, 4), None, [
        None, None, None, None, range(2, 6), None, None, None, None,
    ]),
    ("04.3", (16, 3, -1, 16), range(16), [
        None, None, range(16), range(16), range(16), range(16), None, range(16), range(16),
    ]),
    # q · k = 1 × 3 + 2 × 4 = 11, 17, 23; the tile's rows are tokens 2 to 5, and the request has three
    ("06.1", ([1.0, 2.0], [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [INF, 0.0]], 2, 3), [11, -INF, -INF, -INF], [
        [11, 17, 23, INF], [11, 0, 0, 0], [11, 17, -INF, -INF], [11, 17, 23, -INF], [11, 0, 0, math.nan],
        [7.77817459, -INF, -INF, -INF],
    ]),
    # tokens 3, 4, 5 in blocks 2, 0, 0 of 4 slots: slots 2 × 4 + 3, 0, 1
    ("06.2", (ROWS, [2, 0, 1], 4, 3, 3), [[11], [0], [1]], [
        [[3], [4], [5]], [[11]], [[8], [0], [0]], [[8], [9], [10]], [[5], [0], [1]],
    ]),
    # from maximum 0 to ln 2: the old sum and output are halved
    ("06.3", (0.0, 1.0, [2.0], [math.log(2)], [[4.0]]), [0.693147181, 1.5, [5]], [
        [0.693147181, 2, [5]], [0.693147181, 1.5, [6]], [0.693147181, 2, [6]], [0.693147181, 1.5, [5]],
        [0.693147181, 1.5, [5]], [0.693147181, 1.5, [3.33333333]],
    ]),
    # the maximum stays at ln 4: the new term is a half
    ("06.3", (math.log(4), 1.0, [2.0], [math.log(2)], [[4.0]]), [1.38629436, 1.5, [4]], [
        [1.38629436, 1.5, [4]], [1.38629436, 1.5, [4]], [1.38629436, 1.5, [4]], [1.38629436, 2, [6]],
        [0.693147181, 1.5, [4]], [1.38629436, 1.5, [2.66666667]],
    ]),
    ("06.4", (6, 8, 2), 1, [0, 6, 3, 2, 0]),
    # scales 1/2 and 1: (0.5 + 9) / (0.5 + 3)
    ("06.5", ([(0.0, 1.0, [1.0]), (math.log(2), 3.0, [9.0])],), [2.71428571], [
        [2.5], [2], [2.2], [9.5], [2.375], [7.85714286], [6.33333333], [2.65814420],
    ]),
]  # fmt: skip


@pytest.mark.parametrize("id_", NUMBERS)
def test_notebook_04_and_06_by_hand(id_: str) -> None:
    problem, (words, parts) = draw(find(id_), "by hand", {}), NUMBERS[id_]
    assert isinstance(problem, Problem) and words in problem.question, "drawn anew: work its numbers out again"
    for part, (answer, slips) in zip(problem.parts, parts, strict=True):
        assert agrees(answer, part.answer, 1e-8) and type(answer) is type(part.answer)
        assert agrees(slips, [slip.answer for slip in part.slips], 1e-8)


def test_what_is_left_over_may_be_given_to_one_decimal() -> None:
    for seed in map(str, range(60)):
        problem = draw(find("04.1"), seed, {})
        assert isinstance(problem, Problem)
        fit, left = (float(str(part.answer)) for part in problem.parts)
        for given in (round(left, 1), f"{left:.1f}%", f"{left:.2f}"):
            assert judge(problem, [int(fit), given]).state == "right", (left, given)
        assert judge(problem, [int(fit), round(left + 0.2, 1)]).state == "wrong" or left > 15


@pytest.mark.parametrize(("id_", "case", "answer", "slips"), CODE)
def test_functions_of_notebook_04_and_06_by_hand(id_: str, case: Case, answer: object, slips: list[object]) -> None:
    problem = draw(find(id_), "by hand", {})
    assert isinstance(problem, CodeProblem)
    got = [outcome(problem, problem.reference, case)]
    for slip in problem.slips:
        assert callable(slip.answer)
        got.append(outcome(problem, slip.answer, case))
    values = [found.value[f"take({case[-1]})"] if isinstance(found.value, dict) else found.value for found in got]
    assert [found.error for found in got] == [""] * len(got)
    for wanted, value in zip((answer, *slips), values, strict=True):
        assert agrees(wanted, value, 1e-8), (wanted, value)
