"""How good guesses were: guess over truth on a log axis, as a plotly figure and as a table; pure functions of guesses.

On a log axis half and twice are equally far from the middle. Marker shapes repeat what colours say (Okabe and Ito's).
"""

import html
import math
from dataclasses import dataclass

import plotly.graph_objects as go

NEAR, FAR = 1.25, 2.0  # factors: within 25% is near; within 2 is what an interview asks of a mental estimate
GREEN, ORANGE, BLUE, GREY = "#009E73", "#E69F00", "#0072B2", "#767676"
COLUMNS = 41  # of the text picture, from 1/10 to 10


@dataclass(frozen=True, slots=True)
class Guess:
    """One guess and its truth; None where there was no guess."""

    id: str
    question: str
    unit: str
    guess: float | int | str | None
    truth: float | int | str | None

    @property
    def ratio(self) -> float | None:
        """Guess over truth, where both are numbers above 0."""
        if isinstance(self.guess, str) or isinstance(self.truth, str) or not self.guess or not self.truth:
            return None
        return self.guess / self.truth if self.guess > 0 and self.truth > 0 else None

    @property
    def is_near(self) -> bool:
        return self.guess == self.truth or (self.ratio is not None and 1 / NEAR <= self.ratio <= NEAR)

    @property
    def verdict(self) -> str:
        """In words: "2.5 times too large"."""
        if self.guess is None:
            return "no guess"
        if self.guess == self.truth:
            return "right"
        if self.ratio is None:
            return "not the answer"
        if 0.995 <= self.ratio < 1.005:
            return "within 1%"
        factor, direction = (self.ratio, "large") if self.ratio > 1 else (1 / self.ratio, "small")
        return f"{factor:.3g} times too {direction}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The guesses of a notebook. In JupyterLab the figure shows, elsewhere the table, in print the text."""

    guesses: tuple[Guess, ...]

    def figure(self) -> go.Figure:
        return figure(self.guesses)

    def __repr__(self) -> str:
        return text(self.guesses)

    def _repr_html_(self) -> str:
        return table(self.guesses)

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        bundle: dict[str, object] = {"text/plain": text(self.guesses), "text/html": table(self.guesses)}
        if any(guess.ratio is not None for guess in self.guesses):
            bundle["application/vnd.plotly.v1+json"] = figure(self.guesses).to_plotly_json()
        return bundle


def figure(guesses: tuple[Guess, ...]) -> go.Figure:
    """Guess / truth of each prediction; the grey band is within a factor of 2."""
    shown = [(guess, guess.ratio) for guess in guesses if guess.ratio is not None]
    reach = max([10.0, *(max(ratio, 1 / ratio) * 1.3 for _, ratio in shown)])
    axis = {"title": {"text": "guess / truth (log)"}, "type": "log", "range": [-math.log10(reach), math.log10(reach)]}
    chart = go.Figure(
        layout={
            "template": "none", "width": 640, "height": 150 + 26 * len(shown), "title": {"text": title(guesses)},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": GREY},
            "xaxis": {**axis, "gridcolor": "rgba(118,118,118,0.3)"}, "margin": {"l": 70},
            "yaxis": {"type": "category", "categoryorder": "array", "autorange": "reversed",
                      "categoryarray": [guess.id for guess, _ in shown]},
        }
    )  # fmt: skip
    chart.add_vrect(x0=1 / FAR, x1=FAR, fillcolor=GREY, opacity=0.15, line_width=0)
    chart.add_vline(x=1, line_color=GREY)
    groups = {
        "near": (GREEN, "circle", lambda g, r: g.is_near),
        "too large": (ORANGE, "triangle-right", lambda g, r: not g.is_near and r > 1),
        "too small": (BLUE, "triangle-left", lambda g, r: not g.is_near and r < 1),
    }
    for name, (colour, symbol, belongs) in groups.items():
        points = [(guess, ratio) for guess, ratio in shown if belongs(guess, ratio)]
        chart.add_scatter(
            x=[ratio for _, ratio in points], y=[guess.id for guess, _ in points], mode="markers", name=name,
            text=[html.escape(f"{guess.question}: {guess.verdict}") for guess, _ in points],
            marker={"color": colour, "symbol": symbol, "size": 11},
        )  # fmt: skip
    return chart


def title(guesses: tuple[Guess, ...]) -> str:
    """A sentence: how many guesses were within a factor of 2."""
    made = [guess for guess in guesses if guess.guess is not None]
    if not made:
        return "No guesses yet"
    close = sum(guess.is_near or (guess.ratio is not None and 1 / FAR <= guess.ratio <= FAR) for guess in made)
    return f"{close} of {len(made)} guesses within a factor of {FAR:g}"


def text(guesses: tuple[Guess, ...]) -> str:
    """The figure in characters: 1/10 at the left, the truth at the bar, 10 times at the right."""
    lines = [f"Calibration: {title(guesses)}"]
    for guess in guesses:
        lines.append(f"{guess.id:>6} {_strip(guess.ratio)} {guess.verdict}".rstrip())
    if guesses:
        lines.append(f"{'':>6} {'1/10':<{COLUMNS // 2}}1{'10':>{COLUMNS // 2}}  guess / truth")
    return "\n".join(lines)


def table(guesses: tuple[Guess, ...]) -> str:
    """The same for places that run no script; every text is escaped."""
    rows = "".join(
        f"<tr><td>{html.escape(guess.id)}</td><td>{html.escape(guess.question)}</td><td>{_cell(guess.guess)}</td>"
        f"<td>{_cell(guess.truth)}</td><td>{html.escape(guess.unit)}</td><td>{html.escape(guess.verdict)}</td></tr>"
        for guess in guesses
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "question", "guess", "truth", "unit", ""))
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if guesses else ""
    return f"<div><strong>{html.escape(title(guesses))}</strong></div>{body}"


def _strip(ratio: float | None) -> str:
    cells = ["·"] * COLUMNS
    cells[COLUMNS // 2] = "|"
    if ratio is not None:
        place = round((COLUMNS // 2) * (1 + math.log10(min(max(ratio, 0.1), 10.0))))
        cells[place] = "●"
    return "".join(cells)


def _cell(value: float | int | str | None) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else html.escape(f"{value}")
