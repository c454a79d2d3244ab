"""Builds the committed notebooks: `python -m minivllm.course.author build [NAMES]` runs notebooks/NN_name.py.

    new 07 "When can two requests own one block?"   makes notebooks/07_when_can_two_requests_own.py from the template
    build [NAMES]                                   runs them, drops what differs between runs, writes the .ipynb
    check [NAMES]                                   compares each .ipynb with its source

The .py (jupytext percent) is the source; the .ipynb beside it holds the same cells with their outputs, without widget
state, timings or random ids: a second build changes nothing (outputs tagged nbval-ignore-output, milliseconds, are
written only with a change of others). `check` compares sources, running nothing.
The picture of a cell tagged "readme:NAME" is written to pictures/NAME.png too, for pages that show it.
"""

import argparse
import os
import sys
import tempfile
from base64 import b64decode
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minivllm.course.learner import EXAMPLE
from minivllm.course.new_notebook import new_notebook
from minivllm.errors import ConfigError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT_S = 600
MOST_BYTES = 250_000  # of a notebook that people can still review
PICTURE_TAG = "readme:"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, build or check; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m minivllm.course.author", description=__doc__, formatter_class=raw)
    parser.add_argument("verb", choices=["new", "build", "check"])
    parser.add_argument(
        "names", nargs="*", help="such as 05_block_table or 05; default: all. For new: number and title"
    )
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "new":
            print(f"wrote {new_notebook(options.folder, options.names)}; edit it, then: make notebooks")
            return 0
        paths = sources(options.folder, options.names)
    except (FileNotFoundError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    work = build if options.verb == "build" else check
    are_good = [work(path, f"[{i}/{len(paths)}] {path.stem}") for i, path in enumerate(paths, 1)]
    return int(not all(are_good))


def sources(folder: Path, names: Sequence[str]) -> list[Path]:
    """The .py files of these notebooks, or of all. Raises FileNotFoundError for a name that fits none."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    for name in names:
        if not any(path.stem.startswith(name.removesuffix(".py")) for path in found):
            raise FileNotFoundError(f"no notebook source {folder}/{name}*.py")
    return [p for p in found if not names or any(p.stem.startswith(n.removesuffix(".py")) for n in names)]


def build(source: Path, label: str) -> bool:
    """Run one notebook and write its .ipynb; False, and nothing written, when a cell failed."""
    notebook = read_source(source)
    num_cells = len(notebook.cells)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=CELL_TIMEOUT_S, store_widget_state=False, record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
        on_cell_execute=lambda cell, cell_index: _progress(f"{label}: cell {cell_index + 1} of {num_cells}"),
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as ipython_folder:  # no startup files of the author's own
            fixed = {"IPYTHONDIR": ipython_folder, "PYTHONHASHSEED": "0", EXAMPLE: "example"}
            client.execute(env={**os.environ, **fixed})
    except CellExecutionError as error:
        _progress("")
        print(f"{label}: FAILED, nothing written\n{error}", file=sys.stderr)
        return False
    text = nbformat.writes(tidied(notebook)) + "\n"
    target = source.with_suffix(".ipynb")
    is_same = target.exists() and repeating(nbformat.read(target, as_version=4)) == repeating(notebook)
    if not is_same:
        target.write_text(text)
    for path, png in pictures(notebook, source.parent).items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
    _progress("")
    print(f"{label}: {'unchanged' if is_same else 'written'}, {len(text) / 1000:.0f} kB")
    return True


def repeating(notebook: NotebookNode) -> NotebookNode:
    """A notebook without the outputs that no two runs share: milliseconds, and what else stands in tagged cells."""
    kept = deepcopy(notebook)
    for cell in kept.cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", ()):
            cell.outputs = []
    return kept


def pictures(notebook: NotebookNode, folder: Path) -> dict[Path, bytes]:
    """The PNGs that tagged cells show, by the file each belongs in."""
    found: dict[Path, bytes] = {}
    for cell in notebook.cells:
        names = [tag.removeprefix(PICTURE_TAG) for tag in cell.metadata.get("tags", ()) if tag.startswith(PICTURE_TAG)]
        shown = [o["data"]["image/png"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        found |= {folder / "pictures" / f"{name}.png": b64decode(png) for name in names for png in shown}
    return found


def check(source: Path, label: str) -> bool:
    """Whether the committed .ipynb holds the cells of its source, all of them run."""
    target = source.with_suffix(".ipynb")
    problem = "is missing"
    if target.exists():
        committed = nbformat.read(target, as_version=4)
        problem = stale(read_source(source), committed) or unfit(target, pictures(committed, source.parent))
    if problem:
        print(f"{label}: {target.name} {problem}; run: make notebooks", file=sys.stderr)
    return not problem


def stale(source: NotebookNode, committed: NotebookNode) -> str:
    """What makes a committed notebook differ from its source; "" when nothing does."""
    if len(source.cells) != len(committed.cells):
        return f"has {len(committed.cells)} cells, its source {len(source.cells)}"
    for i, (wanted, cell) in enumerate(zip(source.cells, committed.cells, strict=True)):
        if _identity(wanted) != _identity(cell):
            return f"differs from its source in cell {i}"
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            return f"has never run cell {i}"
    return ""


def unfit(target: Path, shown: Mapping[Path, bytes]) -> str:
    """What readers of the repository would stumble over: too many bytes, or a picture of another build."""
    if target.stat().st_size > MOST_BYTES:
        return f"has {target.stat().st_size / 1000:.0f} kB, more than {MOST_BYTES // 1000}: draw less"
    old = [path.name for path, png in shown.items() if not path.exists() or path.read_bytes() != png]
    return f"shows other pictures than {', '.join(old)}" if old else ""


def read_source(path: Path) -> NotebookNode:
    """A percent script as a notebook with fixed ids and metadata."""
    notebook = jupytext.read(path, fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"c{i:02d}"
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between runs: widget state, live views that have a twin, versions, one stream in pieces."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if len(output.get("data", {})) > 1:
                output.data.pop(WIDGET_VIEW, None)
                output.metadata.pop(WIDGET_VIEW, None)
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one: where they were cut depends on time."""
    joined: list[NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else None
        if before is not None and output.output_type == "stream" and before.get("name") == output.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def _identity(cell: NotebookNode) -> tuple[str, str, list[str]]:
    return cell.cell_type, cell.source.rstrip(), sorted(cell.metadata.get("tags", []))


def _progress(words: str) -> None:
    """One line that is written over, on a terminal; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
