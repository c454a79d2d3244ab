"""Query by key, step by step: which rows of the triangle a pass computes, and where it gets the keys from.

Row i is the query of token i, column j the key of token j, and i meets every j <= i. A pass computes the rows of its
new tokens. It makes the keys of these tokens itself, for the first time or once more; those before it are stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minivllm.errors import MiniVLLMError
from minivllm.events import StepRan
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Key, Mark, SketchPicture, Words, accepted, seek
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import FAINT, OWNER_COLOURS, clipped, counted, visible

MOST_TOKENS = 40
LEFT, TOP = 132.0, 8.0  # of the triangle
BARS_LEFT, BAR_PX = 430.0, 210.0  # the counters stand where no key is: right of the triangle's upper rows
KINDS = {
    "N": Key(OWNER_COLOURS[0], "solid", "N: key projected for the first time"),
    "r": Key(FAINT, "solid", "r: key reused, read from the cache"),
    "X": Key(OWNER_COLOURS[5], "hatch", "X: projected before, and computed again"),
    ".": Key(FAINT, "outline", ".: score of an older query, not computed in this step"),
}


class Pass(NamedTuple):
    """One step: the tokens that went through the model, and the keys that the last of them met."""

    num_new: int
    num_keys: int
    num_known: int  # the tokens that passes before it had computed already

    @property
    def first(self) -> int:
        return self.num_keys - self.num_new

    @property
    def num_again(self) -> int:
        return max(self.num_known - self.first, 0)

    @property
    def num_scores(self) -> int:
        """Pairs of query and key."""
        return sum(range(self.first + 1, self.num_keys + 1))

    def letter(self, query: int, key: int) -> str:
        """Of a cell at or below the diagonal: where this pass gets that key from, or "." for a query of the past."""
        if query < self.first:
            return "."
        return "r" if key < self.first else "X" if key < self.num_known else "N"


class Count(NamedTuple):
    """What a run had done when it had computed as many tokens as the picture shows."""

    name: str
    num_first: int  # token-forwards of tokens that were new
    num_again: int
    num_scores: int
    num_in_all: int  # token-forwards at its end

    @property
    def num_forwards(self) -> int:
        return self.num_first + self.num_again


@dataclass(frozen=True)
class TriangleControls:
    """What the reader chose."""

    run: str
    step: int


class TrianglePicture(SketchPicture):
    step: int
    rows: list[str]  # one letter for each cell, as KINDS names them
    counts: list[Count]


class AttentionTriangle(SketchView):
    """`AttentionTriangle({"with the cache": trace, "without": trace}, texts)`; controls: run, step.

    Each trace is of one text, generated in whatever way; `texts` says what its tokens are.
    """

    def __init__(self, runs: Mapping[str, Trace], texts: Sequence[str]) -> None:
        self._passes = {name: passes_of(name, trace) for name, trace in runs.items()}
        if not self._passes:
            raise MiniVLLMError("AttentionTriangle draws one run at least: give {name: trace}")
        self._texts = [visible(text) for text in texts]
        longest = max(each[-1].num_keys for each in self._passes.values())
        if longest > MOST_TOKENS:
            raise MiniVLLMError(f"the triangle shows {MOST_TOKENS} tokens at most, not {longest}; run a shorter text")
        if len(texts) < longest:
            raise MiniVLLMError(f"texts must name all {longest} tokens of the runs, not {len(texts)}")
        self._origin = provenance(next(iter(runs.values())).header)
        first = next(iter(self._passes))
        self._controls = TriangleControls(first, len(self._passes[first]))
        super().__init__()

    def drawn(self) -> TrianglePicture:
        return draw(self._passes, self._texts, self._controls, self._origin)

    def _moved(self, control: str, value: object) -> None:
        picture = self.drawn()
        if control == "step":
            self._controls = replace(self._controls, step=seek(picture["steps"], value))
        else:
            name = str(accepted(picture["controls"], control, value))
            self._controls = replace(self._controls, run=name)


def passes_of(name: str, trace: Trace) -> list[Pass]:
    """The steps of one text, from the engine's events. Raises MiniVLLMError where requests ran beside each other."""
    passes, known = list[Pass](), 0
    for event in trace:
        if isinstance(event, StepRan) and event.scheduled:
            if len(event.scheduled) > 1:
                raise MiniVLLMError(f"{name}: step {event.step} ran several requests; the triangle shows one text")
            [(_, num_new, num_keys)] = event.scheduled
            passes.append(Pass(num_new, num_keys, known))
            known = max(known, num_keys)
    if not passes:
        raise MiniVLLMError(f"{name}: nothing ran in this trace; record a generation")
    return passes


def draw(
    runs: Mapping[str, Sequence[Pass]], texts: Sequence[str], chosen: TriangleControls, origin: str = ""
) -> TrianglePicture:
    """The triangle of one run at one step, and the counters of all of them."""
    passes = runs[chosen.run]
    step = min(chosen.step, len(passes))
    now = passes[step - 1]
    steps = {name: step if name == chosen.run else _steps_until(now.num_keys, each) for name, each in runs.items()}
    counts = [_count(name, each, steps[name]) for name, each in runs.items()]
    rows = ["".join(now.letter(query, key) for key in range(query + 1)) for query in range(now.num_keys)]
    size = max(each[-1].num_keys for each in runs.values())
    pitch = min(24.0, (WIDTH_PX - LEFT - 130) / size)
    arrivals = [next(i for i, each in enumerate(passes, 1) if query < each.num_keys) for query in range(now.num_keys)]
    title = _title(chosen.run, now, step, counts)
    marks = [*_cells(rows, texts, pitch, arrivals), *_labels(now, texts, pitch, size), *_counters(counts, chosen.run)]
    return {
        "view": "attention-triangle", "title": title, "aria": f"Attention triangle. {title}",
        "text": "\n".join([title, *_text(rows, texts), *text_table(_table(counts))]), "status": "",
        "width": WIDTH_PX, "height": max(TOP + size * pitch + 13 * _num_label_lines(pitch) + 24, 40.0 * len(counts)),
        "marks": marks, "controls": [Choice("run", "run", [(name, name) for name in runs], chosen.run)],
        "steps": (1, len(passes), step), "legend": _legend(rows),
        "lines": _lines(now, counts), "lines_name": "counted until so many tokens were computed", "provenance": origin,
        "step": step, "rows": rows, "counts": counts,
    }  # fmt: skip


def _steps_until(num_keys: int, passes: Sequence[Pass]) -> int:
    """How many steps another run took until it had as many tokens: so runs of unlike steps compare."""
    return next((i for i, each in enumerate(passes, 1) if each.num_keys >= num_keys), len(passes))


def _count(name: str, passes: Sequence[Pass], step: int) -> Count:
    done = passes[:step]
    num_again = sum(each.num_again for each in done)
    num_first = sum(each.num_new for each in done) - num_again
    in_all = sum(each.num_new for each in passes)
    return Count(name, num_first, num_again, sum(each.num_scores for each in done), in_all)


def _title(run: str, now: Pass, step: int, counts: Sequence[Count]) -> str:
    again = f" ({now.num_again} again)" if now.num_again else ""
    so_far = "; ".join(f"{count.name} {count.num_forwards:,}" for count in counts)
    return (
        f"Step {step}, {run}: {counted(now.num_new, 'token')}{again} through the model, and the newest query meets"
        f" {counted(now.num_keys, 'key')}, of which {now.first or 'none'} from the cache."
        f" Token-forwards so far: {so_far}."
    )


def _cells(rows: Sequence[str], texts: Sequence[str], pitch: float, arrivals: Sequence[int]) -> Iterator[Mark]:
    for query, row in enumerate(rows):
        for key, letter in enumerate(row):
            fill, pattern, said = KINDS[letter]
            words = f"query {query} {texts[query]}, key {key} {texts[key]}: {said[3:]}"
            x, y = LEFT + key * pitch, TOP + query * pitch
            yield Box(x, y, pitch - 2, pitch - 2, fill, pattern, "", words, ("step", arrivals[query]))
    last = len(rows) - 1
    yield Box(LEFT - 2, TOP + last * pitch - 2, len(rows) * pitch + 2, pitch + 2, "pick", "outline", "pick")


def _labels(now: Pass, texts: Sequence[str], pitch: float, size: int) -> Iterator[Mark]:
    """Queries to the left; keys below, on several lines where columns are narrow."""
    for token in range(now.num_keys):
        ink = "ink" if token >= now.first else "soft"
        words = f"{clipped(texts[token], 14)}  {token}"
        yield Words(LEFT - 6, TOP + token * pitch + pitch / 2 - 8, words, 11, ink, "end")
    bottom, num_lines = TOP + size * pitch + 2, _num_label_lines(pitch)
    for token in range(now.num_keys):
        room = int(num_lines * pitch / 6.2)
        x, y = LEFT + (token + 0.5) * pitch - 1, bottom + 13 * (token % num_lines)
        yield Words(x, y, clipped(texts[token], room), 9, "ink" if token >= now.first else "soft", "middle")
    yield Words(LEFT, bottom + 13 * num_lines + 4, "key, under its column; to the left: query, its position", 11)


def _num_label_lines(pitch: float) -> int:
    """Lines of key labels, so that each has 48 pixels."""
    return max(2, -int(-48 // pitch))


def _counters(counts: Sequence[Count], shown: str) -> Iterator[Mark]:
    """Token-forwards so far, a bar for each run on one scale."""
    most = max(count.num_in_all for count in counts)
    for i, count in enumerate(counts):
        y = 4 + 38.0 * i
        width, again = (BAR_PX * number / most for number in (count.num_first, count.num_again))
        words = f"{count.name}: {counted(count.num_forwards, 'token-forward')}"
        yield Words(BARS_LEFT, y, words, 12, "ink" if count.name == shown else "soft")
        for left, length, letter in ((BARS_LEFT, width, "N"), (BARS_LEFT + width, again, "X")):
            if length:
                fill, pattern, _ = KINDS[letter]
                yield Box(left, y + 17, length, 12, fill, pattern, "", words)


def _legend(rows: Sequence[str]) -> list[Key]:
    """Of the kinds that are shown; their letters are the text twin's."""
    kinds = [kind for kind in KINDS if any(kind in row for row in rows)]
    return [KINDS[kind]._replace(words=KINDS[kind].words[3:]) for kind in kinds]


def _lines(now: Pass, counts: Sequence[Count]) -> list[str]:
    lines = [f"this step: {counted(now.num_scores, 'score')}, one for each query and key that meet"]
    for count in counts:
        lines.append(
            f"{count.name}: {counted(count.num_forwards, 'token-forward')} so far, {count.num_again:,} of them again"
            f" ({count.num_in_all:,} at its end), {counted(count.num_scores, 'score')}"
        )
    return lines


def _table(counts: Sequence[Count]) -> list[list[str]]:
    head = ["so far", "token-forwards", "of them again", "scores"]
    return [head, *([c.name, f"{c.num_forwards:,}", f"{c.num_again:,}", f"{c.num_scores:,}"] for c in counts)]


def _text(rows: Sequence[str], texts: Sequence[str]) -> list[str]:
    lines = [
        f"{query:3} {clipped(text, 14):14} {row}" for query, (text, row) in enumerate(zip(texts, rows, strict=False))
    ]
    said = [KINDS[kind].words for kind in KINDS if any(kind in row for row in rows)]
    return [*lines, f"rows are queries, columns keys; {'; '.join(said)}"]
