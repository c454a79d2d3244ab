"""Text to a file and back, every failure one line."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minivllm.errors import MiniVLLMError

T = TypeVar("T")


def write_text(path: str | Path, text: str, what: str) -> Path:
    """Write a file and the folders above it. Raises MiniVLLMError, naming `what` it was, when the place refuses."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise MiniVLLMError(f"{path}: cannot save the {what} ({error}); choose another place") from error
    return path


def read_text(path: str | Path, parse: Callable[[str], T], what: str) -> T:
    """Read a file and parse it. Raises MiniVLLMError that begins with the path, from either."""
    try:
        return parse(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise MiniVLLMError(f"{path}: cannot read the {what} ({error})") from error
    except MiniVLLMError as error:
        raise MiniVLLMError(f"{path}: {error}") from error
