"""What a draft learns from: the target's own answers, made by our engine; prompts as prompts.py draws them.

Rounds: questions first; then tasks on texts and follow-ups to answers that earlier rounds gave, and plain text of a
corpus (lab/corpus.py) that the target continues. Half of the answers are greedy, the others drawn at 0.7 to 1.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from minivllm.llm import LLM
from minivllm.outputs import Tokenizer
from minivllm.request import SamplingParams
from minivllm.speculative.prompts import Grammar

ANSWER = 256  # tokens at most
SHARES = {"question": 0.55, "text": 0.25, "follow-up": 0.12, "continuation": 0.08}  # of prompts, from round 2 on

Corpus = torch.Tensor | None  # [rows, tokens] ids


@dataclass(frozen=True)
class Example:
    """A prompt and the target's answer to it, as token ids."""

    kind: str
    token_ids: np.ndarray  # uint16
    num_prompt: int


@dataclass(frozen=True)
class Batch:
    """Examples of about one length, padded at the end: [B, L] each."""

    token_ids: torch.Tensor
    is_answer: torch.Tensor  # true where the token is one of the answer's


@dataclass
class Writer:
    """Draws prompts, and remembers answers for tasks and follow-ups."""

    grammar: Grammar
    tokenizer: Tokenizer
    corpus: Corpus
    draw: random.Random
    told: list[tuple[str, str]] = field(default_factory=list)  # question, answer

    def prompt(self) -> tuple[str, list[int], str]:
        """Kind, token ids, and the question in words (empty: not a chat with one question)."""
        kinds = list(SHARES) if self.told else ["question"]
        kind = self.draw.choices(kinds, [SHARES[kind] for kind in kinds])[0]
        if kind == "question":
            question = self.grammar.question(self.draw)
            return kind, self._chat([question]), question
        if kind == "text":
            return kind, self._chat([self.grammar.about(self._text(), self.draw)]), ""
        if kind == "follow-up":
            question, answer = self.draw.choice(self.told)
            return kind, self._chat([question, answer, self.grammar.follow_up(self.draw)]), ""
        if self.corpus is None:
            return kind, self.tokenizer.encode(self._text()), ""
        return kind, self._piece(48, 160).tolist(), ""

    def _text(self) -> str:
        """A passage for a task: most often of an answer, else of the corpus."""
        if self.corpus is not None and self.draw.random() < 0.3:
            return self.tokenizer.decode(self._piece(40, 140).tolist()).strip()
        paragraphs = [p for p in self.draw.choice(self.told)[1].split("\n\n") if p.strip()]
        start = self.draw.randrange(len(paragraphs)) if paragraphs else 0
        return "\n\n".join(paragraphs[start : start + 2])[:900]

    def _piece(self, least: int, most: int) -> torch.Tensor:
        assert self.corpus is not None
        length = self.draw.randint(least, min(most, self.corpus.shape[1]))
        start = self.draw.randrange(self.corpus.shape[1] - length + 1)
        return self.corpus[self.draw.randrange(len(self.corpus)), start : start + length]

    def _chat(self, turns: list[str]) -> list[int]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        template = self.tokenizer.apply_chat_template  # type: ignore[attr-defined]
        text: str = template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))  # type: ignore[call-arg]


def training_examples(
    llm: LLM, corpus: Corpus, seconds: float, num_tokens: int, per_round: int, seed: int
) -> list[Example]:
    """Rounds of prompts and answers until `num_tokens` or, at a round's end, `seconds` are reached."""
    draw = random.Random(seed)
    writer = Writer(Grammar.of(held_out=False), llm.get_tokenizer(), corpus, draw)
    examples, begun, longest = list[Example](), time.perf_counter(), 0.0
    with tqdm(total=num_tokens, desc="answers", unit=" tokens", mininterval=10) as bar:
        while bar.n < num_tokens and time.perf_counter() - begun + longest < seconds:
            started = time.perf_counter()
            new = answered(llm, writer, per_round, is_greedy=False)
            longest = max(longest, time.perf_counter() - started)
            examples += new
            bar.update(sum(len(e.token_ids) - e.num_prompt for e in new))
        total, elapsed = bar.n, time.perf_counter() - begun
    print(
        f"{len(examples):,} answers of {total:,} tokens in {elapsed:.0f} s: {total / elapsed:,.0f} tokens/s", flush=True
    )
    return examples


def held_out_examples(llm: LLM, corpus: Corpus, count: int, seed: int) -> list[Example]:
    """Greedy answers to prompts of held-out templates on held-out topics and texts."""
    writer = Writer(Grammar.of(held_out=True), llm.get_tokenizer(), corpus, random.Random(seed))
    first = answered(llm, writer, count // 2, is_greedy=True)
    return first + answered(llm, writer, count - len(first), is_greedy=True)


def answered(llm: LLM, writer: Writer, count: int, *, is_greedy: bool) -> list[Example]:
    """One round; questions and their answers are remembered."""
    draw, limit = writer.draw, llm.config.max_model_len - ANSWER
    drawn = [prompt for prompt in (writer.prompt() for _ in range(count)) if len(prompt[1]) <= limit]
    temperatures = [0.0 if is_greedy or draw.random() < 0.5 else draw.uniform(0.7, 1.0) for _ in drawn]
    params = [
        SamplingParams(temperature=t, max_tokens=ANSWER, seed=draw.getrandbits(32), detokenize=False)
        for t in temperatures
    ]
    outputs = llm.generate([ids for _, ids, _ in drawn], params, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    remembered = [i for i, (_, _, question) in enumerate(drawn) if question][: max(1, count // 8)]
    for i in remembered:
        text = writer.tokenizer.decode(answers[i], skip_special_tokens=True)
        if text.strip():
            writer.told.append((drawn[i][2], text.strip()))
    return [
        Example(kind, np.array([*ids, *answer], dtype=np.uint16), len(ids))
        for (kind, ids, _), answer in zip(drawn, answers, strict=True)
        if answer
    ]


def batches(examples: Sequence[Example], tokens_per_batch: int, seed: int) -> Iterator[Batch]:
    """All examples once, those of about one length together, the batches in a seeded order."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].token_ids))
    groups, group = list[list[int]](), list[int]()
    for i in order:
        if group and _padded(len(examples[i].token_ids)) * (len(group) + 1) > tokens_per_batch:
            groups.append(group)
            group = []
        group.append(i)
    groups += [group] if group else []
    random.Random(seed).shuffle(groups)
    for group in groups:
        yield batch_of([examples[i] for i in group])


def batch_of(examples: Sequence[Example]) -> Batch:
    length = _padded(max(len(e.token_ids) for e in examples))
    token_ids = np.zeros((len(examples), length), dtype=np.int64)
    is_answer = np.zeros((len(examples), length), dtype=bool)
    for row, example in enumerate(examples):
        token_ids[row, : len(example.token_ids)] = example.token_ids
        is_answer[row, example.num_prompt : len(example.token_ids)] = True
    return Batch(torch.from_numpy(token_ids), torch.from_numpy(is_answer))


def frequent_tokens(examples: Sequence[Example], size: int, vocab_size: int, always: Sequence[int]) -> torch.Tensor:
    """The `size` most frequent tokens of the answers, `always` among them, ascending; ties go to the lower id."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for example in examples:
        np.add.at(counts, example.token_ids[example.num_prompt :].astype(np.int64), 1)
    counts[list(always)] = counts.max() + 1
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]).copy())


def _padded(length: int) -> int:
    return -(-length // 16) * 16
