"""The block map as pixels, for GitHub, untrusted notebooks and mail: the same picture, no script."""

from PIL import Image

from minivllm.views.block_map_picture import WIDTH_PX, BlockMapPicture, Cell, Owner
from minivllm.views.png import Box, Canvas, text_width, wrapped
from minivllm.views.theme import FAINT, NEUTRAL, SELECTED, clipped

HEADER_PX = 13  # of a cell with text
LINE_PX = 17
NUM_OWNERS = 12  # named in the legend


def block_map_image(picture: BlockMapPicture) -> Image.Image:
    """Title, grid, owners and legend."""
    num_rows = -(-len(picture["cells"]) // picture["columns"])
    title_lines = wrapped(picture["title"], WIDTH_PX - 8, 13)
    grid_top = 8 + len(title_lines) * 18
    grid_height = num_rows * picture["cell_height"]
    owners = picture["owners"][:NUM_OWNERS]
    host_top = grid_top + grid_height
    grid_height += _host_height(picture)
    num_lines = -(-len(owners) // 2) + -(-len(picture["legend"]) // 2)
    canvas = Canvas(WIDTH_PX + 8, grid_top + grid_height + num_lines * LINE_PX + 16)
    canvas.paragraph(4, 4, picture["title"], WIDTH_PX - 8, 13)
    for index in range(len(picture["cells"])):
        draw_cell(canvas, picture, index, cell_box(picture, index, grid_top))
    _draw_host(canvas, picture, host_top)
    y = _draw_owners(canvas, owners, grid_top + grid_height + 8)
    _draw_legend(canvas, picture, y)
    return canvas.image


def cell_box(picture: BlockMapPicture, index: int, top: float) -> Box:
    """Where a block stands."""
    row, column = divmod(index, picture["columns"])
    gap = 2 if picture["cell_width"] >= 16 else 1
    width, height = picture["cell_width"], picture["cell_height"]
    return (4 + column * width, top + row * height, width - gap, height - gap)


def _host_height(picture: BlockMapPicture) -> int:
    num_rows = -(-len(picture["host"]) // picture["columns"])
    return num_rows * picture["cell_height"] + 24 if num_rows else 0


def _draw_host(canvas: Canvas, picture: BlockMapPicture, top: float) -> None:
    """Host blocks below the pool, numbered from 1; none there without preemption by swap."""
    if not picture["host"]:
        return
    canvas.text(4, top + 5, "host memory", 11)
    for index, cell in enumerate(picture["host"]):
        box = cell_box(picture, index, top + 22)
        owners = [picture["owners"][i] for i in cell.owners]
        header = HEADER_PX if picture["has_text"] else 0
        if header:
            _draw_header(canvas, str(index + 1), cell, owners, box)
        _draw_slots(canvas, cell, owners, picture["block_size"], (box[0], box[1] + header, box[2], box[3] - header))


def draw_cell(canvas: Canvas, picture: BlockMapPicture, index: int, box: Box) -> None:
    """One block: its slots, its border, and letters where there is room."""
    cell = picture["cells"][index]
    left, top, width, height = box
    header = HEADER_PX if picture["has_text"] else 0
    owners = [picture["owners"][i] for i in cell.owners]
    if picture["has_text"]:
        _draw_header(canvas, str(index), cell, owners, box)
    _draw_slots(canvas, cell, owners, picture["block_size"], (left, top + header, width, height - header))
    if cell.kind == "live":
        canvas.box(box, border=NEUTRAL, thickness=min(3, width / 4) if len(owners) > 1 else 0.5)
        if cell.is_cached:
            size = min(10 if len(owners) > 1 else 7, width / 2)
            canvas.triangle(((left + width - size, top), (left + width, top), (left + width, top + size)), NEUTRAL)
    if index == picture["selected"]:
        canvas.box((left - 1, top - 1, width + 2, height + 2), border=SELECTED, thickness=2.5)


def _draw_header(canvas: Canvas, name: str, cell: Cell, owners: list[Owner], box: Box) -> None:
    left, top, width, _ = box
    canvas.text(left + 3, top + 1, name, 9)
    letters = "+".join(owner["letter"] for owner in owners)
    if len(owners) > 1:
        letters += f" ×{len(owners)}"
        letters = letters if text_width(letters, 10) < width - 26 else f"×{len(owners)}"
    canvas.text(left + width - text_width(letters, 10) - (9 if cell.is_cached else 4), top, letters, 10)


def _draw_slots(canvas: Canvas, cell: Cell, owners: list[Owner], block_size: int, box: Box) -> None:
    left, top, width, height = box
    if cell.kind == "live":
        share = width * cell.num_filled / block_size
        band = height / len(owners)
        for i, owner in enumerate(owners):
            canvas.box((left, top + i * band, share, band), fill=owner["colour"])
        canvas.hatch((left + share, top, width - share, height), owners[0]["colour"])
    elif cell.kind == "cached":
        canvas.dots(box, NEUTRAL)
        canvas.box(box, border=FAINT)
    elif cell.kind == "reserved":
        canvas.box((left + 1, top + 1, width - 2, height - 2), border=owners[0]["colour"], thickness=1.5)
    elif cell.kind == "on_host":
        canvas.dots(box, owners[0]["colour"])
        canvas.box(box, border=owners[0]["colour"])
    elif cell.kind == "null":
        canvas.box(box, border=FAINT)
        canvas.line(left, top, left + width, top + height, FAINT)
        canvas.line(left, top + height, left + width, top, FAINT)
    else:
        canvas.box(box, border=FAINT, thickness=0.5)


def _draw_owners(canvas: Canvas, owners: list[Owner], y: float) -> float:
    for i, owner in enumerate(owners):
        x, line_y = 4 + (i % 2) * WIDTH_PX / 2, y + (i // 2) * LINE_PX
        canvas.box((x, line_y + 2, 18, 11), fill=owner["colour"])
        canvas.text(x + 24, line_y, f"{owner['letter']} = {clipped(owner['words'], 62)}", 11)
    return y + -(-len(owners) // 2) * LINE_PX


def _draw_legend(canvas: Canvas, picture: BlockMapPicture, y: float) -> None:
    for i, (kind, words) in enumerate(picture["legend"]):
        x, line_y = 4 + (i % 2) * WIDTH_PX / 2, y + (i // 2) * LINE_PX
        _draw_swatch(canvas, kind, (x, line_y + 2, 18, 11))
        canvas.text(x + 24, line_y, words, 11)


def _draw_swatch(canvas: Canvas, kind: str, box: Box) -> None:
    """The mark that the legend explains, in grey: the owner's colour varies."""
    left, top, width, _ = box
    nobody: Owner = {"id": "", "letter": "", "colour": NEUTRAL, "words": ""}
    if kind in ("cached", "empty", "null"):
        _draw_slots(canvas, Cell(kind, 0, False, []), [], 1, box)
        return
    if kind in ("reserved", "on_host"):
        _draw_slots(canvas, Cell(kind, 0, False, [0]), [nobody], 1, box)
        return
    _draw_slots(canvas, Cell("live", 0 if kind == "unfilled" else 1, False, [0]), [nobody], 1, box)
    if kind == "shared":
        canvas.box(box, fill=FAINT, border=NEUTRAL, thickness=3)
    if kind == "published":
        canvas.box(box, fill=FAINT)
        canvas.triangle(((left + width - 8, top), (left + width, top), (left + width, top + 8)), NEUTRAL)
