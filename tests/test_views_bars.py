"""The chart's three forms say the same."""

from minivllm.views.bars import Bars

BARS = Bars("Larger blocks waste more", "block size", "slots", [1, 16], {"empty": [0, 35], "entries": [221, 16]})


def test_text_is_a_table_of_the_values() -> None:
    assert BARS.text().splitlines() == [
        "Larger blocks waste more (slots)",
        "block size    1  16",
        "     empty    0  35",
        "   entries  221  16",
    ]


def test_plotly_figure_has_a_bar_for_each_value() -> None:
    figure = BARS.figure()
    assert [(bar.name, list(bar.x), list(bar.y)) for bar in figure.data] == [
        ("empty", ["1", "16"], [0, 35]),
        ("entries", ["1", "16"], [221, 16]),
    ]
    assert figure.layout.xaxis.title.text == "block size" and figure.layout.yaxis.title.text == "slots"


def test_bundle_has_all_three_and_repeats_to_the_byte() -> None:
    first, again = BARS._repr_mimebundle_(), BARS._repr_mimebundle_()
    assert first is not None and again is not None
    assert set(first[0]) == {"application/vnd.plotly.v1+json", "text/plain", "image/png"}
    assert first[0]["image/png"] == again[0]["image/png"]
