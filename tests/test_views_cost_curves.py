"""What the table costs: the measured rows, and curves that show them under every control."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from minivllm.course.calculators import achieved_share, amdahl_speedup
from minivllm.course.exercises import find
from minivllm.course.exercises.exercise import Problem, draw
from minivllm.course.paging_cost import RECORDING, CostRow, PagingCost, net_gain
from minivllm.errors import MiniVLLMError
from minivllm.views.cost_curves import (
    ALONG,
    BOTTOM,
    CURVES,
    FACTORS,
    LEFT,
    RIGHT,
    SHARES,
    SHOWN,
    TOP,
    CostCurves,
    percent,
)
from minivllm.views.sketch import Dot, Line, Slider

COST = PagingCost.load()


def small() -> PagingCost:
    """Four rows that are easy to reckon with."""
    rows = [
        CostRow("plain", "contiguous", 0, 4, 100, 10.0, 9.0, 11.0, 100.0, 1e-3, "aa", 0.5),
        CostRow("plain", "scattered", 8, 4, 100, 12.5, 12.0, 13.0, 80.0, 1e-3, "aa", 0.4),
        CostRow("plain", "scattered", 16, 4, 100, 11.0, 10.0, 12.0, 90.9, 1e-3, "aa", 0.4545),
        CostRow("engine", "scattered", 16, 4, 100, 9.0, 8.0, 10.0, 111.1, 1e-3, "bb", 0.5555),
    ]
    shape = {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": "bfloat16"}
    return PagingCost(tuple(rows), shape, 200.0, {"gpu": "NVIDIA H200"})


def test_the_recording_is_of_an_h200_and_whole() -> None:
    assert COST.gpu == "NVIDIA H200" and COST.chip == "h200-sxm"
    assert {"machine", "commit", "seed", "command", "torch", "triton"} <= set(COST.facts)
    assert "TEMPORARY" not in RECORDING.read_text()
    assert COST.batches == [1, 8, 64] and COST.block_sizes == [1, 8, 16, 32, 64, 128, 256]
    points = {(batch, context) for batch in COST.batches for context in COST.contexts(batch)}
    assert len(points) == 15 and {context for _, context in points} == {256, 1024, 4096, 16384, 65536}
    for batch, context in points:
        assert all(COST.find("plain", "scattered", batch, context, size) for size in COST.block_sizes)
        assert all(COST.find("engine", "scattered", batch, context, size) for size in COST.block_sizes[1:])
        assert COST.find("plain", "contiguous", batch, context) and COST.find(
            "SDPA cuDNN", "contiguous", batch, context
        )
    assert all(row.low_us <= row.us <= row.high_us and row.error < 0.01 for row in COST.rows)
    text = json.loads(RECORDING.read_text())
    assert text["roofs"]["spread"] < 0.03


def test_recorded_rates_follow_from_bytes_and_times() -> None:
    """K and V of 8 heads, q and out of 32 heads, of size 128 in bf16."""
    for row in COST.rows:
        num_bytes = 4 * row.batch * 128 * (row.context * 8 + 32)
        assert row.gbps == pytest.approx(num_bytes / row.us / 1e3, rel=0.01)
        assert row.share == pytest.approx(row.gbps / COST.copy_gbps, abs=2e-4)


def test_one_kernel_gave_the_same_bits_for_every_layout_at_every_point() -> None:
    assert [layouts for _, _, layouts in COST.same_bits("plain")] == [11] * 15  # 7 scattered, 3 in order, contiguous
    changed = replace(COST, rows=(replace(COST.rows[0], bits="another"), *COST.rows[1:]))
    assert len(changed.same_bits("plain")) == 14


def test_overhead_is_against_the_same_kernel_on_contiguous_keys() -> None:
    cost = small()
    assert cost.overhead(cost.row("plain", "scattered", 4, 100, 8)) == pytest.approx(0.25)
    assert cost.overhead(cost.row("engine", "scattered", 4, 100, 16)) == pytest.approx(-0.1)
    assert cost.overhead(cost.row("plain", "contiguous", 4, 100)) == 0


def test_net_gain_is_amdahls_law_times_the_requests() -> None:
    for extra, share, factor in ((0.25, 0.2, 2.0), (0.2, 0.4, 1.8), (0.0, 1.0, 1.0)):
        wanted = factor * float(amdahl_speedup(share, 1 / (1 + extra)))
        assert net_gain(extra, share, factor) == pytest.approx(wanted)


def test_a_row_feeds_exercise_06_6() -> None:
    row = COST.row("plain", "scattered", 8, 16384, 16)
    problem = draw(find("06.6"), "x:0", COST.exercise_facts(row))
    assert isinstance(problem, Problem)
    wanted = achieved_share(8 * 16384 * 2 * 8 * 128 * 2, row.us / 1e3, "h200-sxm")
    assert problem.parts[0].answer == pytest.approx(float(wanted)) and "h200-sxm" in problem.question
    assert replace(COST, facts={"gpu": "Voodoo 2"}).exercise_facts(row) == {}


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("batch", COST.batches)
def test_curves_are_the_rows(shown: str, along: str, batch: int) -> None:
    view = CostCurves(COST, shown=shown, along=along, batch=batch, context=4096, block_size=16)
    curves = view.drawn()["curves"]
    for curve in CURVES:
        if shown == "extra" and not curve.is_extra:
            assert curve.words not in curves
            continue
        for place, value in curves[curve.words]:
            size, context = (place, 4096) if along == "block_size" else (16, place)
            row = COST.row(curve.kernel, curve.layout, batch, context, size)
            assert value == {"time": row.us, "share": 100 * row.share, "extra": 100 * COST.overhead(row)}[shown]
    dots = [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot)]
    assert len(dots) == sum(map(len, curves.values()))
    assert all(LEFT <= dot.x <= RIGHT and TOP - 0.1 <= dot.y <= BOTTOM + 0.1 for dot in dots)


def test_every_control_changes_the_picture_and_the_title_says_what_is_chosen() -> None:
    view = CostCurves(COST)
    assert view.drawn()["title"].startswith("With 8 requests of 16,384 tokens, our kernel takes 1.5% longer through")
    for control, value, part in (
        ("batch", 64, "With 64 requests"), ("context", 4096, "of 4,096 tokens"), ("block_size", 8, "blocks of 8"),
        ("shown", "time", "µs on contiguous keys"), ("along", "context", "With 64 requests"),
        ("shown", "share", "of the bandwidth of a copy on NVIDIA H200"),
    ):  # fmt: skip
        before = view.drawn()["marks"]
        view.move(control, value)
        assert view.drawn()["marks"] != before and part in view.drawn()["title"]
    view.flush()
    assert view.picture["title"] == view.drawn()["title"] and view.picture["status"] == ""
    view.close()


def test_time_names_the_price_of_copying_first_where_it_was_measured() -> None:
    view = CostCurves(COST, shown="time", block_size=16)
    assert "1,131 µs if the blocks are first copied together" in view.drawn()["title"]
    view.move("block_size", 32)
    assert "copied together" not in view.drawn()["title"]


@pytest.mark.parametrize("attention", SHARES)
@pytest.mark.parametrize("factor", FACTORS)
def test_gain_and_break_even_follow_the_last_two_sliders(attention: int, factor: float) -> None:
    picture = CostCurves(COST, attention=attention, factor=factor).drawn()
    assert picture["break_even"] == 1 + picture["extra"] * attention / 100
    assert picture["gain"] == pytest.approx(factor / picture["break_even"])
    verdict = "paging gains" if factor > picture["break_even"] else "paging loses"
    assert verdict in picture["lines"][1]


def test_bytes_are_held_against_the_copy_and_the_data_sheet() -> None:
    [*_, words] = CostCurves(COST).drawn()["lines"]
    row = COST.row("plain", "scattered", 8, 16384, 16)
    assert words.startswith("537.0 MB in 141.26 µs: 3,801 GB/s") and f"{100 * row.share:.1f}% of a copy" in words
    assert f"{100 * row.gbps / 4800:.1f}% of the data sheet" in words
    unknown = CostCurves(replace(COST, facts={"gpu": "Voodoo 2"})).drawn()["lines"][-1]
    assert "data sheet" not in unknown


def test_bytes_are_counted_and_the_measured_rates_are_of_them() -> None:
    assert COST.num_bytes(COST.row("plain", "scattered", 8, 16384, 16)) == 536_870_912 + 2 * 8 * 32 * 128 * 2
    for row in COST.rows:
        if row.kernel in ("plain", "engine"):
            assert row.gbps == pytest.approx(COST.num_bytes(row) / row.us / 1e3, rel=0.01)


def test_contiguous_curves_are_dashed_and_paged_ones_are_not() -> None:
    lines = [mark for mark in CostCurves(COST).drawn()["marks"] if isinstance(mark, Line)]
    dashed = {curve.colour for curve in CURVES if curve.layout == "contiguous"}
    assert all(line.is_dashed == (line.ink in dashed) for line in lines if line.ink.startswith("#"))
    assert len({(curve.colour, curve.shape) for curve in CURVES}) == len(CURVES)


def test_a_small_measurement_of_another_grid_draws_too() -> None:
    view = CostCurves(small(), block_size=8)
    assert "takes 25.0% longer through blocks of 8" in view.drawn()["title"]
    for shown in SHOWN:
        view.move("shown", shown)
        view.move("along", "context")
        assert view.image().width > 1400


@pytest.mark.parametrize(
    ("control", "value"), [("batch", 2), ("context", 5), ("block_size", 4), ("shown", "x"), ("factor", 9.0), ("y", 1)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        CostCurves(COST).move(control, value)
    assert "\n" not in str(caught.value)


def test_a_batch_with_fewer_contexts_moves_to_the_nearest() -> None:
    rows = tuple(row for row in COST.rows if row.batch < 64 or row.context <= 1024)
    view = CostCurves(replace(COST, rows=rows))
    view.move("batch", 64)
    context = next(c for c in view.drawn()["controls"] if c.name == "context")
    assert isinstance(context, Slider) and context.value == 1024 and context.values == [256, 1024]


def test_what_was_not_measured_and_what_is_no_measurement_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MiniVLLMError, match="was not measured for 8 requests of 7 tokens"):
        COST.row("plain", "scattered", 8, 7, 16)
    with pytest.raises(MiniVLLMError, match="CostCurves draws a PagingCost"):
        CostCurves("file")  # type: ignore[arg-type]
    for text in ("", "[]", '{"rows": [{"kernel": "plain"}], "shape": {}}'):
        path = tmp_path / "odd.json"
        path.write_text(text)
        with pytest.raises(MiniVLLMError, match=r"odd\.json: these are no paging costs") as caught:
            PagingCost.load(path)
        assert "\n" not in str(caught.value)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [CostCurves(COST, shown="time")._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "141.3" in text and "139.2" in text and "1131" in text
    assert json.loads(json.dumps(CostCurves(COST).drawn()))["marks"]
    assert isinstance(CostCurves(COST).image(), Image.Image)


@pytest.mark.parametrize(
    ("share", "words"), [(0.0312, "3.1%"), (0.0031, "0.31%"), (-0.041, "-4.1%"), (0.2427, "24.3%")]
)
def test_percentages_are_short(share: float, words: str) -> None:
    assert percent(share) == words
