"""The marks of W8: a ladder of places above, and below it the bars of p, q and the residual at one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.views.sketch import WIDTH_PX, Box, Key, Line, Mark, Words, ink_for
from minivllm.views.theme import FAINT, OWNER_COLOURS

STYLES = {  # state of a place: fill, pattern, words
    "open": ("soft", "outline", "not judged yet"),
    "accepted": (OWNER_COLOURS[2], "solid", "accepted"),
    "rejected": (OWNER_COLOURS[5], "cross", "rejected"),
    "dropped": (FAINT, "hatch", "behind a rejected one: dropped, never judged"),
    "last": (OWNER_COLOURS[6], "dots", "the target's own token: always one"),
}
ROWS = {
    "p": (OWNER_COLOURS[0], "solid", "p, the target"),
    "q": (OWNER_COLOURS[1], "hatch", "q, the drafter"),
    "residual": (OWNER_COLOURS[3], "dots", "residual max(p − q, 0)"),
}
LEGEND = [Key(fill, pattern, words) for fill, pattern, words in (*ROWS.values(), *STYLES.values())]
LEFT, LADDER_TOP, CELL_H = 10.0, 24.0, 44.0
TOP, BOTTOM = 108.0, 270.0
HEIGHT = BOTTOM + 62
BARS_RIGHT = WIDTH_PX - 20.0


class Place(NamedTuple):
    text: str
    state: str


@dataclass(frozen=True)
class Scene:
    """One stage: the ladder, the rows over a few words, and the draft (`token`) that is judged by `u`."""

    title: str
    places: tuple[Place, ...]
    words: str | tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    token: int = -1
    chance: float = 0.0
    u: float = -1.0
    lines: tuple[str, ...] = ()


def marks(scene: Scene) -> list[Mark]:
    """Everything of one stage."""
    return [*_ladder(scene), *_bars(scene), *(_dice(scene) if scene.u >= 0 else [])]


def _ladder(scene: Scene) -> list[Mark]:
    width = min(120.0, (WIDTH_PX - 2 * LEFT) / len(scene.places) - 8)
    found: list[Mark] = []
    for i, place in enumerate(scene.places):
        fill, pattern, words = STYLES[place.state]
        x = LEFT + i * (width + 8)
        name = f"place {i + 1}" if i < len(scene.places) - 1 or place.text != "+1" else "one more"
        ink = ink_for(fill, pattern)
        border = "ink" if place.state == "last" else ""
        told = f"{place.text}: {words}"
        found.append(Words(x, LADDER_TOP - 16, name, 10, "soft"))
        found.append(Box(x, LADDER_TOP, width, CELL_H, fill, pattern, border, told))
        found.append(Words(x + width / 2, LADDER_TOP + 14, place.text, 14, ink, "middle"))
    return found


def _bars(scene: Scene) -> list[Mark]:
    if not scene.rows:
        return [Words(LEFT, TOP + 40, "The target has not spoken yet.", 12, "soft")]
    found: list[Mark] = [Line(LEFT + 36, BOTTOM, BARS_RIGHT, BOTTOM, "soft")]
    for tick in (0.0, 0.5, 1.0):
        y = BOTTOM - tick * (BOTTOM - TOP)
        found += [
            Line(LEFT + 36, y, BARS_RIGHT, y, "line", 0.3),
            Words(LEFT + 30, y - 6, f"{tick:g}", 10, "soft", "end"),
        ]
    group = (BARS_RIGHT - LEFT - 40) / len(scene.words)
    bar = min(44.0, (group - 20) / len(scene.rows))
    for i, word in enumerate(scene.words):
        start = LEFT + 40 + i * group + (group - bar * len(scene.rows)) / 2
        for j, (name, row) in enumerate(scene.rows.items()):
            fill, pattern, words = ROWS[name]
            height = row[i] * (BOTTOM - TOP)
            border = "pick" if i == scene.token else ""
            told = f"{words} of {word}: {row[i]:.3f}"
            found.append(Box(start + j * bar, BOTTOM - height, bar - 3, height, fill, pattern, border, told))
            found.append(Words(start + (j + 0.5) * bar - 1, BOTTOM - height - 13, f"{row[i]:.2f}", 10, "ink", "middle"))
        ink = "pick" if i == scene.token else "ink"
        found.append(Words(LEFT + 40 + (i + 0.5) * group, BOTTOM + 4, word, 12, ink, "middle"))
    return found


def _dice(scene: Scene) -> list[Mark]:
    """u on the line from 0 to 1, whose first part accepts."""
    y, left, right = BOTTOM + 34, LEFT + 150, BARS_RIGHT - 60
    at = left + scene.u * (right - left)
    edge = left + scene.chance * (right - left)
    return [
        Words(left - 8, y - 1, "accept where u falls here:", 11, "ink", "end"),
        Box(left, y, edge - left, 12, OWNER_COLOURS[2], "solid", "", f"u below {scene.chance:.3f} accepts"),
        Box(edge, y, right - edge, 12, OWNER_COLOURS[5], "cross", "", f"u from {scene.chance:.3f} on rejects"),
        Line(at, y - 6, at, y + 18, "pick", 3),
        Words(right + 6, y - 1, f"u = {scene.u:.2f}", 11, "pick"),
    ]
