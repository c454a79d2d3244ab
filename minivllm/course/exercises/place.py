"""A place in the engine's sources: the file and lines of a function, read without importing what it needs.

The course imports no engine: it names the engine's functions, and finds their text for the solution of an exercise.
Who checks code calls `load`, and only then is the engine's module imported.
"""

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from minivllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """`Place("minivllm.engine.kv_manager", "KVManager.grow")`."""

    module: str
    name: str

    @property
    def path(self) -> Path:
        """The file. Raises ConfigError where the module is not installed."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"{self.module} is not installed; its source cannot be shown")
        return Path(spec.origin)

    @property
    def relative_path(self) -> str:
        """As the repository has it: kernels/minivllm_kernels/split_kv.py."""
        root = "kernels/" if self.module.startswith("minivllm_kernels") else ""
        return f"{root}{self.module.replace('.', '/')}.py"

    @property
    def line(self) -> int:
        return self._node().lineno

    @property
    def source(self) -> str:
        """The function's own text, with its decorators."""
        node = self._node()
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = self.path.read_text().splitlines()[first - 1 : node.end_lineno]
        indent = len(lines[0]) - len(lines[0].lstrip())
        return "\n".join(line[indent:] for line in lines)

    def load(self) -> Callable[..., object]:
        """The function itself. Raises ConfigError for a name that is no function or class."""
        found: object = resolve_name(f"{self.module}:{self.name}")
        if not callable(found):
            raise ConfigError(f"{self.module}.{self.name} cannot be called; name a function or a class")
        return found

    def _node(self) -> ast.FunctionDef | ast.ClassDef:
        """Raises ConfigError for a name that the file does not define."""
        body: list[ast.stmt] = ast.parse(self.path.read_text()).body
        found: ast.FunctionDef | ast.ClassDef | None = None
        for name in self.name.split("."):
            nodes = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            found = next((node for node in nodes if node.name == name), None)
            if found is None:
                raise ConfigError(f"{self.relative_path} defines no {self.name}; correct the exercise's place")
            body = found.body
        assert found is not None, "a name has at least one part"
        return found
