"""The block table as pixels: title, the table's entries with their tokens, and the chain of the chosen token."""

from PIL import Image

from minivllm.views.block_map_picture import WIDTH_PX
from minivllm.views.block_table_picture import BlockTablePicture, Link, TableEntry
from minivllm.views.png import Canvas, text_width, wrapped
from minivllm.views.pool_state import NULL_BLOCK
from minivllm.views.theme import FAINT, NEUTRAL, SELECTED, clipped

ENTRY_PX = 42  # height of one entry
LINK_PX = 40
NUM_ENTRIES = 8


def block_table_image(picture: BlockTablePicture) -> Image.Image:
    """One row for each entry of the table, then the chain, then the first numbers of K and V."""
    entries = picture["entries"][:NUM_ENTRIES]
    rows = _chain_rows(picture["chain"])
    top = 10 + len(wrapped(picture["title"], WIDTH_PX - 8, 13)) * 18
    height = top + len(entries) * ENTRY_PX + len(rows) * LINK_PX + len(picture["values"]) * 16 + 8
    height += len(picture["notes"]) * 18
    canvas = Canvas(WIDTH_PX + 8, height)
    canvas.paragraph(4, 4, picture["title"], WIDTH_PX - 8, 13)
    y: float = top
    for entry in entries:
        _draw_entry(canvas, picture, entry, y)
        y += ENTRY_PX
    for row in rows:
        _draw_links(canvas, row, y)
        y += LINK_PX
    for note in picture["notes"]:
        canvas.text(4, y, note, 11)
        y += 18
    for name, numbers in picture["values"]:
        canvas.text(4, y, f"{name} = [{', '.join(numbers)}, …]", 11)
        y += 16
    return canvas.image


def _draw_entry(canvas: Canvas, picture: BlockTablePicture, entry: TableEntry, y: float) -> None:
    shared = f"  ×{entry['ref_count']}" if entry["ref_count"] > 1 else ""
    gone = "  left the window" if entry["physical"] == NULL_BLOCK else ""
    canvas.box((4, y, 6, ENTRY_PX - 6), fill=picture["colour"])
    canvas.text(16, y, f"logical {entry['logical']} → physical {entry['physical']}{shared}{gone}", 11)
    x = 16.0
    for token in entry["tokens"]:
        words = clipped(token.text, 12)
        width = text_width(words, 11) + 8
        if x + width > WIDTH_PX - 12:
            canvas.text(x, y + 17, "…", 11)
            return
        is_chosen = token.position == picture["token"]
        border = SELECTED if is_chosen else NEUTRAL
        if not token.is_stored:  # known, and its slot still empty: the next step computes it
            canvas.hatch((x, y + 16, width, 19), FAINT, gap=6)
        canvas.box((x, y + 16, width, 19), border=border, thickness=2.5 if is_chosen else 0.5)
        canvas.text(x + 4, y + 18, words, 11)
        x += width + 3
    for _ in range(min(entry["num_unused"], int((WIDTH_PX - x) // 15))):
        canvas.hatch((x, y + 16, 12, 19), NEUTRAL)
        x += 15


def _chain_rows(chain: list[Link]) -> list[list[Link]]:
    """Links side by side, as many as fit."""
    rows: list[list[Link]] = []
    x = float(WIDTH_PX)
    for link in chain:
        width = _link_width(link) + 18
        if x + width > WIDTH_PX:
            rows.append([])
            x = 4
        rows[-1].append(link)
        x += width
    return rows


def _draw_links(canvas: Canvas, links: list[Link], y: float) -> None:
    x = 4.0
    for i, link in enumerate(links):
        if i:
            canvas.text(x - 14, y + 10, "›", 13)
        canvas.box((x, y, _link_width(link), LINK_PX - 6), border=NEUTRAL, thickness=0.5)
        canvas.text(x + 6, y + 2, link.label, 10)
        canvas.text(x + 6, y + 15, f"{link.formula} {link.value}".strip(), 12)
        x += _link_width(link) + 18


def _link_width(link: Link) -> float:
    return max(text_width(link.label, 10), text_width(f"{link.formula} {link.value}".strip(), 12)) + 12
