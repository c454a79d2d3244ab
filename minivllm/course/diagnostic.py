"""Twenty questions on nine subjects that say where to start: choices in words, and numbers drawn for each learner.

    test = Diagnostic(open_records())
    test.hand_in("C8", "b")
    advice(test.scores())                # "Start with notebook 05 (...)"

Numbers are what the question bank's calculators work out, the wrong ones what its slips give. An answer counts once;
`begin_again` draws other numbers and forgets the answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from minivllm.course.multiple_choice import MultipleChoice, Option, of_bank, shuffled
from minivllm.course.questions import groups
from minivllm.course.records import Record, Records
from minivllm.errors import MiniVLLMError

KIND, ROUND = "diagnostic", "round"
# Group -> the notebooks that teach it: the first is where to start, the next is where it goes on.
STARTS = {
    "A": ("02", "03"), "B": ("04",), "C": ("05",), "D": ("05", "07"), "E": ("03", "09"), "F": ("01", "10"),
    "G": ("12",), "J": ("01",), "K": ("02",), "L": ("06",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InWords:
    """A question whose answers are sentences; `wrong` says of each other sentence what is wrong with it.

    `numbers` are those of the texts, as "printed = expression of calculators": see question_facts.py.
    """

    ask: str
    right: str
    wrong: Mapping[str, str]
    numbers: tuple[str, ...] = ()


WORDS = {
    "A1": InWords(
        "Why does a decoder keep K and V of past tokens, but not Q?",
        "K and V are read again by every later token, a query never is.",
        {
            "Queries are too large to keep.": "Size is no reason: a query is used once, and nobody reads it again.",
            "All tokens share one query.": "Each token has its own query, and uses it in one step only.",
            "K and V may be approximated, Q may not.": "Nothing is approximated: stored K and V are those computed.",
        },
    ),
    "B8": InWords(
        "A request's blocks are taken as it grows. Which of its slots are wasted?",
        "At most the empty ones of its last block.",
        {
            "None at all.": "The last block is rarely full, and nobody else can use its empty slots.",
            "All up to the longest allowed length.": "That is reservation; blocks are taken when they are needed.",
            "The gaps between its blocks.": "All blocks are of one size, so any free block fits: no gap is lost.",
        },
    ),
    "C9": InWords(
        "What does PagedAttention change about the attention that a token computes?",
        "Nothing: the same K and V are read through a table.",
        {
            "It attends to fewer tokens.": "Sparse attention does; here every key is still read.",
            "It approximates the softmax.": "The result is exact, up to the order of additions.",
            "It fetches old tokens from the CPU.": "Every block of a running request lies in the device's memory.",
        },
    ),
    "D1": InWords(
        "Two samples share a prompt whose last block is half full. What is copied when one of them writes?",
        "That last block, once.",
        {
            "The blocks of the whole prompt.": "Full blocks are never written again, so they stay shared.",
            "Nothing: both write into it.": "Both would write to the same slot, and one would read the other's token.",
            "The one slot that is written.": "A table names blocks, not slots: the copy is a whole block.",
        },
    ),
    "E2": InWords(
        "What does continuous batching change?",
        "The batch is chosen anew at every step.",
        {
            "The batch may be larger.": "Its bound stays; its seats are refilled as soon as somebody is done.",
            "Requests of equal length are grouped.": "Lengths need not match: whoever is done leaves.",
            "Nobody waits any more.": "Queues remain when more arrive than seats, tokens or blocks allow.",
        },
    ),
    "F2": InWords(
        "One request decodes alone, on a GPU at its limits. What takes most of a step's time?",
        "Reading all the weights for a single token.",
        {
            "Computing the prompt again.": "K and V of the prompt are stored: one new token is computed.",
            "Its FLOPs, which are as many as the prompt's.": "They are those of one token, about 2 for each weight.",
            "Choosing the token from the logits.": "That reads one row of logits, little beside the weights.",
        },
    ),
    "G1": InWords(
        "A drafter proposes 4 tokens and the target checks them in one step. How many tokens may the step give?",
        "1 to 5: the accepted ones and one of the target's own.",
        {
            "0 to 4: the accepted ones.": "The target's own token comes after them, even where all are wrong.",
            "Always 5.": "What stands behind a rejected draft is dropped.",
            "Always 4.": "A rejected draft ends the round, and a whole round gains one token more.",
        },
    ),
    "J3": InWords(
        "The batch of a decode step grows from 1 to 64. What keeps its FLOPs per byte?",
        "Attention over the stored K and V.",
        {
            "The products with the weights.": "The weights are read once for all 64, so their FLOPs per byte grow.",
            "Both.": "The weights are read once for all 64; only K and V are everybody's own.",
            "Neither.": "Each sequence brings K and V of its own: bytes grow as FLOPs do.",
        },
    ),
    "K3": InWords(
        "How many numbers does MLA of DeepSeek-V3 keep for each token and layer, and MQA with heads of 128?",
        "MLA 576, MQA 256.",
        {
            "MLA 64, MQA 256.": "64 is the rotary key; a latent of 512 is kept beside it, so MQA keeps less.",
            "MLA 1,152, MQA 256.": "One latent serves K and V: there is no factor of 2.",
            "MLA 576, MQA 128.": "MQA keeps one key and one value, 128 numbers each.",
        },
        ("576 = kv_bytes_per_token('deepseek-v3') / 61 / 2", "512 = kv_bytes_per_token('deepseek-v3') / 61 / 2 - 64",
         "1,152 = 2 * (512 + 64)", "256 = 2 * 128"),
    ),
    "L1": InWords(
        "Two programs each did a part of one query's keys. How do their partial outputs become one?",
        "Scaled by e^(own maximum − larger maximum), added, divided once.",
        {
            "By their mean.": "A part weighs as much as its sum of exponentials, which differs.",
            "By adding sums and outputs as they are.": "Their exponentials were taken below different maxima.",
            "By keeping the part with the larger maximum.": "Keys of the other part have weight too.",
        },
    ),
}  # fmt: skip
# One question in words for each subject, then one number for each.
ORDER = (*WORDS, "A2", "B6", "C8", "D9", "E1", "F4", "G4", "J1", "K1", "L2")


@dataclass(frozen=True, slots=True)
class Item:
    """One of the twenty: the bank's question it belongs to, and what this learner is shown."""

    id: str
    question: MultipleChoice

    @property
    def group(self) -> str:
        return self.id[0]


class Score(NamedTuple):
    """How a subject stands."""

    group: str
    num_right: int
    num_answered: int
    num_items: int

    @property
    def title(self) -> str:
        return groups()[self.group].title

    @property
    def share(self) -> float:
        """Right ones among those answered, from 0 to 1."""
        return self.num_right / self.num_answered if self.num_answered else 0.0


@dataclass
class Diagnostic:
    """One learner's twenty questions and the answers so far; each answer is written down when it is handed in."""

    records: Records
    round: int = field(init=False)
    items: tuple[Item, ...] = field(init=False)
    answers: dict[str, Option] = field(init=False)

    def __post_init__(self) -> None:
        stored = dict(self.records.read_all(KIND))
        number = stored.pop(ROUND, {}).get("round", 0)
        self._draw(number if isinstance(number, int) else 0)
        self.answers = dict(self._known(stored))

    def item(self, item_id: str) -> Item:
        return next(item for item in self.items if item.id == item_id)

    def hand_in(self, item_id: str, letter: str) -> Option:
        """Answer one question for good. Raises MiniVLLMError for a letter there is not, and for a second answer."""
        if item_id in self.answers:
            raise MiniVLLMError(f"question {item_id} is answered already; begin again for other numbers")
        option = self.item(item_id).question.by_letter(letter)
        self.answers[item_id] = option
        kept: Record = {"round": self.round, "words": option.words, "is_right": option.is_right, "slip": option.slip}
        self.records.write(KIND, item_id, kept)
        return option

    def begin_again(self) -> None:
        """Forget the answers and draw other numbers."""
        self._draw(self.round + 1)
        self.answers = {}
        self.records.write(KIND, ROUND, {"round": self.round})

    def scores(self) -> list[Score]:
        """The subjects, in the order of their letters."""
        return scores(self.items, self.answers)

    def _draw(self, number: int) -> None:
        self.round, seed = number, f"{self.records.seed}/diagnostic/{number}"
        self.items = tuple(Item(name, _posed(name, seed)) for name in ORDER)

    def _known(self, stored: Mapping[str, Record]) -> list[tuple[str, Option]]:
        """The answers of this round whose question still reads as it did."""
        return [
            (item.id, option)
            for item in self.items
            for kept in [stored.get(item.id, {})]
            for option in item.question.options
            if kept.get("round") == self.round and kept.get("words") == option.words
        ]


def scores(items: tuple[Item, ...], answers: Mapping[str, Option]) -> list[Score]:
    """How each subject of the items stands."""
    found = []
    for letter in sorted({item.group for item in items}):
        own = [item.id for item in items if item.group == letter]
        given = [answers[name] for name in own if name in answers]
        found.append(Score(letter, sum(option.is_right for option in given), len(given), len(own)))
    return found


def weakest(found: list[Score]) -> Score | None:
    """The subject with the smallest share right, the one that is taught first among equals; None if nothing is weak."""
    known = [score for score in found if score.num_answered and score.share < 1]
    return min(known, key=lambda score: (score.share, STARTS[score.group][-1], score.group), default=None)


def advice(found: list[Score]) -> str:
    """One line: the notebook to start with."""
    if not any(score.num_answered for score in found):
        return "Answer a question, and this line says where to start."
    weak, is_over = weakest(found), all(score.num_answered == score.num_items for score in found)
    if weak is None and not is_over:
        return "All right so far: go on."
    if weak is None:
        return "All right: start with the exercises of notebook 05, or with `minivllm quiz --mock 30`."
    first, *later = STARTS[weak.group]
    then = f", then {later[0]}" if later else ""
    so_far = "" if is_over else "So far: "
    got = f"{weak.title}: {weak.num_right} of {weak.num_answered} right"
    return f"{so_far}{'start' if so_far else 'Start'} with notebook {first}{then} ({got})."


def _posed(item_id: str, seed: str) -> MultipleChoice:
    if item_id not in WORDS:
        return of_bank(item_id, seed)
    item = WORDS[item_id]
    wrong = [Option(words, "", why) for words, why in item.wrong.items()]
    return shuffled(item.ask, item.right, wrong, item.right, Random(f"{item_id}/{seed}"))
