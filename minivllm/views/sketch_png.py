"""A sketch as pixels, for GitHub, untrusted notebooks and mail: the same marks, no script."""

from itertools import pairwise

from PIL import Image

from minivllm.views.png import Canvas, text_width, wrapped
from minivllm.views.sketch import Box, Dot, Key, Line, Mark, SketchPicture, Trail, Words
from minivllm.views.theme import FAINT, NEUTRAL, SELECTED

ROLES = {"ink": NEUTRAL, "soft": NEUTRAL, "line": FAINT, "pick": SELECTED}  # "page" stays transparent
LINE_PX = 17
NUM_LINES = 14  # below the picture


def sketch_image(picture: SketchPicture) -> Image.Image:
    """Title, marks, legend, the status and the lines below."""
    width = picture["width"]
    title_lines = len(wrapped(picture["title"], width - 8, 13))
    top = 8 + title_lines * 18
    words_below = [*([picture["status"]] if picture["status"] else []), *picture["lines"][:NUM_LINES]]
    below = [line for words in words_below for line in wrapped(words, width - 8, 11)]
    legend_top = top + picture["height"] + 8
    num_keys = -(-len(picture["legend"]) // 2)
    height = legend_top + num_keys * LINE_PX + len(below) * 15 + 8
    canvas = Canvas(round(width + 8), round(height))
    canvas.paragraph(4, 4, picture["title"], width - 8, 13)
    for mark in picture["marks"]:
        _draw(canvas, mark, 4, top)
    for i, key in enumerate(picture["legend"]):
        _draw_key(canvas, key, 4 + (i % 2) * width / 2, legend_top + (i // 2) * LINE_PX)
    for i, line in enumerate(below):
        canvas.text(4, legend_top + num_keys * LINE_PX + i * 15, line, 11)
    return canvas.image


def _draw(canvas: Canvas, mark: Mark, left: float, top: float) -> None:
    match mark:
        case Box():
            _draw_box(canvas, mark._replace(x=mark.x + left, y=mark.y + top))
        case Line(x, y, to_x, to_y, ink, thickness, is_dashed):
            _draw_line(canvas, (x + left, y + top), (to_x + left, to_y + top), _colour(ink), thickness, is_dashed)
        case Trail(points, ink, thickness, is_dashed):
            places = [(x + left, y + top) for x, y in points]
            for i, (start, end) in enumerate(pairwise(places)):
                if not is_dashed or i % 3 < 2:
                    canvas.line(*start, *end, _colour(ink), thickness)
        case Words(x, y, text, size, ink, anchor):
            shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * text_width(text, size)
            canvas.text(x + left - shift, y + top, text, size, _colour(ink))
        case Dot(x, y, shape, fill, radius):
            _draw_dot(canvas, x + left, y + top, shape, _colour(fill), radius)


def _draw_box(canvas: Canvas, box: Box) -> None:
    place, colour = (box.x, box.y, box.width, box.height), _colour(box.fill)
    right, bottom = box.x + box.width, box.y + box.height
    match box.pattern:
        case "solid" if box.fill != "page":
            canvas.box(place, fill=colour)
        case "hatch":
            canvas.hatch(place, colour)
        case "dots":
            canvas.dots(place, colour)
        case "cross":
            canvas.line(box.x, box.y, right, bottom, colour)
            canvas.line(box.x, bottom, right, box.y, colour)
    if box.border or box.pattern != "solid":
        border = _colour(box.border or box.fill)
        canvas.box(place, border=border, thickness=2 if box.border in ("ink", "pick") else 0.5)


def _draw_line(
    canvas: Canvas, start: tuple[float, float], end: tuple[float, float], ink: str, thickness: float, is_dashed: bool
) -> None:
    """Dashes of 6 pixels and gaps of 4."""
    (x, y), (to_x, to_y) = start, end
    length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
    if not is_dashed or length == 0:
        canvas.line(x, y, to_x, to_y, ink, thickness)
        return
    for from_px in range(0, int(length), 10):
        a, b = from_px / length, min(from_px + 6, length) / length
        canvas.line(x + a * (to_x - x), y + a * (to_y - y), x + b * (to_x - x), y + b * (to_y - y), ink, thickness)


def _draw_dot(canvas: Canvas, x: float, y: float, shape: str, fill: str, radius: float) -> None:
    if shape == "square":
        canvas.box((x - radius, y - radius, 2 * radius, 2 * radius), fill=fill)
    elif shape == "diamond":
        canvas.triangle(((x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)), fill)
    else:
        canvas.disc(x, y, radius, fill)


def _draw_key(canvas: Canvas, key: Key, x: float, y: float) -> None:
    _draw_box(canvas, Box(x, y + 2, 18, 11, key.fill, key.pattern))
    canvas.text(x + 24, y, key.words, 11)


def _colour(name: str) -> str:
    return ROLES.get(name, name if name.startswith("#") else NEUTRAL)
