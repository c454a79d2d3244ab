"""What predict, ask, check and solution show: one card, as HTML with escaped text and as plain text, in equal words.

The colour of the border (of JupyterLab's theme, light and dark) repeats what the sign and the words say already.
"""

import html
from dataclasses import dataclass
from typing import Literal

Tone = Literal["open", "wrong", "right", "plain"]
SIGNS: dict[Tone, str] = {"open": "○", "wrong": "✗", "right": "✓", "plain": "·"}
COLOURS: dict[Tone, str] = {
    "open": "var(--jp-error-color1, #d32f2f)",  # red before the learner works
    "wrong": "var(--jp-error-color1, #d32f2f)",
    "right": "var(--jp-success-color1, #2e7d32)",
    "plain": "var(--jp-border-color0, #9e9e9e)",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A title, lines below it, a listing in fixed width, a link into the repository, and words that wait folded."""

    tone: Tone
    title: str
    lines: tuple[str, ...] = ()
    listing: str = ""
    link: tuple[str, str] | None = None  # words, address relative to notebooks/
    folded: tuple[str, str] | None = None  # what stands on the fold, what lies below it

    def __repr__(self) -> str:
        body = [line for text in self.lines for line in text.split("\n")]
        body += [f"  {line}".rstrip() for line in self.listing.split("\n")] if self.listing else []
        body += [f"engine: {self.link[0]}"] if self.link else []
        body += [f"{self.folded[0]}: {self.folded[1]}"] if self.folded else []
        return "\n".join([f"{SIGNS[self.tone]} {self.title}", *(f"  {line}".rstrip() for line in body)])

    def _repr_html_(self) -> str:
        body = [f'<div style="font-weight:600">{SIGNS[self.tone]} {html.escape(self.title)}</div>']
        body += [f'<div style="white-space:pre-wrap">{html.escape(line)}</div>' for line in self.lines]
        if self.listing:
            body.append(f'<pre style="margin:4px 0;overflow-x:auto;background:none">{html.escape(self.listing)}</pre>')
        if self.link:
            words, address = map(html.escape, self.link)
            body.append(f'<div>engine: <a href="{address}">{words}</a></div>')
        if self.folded:
            summary, below = map(html.escape, self.folded)
            body.append(f"<details><summary>{summary}</summary>{below}</details>")
        style = f"border-left:4px solid {COLOURS[self.tone]};padding:4px 10px;margin:4px 0;max-width:760px"
        return f'<div role="status" style="{style}">{"".join(body)}</div>'
