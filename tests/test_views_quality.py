"""Quality against cache: points are the published numbers, every control moves them, and who paid stands below."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
from PIL import Image

from minivllm.course.calculators import kv_bytes_per_token, mha_bytes_per_token
from minivllm.course.published_quality import DATA, Point, Study, published_studies
from minivllm.errors import MiniVLLMError
from minivllm.lab.attention_kinds import own_study
from minivllm.views.png import text_width
from minivllm.views.quality_and_cache import ALL, LEFT, RIGHT, QualityAndCache, QualityControls, draw
from minivllm.views.sketch import WIDTH_PX, Choice, Dot, Words


def study(name: str) -> Study:
    return next(known for known in published_studies() if known.id == name)


def dots(view: QualityAndCache) -> list[Dot]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot) and mark.words]


def labels(view: QualityAndCache) -> list[str]:
    return [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]


# --- the tables


def test_every_point_names_its_source_and_what_was_paid() -> None:
    for raw in json.loads(DATA.read_text()):
        assert "arXiv" in raw["source"] and "table" in raw["source"] and raw["cache_unit"]
        for point in raw["points"]:
            assert set(point["values"]) == set(raw["metrics"]) and len(point["paid"]) > 10
    assert all(s.point(s.baseline).cache_percent == 100 for s in published_studies())


def test_published_caches_are_what_the_calculators_give() -> None:
    """110.6K and 15.6K numbers are DeepSeek-V2-Lite's shape as MHA and as MLA; 34.6K is DeepSeek-V2's."""
    raw = {
        entry["id"]: {p["name"]: p["cache_numbers"] for p in entry["points"]} for entry in json.loads(DATA.read_text())
    }
    small, large = raw["deepseek-moe-16b"], raw["deepseek-moe-250b"]
    assert small["mha"] == round(int(mha_bytes_per_token("deepseek-v2-lite")) / 2, -2)
    assert small["mla"] == round(int(kv_bytes_per_token("deepseek-v2-lite")) / 2, -2)
    assert large["mla"] == round(int(kv_bytes_per_token("deepseek-v2")) / 2, -2)
    assert [round(100 * m["mla"] / m["mha"]) for m in (small, large)] == [14, 4]  # the paper's own percentages
    assert raw["ainslie-2023"]["mha"] == 8 * raw["ainslie-2023"]["gqa-8"] == 64 * raw["ainslie-2023"]["mqa"]


def test_published_qualities_are_those_of_the_list_of_numbers() -> None:
    t5 = study("ainslie-2023")
    assert [t5.point(name).values["average score"] for name in ("mha", "gqa-8", "mqa")] == [47.2, 47.1, 46.6]


def test_change_is_negative_where_quality_is_worse_whichever_way_it_is_measured() -> None:
    words, dense = study("shazeer-2019"), study("deepseek-7b")
    assert words.change_percent(words.point("mqa"), "perplexity") == pytest.approx(-100 * 0.3 / 29.9)
    assert dense.change_percent(dense.point("gqa-8"), "MMLU") == pytest.approx(-100 * 4 / 45.2)
    assert words.change_percent(words.point("mha"), "perplexity") == 0


def test_unknown_variant_is_one_line() -> None:
    with pytest.raises(MiniVLLMError, match="there are: mha, gqa-8, mqa"):
        study("ainslie-2023").point("gqa-16")


# --- the picture


def test_all_studies_stand_beside_their_own_mha() -> None:
    picture = QualityAndCache([own_study()]).drawn()
    assert picture["changes"]["ainslie-2023/gqa-8"] == pytest.approx(-100 * 0.1 / 47.2)
    assert picture["changes"]["deepseek-7b/mqa"] == pytest.approx(-100 * 7.3 / 45.2)
    assert picture["changes"]["deepseek-moe-250b/mla"] > 0 > picture["changes"]["ours/mqa"]
    assert picture["cache_percents"]["ainslie-2023/mqa"] == pytest.approx(100 / 64)
    assert "2.7% better" in picture["title"] and "22.2% worse" in picture["title"]


def test_less_cache_lies_to_the_left_and_less_quality_below() -> None:
    view = QualityAndCache(study="deepseek-7b")
    mha, gqa, mqa = dots(view)
    assert LEFT < mqa.x < gqa.x < mha.x < RIGHT
    assert mha.y < gqa.y < mqa.y
    assert "MMLU 41.2 at 25%" in gqa.words and "1.33T tokens" in gqa.words


def test_loss_is_better_when_lower_and_then_stands_higher() -> None:
    view = QualityAndCache([own_study()], study="ours")
    found = {dot.words.split(",")[1].split(":")[0].strip(): dot.y for dot in dots(view)}
    assert found["GQA-3"] < found["MHA"] < found["MLA-64"] < found["MQA"]


@pytest.mark.parametrize("chosen", [s.id for s in published_studies()])
def test_every_study_draws_its_own_measure(chosen: str) -> None:
    view, known = QualityAndCache(), study(chosen)
    view.move("study", chosen)
    view.flush()
    picture = view.drawn()
    assert view.picture["title"] == picture["title"] and view.picture["status"] == ""
    least = min(known.points, key=lambda p: p.cache_percent)
    metric = known.metrics[0]
    assert f"{least.values[metric]:.4g} instead of {known.point(known.baseline).values[metric]:.4g}" in picture["title"]
    assert len(dots(view)) == len(known.points)
    assert all(any(label == f"{p.label} {p.values[metric]:.4g}" for label in labels(view)) for p in known.points)
    assert len(picture["lines"]) == 1 and known.source in picture["lines"][0]
    view.close()


def test_metric_moves_the_points_and_survives_a_study_that_has_it() -> None:
    view = QualityAndCache(study="deepseek-7b")
    before = dots(view)
    view.move("metric", "C-Eval")
    assert "C-Eval 30 instead of 42.9" in view.drawn()["title"] and dots(view) != before
    view.move("study", "deepseek-moe-16b")
    assert "C-Eval 50.9 instead of 51.6, 1.4% worse" in view.drawn()["title"]
    view.move("study", "ainslie-2023")
    assert "average score" in view.drawn()["title"]
    view.move("study", ALL)
    assert "beside its own MHA" in view.drawn()["title"]


def test_axis_of_the_cache_can_be_linear() -> None:
    view = QualityAndCache(study="deepseek-7b")
    log = [dot.x for dot in dots(view)]
    view.move("axis", "linear")
    mha, gqa, mqa = (dot.x - LEFT for dot in dots(view))
    assert gqa / mha == pytest.approx(0.25) and mqa / mha == pytest.approx(1 / 32)
    assert [dot.x for dot in dots(view)][1:] != log[1:] and "80%" in labels(view)


def test_who_paid_what_stands_below_and_in_the_text() -> None:
    picture = QualityAndCache([own_study()]).drawn()
    assert len(picture["lines"]) == 6 and picture["lines_name"] == "who paid what"
    assert "GQA-8, XXL MQA: heads averaged, then 5% of the pre-training steps again" in picture["lines"][1]
    assert all(line in picture["text"] for line in picture["lines"])
    assert "-8.8%" in picture["text"] and "12.5%" in picture["text"]


def test_kinds_differ_in_shape_and_not_in_colour_alone() -> None:
    marks = QualityAndCache([own_study()], study="ours").drawn()["marks"]
    shapes = {mark.fill: mark.shape for mark in marks if isinstance(mark, Dot) and mark.words}
    assert len(set(shapes.values())) == 3
    assert sum(isinstance(mark, Dot) and not mark.words for mark in marks) == 3  # the dots inside the three latents


@pytest.mark.parametrize("chosen", [ALL, "ours", *(s.id for s in published_studies())])
def test_labels_of_points_do_not_cover_each_other_nor_leave_the_plot(chosen: str) -> None:
    marks = QualityAndCache([own_study()], study=chosen).drawn()["marks"]
    places = []
    for mark in marks:
        if isinstance(mark, Words) and (mark.size, mark.ink) == (10, "ink"):
            width = text_width(mark.text, 10)
            left = mark.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[mark.anchor] * width
            places.append((left, mark.y, left + width, mark.y + 10))
    assert len(places) >= 2 and all(left > LEFT and right < WIDTH_PX for left, _, right, _ in places)
    for one, other in combinations(places, 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


@pytest.mark.parametrize(
    ("control", "value"),
    [("study", "gpt"), ("metric", "MMLU"), ("axis", "cubic"), ("x", 1), ("study", 3), ("axis", True)],
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        QualityAndCache().move(control, value)
    assert "\n" not in str(caught.value)


def test_no_study_is_one_line() -> None:
    with pytest.raises(MiniVLLMError, match="no study to draw"):
        draw(QualityControls(), [])


def test_study_of_one_point_and_of_equal_points_draws() -> None:
    point = Point("mha", "mha", "MHA", 100.0, {"score": 5.0}, "nothing at all")
    lone = Study("lone", "A lone model", "this test", ("score",), "mha", True, (point,))
    twin = replace(lone, points=(point, replace(point, name="gqa", kind="gqa", cache_percent=0.1)))
    for made in (lone, twin):
        view = QualityAndCache([made], study="lone")
        assert "5 instead of 5" in view.drawn()["title"]
        assert all(LEFT <= dot.x <= RIGHT for dot in dots(view))


def test_twins_repeat_and_fit_json() -> None:
    bundles = [QualityAndCache([own_study()])._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert "T5, XXL GQA-8" in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(QualityAndCache().drawn()))["marks"]
    assert isinstance(QualityAndCache().image(), Image.Image)


def test_choices_offer_every_study_with_its_name() -> None:
    first = QualityAndCache([own_study()]).drawn()["controls"][0]
    assert isinstance(first, Choice)
    assert [value for value, _ in first.options] == [ALL, *(s.id for s in published_studies()), "ours"]
