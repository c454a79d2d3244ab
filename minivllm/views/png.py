"""A small canvas for PNG twins: text, boxes and hatching in pixels of the page, drawn at twice the size.

The background is transparent and the ink a mid-grey, so that one image reads on a light and on a dark page.
"""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from minivllm.views.theme import NEUTRAL

SCALE = 2
PLAIN = str.maketrans({
    "→": "->", "×": "x", "␣": "_", "⏎": "\\n", "⇥": "\\t", "∅": "-", "−": "-", "≥": ">=", "≤": "<=", "⌊": "floor(",
    "⌋": ")", "⌈": "ceil(", "⌉": ")", "µ": "u",
})  # fmt: skip  # not in Pillow's font
Box = tuple[float, float, float, float]  # left, top, width, height


class Canvas:
    """Draw with page pixels; `image` is what came out."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGBA", (width * SCALE, height * SCALE), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: float = 12, ink: str = NEUTRAL) -> float:
        """Write with the top left corner at (x, y); returns where the words end."""
        font = _font(round(size * SCALE))
        self._draw.text((x * SCALE, y * SCALE), words.translate(PLAIN), fill=ink, font=font)
        return x + text_width(words, size)

    def paragraph(self, x: float, y: float, words: str, width: float, size: float = 12) -> float:
        """Write words in lines of at most `width`; returns the top of the line after."""
        for line in wrapped(words, width, size):
            self.text(x, y, line, size)
            y += size * 1.35
        return y

    def box(self, box: Box, fill: str | None = None, border: str | None = None, thickness: float = 1) -> None:
        left, top, width, height = (round(edge * SCALE) for edge in box)
        if width < 1 or height < 1:
            return
        corners = (left, top, left + width - 1, top + height - 1)
        self._draw.rectangle(corners, fill=fill, outline=border, width=round(thickness * SCALE))

    def hatch(self, box: Box, ink: str, gap: float = 4) -> None:
        """Fill a box with diagonal lines."""
        left, top, width, height = (round(edge * SCALE) for edge in box)
        if width < 1 or height < 1:
            return
        tile = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        lines = ImageDraw.Draw(tile)
        for start in range(-height, width, round(gap * SCALE)):
            lines.line((start, height, start + height, 0), fill=ink, width=SCALE)
        self.image.alpha_composite(tile, (left, top))

    def dots(self, box: Box, ink: str, gap: float = 4) -> None:
        """Fill a box with dots."""
        left, top, width, height = box
        for row in range(int(height / gap)):
            for column in range(int(width / gap)):
                self.box((left + (column + 0.4) * gap, top + (row + 0.4) * gap, 1.5, 1.5), fill=ink)

    def line(self, x: float, y: float, to_x: float, to_y: float, ink: str = NEUTRAL, thickness: float = 1) -> None:
        ends = (x * SCALE, y * SCALE, to_x * SCALE, to_y * SCALE)
        self._draw.line(ends, fill=ink, width=round(thickness * SCALE))

    def disc(self, x: float, y: float, radius: float, ink: str) -> None:
        corners = ((x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE)
        self._draw.ellipse(corners, fill=ink)

    def triangle(self, corners: tuple[tuple[float, float], ...], ink: str) -> None:
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in corners], fill=ink)


def text_width(words: str, size: float = 12) -> float:
    """Width of a line in page pixels."""
    return float(_font(round(size * SCALE)).getlength(words.translate(PLAIN))) / SCALE


def wrapped(words: str, width: float, size: float = 12) -> list[str]:
    """Lines of at most `width` page pixels; a longer word stands alone."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine, so that PNG bytes repeat."""
    return ImageFont.load_default(pixels)
