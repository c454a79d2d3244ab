"""A bar chart of results: plotly where scripts run, with the text and PNG twins that every view has."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from minivllm.views.png import Canvas, text_width
from minivllm.views.theme import owner_colour
from minivllm.views.widget import MimeBundle, with_twins

WIDTH_PX, HEIGHT_PX, TOP_PX, BOTTOM_PX = 640, 300, 50, 50


class Bars:
    """Groups of bars: one group for each category, one bar for each series; linear from 0."""

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        categories: Sequence[object],
        series: Mapping[str, Sequence[float]],
    ) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self.categories = [str(category) for category in categories]
        self.series = {name: list(values) for name, values in series.items()}

    def figure(self) -> go.Figure:
        layout = {"template": "none", "width": WIDTH_PX, "height": HEIGHT_PX, "title": {"text": self.title}}
        axes = {
            "xaxis": {"title": {"text": self.x_label}, "type": "category"},
            "yaxis": {"title": {"text": self.y_label}},
        }
        figure = go.Figure(layout={**layout, **axes})
        for i, (name, values) in enumerate(self.series.items()):
            figure.add_bar(x=self.categories, y=values, name=name, marker={"color": owner_colour(i)})
        return figure

    def text(self) -> str:
        """The chart as a table."""
        rows = [[self.x_label, *self.categories], *([n, *(f"{v:g}" for v in vs)] for n, vs in self.series.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"{self.title} ({self.y_label})", *lines])

    def png_canvas(self) -> Canvas:
        """The chart in pixels, each bar with its number."""
        canvas = Canvas(WIDTH_PX, HEIGHT_PX)
        canvas.text(8, 6, self.title, 13)
        highest = max((max(values) for values in self.series.values()), default=0) or 1
        group_px = (WIDTH_PX - 40) / len(self.categories)
        bar_px = min(40.0, group_px * 0.8 / len(self.series))
        floor = HEIGHT_PX - BOTTOM_PX
        for i, (name, values) in enumerate(self.series.items()):
            canvas.box((WIDTH_PX - 130, 8 + 16 * i, 11, 11), fill=owner_colour(i))
            canvas.text(WIDTH_PX - 114, 6 + 16 * i, name, 11)
            for j, value in enumerate(values):
                x, height = 20 + j * group_px + i * bar_px, value / highest * (floor - TOP_PX)
                canvas.box((x, floor - height, bar_px - 2, height), fill=owner_colour(i))
                canvas.text(x + 1, floor - height - 14, f"{value:g}", 10)
        for j, category in enumerate(self.categories):
            canvas.text(20 + j * group_px + bar_px / 2, floor + 4, category, 11)
        canvas.line(16, floor, WIDTH_PX - 16, floor)
        canvas.text((WIDTH_PX - text_width(self.x_label)) / 2, floor + 24, self.x_label)
        canvas.text(8, 26, self.y_label, 11)
        return canvas

    def __repr__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **options: object) -> MimeBundle | None:
        data = {"application/vnd.plotly.v1+json": self.figure().to_plotly_json()}
        return with_twins((data, {}), self.text(), self.png_canvas().image)
