"""Predict, run, explain: a guess is written down before the answer shows, and can never be changed after it.

    blocks = predict("05.1", "How many blocks of 8 do 21 tokens take?", ..., unit="blocks")   # your number for the ...
    blocks.reveal(num_blocks)                 # after the run: guess, truth and their ratio, stored for good
    predict.calibration("05")                 # all guesses of a notebook beside the truth

An unfilled notebook shows red and goes on: without a guess nothing is stored, and the answer waits under a fold. A
guess may be changed until its answer was revealed; running the cell again shows the one that is stored. A word from
`choices` may be guessed instead of a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minivllm.course.answer_units import in_unit, parsed, readings
from minivllm.course.calibration import Calibration, Guess
from minivllm.course.card import Card
from minivllm.course.exercises.compare import LARGEST, agrees, plain
from minivllm.course.judge import LETTERS, is_unfilled
from minivllm.course.learner import open_records
from minivllm.course.records import Record, Records
from minivllm.errors import MiniVLLMError, short

KIND = "guess"
Answer = float | int | str


@dataclass(frozen=True)
class Prediction:
    """One question that is guessed first. It shows itself as a card; `guess` writes down, `reveal` compares."""

    id: str
    question: str
    unit: str
    choices: tuple[str, ...]
    records: Callable[[], Records] = field(repr=False)
    refused: str = ""  # what was wrong with the guess of this cell

    def guess(self, value: object) -> Card:
        """Write a guess down; refused, in words, once the answer is known or when it is no answer."""
        return _carded(self.id, lambda: _shown(self, self._guess(value)))

    def reveal(self, truth: object) -> Card:
        """Store the truth with the guess, and compare. The first truth counts; later runs show what was stored.

        Without a guess the question stays open: who runs all cells first has lost nothing.
        """
        return _carded(self.id, lambda: self._reveal(truth))

    def card(self) -> Card:
        """The stored guess, or that there is none yet."""
        return _carded(self.id, lambda: _shown(self, self.refused))

    def __repr__(self) -> str:
        return repr(self.card())

    def _repr_html_(self) -> str:
        return self.card()._repr_html_()

    def record(self) -> Record:
        return self.records().read(KIND, self.id) or {}

    def _guess(self, value: object) -> str:
        """Store a guess; what to say when it is refused, else ""."""
        record, number = self.record(), self._answer(value)
        if number is None:
            in_words = f"one number, in {self.unit}" if self.unit else "one number"
            wanted = f"one of {', '.join(self.choices)}" if self.choices else in_words
            return f"Guess {wanted}, not {short(value)}."
        if "truth" in record and "guess" in record:
            return "" if agrees(record.get("guess"), number) else "The answer is known: the guess stays as it was."
        self.records().write(KIND, self.id, {**record, "question": self.question, "unit": self.unit, "guess": number})
        return ""

    def _reveal(self, truth: object) -> Card:
        value = self._answer(truth)
        if value is None:
            return Card("wrong", f"{self.id}: the answer must be a number or a choice, not {short(truth)}")
        record = self.record()
        if "guess" not in record:
            return _open(self, value)
        if "truth" not in record:
            record |= {"question": self.question, "unit": self.unit, "truth": value}
            self.records().write(KIND, self.id, record)
        note = "" if agrees(record["truth"], value, 1e-9) else f"This run gives {_number(value)}; the first one counts."
        return _compared(self, record, note)

    def _answer(self, value: object) -> Answer | None:
        """A guess as a number or one of the choices; None for anything else."""
        value = plain(value)
        if self.choices:
            letter = value.strip().lower() if isinstance(value, str) else ""
            if len(letter) == 1 and letter in LETTERS[: len(self.choices)]:
                return self.choices[LETTERS.index(letter)]
            return next((choice for choice in self.choices if agrees(choice, value)), None)
        if isinstance(value, str):
            number = parsed(value)
            means = readings(number, self.unit) if number else []
            value = in_unit(means[0].value, self.unit) if means else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            return None
        return value


class Predict:
    """`predict` itself: makes predictions over one learner's records, and draws how good they were."""

    def __init__(self, records: Callable[[], Records]) -> None:
        self._records = records

    def __call__(
        self, id_: str, question: str, guess: object = None, *, unit: str = "", choices: Sequence[str] = ()
    ) -> Prediction:
        """Ask, and write down the guess if there is one. `...` and None are no guess yet."""
        made = Prediction(str(id_), question, unit, tuple(choices), self._records)
        if is_unfilled(guess):
            return made
        try:
            refused = made._guess(guess)
        except MiniVLLMError as error:
            refused = str(error)
        return Prediction(made.id, question, unit, made.choices, self._records, refused)

    def calibration(self, notebook: str = "") -> Calibration:
        """Guess over truth for each prediction of a notebook ("05"), or of all."""
        try:
            stored = self._records().read_all(KIND)
        except MiniVLLMError:
            stored = {}
        chosen = {key: record for key, record in sorted(stored.items()) if key.startswith(notebook)}
        return Calibration(tuple(_guess_of(key, record) for key, record in chosen.items() if "truth" in record))


def _shown(prediction: Prediction, refused: str) -> Card:
    """The card of a question: locked, stored, or open."""
    record = prediction.record()
    title = f"{prediction.id} Predict: {prediction.question}"
    choices = tuple(f"{a}) {words}" for a, words in zip(LETTERS, prediction.choices, strict=False))
    notes = (refused,) if refused else ()
    if "truth" in record and "guess" in record:
        guess = _with_unit(prediction, record["guess"])
        return Card("plain", title, (*notes, f"Answered already; your guess: {guess}."))
    if "guess" in record:
        stored = f"Your guess: {_with_unit(prediction, record['guess'])}. It can be changed until the answer shows."
        return Card("wrong" if refused else "plain", title, (*notes, stored))
    how = "Put your guess in place of the dots, and run the cell." if not refused else ""
    return Card("open", title, tuple(filter(None, (*choices, *notes, f"No guess yet. {how}".strip()))))


def _open(prediction: Prediction, truth: Answer) -> Card:
    """The answer is known, the guess is not: the answer stays folded away."""
    how = "Guess first: put yours in place of the dots, run that cell, then this one."
    folded = ("Answer", f"{_with_unit(prediction, truth)}.")
    return Card("open", f"{prediction.id} {prediction.question}", (f"No guess yet. {how}",), folded=folded)


def _compared(prediction: Prediction, record: Record, note: str) -> Card:
    truth = f"Answer: {_with_unit(prediction, record['truth'])}."
    title, notes = f"{prediction.id} {prediction.question}", (note,) if note else ()
    guess = _guess_of(prediction.id, record)
    words = f"Your guess: {_with_unit(prediction, record['guess'])}{f', {guess.verdict}' if guess.verdict else ''}."
    return Card("right" if guess.is_near else "wrong", title, (truth, words, *notes))


def _guess_of(key: str, record: Record) -> Guess:
    guess, truth = record.get("guess"), record.get("truth")
    return Guess(key, str(record.get("question", "")), str(record.get("unit", "")), _plain(guess), _plain(truth))


def _plain(value: object) -> Answer | None:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else None


def _with_unit(prediction: Prediction, value: object) -> str:
    return f"{_number(value)} {prediction.unit}".rstrip() if isinstance(value, int | float) else str(value)


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _carded(id_: str, act: Callable[[], Card]) -> Card:
    """Records that cannot be read or written are a red card, and the notebook goes on."""
    try:
        return act()
    except MiniVLLMError as error:
        return Card("wrong", f"{id_}: {error}")


predict = Predict(open_records)
