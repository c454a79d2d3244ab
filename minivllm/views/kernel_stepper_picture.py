"""The marks of the kernel stepper: the line of tiles, the block table, the pool's slots, the softmax and the output."""

from dataclasses import dataclass
from itertools import groupby

from minivllm.course.kernel_turns import LOG2_E, End, KernelCase, KernelSteps, Stage, Turn
from minivllm.views.sketch import WIDTH_PX, Box, Key, Line, Mark, Words, ink_for
from minivllm.views.theme import FAINT, NEUTRAL, OWNER_COLOURS, owner_colour, owner_letter

LEFT, RIGHT = 8.0, WIDTH_PX - 8.0
TILES_Y, TABLE_Y, POOL_Y, SOFTMAX_Y, OUTPUT_Y = 22.0, 88.0, 154.0, 228.0, 362.0
HEIGHT = OUTPUT_Y + 96
MIDDLE = 372.0  # between the weights and the numbers
MOST_ROWS = 5  # query heads whose numbers are shown
MOST_BLOCKS = 48  # of the pool; of a larger one, only those that some table names
FINAL = OWNER_COLOURS[5]
LEGEND = [
    Key(NEUTRAL, "solid", "read in this turn"),
    Key(NEUTRAL, "dots", "the request's other tokens"),
    Key(NEUTRAL, "hatch", "masked: no token is there"),
    Key(FINAL, "solid", "the finished output, for comparison"),
]


@dataclass(frozen=True)
class Moment:
    """One stage of a launch, and the query head of its group that is looked at."""

    steps: KernelSteps
    index: int
    head: int  # within the group

    @property
    def stage(self) -> Stage:
        return self.steps.stages[self.index]

    @property
    def case(self) -> KernelCase:
        return self.steps.case

    @property
    def turn(self) -> Turn:
        """The stage, or the turn before an end."""
        return next(s for s in reversed(self.steps.stages[: self.index + 1]) if isinstance(s, Turn))

    @property
    def before(self) -> Turn | None:
        """The turn before this one on the same pair, by the same program."""
        found = self.steps.stages[self.index - 1] if self.index and isinstance(self.stage, Turn) else None
        is_same = isinstance(found, Turn) and (found.program, found.request, found.kv_head) == self.pair
        return found if is_same and isinstance(found, Turn) else None

    @property
    def pair(self) -> tuple[int, int, int]:
        return self.stage.program, self.stage.request, self.stage.kv_head

    @property
    def query_head(self) -> int:
        return self.stage.kv_head * self.case.group + self.head

    @property
    def parts(self) -> list[End]:
        """What a merge merges, in order."""
        stage = self.stage
        by_slot = {end.slot: end for end in self.steps.ends if end.slot is not None}
        return [by_slot[slot] for slot in stage.merged_slots] if isinstance(stage, End) else []


def marks(moment: Moment) -> list[Mark]:
    """All of the picture, from top to bottom."""
    softmax = weights_of(moment) if isinstance(moment.stage, Turn) else parts_of(moment)
    return [*line_of_tiles(moment), *table_row(moment), *pool(moment), *softmax, *numbers(moment), *output(moment)]


def natural(peak: float) -> float:
    """From powers of two, in which the kernel counts, to powers of e."""
    return peak / LOG2_E


def line_of_tiles(moment: Moment) -> list[Mark]:
    """The pairs' tiles one behind the other, who works on which, and the tile of this turn."""
    case, turn = moment.case, moment.turn
    num_tiles = sum(tiles for _, _, tiles in case.pairs)
    pitch = (RIGHT - LEFT) / num_tiles
    first_stages = {
        (s.request, s.kv_head, s.start): i for i, s in enumerate(moment.steps.stages) if isinstance(s, Turn)
    }
    found: list[Mark] = [
        Words(LEFT, 4, f"the work: tiles of {case.tile} tokens; B1 is a tile of request B, KV head 1", 11)
    ]
    tiles = [(request, kv_head, tile) for request, kv_head, count in case.pairs for tile in range(count)]
    for place, (request, kv_head, tile) in enumerate(tiles):
        start, x, colour = tile * case.tile, LEFT + place * pitch, owner_colour(request)
        is_now = (request, kv_head, start) == (turn.request, turn.kv_head, turn.start)
        pattern, step = "solid" if is_now else "outline", first_stages.get((request, kv_head, start), moment.index) + 1
        words = f"request {owner_letter(request)}, KV head {kv_head}, tokens from {start}"
        found.append(Box(x + 1, TILES_Y, pitch - 2, 24, colour, pattern, colour, words, ("step", step)))
        if is_now:
            found.append(Box(x - 1, TILES_Y - 2, pitch + 2, 28, "pick", "outline", "pick"))
        if pitch >= 18 or tile == 0:
            letter, ink = f"{owner_letter(request)}{kv_head}", ink_for(colour, pattern)
            found.append(Words(x + pitch / 2, TILES_Y + 6, letter, 11, ink, "middle"))
    for program in range(case.num_programs):
        start, stop = min(program * case.share, num_tiles), min((program + 1) * case.share, num_tiles)
        if start < stop:
            found += _bracket(LEFT + start * pitch + 2, LEFT + stop * pitch - 2, program, program == turn.program)
    return found


def _bracket(left: float, right: float, program: int, is_now: bool) -> list[Mark]:
    y, ink = TILES_Y + 34, "pick" if is_now else "soft"
    thickness = 2.0 if is_now else 1.0
    lines = [
        Line(left, y, right, y, ink, thickness),
        Line(left, y, left, y - 4, ink),
        Line(right, y, right, y - 4, ink),
    ]
    return [*lines, Words((left + right) / 2, y + 4, f"program {program}", 11, ink, "middle")]


def table_row(moment: Moment) -> list[Mark]:
    """The request's block table, with the entries of this turn."""
    case, turn = moment.case, moment.turn
    table, colour = case.block_tables[turn.request], owner_colour(turn.request)
    read = range(turn.start // case.block_size, (turn.start + len(turn.slots) - 1) // case.block_size + 1)
    pitch = min(44.0, (RIGHT - 150) / max(len(table), 1))
    found: list[Mark] = [Words(LEFT, TABLE_Y + 22, f"block table of request {owner_letter(turn.request)}", 11)]
    for entry, block in enumerate(table):
        x, is_read = 150 + entry * pitch, entry in read
        words = f"entry {entry}: tokens {entry * case.block_size} and on lie in block {block}"
        found.append(Box(x, TABLE_Y + 16, pitch - 4, 24, colour, "solid" if is_read else "outline", colour, words))
        if pitch >= 18:
            ink = ink_for(colour, "solid" if is_read else "outline")
            found.append(Words(x + pitch / 2 - 2, TABLE_Y + 22, str(block), 11, ink, "middle"))
            found.append(Words(x + pitch / 2 - 2, TABLE_Y + 2, str(entry), 10, "soft", "middle"))
    return found


def pool(moment: Moment) -> list[Mark]:
    """The pool's blocks, slot by slot: what this turn reads lies where the table says."""
    case, turn = moment.case, moment.turn
    named = sorted({block for table in case.block_tables for block in table})
    blocks = list(range(case.num_blocks)) if case.num_blocks <= MOST_BLOCKS else named[:MOST_BLOCKS]
    pitch = min(44.0, (RIGHT - LEFT) / len(blocks))
    shown = "slot by slot" if len(blocks) == case.num_blocks else f"{len(blocks)} of its {case.num_blocks} blocks"
    found: list[Mark] = [Words(LEFT, POOL_Y - 8, f"the pool, {shown}: block ids below", 11)]
    for place, block in enumerate(blocks):
        x = LEFT + place * pitch
        owner = next((i for i, table in enumerate(case.block_tables) if block in table), None)
        border, whose = (
            ("line", "free") if owner is None else (owner_colour(owner), f"of request {owner_letter(owner)}")
        )
        found.append(Box(x + 1, POOL_Y + 10, pitch - 2, 26, "page", "outline", border, f"block {block}, {whose}"))
        if owner is not None and block not in case.block_tables[turn.request]:
            found.append(Words(x + pitch / 2, POOL_Y + 17, owner_letter(owner), 10, "soft", "middle"))
        found += _slots(moment, block, x + 2, (pitch - 4) / case.block_size)
        is_read = block in {slot // case.block_size for slot in turn.slots}
        if pitch >= 14 or is_read:
            ink = "ink" if is_read else "soft"
            found.append(Words(x + pitch / 2, POOL_Y + 40, str(block), 11 if is_read else 10, ink, "middle"))
    return found


def _slots(moment: Moment, block: int, left: float, width: float) -> list[Mark]:
    """One block's slots of the turn's request, runs of one kind drawn as one box."""
    case, turn = moment.case, moment.turn
    table = case.block_tables[turn.request]
    if block not in table:
        return []
    size, entry, length = case.block_size, table.index(block), case.num_tokens[turn.request]
    tile = range(turn.start, turn.start + case.tile)
    kinds = []
    for offset in range(size):
        token = entry * size + offset
        stored = "solid" if token in tile else "dots"
        kinds.append(stored if token < length else "hatch")
    found: list[Mark] = []
    for pattern, run in groupby(range(size), kinds.__getitem__):
        offsets = list(run)
        words = f"block {block}, slots {block * size + offsets[0]} to {block * size + offsets[-1]}"
        found.append(Box(left + offsets[0] * width, POOL_Y + 12, len(offsets) * width, 22, owner_colour(turn.request),
                         pattern, "", words))  # fmt: skip
    return found


def weights_of(moment: Moment) -> list[Mark]:
    """What each token of the tile weighs against the largest score so far, for the chosen query head."""
    case, turn = moment.case, moment.turn
    peak, scores = turn.peak[moment.head], turn.scores[moment.head]
    floor, tall, pitch = SOFTMAX_Y + 104, 66.0, (MIDDLE - 24 - LEFT) / case.tile
    found: list[Mark] = [
        Words(LEFT, SOFTMAX_Y, f"weights e^(score − maximum), query head {moment.query_head}", 11),
        Line(LEFT, floor, MIDDLE - 24, floor, "soft"),
    ]
    for place in range(case.tile):
        x, token = LEFT + place * pitch, turn.start + place
        if place < len(scores):
            weight = 2 ** (scores[place] - peak)
            words = f"token {token}: score {natural(scores[place]):.4g}, weight {weight:.4g}"
            found.append(Box(x + 1, floor - weight * tall, pitch - 2, max(weight * tall, 1), owner_colour(turn.request),
                             words=words))  # fmt: skip
        else:
            found.append(Box(x + 1, floor - tall, pitch - 2, tall, FAINT, "hatch", words=f"token {token}: masked"))
        if place % 4 == 0:
            found.append(Words(x + pitch / 2, floor + 3, str(token), 10, "soft", "middle"))
    return found


def parts_of(moment: Moment) -> list[Mark]:
    """An end: what becomes of the sum, and how much each part weighs where parts are merged."""
    stage = moment.stage
    assert isinstance(stage, End)
    parts, found = moment.parts, list[Mark]()
    if not parts:
        kept = "the whole pair: divide by the sum, write the output"
        stored = f"a part: its output and log-sum go to slot {stage.slot}; the last to come merges"
        return [Words(LEFT, SOFTMAX_Y, kept if stage.slot is None else stored, 11)]
    top = max(part.lse[moment.head] for part in parts)
    weights = [2 ** (part.lse[moment.head] - top) for part in parts]
    found.append(Words(LEFT, SOFTMAX_Y, f"the merge: what each part weighs, query head {moment.query_head}", 11))
    room = min(30.0, 86 / len(parts))
    for row, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        y, share = SOFTMAX_Y + 20 + row * room, weight / sum(weights)
        words = f"program {part.program}, slot {part.slot}: {100 * share:.1f}%"
        found.append(Box(LEFT, y, share * (MIDDLE - 190), room - 6, owner_colour(stage.request), words=words))
        found.append(Words(LEFT + share * (MIDDLE - 190) + 6, y + room / 2 - 9, words, 11))
    return found


def numbers(moment: Moment) -> list[Mark]:
    """The running maximum and sum before and after, for each query head of the group."""
    case, turn, before = moment.case, moment.turn, moment.before
    columns = (MIDDLE, MIDDLE + 62, MIDDLE + 196)
    found: list[Mark] = [
        Words(columns[0], SOFTMAX_Y, "head", 10, "soft"),
        Words(columns[1], SOFTMAX_Y, "running maximum", 10, "soft"),
        Words(columns[2], SOFTMAX_Y, "running sum", 10, "soft"),
    ]
    for row in range(min(case.group, MOST_ROWS)):
        y, is_chosen = SOFTMAX_Y + 18 + 18 * row, row == moment.head
        if is_chosen:
            found.append(Box(MIDDLE - 6, y - 3, RIGHT - MIDDLE + 8, 17, "pick", "outline", "pick"))
        old = (natural(before.peak[row]), before.total[row]) if before else None
        new = (natural(turn.peak[row]), turn.total[row])
        texts = [f"{old[i]:.4g} → {new[i]:.4g}" if old else f"{new[i]:.4g}" for i in (0, 1)]
        found.append(Words(columns[0], y, str(turn.kv_head * case.group + row), 11))
        found += [Words(columns[1 + i], y, text, 11) for i, text in enumerate(texts)]
    return found


def output(moment: Moment) -> list[Mark]:
    """The output so far divided by the sum so far, beside the finished output of the same head."""
    now, final = outputs(moment)
    highest = max(*map(abs, (*now, *final)), 1e-30)
    zero, tall, pitch = OUTPUT_Y + 52, 34.0, (RIGHT - LEFT) / len(now)
    head = f"the {len(now)} numbers of the output of query head {moment.query_head}"
    made = "after the merge" if moment.parts else "so far, divided by the sum so far"
    found: list[Mark] = [Words(LEFT, OUTPUT_Y, f"{head}, {made}", 11), Line(LEFT, zero, RIGHT, zero, "soft")]
    for place, (value, target) in enumerate(zip(now, final, strict=True)):
        x, height = LEFT + place * pitch, value / highest * tall
        y = zero - target / highest * tall
        words = f"number {place}: {value:.4g} now, {target:.4g} in the end"
        found.append(Box(x + 1, zero - max(height, 0), pitch - 2, max(abs(height), 0.5),
                         owner_colour(moment.stage.request), words=words))  # fmt: skip
        found.append(Line(x, y, x + pitch, y, FINAL, 2))
    return found


def outputs(moment: Moment) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The output of the chosen head as far as this program has it, and the finished one."""
    stage, head = moment.stage, moment.head
    final = moment.steps.out[stage.request][moment.query_head]
    if isinstance(stage, Turn):
        return tuple(value / stage.total[head] for value in stage.output[head]), final
    if not stage.merged_slots:
        return stage.output[head], final
    return merged(moment.parts, head), final


def merged(parts: list[End], head: int) -> tuple[float, ...]:
    """Partial outputs weighed by their sums: what merge_partials does (kernels/minivllm_kernels/split_kv.py)."""
    top = max(part.lse[head] for part in parts)
    weights = [2 ** (part.lse[head] - top) for part in parts]
    rows = zip(*(part.output[head] for part in parts), strict=True)
    return tuple(sum(w * x for w, x in zip(weights, row, strict=True)) / sum(weights) for row in rows)
