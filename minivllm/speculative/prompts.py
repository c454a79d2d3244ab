"""Chat prompts for a draft to learn from: a grammar of our own, seeded, with templates and topics kept for judging.

The words are in prompts.json. One of eight questions, one of four tasks, one of six follow-ups and one of ten topics
are held out: training prompts use none of them, held-out prompts nothing else.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Grammar:
    """Templates and topics of one side of the split; prompts are drawn from `random`."""

    topics: list[str]
    ask: list[str]
    with_text: list[str]
    follow_ups: list[str]

    @staticmethod
    def of(*, held_out: bool) -> "Grammar":
        def part(name: str, every: int) -> list[str]:
            return [entry for i, entry in enumerate(WORDS[name]) if (i % every == every - 1) == held_out]

        return Grammar(part("topics", 10), part("ask", 8), part("with_text", 4), part("follow_ups", 6))

    def question(self, draw: random.Random) -> str:
        """One of the templates; two of five get a wish at their end."""
        ending = " " + draw.choice(WORDS["endings"]) if draw.random() < 0.4 else ""
        return self._filled(draw.choice(self.ask) + ending, draw)

    def about(self, text: str, draw: random.Random) -> str:
        """A task on a text: "Summarise ...", then the text."""
        return f"{self._filled(draw.choice(self.with_text), draw)}\n\n{text}"

    def follow_up(self, draw: random.Random) -> str:
        return self._filled(draw.choice(self.follow_ups), draw)

    def _filled(self, template: str, draw: random.Random) -> str:
        person, other = draw.sample(WORDS["people"], 2)
        topic, topic2 = draw.sample(self.topics, 2)
        return template.format(
            topic=topic, topic2=topic2, person=person, other=other, place=draw.choice(WORDS["places"]),
            n=draw.choice(WORDS["counts"]), m=draw.choice((20, 30, 50, 80, 100, 150)), tone=draw.choice(WORDS["tones"]),
            reader=draw.choice(WORDS["readers"]), language=draw.choice(WORDS["languages"]),
        )  # fmt: skip
