"""The committed notebooks keep the course's grammar: one badge, one way to install, short cells, links that lead on."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat import NotebookNode

from minivllm.course.author import read_source
from minivllm.course.exercises import exercises
from minivllm.course.new_notebook import new_notebook
from minivllm.course.questions import questions

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
INSTALL = """import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()"""
LINK = re.compile(r"\[`?([^\]`]+)`?\]\(([^)\s]+)\)")
ASKED = re.compile(r"""(?<![.\w])(?:ask|check(?:\.\w+)?)\(["']([^"']*)["']""")
MOST_LINES = 24  # of a code cell that fits on a screen with its output

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def sources(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


@each
def test_it_opens_in_colab_and_installs_itself_there(path: Path) -> None:
    first, install = read(path).cells[:2]
    assert first.source.startswith(f"# {path.stem[:2]} · ")
    assert (
        f"(https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/{path.name})" in first.source
    )
    assert install.source == INSTALL


@each
def test_it_asks_first_and_ends_with_a_quiz(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells)
    wanted = ["Warm-up", "FlashCards(cards", "predict(", ".reveal(", "# Not true", "60 seconds", "Exit quiz"]
    places = [text.find(word) for word in wanted]
    assert -1 not in places and places == sorted(places), dict(zip(wanted, places, strict=True))
    assert f'predict.calibration("{path.stem[:2]}")' in text


@each
def test_every_exercise_of_it_is_asked_and_every_card_exists(path: Path) -> None:
    code = "\n".join(sources(path, "code"))
    own = [id_ for id_ in exercises() if id_.startswith(path.stem[:2])]
    assert [id_ for id_ in own if f'ask("{id_}"' not in code or f'check("{id_}"' not in code] == []
    cards = re.findall(r'"([A-Z]\d+)(?:\.num)?"', " ".join(re.findall(r"FlashCards\(cards=\(([^)]*)\)", code)))
    assert len(cards) >= 5 and set(cards) <= set(questions())


@each
def test_every_exercise_that_is_asked_exists(path: Path) -> None:
    assert strangers([cell.source for cell in read(path).cells]) == []


def test_an_unedited_new_notebook_asks_what_does_not_exist(tmp_path: Path) -> None:
    new = new_notebook(tmp_path, ["97", "When can two requests own one block?"])
    assert strangers([cell.source for cell in read_source(new).cells]) == ["97.1"]


def strangers(texts: list[str]) -> list[str]:
    """Ids that ask(...), check(...) or check.redraw(...) name and that no exercise has."""
    return sorted({id_ for text in texts for id_ in ASKED.findall(text)} - set(exercises()))


@each
def test_code_cells_fit_on_a_screen(path: Path) -> None:
    long = [source for source in sources(path, "code") if source.count("\n") >= MOST_LINES and "import " not in source]
    assert long == []


@each
def test_links_lead_to_a_file_and_to_the_function_they_name(path: Path) -> None:
    links = [match for source in sources(path, "markdown") for match in LINK.findall(source)]
    inside = [(words, target) for words, target in links if not target.startswith("https://")]
    assert any(target.endswith(".py") for _, target in inside), "no link into the engine"
    for words, target in inside:
        found = path.parent / unquote(target.split("#")[0])
        assert found.exists(), target
        if found.suffix == ".py" and re.fullmatch(r"[\w.]+(\(\))?", words):
            assert words.removesuffix("()") in names_in(found), f"{words} is not in {target}"


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods of a file, with and without their class, and the file's own name."""
    names = {path.name, path.stem}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


@each
def test_readers_without_a_kernel_see_pictures_and_text(path: Path) -> None:
    outputs = [o for cell in read(path).cells if cell.cell_type == "code" for o in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) >= 2
    assert all("text/plain" in data for data in shown)
    assert not any("application/vnd.jupyter.widget-view+json" in data and len(data) > 1 for data in shown)
    assert [o for o in outputs if o.output_type == "error"] == []
