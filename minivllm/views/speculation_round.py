"""W8, the ladder of one round: drafts, the verdict on each, what replaces a rejected one, and the token always gained.

The first round is a playground: four tokens whose p and q are sliders, the same at every place. Others are rounds that
an engine ran (course/speculation_rounds.py): their p is the model's, their drafts are certain, so they have no q.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from minivllm.course.speculation import Round, drafts_of, judge_round, normalised
from minivllm.course.speculation_rounds import RealRound
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import WIDTH_PX, Choice, Control, SketchPicture, Slider, Value, seek, with_control
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.speculation_round_picture import HEIGHT, LEGEND, Place, Scene, marks
from minivllm.views.theme import clipped, counted, visible

WORDS = "ABCD"
PLAYGROUND = "playground"
WEIGHTS = list(range(11))
MOST_DRAFTS = 4


@dataclass(frozen=True)
class RoundControls:
    """What the reader chose; p_a .. q_d are weights, made chances by dividing by their sum."""

    step: int = 1
    round: str = PLAYGROUND
    num_drafts: int = 3
    numbers: int = 1  # which random numbers
    p_a: int = 4
    p_b: int = 3
    p_c: int = 2
    p_d: int = 1
    q_a: int = 5
    q_b: int = 1
    q_c: int = 1
    q_d: int = 3

    @property
    def target(self) -> tuple[float, ...]:
        return normalised((self.p_a, self.p_b, self.p_c, self.p_d))

    @property
    def drafter(self) -> tuple[float, ...]:
        return normalised((self.q_a, self.q_b, self.q_c, self.q_d))


class RoundPicture(SketchPicture):
    tokens: list[str]  # what is certain at the step shown
    num_accepted: int
    chance: float  # of the draft that is being judged; 0 at other steps


class RoundStepper(SketchView):
    """`RoundStepper(real_rounds, num_drafts=3)`; controls: step, round, num_drafts, numbers, p_a .. p_d, q_a .. q_d."""

    def __init__(self, rounds: Sequence[RealRound] = (), **chosen: Value) -> None:
        if not all(isinstance(one, RealRound) for one in rounds):
            raise MiniVLLMError("RoundStepper draws RealRounds (minivllm/course/speculation_rounds.py)")
        self._rounds = {f"{i}": one for i, one in enumerate(rounds, 1)}
        self._controls = RoundControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> RoundPicture:
        return draw(self._controls, self._rounds)

    def _moved(self, control: str, value: object) -> None:
        if control == "step":
            last = len(scenes(self._controls, self._rounds))
            self._controls = replace(self._controls, step=seek((1, last, self._controls.step), value))
            return
        chosen = with_control(self._controls, controls(self._controls, self._rounds), control, value)
        chosen = replace(chosen, step=1) if control in ("round", "num_drafts", "numbers") else chosen
        last = len(scenes(chosen, self._rounds))  # raises where all weights of a row are 0
        self._controls = replace(chosen, step=min(chosen.step, last))


def draw(chosen: RoundControls, rounds: dict[str, RealRound]) -> RoundPicture:
    """One step of the round."""
    found = scenes(chosen, rounds)
    scene = found[chosen.step - 1]
    says = scene.title
    origin = "four tokens, p and q from the sliders" if chosen.round == PLAYGROUND else rounds[chosen.round].origin
    return {
        "view": "speculation-round", "title": says, "aria": f"One round of speculation. {says}",
        "text": _text(chosen, found), "status": "", "width": WIDTH_PX, "height": HEIGHT, "marks": marks(scene),
        "controls": controls(chosen, rounds), "steps": (1, len(found), chosen.step), "legend": LEGEND,
        "lines": list(scene.lines), "lines_name": "how it was found", "provenance": origin, "step_word": "stage",
        "tokens": [place.text for place in scene.places if place.state in ("accepted", "last")],
        "num_accepted": sum(place.state == "accepted" for place in scene.places), "chance": scene.chance,
    }  # fmt: skip


def controls(chosen: RoundControls, rounds: dict[str, RealRound]) -> list[Control]:
    options = [(PLAYGROUND, "four tokens, yours to set"), *((key, one.title) for key, one in rounds.items())]
    found: list[Control] = [Choice("round", "round", options, chosen.round)]
    if chosen.round != PLAYGROUND:
        return found
    num = chosen.num_drafts
    found += [
        Slider("num_drafts", "drafts", [*range(1, MOST_DRAFTS + 1)], num, counted(num, "draft")),
        Slider("numbers", "random numbers", [*range(1, 31)], chosen.numbers, f"draw {chosen.numbers}"),
    ]
    rows = {"p": chosen.target, "q": chosen.drafter}
    return found + [
        Slider(f"{name}_{word.lower()}", f"{name}({word})", [*WEIGHTS], getattr(chosen, f"{name}_{word.lower()}"),
               f"{row[i]:.2f}")
        for name, row in rows.items() for i, word in enumerate(WORDS)
    ]  # fmt: skip


def scenes(chosen: RoundControls, rounds: dict[str, RealRound]) -> list[Scene]:
    """Every stage of the chosen round."""
    if chosen.round != PLAYGROUND:
        return _real_scenes(rounds[chosen.round])
    return _scenes(played(chosen), chosen.target, chosen.drafter)


def played(chosen: RoundControls) -> Round:
    """The playground's round: one seed gives the numbers of all four places, whatever the sliders say."""
    random = Random(chosen.numbers)
    numbers = [[random.random() for _ in range(MOST_DRAFTS)] for _ in range(2)]
    last_u, num = random.random(), chosen.num_drafts
    drafts = drafts_of([chosen.drafter] * num, numbers[0][:num])
    return judge_round([chosen.target] * (num + 1), [chosen.drafter] * num, drafts, numbers[1][:num], last_u)


def _scenes(played: Round, target: tuple[float, ...], drafter: tuple[float, ...]) -> list[Scene]:
    drafts = [WORDS[token] for token in played.drafts]
    num, rows = len(drafts), {"p": target, "q": drafter}
    every = f"{', '.join(drafts)}"
    overlap = sum(map(min, target, drafter))
    lines = [f"acceptance Σ min(p, q) = {overlap:.3f}, the same at every place here"]
    found = [
        Scene(f"The drafter wrote {every}, each drawn from q; the target will read all {num + 1} places in one step.",
              _places(drafts, 0, "open"), WORDS, rows, lines=(*lines, "nothing is stored for good yet"))
    ]  # fmt: skip
    for i, judged in enumerate(played.judged):
        word, p, q = drafts[i], judged.target[judged.token_id], judged.drafter[judged.token_id]
        verdict = "accepted" if judged.is_accepted else "rejected"
        sign = "<" if judged.is_accepted else "≥"
        why = f"u = {judged.u:.3f} {sign} min(1, p / q) = {judged.chance:.3f}"
        says = f"Place {i + 1}: draft {word} is {verdict}, for {why}."
        line = f"min(1, {p:.3f} / {q:.3f}) = {judged.chance:.3f}; u = {judged.u:.3f} is drawn anew for every draft"
        places = _places(drafts, i, verdict)
        found.append(Scene(says, places, WORDS, rows, judged.token_id, judged.chance, judged.u, (line,)))
    kept, last = played.num_accepted, WORDS[played.last_token]
    if not played.is_complete:
        left = ", ".join(f"{word} {chance:.3f}" for word, chance in zip(WORDS, played.last_row, strict=True))
        line = f"max(p − q, 0) / {sum(max(a - b, 0) for a, b in zip(target, drafter, strict=True)):.3f} = {left}"
        says = "The rejected place draws again, from what p has and q has not: max(p − q, 0), made to sum to 1."
        found.append(
            Scene(says, _places(drafts, kept, "rejected"), WORDS, {**rows, "residual": played.last_row}, lines=(line,))
        )
    what = "the extra token, drawn from p" if played.is_complete else "its replacement, drawn from the residual"
    says = f"{last} is {what}: one target step gave {counted(kept + 1, 'token')}, {kept} of them drafted."
    lines = [f"tokens of this round: {kept} accepted + 1", f"mean of all rounds: {_mean(overlap, num)}"]
    row = {"p": target} if played.is_complete else {"residual": played.last_row}
    found.append(Scene(says, _places(drafts, kept, "last", last), WORDS, row, played.last_token, lines=tuple(lines)))
    return found


def _mean(overlap: float, num: int) -> str:
    terms = sum(overlap**i for i in range(num + 1))
    return f"1 + a + … + a^{num} = {terms:.3f} tokens, where a = {overlap:.3f}"


def _places(drafts: Sequence[str], at: int, state: str, last: str = "") -> tuple[Place, ...]:
    """The ladder while place `at` is judged: those before it are accepted, those after it open or never judged."""
    found = [Place(word, "accepted" if i < at else "open") for i, word in enumerate(drafts)]
    if state in ("accepted", "rejected"):
        found[at] = Place(drafts[at], state)
    if state in ("rejected", "last"):
        found[at + 1 :] = [Place(word, "dropped") for word in drafts[at + 1 :]]
    if state == "last":
        found = [*found[:at], Place(last, "last"), *found[at + 1 :]]
        return tuple(found) if at < len(drafts) else tuple(found[: len(drafts) + 1])
    return (*found, Place("+1", "open" if state != "rejected" else "dropped"))


def _real_scenes(one: RealRound) -> list[Scene]:
    drafts = [clipped(visible(text), 10) for text in one.drafts]
    num, last = len(drafts), clipped(visible(one.last), 10)
    says = f"{one.method} drafted {counted(num, 'token')}, without chances of its own: q is 1 for the draft."
    found = [Scene(says, _places(drafts, 0, "open"), (), {}, lines=one.lines)]
    for i in range(min(one.num_accepted + 1, num)):
        verdict = "accepted" if i < one.num_accepted else "rejected"
        words = tuple(clipped(visible(text), 10) for text, _ in one.tops[i])
        row, wanted = tuple(p for _, p in one.tops[i]), words[one.chosen[i]] if words else ""
        why = f"the target wants “{drafts[i]}” too" if verdict == "accepted" else f"the target wants “{wanted}”"
        says = f"Place {i + 1}: draft “{drafts[i]}” is {verdict}: {why}."
        line = "a certain draft is accepted where the target's own draw is the same token: chance p(draft)"
        places = _places(drafts, i, verdict)
        found.append(
            Scene(says, places, words, {"p": row} if row else {}, one.chosen[i] if words else -1, lines=(line,))
        )
    kept = one.num_accepted
    what = "extra token" if kept == num else "target's own token for the rejected place"
    says = f"“{last}” is the {what}: one target step gave {counted(kept + 1, 'token')}, {kept} of them drafted."
    words = tuple(clipped(visible(text), 10) for text, _ in one.tops[kept])
    row = tuple(p for _, p in one.tops[kept])
    shown = {"p": row} if row else {}
    found.append(Scene(says, _places(drafts, kept, "last", last), words, shown, one.chosen[kept] if words else -1))
    return found


def _text(chosen: RoundControls, found: Sequence[Scene]) -> str:
    scene = found[chosen.step - 1]
    lines = [scene.title, "places: " + ", ".join(f"{place.text} ({place.state})" for place in scene.places)]
    if scene.rows:
        rows = [["", *scene.words]]
        rows += [[name, *(f"{chance:.3f}" for chance in row)] for name, row in scene.rows.items()]
        lines += text_table(rows)
    return "\n".join([*lines, *scene.lines])
