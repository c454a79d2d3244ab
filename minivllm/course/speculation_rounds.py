"""Rounds of speculation that an engine ran, in words: what was drafted, how much was kept, what the target thought."""

from dataclasses import dataclass

from minivllm.errors import MiniVLLMError

Top = tuple[tuple[str, float], ...]  # likely tokens of a place and the model's chance of each


@dataclass(frozen=True)
class RealRound:
    """One request in one step. `tops` and `chosen` have a place for each token that the round gave, in order.

    drafts: texts. last: text of the extra or replacing token. chosen: which of a place's likely tokens came out.
    """

    method: str
    step: int
    drafts: tuple[str, ...]
    num_accepted: int
    last: str
    tops: tuple[Top, ...]
    chosen: tuple[int, ...]
    origin: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.num_accepted <= len(self.drafts) or not self.drafts:
            raise MiniVLLMError(f"a round of {len(self.drafts)} drafts cannot accept {self.num_accepted}")
        if len(self.tops) != self.num_accepted + 1 or len(self.chosen) != self.num_accepted + 1:
            raise MiniVLLMError(f"a round that accepts {self.num_accepted} gives one token more, each with its chances")

    @property
    def title(self) -> str:
        return f"{self.method}, step {self.step}: {self.num_accepted} of {len(self.drafts)} accepted"

    @property
    def lines(self) -> tuple[str, ...]:
        return (f"step {self.step} of a real run; drafts and verdicts are the engine's event DraftJudged",)
