"""The kernel stepper: the real paged decode kernel, one turn of one program at a time.

A program follows the block table to a tile of keys, updates a running maximum, sum and output, and takes the next tile.
Where a request's tiles were cut between programs, each leaves a part, and the last one to come merges them.
"""

from dataclasses import dataclass, replace

from minivllm.course.kernel_turns import KernelSteps, Turn, distinct_blocks
from minivllm.errors import MiniVLLMError
from minivllm.views.kernel_stepper_picture import HEIGHT, LEGEND, Moment, marks, natural, outputs
from minivllm.views.sketch import WIDTH_PX, Choice, Control, SketchPicture, Slider, Value, accepted, seek
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import counted, owner_letter

NUM_LISTED = 4  # numbers of an output in the text twin


@dataclass(frozen=True)
class StepperControls:
    """Which stage of the launch is shown, from 1, and which query head of its group."""

    step: int = 1
    head: int = 0


class StepperPicture(SketchPicture):
    program: int
    turn: int  # of the program, from 1; ends count too
    slots: list[int]
    peak: list[float]
    total: list[float]


class KernelStepper(SketchView):
    """`KernelStepper(kernel_steps(inputs), program=1)`; controls: step, program, turn, head."""

    def __init__(self, steps: KernelSteps, **chosen: Value) -> None:
        if not isinstance(steps, KernelSteps):
            raise MiniVLLMError(
                f"KernelStepper draws KernelSteps (minivllm/lab/kernel_steps.py), not {type(steps).__name__}"
            )
        self._steps = steps
        self._controls = StepperControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> StepperPicture:
        return draw(self._steps, self._controls)

    def _moved(self, control: str, value: object) -> None:
        self._controls = moved(self._steps, self._controls, control, value)


def moved(steps: KernelSteps, chosen: StepperControls, control: str, value: object) -> StepperControls:
    """The controls after one was moved; a program begins at its first turn. Raises MiniVLLMError for what it is not."""
    if control == "step":
        return replace(chosen, step=seek((1, len(steps.stages), chosen.step), value))
    taken = accepted(controls(steps, chosen), control, value)
    if control == "head":
        return replace(chosen, head=int(taken))
    program = int(taken) if control == "program" else steps.stages[chosen.step - 1].program
    turn = int(taken) if control == "turn" else 1
    return replace(chosen, step=places(steps, program)[turn - 1])


def places(steps: KernelSteps, program: int) -> list[int]:
    """The steps of one program, counted from 1."""
    return [i for i, stage in enumerate(steps.stages, 1) if stage.program == program]


def controls(steps: KernelSteps, chosen: StepperControls) -> list[Control]:
    stage, group = steps.stages[chosen.step - 1], steps.case.group
    programs = sorted({stage.program for stage in steps.stages})
    own = places(steps, stage.program)
    turn = own.index(chosen.step) + 1
    heads = [(str(i), f"query head {stage.kv_head * group + i}") for i in range(group)]
    return [
        Slider("program", "program id", [*programs], stage.program, f"program {stage.program} of {len(programs)}"),
        Slider("turn", "its turn", [*range(1, len(own) + 1)], turn, f"{turn} of {len(own)}"),
        Choice("head", "show", heads, str(chosen.head)),
    ]


def draw(steps: KernelSteps, chosen: StepperControls) -> StepperPicture:
    """One stage of the launch."""
    moment = Moment(steps, chosen.step - 1, chosen.head)
    title, turn = sentence(moment), moment.turn
    return {
        "view": "kernel-stepper", "title": title, "aria": f"Kernel stepper. {title}", "text": _text(title, moment),
        "status": "", "width": WIDTH_PX, "height": HEIGHT, "marks": marks(moment), "controls": controls(steps, chosen),
        "steps": (1, len(steps.stages), chosen.step), "legend": LEGEND, "lines": lines(moment),
        "lines_name": "how it was computed", "provenance": steps.origin, "program": moment.stage.program,
        "turn": places(steps, moment.stage.program).index(chosen.step) + 1, "slots": list(turn.slots),
        "peak": list(turn.peak), "total": list(turn.total),
    }  # fmt: skip


def sentence(moment: Moment) -> str:
    """What happens in this stage."""
    stage, case = moment.stage, moment.case
    pair = f"request {owner_letter(stage.request)}, KV head {stage.kv_head}"
    if isinstance(stage, Turn):
        blocks, last = distinct_blocks(stage, case.block_size), stage.start + len(stage.slots) - 1
        masked = case.tile - len(stage.slots)
        where = f"block{'s' if len(blocks) > 1 else ''} {' and '.join(map(str, blocks))}"
        tail = f", and {counted(masked, 'place')} of the tile {'is' if masked == 1 else 'are'} masked" if masked else ""
        return f"Program {stage.program} reads tokens {stage.start} to {last} of {pair}: they lie in {where}{tail}."
    if stage.slot is None:
        return f"Program {stage.program} had all of {pair}: it divides by the sum and writes the output."
    if not stage.merged_slots:
        return f"Program {stage.program} has only a part of {pair}: it stores output and log-sum in slot {stage.slot}."
    return (
        f"Program {stage.program} stored the last part of {pair}, so it merges {counted(len(moment.parts), 'part')}"
        " and writes the output."
    )


def lines(moment: Moment) -> list[str]:
    """The arithmetic of the stage, with its numbers."""
    stage, case, head = moment.stage, moment.case, moment.head
    if isinstance(stage, Turn):
        token, slot, size = stage.start, stage.slots[0], case.block_size
        table = case.block_tables[stage.request]
        found = [
            f"slot of token {token} = table[{token} // {size}] × {size} + {token} % {size} = {table[token // size]} × "
            f"{size} + {token % size} = {slot}; its K of this KV head begins at element {stage.k_offsets[0]:,}"
        ]
        new, total, fresh = natural(stage.peak[head]), stage.total[head], tile_sum(stage, head)
        if moment.before is None:
            return [*found, f"first tile: maximum {new:.4g}, sum of e^(score − maximum) = {total:.4g}"]
        old, shrink = natural(moment.before.peak[head]), 2 ** (moment.before.peak[head] - stage.peak[head])
        return [
            *found,
            f"maximum = max({old:.4g}, this tile's {natural(max(stage.scores[head])):.4g}) = {new:.4g}; older terms "
            f"shrink by e^({old:.4g} − {new:.4g}) = {shrink:.4g}",
            f"sum = {moment.before.total[head]:.4g} × {shrink:.4g} + {fresh:.4g} = {total:.4g}",
        ]  # fmt: skip
    if moment.parts:
        top = max(part.lse[head] for part in moment.parts)
        total = sum(2 ** (part.lse[head] - top) for part in moment.parts)
        terms = " + ".join(f"e^({natural(part.lse[head]):.4g} − {natural(top):.4g})" for part in moment.parts)
        return [f"weights: log-sums against the largest, {terms} = {total:.4g}"]
    top, total = natural(moment.turn.peak[head]), moment.turn.total[head]
    return [f"log-sum = maximum + ln(sum) = {top:.4g} + ln({total:.4g}) = {natural(stage.lse[head]):.4g}"]


def tile_sum(turn: Turn, head: int) -> float:
    """What the tile itself adds to the sum of a head."""
    return sum(2 ** (score - turn.peak[head]) for score in turn.scores[head])


def _text(title: str, moment: Moment) -> str:
    turn, group = moment.turn, moment.case.group
    rows = [["query head", "maximum", "sum", "output begins"]]
    for head in range(group):
        begins = ", ".join(f"{value:.4g}" for value in outputs(replace(moment, head=head))[0][:NUM_LISTED])
        row = [str(turn.kv_head * group + head), f"{natural(turn.peak[head]):.4g}", f"{turn.total[head]:.4g}", begins]
        rows.append(row)
    slots = f"slots {', '.join(map(str, turn.slots))}"
    return "\n".join([title, slots, *text_table(rows), *lines(moment), moment.steps.origin])
