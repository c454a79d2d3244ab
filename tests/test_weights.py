"""Claims about where models come from: a folder, a built-in config or the hub, and one line for each mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from minivllm import weights
from minivllm.config import ModelConfig
from minivllm.errors import ModelError
from minivllm.weights import builtin_configs, find_model

CONFIG = builtin_configs()["smollm2-135m"]


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- folders --


def write_folder(folder: Path, shards: dict[str, list[str]], *, listed: bool = True) -> Path:
    """Write a model folder: shard file name -> tensor names, with an index where `listed`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard, names in shards.items():
        save_file({name: torch.zeros(4) for name in names}, folder / shard)
    if listed:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


TWO_SHARDS = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}


def test_folder_with_shards_is_found_in_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sharded", TWO_SHARDS)
    source = find_model(folder)
    assert source.folder == folder and source.config == CONFIG and not source.has_tokenizer
    assert source.weight_files == [folder / shard for shard in TWO_SHARDS]
    assert find_model(str(folder)) == source


def test_missing_shard_is_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sharded", TWO_SHARDS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'model-00002-of-00002.safetensors' is listed in .* but missing"):
        find_model(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_shard_cut_short_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    folder = write_folder(tmp_path / "cut", {"model.safetensors": ["a"]}, listed=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ModelError, match=r"is not a whole safetensors file") as error:
        find_model(folder)
    assert one_line(error)


def test_folder_without_weights_serves_dummy_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "bare", {}, listed=False)
    assert find_model(folder, load_format="dummy").weight_files == []
    with pytest.raises(ModelError, match=r"no \*.safetensors in .*load_format='dummy'"):
        find_model(folder)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "does not exist: pass a folder"),
        (lambda path: path.write_text("x"), "is a file: pass a folder"),
        (lambda path: path.mkdir(), "no config.json in"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "cannot read .* as JSON"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("[]")), "is not a JSON object"),
    ],
)
def test_broken_folder_is_one_line(tmp_path: Path, make: Callable[[Path], object], line: str) -> None:
    make(tmp_path / "model")
    for name in (tmp_path / "model", str(tmp_path / "model")):
        with pytest.raises(ModelError, match=line) as error:
            find_model(name)
        assert one_line(error)


# -- built-in configs and names --


PUBLISHED_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "tinyllama-1.1b": 1_100_048_384,
    "deepseek-v2-lite": 15_706_484_224,
}


def test_built_in_configs_have_the_published_parameter_counts() -> None:
    configs = {name: config for name, config in builtin_configs().items() if not name.startswith("tiny-")}
    counts = {name: ModelConfig.from_json(config).num_parameters for name, config in configs.items()}
    assert counts == PUBLISHED_PARAMETERS


def test_built_in_config_needs_no_file_for_dummy_weights() -> None:
    source = find_model("Qwen3-8B", load_format="dummy")
    assert (source.folder, source.weight_files, source.has_tokenizer) == (None, [], False)


def test_built_in_config_without_weights_says_where_weights_are() -> None:
    with pytest.raises(ModelError) as error:
        find_model("qwen3-8b")
    assert one_line(error) == (
        "qwen3-8b is a built-in config without weights: pass load_format='dummy' for random weights, "
        "or a folder or Hugging Face id (Qwen/Qwen3-8B)"
    )


@pytest.mark.parametrize("name", ["gpt-17", "", "two words", "a\nb", "a" * 5000])
def test_unknown_model_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=r"unknown model .*use smollm2-135m, a folder") as error:
        find_model(name)
    assert one_line(error)


def test_near_name_is_suggested() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'smolm2-135m' \(did you mean 'smollm2-135m'\?\)"):
        find_model("smolm2-135m")


def test_unknown_load_format_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"load_format must be 'auto' or 'dummy', not 'gguf'"):
        find_model("smollm2-135m", load_format="gguf")


# -- the hub --


def test_hub_id_is_downloaded_with_weights_only_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "snapshot", TWO_SHARDS)
    asked: list[list[str]] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(weights, "snapshot_download", snapshot)
    source = find_model("org/name", show_progress=False)
    assert source.name == "org/name" and source.folder == folder and len(source.weight_files) == 2
    find_model("org/name", load_format="dummy")
    assert ["model*.safetensors" in patterns for patterns in asked] == [True, False]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (LocalEntryNotFoundError, "cannot reach the Hugging Face hub for org/name and it is not in its cache: check"),
        (RepositoryNotFoundError, "no model org/name on the Hugging Face hub, or it is private"),
        (GatedRepoError, "org/name is gated: accept its licence"),
        (OSError, "cannot download org/name .OSError: disk trouble.: try again"),
    ],
)
def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], line: str) -> None:
    def fail(*_: object, **__: object) -> str:
        error = kind.__new__(kind)  # the hub's own errors want a response object
        error.args = ("disk trouble\nand a long story",)
        raise error

    monkeypatch.setattr(weights, "snapshot_download", fail)
    with pytest.raises(ModelError, match=line) as error:
        find_model("org/name", show_progress=False)
    assert one_line(error)
