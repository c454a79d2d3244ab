"""The unit trainer: kB and KiB, GB and GiB, bits and bytes; one question after the other, each slip named at once.

Below the question stand the two ladders that it is about: how much longer the binary unit is at each step, and the
eight bits of a byte.
"""

from collections import Counter
from dataclasses import dataclass, replace

from minivllm.course.learner import open_records
from minivllm.course.multiple_choice import Option
from minivllm.course.unit_drill import EXCESS, PREFIXES, TOPICS, Drill, drill
from minivllm.errors import MiniVLLMError
from minivllm.views.choice_rows import answer_choice, rows
from minivllm.views.png import wrapped
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Mark, SketchPicture, Words, accepted, ink_for
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import FAINT, OWNER_COLOURS, counted

DECIMAL, MORE, BIT = OWNER_COLOURS[0], OWNER_COLOURS[1], OWNER_COLOURS[3]
BAR_X, BAR_PX, ROW_PX = 190.0, 400.0, 22.0  # a bar of 1 kB, MB, GB or TB
VERDICT_PX = 148.0  # below a question of at most two lines and four options


@dataclass(frozen=True)
class Answered:
    """A question that is done: whether the first try was right, and the slips of the others."""

    is_right_at_once: bool
    slips: tuple[str, ...]


@dataclass(frozen=True)
class TrainerState:
    """The question on the table, the letters tried for it, and what came before."""

    topic: str = TOPICS[0]
    number: int = 1
    tried: tuple[str, ...] = ()
    done: tuple[Answered, ...] = ()


class TrainerPicture(SketchPicture):
    verdict: str
    num_done: int
    num_right_at_once: int
    slips: dict[str, int]


class UnitTrainer(SketchView):
    """`UnitTrainer()`, or `UnitTrainer("GB and GiB")`; the seed is the learner's unless one is given."""

    def __init__(self, topic: str = TOPICS[0], seed: str | None = None) -> None:
        self._seed = open_records().seed if seed is None else seed
        self._state = TrainerState()
        super().__init__()
        self.choose({"topic": topic})

    def drawn(self) -> TrainerPicture:
        return draw(self._state, self._drill)

    @property
    def _drill(self) -> Drill:
        return drill(self._state.topic, self._seed, self._state.number)

    def _moved(self, control: str, value: object) -> None:
        state, found = self._state, self._drill
        known = str(accepted(controls(state, found), control, value))
        if control == "topic":
            self._state = replace(state, topic=known, tried=())
        elif control == "new question" and known == "yes":
            self._state = replace(state, number=state.number + 1, tried=())
        elif control == "start over" and known == "yes":
            self._state = TrainerState(topic=state.topic, number=state.number + 1)
        elif control == "answer" and known:
            if known in state.tried:
                raise MiniVLLMError(f"{known}) was tried already; choose another")
            self._state = after(state, found, known)


def after(state: TrainerState, found: Drill, letter: str) -> TrainerState:
    """The state when a letter was tried; a right one ends the question and is counted."""
    tried = (*state.tried, letter)
    if not found.question.by_letter(letter).is_right:
        return replace(state, tried=tried)
    slips = tuple(option.slip for option in _wrong(found, tried))
    return replace(state, tried=tried, done=(*state.done, Answered(not slips, slips)))


def draw(state: TrainerState, found: Drill) -> TrainerPicture:
    """The question with its verdict, the ladder of units and the byte below it."""
    is_over, verdict = _is_over(state, found), _verdict(state, found)
    num_right = sum(answered.is_right_at_once for answered in state.done)
    slips = Counter(slip for answered in state.done for slip in answered.slips)
    title = _title(state, found, num_right)
    marks, _ = rows(found.question, 4, state.tried, is_over=is_over)
    lines = [f"{name}: {times(count)}" for name, count in slips.most_common()]
    return {
        "view": "unit-trainer", "title": title, "aria": f"Unit trainer. {title}. {verdict}",
        "text": _text(title, state, found, verdict, lines), "status": "", "width": WIDTH_PX, "height": VERDICT_PX + 164,
        "marks": [*marks, *_verdict_marks(verdict, is_over), *_ladder(found.prefix, VERDICT_PX + 42),
                  *_byte(is_marked=not found.prefix, top=VERDICT_PX + 42 + len(PREFIXES) * ROW_PX + 10)],
        "controls": controls(state, found), "steps": None,
        "legend": [Key(DECIMAL, "solid", "1 kB, MB, GB, TB"), Key(MORE, "hatch", "what KiB, MiB, GiB, TiB have more")],
        "lines": [f"slips so far: {', '.join(lines)}"] if lines else [], "lines_name": "slips", "provenance": "",
        "verdict": verdict, "num_done": len(state.done), "num_right_at_once": num_right, "slips": dict(slips),
    }  # fmt: skip


def controls(state: TrainerState, found: Drill) -> list[Control]:
    return [
        Choice("topic", "units", [(topic, topic) for topic in TOPICS], state.topic),
        answer_choice(found.question, "", _is_over(state, found)),
        Choice("new question", "new question", [("no", "this one"), ("yes", "draw another")], "no"),
        Choice("start over", "start over", [("no", "no"), ("yes", "count from 0")], "no"),
    ]


def times(count: int) -> str:
    """times(1) == "once"; times(3) == "3 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _is_over(state: TrainerState, found: Drill) -> bool:
    return any(found.question.by_letter(letter).is_right for letter in state.tried)


def _wrong(found: Drill, tried: tuple[str, ...]) -> list[Option]:
    return [option for letter in tried if not (option := found.question.by_letter(letter)).is_right]


def _title(state: TrainerState, found: Drill, num_right: int) -> str:
    count = f"{num_right} of {counted(len(state.done), 'question')} right at the first try"
    end = f"; {found.question.right.words} is right" if _is_over(state, found) else ""
    return (f"{count}{end}" if state.done else "Which number is it? Each wrong one is a slip that people make") + "."


def _verdict(state: TrainerState, found: Drill) -> str:
    """What the last try was."""
    if not state.tried:
        return ""
    last = found.question.by_letter(state.tried[-1])
    if last.is_right:
        return f"Right: {found.question.working}"
    return f"{last.words}? {last.diagnosis} Try another."


def _text(title: str, state: TrainerState, found: Drill, verdict: str, lines: list[str]) -> str:
    marks = {letter: found.question.by_letter(letter).is_right for letter in state.tried}
    options = [
        f"  {words}{'' if letter not in marks else '  (right)' if marks[letter] else '  (wrong)'}"
        for letter, words in found.question.lettered()
    ]
    table = [["binary", "decimal", "more"]]
    table += [[f"1 {_binary(p)}", f"{EXCESS[p]:.4g} {p}B", f"{100 * EXCESS[p] - 100:.1f}%"] for p in PREFIXES]
    slips = [f"slips: {', '.join(lines)}"] if lines else []
    asked = f"Question {state.number}: {found.question.ask}"
    return "\n".join(filter(None, [title, asked, *options, verdict, *slips, *text_table(table), "1 byte = 8 bits"]))


def _verdict_marks(verdict: str, is_over: bool) -> list[Mark]:
    lines = wrapped(verdict, WIDTH_PX - 170, 12)[:2] if verdict else []
    said: list[Mark] = [Words(8, VERDICT_PX + 2 + 16 * i, line, 12) for i, line in enumerate(lines)]
    if not is_over:
        return said
    return [
        *said,
        Words(WIDTH_PX - 68, VERDICT_PX + 7, "next question", 12, "ink", "middle"),
        Box(
            WIDTH_PX - 128, VERDICT_PX + 2, 120, 24, FAINT, "outline", "pick", "draws another", ("new question", "yes")
        ),
    ]


def _ladder(prefix: str, top: float) -> list[Mark]:
    """A bar for each step: the decimal unit, and hatched beyond it what the binary one has more."""
    marks: list[Mark] = []
    for row, name in enumerate(PREFIXES):
        y, more = top + row * ROW_PX, BAR_PX * (EXCESS[name] - 1)
        is_marked = name == prefix
        percent = f"{100 * EXCESS[name] - 100:.1f}%"
        marks += [
            Words(
                BAR_X - 8,
                y,
                f"1 {_binary(name)} = {EXCESS[name]:.4g} {name}B",
                11,
                "ink" if is_marked else "soft",
                "end",
            ),
            Box(BAR_X, y, BAR_PX, ROW_PX - 6, DECIMAL, "solid", "ink" if is_marked else "", f"1 {name}B"),
            Box(BAR_X + BAR_PX, y, more, ROW_PX - 6, MORE, "hatch", "ink" if is_marked else "", f"{percent} more"),
            Words(BAR_X + BAR_PX + more + 6, y, f"+{percent}", 11, "ink" if is_marked else "soft"),
            Words(BAR_X + 6, y, f"1 {name}B", 11, ink_for(DECIMAL, "solid")),
        ]
    return marks


def _byte(*, is_marked: bool, top: float) -> list[Mark]:
    border = "ink" if is_marked else ""
    marks: list[Mark] = [Words(BAR_X - 8, top, "1 byte = 8 bits", 11, "ink" if is_marked else "soft", "end")]
    return [*marks, *(Box(BAR_X + i * 20, top, 16, 16, BIT, "dots", border, "1 bit") for i in range(8))]


def _binary(prefix: str) -> str:
    """_binary("k") == "KiB"."""
    return f"{prefix.upper()}iB"
