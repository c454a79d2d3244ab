"""The rules of the house that a machine can check: who imports whom, sizes, packaging, no traces of one machine."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "minivllm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
FRONTS = ("views", "course", "serving", "bench", "lab")  # nobody but cli, notebooks and tests may know them

FORBIDDEN = {
    "engine": ("torch", "transformers", "minivllm.runner", "minivllm.models", "minivllm.attention", "minivllm.llm"),
    "models": ("minivllm.engine", "minivllm.runner"),
    "views": ("minivllm.engine", "minivllm.runner"),
    "course": ("minivllm.engine", "minivllm.runner"),
}
# An import that points down within the fronts: views -> course.
ALLOWED_FRONTS = {
    "views": ("course",),
    "lab": ("course",),
    "bench": ("lab", "views", "course"),
    "cli": FRONTS,
    "doctor": (),
}


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, at any depth of nesting, type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """The package or module just below minivllm: engine, views, cli ..."""
    return path.relative_to(ROOT / "minivllm").parts[0].removesuffix(".py")


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", [p for p in SOURCES if "minivllm_kernels" not in p.parts], ids=str)
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    fronts = [front for front in FRONTS if front != room and front not in ALLOWED_FRONTS.get(room, ())]
    forbidden = (*FORBIDDEN.get(room, ()), *(f"minivllm.{front}" for front in fronts if room != "__init__"))
    broken = [name for name in imports_of(path) for package in forbidden if is_within(name, package)]
    assert broken == []


def test_kernels_import_nothing_of_ours() -> None:
    kernels = [path for path in SOURCES if "minivllm_kernels" in path.parts]
    assert [name for path in kernels for name in imports_of(path) if is_within(name, "minivllm")] == []


def test_folder_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["minivllm.cli", "minivllm.engine.engine", "minivllm.events"])
def test_light_modules_load_without_torch(module: str) -> None:
    probe = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def limit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines a function may have: 60 for a kernel, whose tensors all live at once, else 50."""
    is_kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return 60 if is_kernel else 50


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > limit(f)] == []


def test_wheel_and_editable_install_hold_both_packages() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert hatch["targets"]["wheel"]["packages"] == ["minivllm", "kernels/minivllm_kernels"]
    assert hatch["dev-mode-dirs"] == [".", "kernels"]
    assert all((ROOT / package / "py.typed").exists() for package in hatch["targets"]["wheel"]["packages"])


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    pins = {
        canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert [requirement for requirement in wanted if canonical(requirement) not in pins] == []
    assert "+" not in (ROOT / "constraints.txt").read_text()


def canonical(requirement: str) -> str:
    """The package's name as indexes compare it: canonical("Jinja2>=3") == "jinja2"."""
    name = requirement.split(">")[0].split("<")[0].split("=")[0].split("[")[0]
    return name.strip().lower().replace("_", "-").replace(".", "-")


def tracked_files() -> list[Path]:
    """What git holds or would hold; empty outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name] if listing.returncode == 0 else []


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    files = tracked_files()
    if not files:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    # split, so that this file does not name them either
    needles = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "/root" + "/", "/opt" + "/wheels"]
    needles += ["/opt" + "/pypi", "/work" + "/main", "/work" + "/shared", "/tmp" + "/bash_jobs"]
    found = [
        f"{path.relative_to(ROOT)}: {needle}"
        for path in files
        if path.is_file()
        for needle in needles
        if needle.encode() in path.read_bytes()
    ]
    assert found == []
