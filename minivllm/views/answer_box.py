"""A field and a button for a guess or an answer; what came of it stands below, as the same card that a cell shows.

    AnswerBox(predict("05.1", "How many blocks?", unit="blocks"))
    ExerciseBox("02.1")                      # check's verdict, its hints, and "other numbers"

Only ipywidgets' own controls: they work by keyboard. A callback may run on a thread of the kernel's, so it lets nothing
out: an error ends in the card. Without a browser the box is its card, as HTML and as text.
"""

import re
import threading
from collections.abc import Callable, Mapping

import ipywidgets

from minivllm.course.card import Card
from minivllm.course.check import Check, check
from minivllm.course.exercises import find
from minivllm.course.exercises.exercise import CodeProblem, Facts
from minivllm.course.predict import Prediction
from minivllm.views.widget import in_words


class Box(ipywidgets.VBox):
    """One field, some buttons, one card. No key but a button's sends anything: a slip of the hand costs no try."""

    def __init__(
        self, card: Card, label: str, unit: str, choices: tuple[str, ...], verbs: Mapping[str, object]
    ) -> None:
        wide = ipywidgets.Layout(width="max-content", max_width="760px")
        self.field: ipywidgets.Text | ipywidgets.RadioButtons
        if choices:
            self.field = ipywidgets.RadioButtons(options=list(choices), value=None, layout=wide, description=label)
        else:
            self.field = ipywidgets.Text(placeholder=f"in {unit}" if unit else "your answer", description=label)
        self._verbs: dict[str, Callable[[object], Card]] = {n: v for n, v in verbs.items() if callable(v)}
        self.buttons = {name: ipywidgets.Button(description=name, tooltip=f"{label}: {name}") for name in self._verbs}
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self._press(name))
        self.card = card
        self.shown = ipywidgets.HTML(card._repr_html_())
        self._lock = threading.Lock()
        super().__init__(children=(self.shown, ipywidgets.HBox((self.field, *self.buttons.values()))))

    def _press(self, name: str) -> None:
        with self._lock:
            try:
                self.card = self._verbs[name](self.field.value)
            except Exception as error:
                self.card = Card("wrong", in_words(error))
            self.shown.value = self.card._repr_html_()

    def __repr__(self) -> str:
        return repr(self.card)

    def _repr_mimebundle_(self, **options: object) -> tuple[dict[str, object], dict[str, object]]:
        bundle = super()._repr_mimebundle_(**options)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle or {})
        return data | {"text/plain": repr(self.card), "text/html": self.card._repr_html_()}, {}


class AnswerBox(Box):
    """Writes a guess down; the cell that reveals the answer ends it."""

    def __init__(self, prediction: Prediction) -> None:
        verbs = {"write it down": prediction.guess}
        super().__init__(prediction.card(), "guess", prediction.unit, prediction.choices, verbs)


class ExerciseBox(Box):
    """Answers an exercise that asks for a number, a list or a choice; code is checked in a cell."""

    def __init__(self, exercise_id: str, checked: Check = check, facts: Facts | None = None) -> None:
        exercise = find(exercise_id)
        problem = checked.problem(exercise, facts or {})
        parts = () if isinstance(problem, CodeProblem) else problem.parts
        unit, choices = (parts[0].unit, parts[0].choices) if len(parts) == 1 else ("", ())

        def judged(text: object) -> Card:
            return checked(exercise_id, entries(text), facts=facts)

        def redrawn(_: object) -> Card:
            return checked.redraw(exercise_id)

        verbs = {"check": judged} if facts or choices else {"check": judged, "other numbers": redrawn}
        super().__init__(checked.ask(exercise_id, facts=facts), exercise_id, unit, choices, verbs)


def entries(text: object) -> object:
    """What was typed, as a list where it is one: entries("[1, 2.5]"), entries("a, b"); "1,234" is one number."""
    if not isinstance(text, str):
        return text
    is_list = text.strip().startswith(("[", "("))
    words = re.split(r",\s+|,(?!\d{3}(?!\d))", text.strip().strip("[]()"))
    values = [_number(word.strip().strip("'\"")) for word in words if word.strip()]
    return values if is_list or len(values) > 1 else text


def _number(word: str) -> object:
    try:
        return int(word) if word.lstrip("+-").isdigit() else float(word)
    except ValueError:
        return word
