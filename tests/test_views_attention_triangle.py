"""The attention triangle: its cells and counters follow from the steps that the engine's events tell."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import PreTrainedModel

from minivllm import LLM
from minivllm.course.calculators import token_forwards
from minivllm.errors import MiniVLLMError
from minivllm.lab.uncached import at_once, cached, uncached
from minivllm.trace import Trace
from minivllm.views.attention_triangle import LEFT, AttentionTriangle, Count, Pass
from minivllm.views.sketch import WIDTH_PX, Box, Words
from tests.view_traces import HOSTILE, ran

WITH, WITHOUT, ONCE = "with the cache", "without a cache", "all at once"


def run_of(*steps: tuple[int, int]) -> Trace:
    """A hand-made run: (new tokens, keys) of each step."""
    return Trace({"model": "hand-made"}, [ran(i, ("a", *step)) for i, step in enumerate(steps, 1)])


def three_ways(num_tokens: int) -> dict[str, Trace]:
    steps = range(1, num_tokens + 1)
    return {
        WITH: run_of(*((1, i) for i in steps)),
        WITHOUT: run_of(*((i, i) for i in steps)),
        ONCE: run_of((num_tokens, num_tokens)),
    }


def triangle(num_tokens: int = 19) -> AttentionTriangle:
    return AttentionTriangle(three_ways(num_tokens), [f"t{i}" for i in range(num_tokens)])


def counts(view: AttentionTriangle) -> dict[str, Count]:
    return {count.name: count for count in view.drawn()["counts"]}


def cells(view: AttentionTriangle) -> list[Box]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Box) and mark.words.startswith("query")]


def test_engine_run_with_and_without_reuse_draws_190_against_19(
    reference_model: Callable[[str], tuple[Path, PreTrainedModel]],
) -> None:
    llm = LLM(reference_model("llama-gqa")[0], dtype="float32", num_blocks=20, enable_prefix_caching=False)
    reused, without = cached(llm, [7], 19), uncached(llm, [7], 19)
    runs = {WITH: reused.trace, WITHOUT: without.trace, ONCE: at_once(llm, reused.token_ids[:-1]).trace}
    view = AttentionTriangle(runs, [str(token_id) for token_id in reused.token_ids])
    found = {name: count.num_forwards for name, count in counts(view).items()}
    assert found == {WITH: reused.num_token_forwards, WITHOUT: without.num_token_forwards, ONCE: 19}
    assert found[WITHOUT] == int(token_forwards(19)) == 190 and found[WITH] == 19


@pytest.mark.parametrize("step", [1, 2, 11, 19])
def test_step_moves_the_counters_of_all_runs(step: int) -> None:
    view = triangle()
    view.move("step", step)
    now = counts(view)
    assert now[WITH].num_forwards == step and now[WITHOUT].num_forwards == step * (step + 1) // 2
    assert now[WITHOUT].num_first == step and now[WITHOUT].num_again == step * (step - 1) // 2
    assert now[WITH].num_scores == step * (step + 1) // 2
    assert now[WITHOUT].num_scores == step * (step + 1) * (step + 2) // 6
    assert now[ONCE].num_forwards == 19
    picture = view.drawn()
    assert picture["steps"] == (1, 19, step) and picture["title"].startswith(f"Step {step}, {WITH}")
    assert f"meets {step} key" in picture["title"]
    assert f"{WITH} {step}; {WITHOUT} {step * (step + 1) // 2}; {ONCE} 19." in picture["title"]


def test_run_changes_which_cells_are_reused_and_which_computed_again() -> None:
    view = triangle(4)
    assert view.drawn()["rows"] == [".", "..", "...", "rrrN"]
    view.move("run", WITHOUT)
    assert view.drawn()["rows"] == ["X", "XX", "XXX", "XXXN"]
    assert "(3 again)" in view.drawn()["title"] and "none from the cache" in view.drawn()["title"]
    view.move("run", ONCE)
    assert view.drawn()["rows"] == ["N", "NN", "NNN", "NNNN"] and view.drawn()["steps"] == (1, 1, 1)
    view.move("run", WITH)
    assert view.drawn()["step"] == 4  # the step that was chosen before comes back
    view.flush()
    assert view.picture["rows"] == view.drawn()["rows"] and view.picture["status"] == ""
    view.close()


def test_runs_are_compared_where_they_have_the_same_tokens() -> None:
    view = triangle()
    view.move("step", 7)
    assert {name: count.num_forwards for name, count in counts(view).items()} == {WITH: 7, WITHOUT: 28, ONCE: 19}
    view.move("run", ONCE)
    assert {name: count.num_forwards for name, count in counts(view).items()} == {WITH: 19, WITHOUT: 190, ONCE: 19}


def test_prompt_in_chunks_reuses_what_earlier_chunks_stored() -> None:
    view = AttentionTriangle({WITH: run_of((3, 3), (2, 5), (1, 6))}, "abcdef")
    assert view.drawn()["rows"][5] == "rrrrrN"
    view.move("step", 2)
    assert view.drawn()["rows"] == [".", "..", "...", "rrrN", "rrrNN"]
    view.move("step", 1)
    assert view.drawn()["rows"] == ["N", "NN", "NNN"]


def test_preempted_request_computes_again_what_it_had_lost() -> None:
    view = AttentionTriangle({WITH: run_of((2, 2), (1, 3), (4, 4), (1, 5))}, "abcde")
    view.move("step", 3)
    assert view.drawn()["rows"] == ["X", "XX", "XXX", "XXXN"]
    assert counts(view)[WITH] == Count(WITH, 4, 3, 3 + 3 + 10, 8)


@pytest.mark.parametrize("each", [Pass(1, 7, 6), Pass(7, 7, 6), Pass(3, 7, 4), Pass(7, 7, 0)])
def test_letters_agree_with_the_counts(each: Pass) -> None:
    rows = ["".join(each.letter(query, key) for key in range(query + 1)) for query in range(each.num_keys)]
    assert sum(len(row) - row.count(".") for row in rows) == each.num_scores
    assert rows[-1].count("X") == each.num_again and rows[-1].count("r") == each.first
    assert rows[-1].count("N") == each.num_new - each.num_again


def test_click_on_a_row_goes_to_the_step_that_first_computed_it() -> None:
    view = triangle(6)
    view.move("run", WITHOUT)
    control, value = next(cell.click for cell in cells(view) if cell.words.startswith("query 2")) or ("", 0)
    view.move(control, value)
    assert view.drawn()["step"] == 3 and len(view.drawn()["rows"]) == 3


def test_kinds_differ_in_colour_and_in_pattern() -> None:
    view = triangle(5)
    drawn = {(cell.fill, cell.pattern) for cell in cells(view)}
    view.move("run", WITHOUT)
    drawn |= {(cell.fill, cell.pattern) for cell in cells(view)}
    assert len(drawn) == 4 and len({pattern for _, pattern in drawn}) == 3
    assert {(key.fill, key.pattern) for key in view.drawn()["legend"]} <= drawn


@pytest.mark.parametrize("num_tokens", [1, 2, 19, 40])
def test_every_size_stays_within_the_picture_and_apart_from_the_counters(num_tokens: int) -> None:
    view = triangle(num_tokens)
    view.move("run", ONCE)
    picture = view.drawn()
    bars = [m for m in picture["marks"] if isinstance(m, Box) and "token-forward" in m.words]
    for mark in [*cells(view), *bars]:
        assert mark.x >= 0 and mark.x + mark.width <= WIDTH_PX and mark.y + mark.height <= picture["height"]
    for bar in bars:
        assert not any(c.x + c.width > bar.x and c.y < bar.y + bar.height for c in cells(view))
    assert all(mark.y + mark.size <= picture["height"] for mark in picture["marks"] if isinstance(mark, Words))
    assert min(cell.x for cell in cells(view)) == LEFT


def test_token_texts_travel_as_plain_strings_and_spaces_can_be_seen() -> None:
    view = AttentionTriangle({WITH: run_of((2, 2), (1, 3))}, [HOSTILE, " a\n", "b"])
    picture = json.loads(json.dumps(view.drawn()))
    assert any("<img" in mark[7] for mark in picture["marks"] if mark[-1] == "box")  # the kit writes textContent
    assert "␣a⏎" in picture["text"]


@pytest.mark.parametrize(
    ("control", "value"), [("step", 0), ("step", 20), ("step", True), ("run", "x"), ("x", 1), ("run", None)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as error:
        triangle().move(control, value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("runs", "texts", "words"),
    [({}, [], "one run"), ({WITH: Trace()}, "abc", "nothing ran"), (three_ways(41), "a" * 41, "at most"),
     (three_ways(4), "abc", "all 4 tokens"),
     ({WITH: Trace({}, [ran(1, ("a", 1, 1), ("b", 1, 1))])}, "ab", "several requests")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_in_one_line(runs: dict[str, Trace], texts: str, words: str) -> None:
    with pytest.raises(MiniVLLMError, match=words) as error:
        AttentionTriangle(runs, texts)
    assert "\n" not in str(error.value)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [triangle()._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "rrrrrrrrrrrrrrrrrrN" in text and "190" in text and "1,330" in text
    image = triangle().image()
    assert isinstance(image, Image.Image) and image.width > 1400 and len(image.getcolors(1 << 24) or []) > 20
