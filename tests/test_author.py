"""The author's kit: a new notebook runs as it comes from the template, and what is built is what is checked."""

import re
from base64 import b64encode
from pathlib import Path

import jupytext
import nbformat
import pytest

from minivllm.course.author import MOST_BYTES, check, main, pictures, read_source, stale, tidied
from minivllm.course.new_notebook import TEMPLATE, new_notebook
from minivllm.errors import ConfigError

TITLE = "When can two requests own one block?"


def test_a_new_notebook_is_the_template_with_its_number_and_title(tmp_path: Path) -> None:
    path = new_notebook(tmp_path, ["07", TITLE])
    assert path.name == "07_when_can_two_requests_own.py"
    assert f"# # 07 · {TITLE}" in path.read_text() and "NN" not in path.read_text()
    assert f"/notebooks/{path.stem}.ipynb)" in path.read_text()  # what the badge opens


def test_the_template_has_the_grammar_of_a_notebook() -> None:
    text = TEMPLATE.read_text()
    wanted = ["Warm-up", "predict(", ".reveal(", "Panel(", "\nask(", "\ncheck(", "Not true", "60 seconds", "Exit quiz"]
    places = [text.find(word) for word in [*wanted, "calibration("]]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("words", [[], ["07"], ["7", "x"], ["007", "x"], ["07", "???"], ["07", "a", "b"], ["../", "x"]])
def test_a_bad_number_or_title_is_one_line(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        new_notebook(tmp_path, words)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "07", TITLE, "--folder", str(tmp_path)]) == 0
    assert main(["new", "07", "Another title", "--folder", str(tmp_path)]) == 2
    assert "notebook 07 exists" in capsys.readouterr().err


def test_a_notebook_that_was_never_built_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_notebook(tmp_path, ["07", TITLE])
    assert main(["check", "--folder", str(tmp_path)]) == 1
    assert "is missing" in capsys.readouterr().err


def test_an_edited_source_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "07_x.py"
    path.write_text("# %%\nx = 1\n")
    notebook = read_source(path)
    notebook.cells[0].execution_count = 1
    nbformat.write(tidied(notebook), path.with_suffix(".ipynb"))
    assert check(path, "07")
    path.write_text("# %%\nx = 2\n")
    assert not check(path, "07")
    assert stale(read_source(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)).startswith("differs")


def test_too_large_notebooks_and_stale_pictures_are_refused(tmp_path: Path) -> None:
    path, png = tmp_path / "07_x.py", b"not really a picture"
    path.write_text('# %% tags=["readme:hero"]\nx = 1\n')
    notebook = read_source(path)
    notebook.cells[0].execution_count = 1
    data = {"image/png": b64encode(png).decode(), "text/plain": "a picture"}
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", data)]
    nbformat.write(tidied(notebook), path.with_suffix(".ipynb"))
    assert pictures(notebook, tmp_path) == {tmp_path / "pictures" / "hero.png": png}
    assert not check(path, "07")  # the picture was never written
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "hero.png").write_bytes(png)
    assert check(path, "07")
    notebook.cells[0].outputs[0].data["text/plain"] = "x" * MOST_BYTES
    nbformat.write(tidied(notebook), path.with_suffix(".ipynb"))
    assert not check(path, "07")


@pytest.mark.weights
def test_the_template_runs_unfilled_and_shows_red(tmp_path: Path) -> None:
    assert main(["new", "99", TITLE, "--folder", str(tmp_path)]) == 0
    assert main(["build", "--folder", str(tmp_path)]) == 0
    assert main(["check", "--folder", str(tmp_path)]) == 0
    built = nbformat.read(tmp_path / "99_when_can_two_requests_own.ipynb", as_version=4)
    shown = "\n".join(
        str(output.get("data", {}).get("text/plain", "")) for c in built.cells for output in c.get("outputs", [])
    )
    assert "No guess yet" in shown and "Answer: 3 blocks" in shown and "no exercise is called '99.1'" in shown


def test_cells_of_the_template_are_short() -> None:
    code = [cell.source for cell in jupytext.read(TEMPLATE).cells if cell.cell_type == "code"]
    assert max(source.count("\n") for source in code) < 20
    assert not any(re.search(r"^def ", source, re.MULTILINE) for source in code)
