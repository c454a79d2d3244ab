"""The physical shuffle (FM2): a live engine's blocks trade places, a step is computed again, the bits compared."""

from collections.abc import Callable
from dataclasses import dataclass

from minivllm.course.block_order import Shuffled, Tables
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Choice,
    Control,
    Key,
    Line,
    Mark,
    SketchPicture,
    Slider,
    Value,
    Words,
    ink_for,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import FAINT, counted, owner_colour, owner_letter

Shuffle = Callable[[int, int, bool], Shuffled]  # blocks to move, seed, whether the tables follow
LEFT, RIGHT = 8.0, WIDTH_PX - 8.0
BEFORE_Y, AFTER_Y, CELL = 24.0, 130.0, 26.0
HEIGHT = AFTER_Y + 60
MOST_BLOCKS = 64  # drawn; of a larger pool, the first ones
NUM_SEEDS = 10
FOLLOWED, LEFT_BEHIND = "follow", "stay"


@dataclass(frozen=True)
class ShuffleControls:
    """How many blocks trade places, which shuffle of many, and whether the block tables are told."""

    moved: int
    seed: int = 0
    tables: str = FOLLOWED


class ShufflePicture(SketchPicture):
    num_different: int
    greatest_difference: float
    before: list[list[int]]
    after: list[list[int]]


class BlockShuffle(SketchView):
    """`BlockShuffle(LiveStep(llm).shuffle, num_blocks=24)`; controls: moved, seed, tables."""

    def __init__(self, shuffle: Shuffle, num_blocks: int, **chosen: Value) -> None:
        if num_blocks < 3:
            raise MiniVLLMError(f"a pool of {num_blocks} blocks has nothing to shuffle: block 0 stays; take 3 or more")
        self._shuffle, self._num_blocks = shuffle, num_blocks
        self._controls = ShuffleControls(moved=num_blocks - 1)
        self._found = shuffle(num_blocks - 1, 0, True)
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> ShufflePicture:
        return draw(self._found, self._controls, self._num_blocks)

    def _moved(self, control: str, value: object) -> None:
        chosen = with_control(self._controls, controls(self._controls, self._num_blocks), control, value)
        self._found = self._shuffle(chosen.moved, chosen.seed, chosen.tables == FOLLOWED)
        self._controls = chosen


def controls(chosen: ShuffleControls, num_blocks: int) -> list[Control]:
    words = [(FOLLOWED, "the block tables follow"), (LEFT_BEHIND, "the block tables stay as they were")]
    return [
        Slider("moved", "blocks that trade places", [0, *range(2, num_blocks)], chosen.moved,
               f"{chosen.moved} of {num_blocks - 1}"),
        Slider("seed", "another shuffle", [*range(NUM_SEEDS)], chosen.seed, f"seed {chosen.seed}"),
        Choice("tables", "and", words, chosen.tables),
    ]  # fmt: skip


def draw(found: Shuffled, chosen: ShuffleControls, num_blocks: int) -> ShufflePicture:
    """The pool before and after, who lies where, and what the comparison found."""
    title = sentence(found)
    requests = range(len(found.before))
    return {
        "view": "block-shuffle", "title": title, "aria": f"Physical shuffle. {title}", "text": _text(title, found),
        "status": "", "width": WIDTH_PX, "height": HEIGHT, "marks": _marks(found, num_blocks),
        "controls": controls(chosen, num_blocks), "steps": None,
        "legend": [Key(owner_colour(i), "solid", f"request {owner_letter(i)} and its logical block") for i in requests],
        "lines": _lines(found), "lines_name": "block tables", "provenance": f"computed live on {found.device}",
        "num_different": found.num_different, "greatest_difference": found.greatest_difference,
        "before": [list(table) for table in found.before], "after": [list(table) for table in found.after],
    }  # fmt: skip


def sentence(found: Shuffled) -> str:
    """What the shuffle did to the output."""
    moved = f"{counted(found.num_moved, 'block')} moved"
    if found.num_different == 0:
        told = "" if found.is_followed else ", the tables did not follow"
        return f"{moved}{told}: of {found.num_values:,} logits none differs in a single bit; greatest difference 0."
    return (
        f"{moved}{'' if found.is_followed else ' and the tables did not follow'}: {found.num_different:,} of "
        f"{found.num_values:,} logits differ, by up to {found.greatest_difference:.4g}."
    )


def holders(tables: Tables) -> dict[int, list[tuple[int, int]]]:
    """Who reads each block: (request, logical block); a shared block has several."""
    found: dict[int, list[tuple[int, int]]] = {}
    for request, table in enumerate(tables):
        for logical, block in enumerate(table):
            found.setdefault(block, []).append((request, logical))
    return found


def _marks(found: Shuffled, num_blocks: int) -> list[Mark]:
    shown = min(num_blocks, MOST_BLOCKS)
    pitch = (RIGHT - LEFT) / shown
    stored = holders(found.before)
    moved = {found.order[block]: owners for block, owners in stored.items()}  # where the bytes lie now
    marks: list[Mark] = [Words(LEFT, 4, "the pool before, block 0 to the left", 11)]
    marks += _row(stored, shown, pitch, BEFORE_Y)
    for block in sorted(stored):
        request, _ = stored[block][0]
        if block < shown and found.order[block] < shown:
            start, end = LEFT + (block + 0.5) * pitch, LEFT + (found.order[block] + 0.5) * pitch
            marks.append(Line(start, BEFORE_Y + CELL + 16, end, AFTER_Y - 2, owner_colour(request), 1.5))
    marks += _row(moved, shown, pitch, AFTER_Y)
    return [*marks, Words(LEFT, AFTER_Y + CELL + 18, "the pool after: the same bytes in other places", 11)]


def _row(owners: dict[int, list[tuple[int, int]]], shown: int, pitch: float, top: float) -> list[Mark]:
    """One pool: a cell for each block, with the first of those who read it."""
    marks: list[Mark] = []
    for block in range(shown):
        x, readers = LEFT + block * pitch, owners.get(block, [])
        names = [f"{owner_letter(request)}{logical}" for request, logical in readers]
        colour = owner_colour(readers[0][0]) if readers else FAINT
        pattern = "solid" if readers else "outline"
        words = f"block {block}: {', '.join(names) or 'nobody reads it'}"
        marks.append(Box(x + 1, top, pitch - 2, CELL, colour, pattern, "", words))
        if names and pitch >= 18:
            label = names[0] if len(names) == 1 else f"{names[0]}+"
            marks.append(Words(x + pitch / 2, top + 7, label, 10, ink_for(colour, pattern), "middle"))
        if pitch >= 14 or block % 8 == 0:
            marks.append(Words(x + pitch / 2, top + CELL + 2, str(block), 10, "soft", "middle"))
    return marks


def _lines(found: Shuffled) -> list[str]:
    return [
        f"request {owner_letter(i)}: {list(before)} → {list(after)}"
        for i, (before, after) in enumerate(zip(found.before, found.after, strict=True))
    ]


def _text(title: str, found: Shuffled) -> str:
    rows = [["request", "table before", "table the kernel got", "where its blocks lie now"]]
    for i, (before, after) in enumerate(zip(found.before, found.after, strict=True)):
        now = [found.order[block] for block in before]
        rows.append([owner_letter(i), *(" ".join(map(str, table)) for table in (before, after, now))])
    return "\n".join([title, *text_table(rows)])
