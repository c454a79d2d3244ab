"""One colour per meaning, in light and dark, never colour alone: every owner also has a letter.

The seven owner colours are Okabe and Ito's, which colour-blind people can tell apart. All other colours come from
JupyterLab's CSS variables in the browser, and from mid-greys that read on white and on black in the PNG twin.
"""

import html

OWNER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
NEUTRAL = "#767676"  # text and lines of PNGs: contrast 4.5 on white, 4.6 on black
FAINT = "#9e9e9e"  # cells that nobody owns
SELECTED = "#8250df"  # what the reader chose; in the browser var(--jp-brand-color1) would clash with owner A

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def owner_colour(ordinal: int) -> str:
    """The colour of the request that arrived as number `ordinal`, from 0; it never changes."""
    return OWNER_COLOURS[ordinal % len(OWNER_COLOURS)]


def owner_letter(ordinal: int) -> str:
    """A short name to print in a cell: owner_letter(0) == "A", owner_letter(26) == "AA"."""
    head, tail = divmod(ordinal, len(LETTERS))
    return (owner_letter(head - 1) if head else "") + LETTERS[tail]


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on `colour`: ink_on("#0072B2") == "#ffffff"."""
    black, white = contrast(colour, "#000000"), contrast(colour, "#ffffff")
    return "#ffffff" if white >= 4.5 or white > black else "#000000"


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two colours, from 1 (equal) to 21 (black and white)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def escape(text: str) -> str:
    """Make text safe inside HTML; views prefer `textContent`, where nothing needs escaping."""
    return html.escape(text, quote=True)


def visible(text: str) -> str:
    r"""Show what a token holds on one line: visible(" a\n") == "␣a⏎"."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown) or "∅"


def clipped(text: str, length: int) -> str:
    """At most `length` characters: clipped("abcdef", 4) == "abc…"."""
    return text if len(text) <= length else text[: length - 1] + "…"


def counted(number: int, noun: str) -> str:
    """counted(1, "block") == "1 block"; counted(2, "block") == "2 blocks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
