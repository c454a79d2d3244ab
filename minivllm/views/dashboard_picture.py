"""The engine room in one picture: eight plots, what was decided last and why, and the load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from minivllm.course.engine_frames import MOST_DECISIONS, Decision, Frame, Load
from minivllm.views.block_map_picture import provenance
from minivllm.views.dashboard_panels import PANELS, Window, amount, height, panel_marks, window
from minivllm.views.sentences import PREEMPTION_REASONS, WAIT_REASONS
from minivllm.views.sketch import WIDTH_PX, Choice, Control, Line, Mark, Press, SketchPicture, Slider, Words
from minivllm.views.sketch import table as text_table
from minivllm.views.theme import clipped, counted

ROW_PX = 15
TABLE_X = (0.0, 62.0, 150.0, 250.0)
SETTINGS = {  # label and unit of each slider
    "rate": ("arrivals", "a second"),
    "prompt_tokens": ("prompt", "tokens"),
    "output_tokens": ("output", "tokens"),
    "shared_tokens": ("shared prefix", "tokens"),
    "token_budget": ("token budget", "tokens a step"),
    "batch_limit": ("batch limit", "requests"),
}
BEGIN_REASONS = {
    "fits": "a seat, budget and blocks were there",
    "alone": "nobody else runs, so it may use the last block",
    "new_batch": "the last batch is over",
    "swapped_in": "its blocks came back from the host",
}
FINISH_REASONS = {
    "length": "it has all the tokens that were asked for", "stop": "it wrote the end of its text", "abort": "dropped",
}  # fmt: skip
REASONS = {
    "began": BEGIN_REASONS, "waits": WAIT_REASONS, "preempted": PREEMPTION_REASONS, "swapped out": PREEMPTION_REASONS,
    "finished": FINISH_REASONS,
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """What the reader chose to see."""

    run: str = ""  # of several saved ones
    seconds: str = "30"  # of the past
    frame: int | None = None  # of a replay; None: the last


class DashboardPicture(SketchPicture):
    decided: list[tuple[str, str, str, str]]  # step, request, decision, reason in words


def draw(
    frames: Sequence[Frame], header: Mapping[str, object], chosen: Chosen, room: Sequence[Control] = (),
    status: str = "", said: str = "",
) -> DashboardPicture:  # fmt: skip
    """A picture of the newest frame, or of the chosen one of a replay; `room` are the controls of its source."""
    is_live = header.get("live") == "live"
    controls = [*room, Choice("seconds", "shows", [(s, f"{s} s") for s in ("10", "30", "120")], chosen.seconds)]
    index = len(frames) - 1 if chosen.frame is None else chosen.frame
    marks: list[Mark] = []
    shown: Window | None = None
    decided: list[tuple[str, str, str, str]] = []
    if frames:
        shown = window(frames, index, float(chosen.seconds))
        decided = [(str(d.step), d.request_id or "-", d.what, why(d)) for d in last_decisions(frames, index)]
        marks = [*panel_marks(shown), *_table(decided, height() + 8), *_axis(shown)]
    title = _title(shown, header, is_live)
    return {
        "view": "dashboard", "title": title, "aria": f"Dashboard. {title}",
        "text": "\n".join(filter(None, (_text(title, decided, controls, shown), status))), "status": status,
        "width": WIDTH_PX, "height": height() + 22 + ROW_PX * (MOST_DECISIONS + 1), "marks": marks,
        "controls": controls, "steps": None if is_live or not frames else (0, len(frames) - 1, index),
        "step_word": "frame", "tick_ms": 100, "legend": [],
        "lines": _lines(shown, said),
        "lines_name": "the load and the bytes of a step", "provenance": provenance(header),
        "decided": decided,
    }  # fmt: skip


def buttons(is_playing: bool) -> list[Control]:
    """Start, pause, one step, reset, save."""
    return [
        Press("start", "start", is_playing), Press("pause", "pause", not is_playing),
        Press("one step", "one step"), Press("reset", "reset"), Press("save", "save"),
    ]  # fmt: skip


def sliders(choices: Mapping[str, Sequence[float]], wished: Load) -> list[Control]:
    """One for each setting of the load."""
    return [
        Slider(name, label, list(choices[name]), getattr(wished, name), f"{getattr(wished, name):g} {unit}")
        for name, (label, unit) in SETTINGS.items()
    ]


def last_decisions(frames: Sequence[Frame], index: int) -> list[Decision]:
    """The newest first, as many as the table has rows."""
    back = (decision for i in range(index, -1, -1) for decision in reversed(frames[i].decisions))
    return list(islice(back, MOST_DECISIONS))


def why(decision: Decision) -> str:
    return REASONS.get(decision.what, {}).get(decision.reason, decision.reason)


def _title(shown: Window | None, header: Mapping[str, object], is_live: bool) -> str:
    origin = "Live" if is_live else "Recorded"
    if shown is None:
        return f"{origin}: nothing has run yet. Press start, or one step."
    frame = shown.now[1]
    who = f"{frame.num_running} run, {frame.num_waiting} wait, {frame.num_preempted} of them preempted"
    return f"{origin}, {header.get('model', 'an engine')}, second {frame.time_s:.1f}, step {frame.step}: {who}."


def _axis(shown: Window) -> list[Mark]:
    """What time the plots span, and what the dashed lines across them are."""
    words = f"each plot spans {shown.length_s:g} s; at a dashed upright line a slider was moved"
    return [Words(WIDTH_PX, height() - 8, words, 10, "soft", "end")]


def _table(decided: Sequence[tuple[str, str, str, str]], top: float) -> list[Mark]:
    rows = [("step", "request", "decision", "because"), *decided]
    marks: list[Mark] = [Line(0, top + ROW_PX + 1, WIDTH_PX, top + ROW_PX + 1, "line")]
    for i, row in enumerate(rows):
        cells = zip(TABLE_X, row, (9, 12, 14, 74), strict=True)
        ink = "soft" if i == 0 else "ink"
        marks += [Words(x, top + 3 + i * ROW_PX, clipped(words, most), 11, ink) for x, words, most in cells]
    return marks


def _lines(shown: Window | None, said: str) -> list[str]:
    """The load in force, what the ledger says of the last second, and what came of the last button."""
    if shown is None:
        return [said] if said else []
    before, frame = shown.now
    load = frame.load
    now = f"In force: {load.rate:g} arrivals a second, prompts of {load.shared_tokens} + {_range(load.prompt_tokens)}"
    lines = [f"{now} tokens, outputs of {_range(load.output_tokens)}; {load.token_budget} tokens and "
             f"{counted(load.batch_limit, 'request')} a step at most."]  # fmt: skip
    costed = frame.costed_steps - before.costed_steps
    if costed:
        names = {"weight_bytes": "weights", "kv_bytes": "K and V", "logit_bytes": "logits"}
        moved = [f"{amount((getattr(frame, n) - getattr(before, n)) / costed / 1e6)} MB {w}" for n, w in names.items()]
        took, floor = frame.costed_ms - before.costed_ms, frame.floor_ms - before.floor_ms
        share = f"{100 * floor / took:.0f}%" if took else "-"
        lines.append(f"Ledger, a step of the last second: {', '.join(moved)}; the floor is {share} of what it took.")
    else:
        lines.append("No ledger kept: nobody worked out what these steps had to move.")
    return [*lines, said] if said else lines


def _range(mean: int) -> str:
    return f"{max(1, round(mean / 2))}..{max(1, round(mean * 1.5))}"


def _text(
    title: str, decided: Sequence[tuple[str, str, str, str]], controls: Sequence[Control], shown: Window | None
) -> str:
    lines = [title]
    if shown is not None:
        before, frame = shown.now
        rows = [[panel.title, *(f"{s.name} {amount(s.read(before, frame))}" for s in panel.series)] for panel in PANELS]
        widest = max(map(len, rows))
        lines += text_table([[*row, *[""] * (widest - len(row))] for row in rows])
    moved = [f"{c.label} {c.shown}" for c in controls if isinstance(c, Slider)]
    if moved:
        lines.append("sliders: " + ", ".join(moved))
    lines += [f"{c.label} {c.value}" for c in controls if isinstance(c, Choice)]
    lines += [f"step {step}: {who} {what}, because: {reason}" for step, who, what, reason in decided]
    return "\n".join(lines)
