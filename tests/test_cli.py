"""The command line: every subcommand through main(argv), and one line for every error."""

import io
import os
import sys
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from minivllm import __version__, cli, doctor
from minivllm.errors import ModelError
from minivllm.request import SamplingParams
from minivllm.speculative_config import SpeculativeConfig
from minivllm.views.step_ledger import save_ledgers

# --- generate, with a model that answers in three pieces


class FakeLLM:
    """Records how it was asked; its text grows in three results."""

    calls: list[tuple[str, object, SamplingParams]]
    options: dict[str, object]
    template: str | None = "a template"
    pieces = ("Par", "Paris", "Paris \x1b[31mis\x07 é.")
    error: BaseException | None = None
    num_drafted = 0

    def __init__(self, **options: object) -> None:
        FakeLLM.options, FakeLLM.calls = options, []

    def get_tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(chat_template=self.template)

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[SimpleNamespace]:
        return self._results("stream", prompt, params)

    def stream_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[SimpleNamespace]:
        return self._results("stream_chat", messages, params)

    def _results(self, name: str, given: object, params: SamplingParams) -> Iterator[SimpleNamespace]:
        self.calls.append((name, given, params))
        times = {"arrival_time": 1.0, "first_token_time": 1.5, "finished_time": 2.5}
        metrics = SimpleNamespace(**times, num_drafted=self.num_drafted, num_accepted_drafts=3)
        for count, text in enumerate(self.pieces, start=1):
            sample = SimpleNamespace(text=text, token_ids=[7] * count, finish_reason="stop")
            yield SimpleNamespace(outputs=[sample], prompt_token_ids=[1, 2], num_cached_tokens=1, metrics=metrics)
            if self.error:
                raise self.error


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = ModuleType("minivllm.llm")
    monkeypatch.setattr(module, "LLM", FakeLLM, raising=False)
    monkeypatch.setitem(sys.modules, "minivllm.llm", module)
    monkeypatch.setattr(FakeLLM, "template", "a template")
    monkeypatch.setattr(FakeLLM, "error", None)
    return FakeLLM


def test_generate_prints_the_growing_text_once_and_no_control_characters(
    fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "capital of France?"]) == 0
    assert capsys.readouterr() == ("Paris [31mis é.\n", "")


def test_generate_hands_its_options_on(fake_llm: type[FakeLLM]) -> None:
    asked = (
        "--model m --dtype float32 --load-format dummy --max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 5"
    )
    assert cli.main(["generate", "x", *asked.split(), "--speculative-config", '{"method": "ngram"}']) == 0
    drafted = (SpeculativeConfig("ngram"),)
    assert fake_llm.options == {
        "model": "m", "dtype": "float32", "load_format": "dummy", "speculative_config": drafted
    }  # fmt: skip
    assert fake_llm.calls[0][2] == SamplingParams(max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, seed=5)


@pytest.mark.parametrize(
    ("template", "flag", "expected"),
    [
        ("t", [], "stream_chat"),
        ("t", ["--chat"], "stream_chat"),
        ("t", ["--raw"], "stream"),
        (None, [], "stream"),
        (None, ["--raw"], "stream"),
    ],
)
def test_template_is_used_where_there_is_one(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, template: str | None, flag: list[str], expected: str
) -> None:
    monkeypatch.setattr(FakeLLM, "template", template)
    cli.main(["generate", "x", *flag])
    given = [{"role": "user", "content": "x"}] if expected == "stream_chat" else "x"
    assert [call[:2] for call in fake_llm.calls] == [(expected, given)]


def test_dash_reads_the_prompt_from_stdin(fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    cli.main(["generate", "-", "--raw"])
    assert fake_llm.calls[0][1] == "two\nlines"


def test_stats_go_to_stderr_in_one_line(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["generate", "x", "--stats"])
    expected = "2 prompt tokens (1 cached), first token after 500 ms, 3 tokens, then 2.0 tokens/s; stop\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr(FakeLLM, "num_drafted", 4)
    cli.main(["generate", "x", "--stats"])
    assert capsys.readouterr().err == expected.replace("; stop", ", 3 of 4 drafts accepted; stop")


def test_ctrl_c_keeps_what_was_written_and_exits_130(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "error", KeyboardInterrupt())
    assert cli.main(["generate", "x"]) == 130
    assert capsys.readouterr() == ("Par\n", "")


# --- errors


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "x", "--temperature", "nan"], "temperature must be a finite number"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be an integer of at least 1, not 0"),
        (["generate", ""], "the prompt is empty; give some text"),
        (["lab", "--port", "99999"], "--port must be from 1 to 65535, not 99999"),
    ],
)
def test_wrong_options_give_one_line_and_exit_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"minivllm: {line}")
    assert error.count("\n") == 1


def test_chat_without_a_template_says_what_to_do(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "template", None)
    assert cli.main(["generate", "x", "--chat"]) == 2
    assert capsys.readouterr().err == "minivllm: smollm2-135m has no chat template: use --raw\n"


def test_an_error_of_the_engine_is_one_line(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "error", ModelError("no such model: use smollm2-135m"))
    assert cli.main(["generate", "x"]) == 2
    assert capsys.readouterr().err == "minivllm: no such model: use smollm2-135m\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "x", "--chat", "--raw"], ["bench"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: minivllm" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"minivllm {__version__}\n"


# --- fetch, bench, lab


def test_fetch_says_where_the_model_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("minivllm.weights.fetch_default_model", lambda: Path("somewhere"))
    assert cli.main(["fetch"]) == 0
    assert capsys.readouterr().out == "default model: somewhere\n"


def test_bench_hands_everything_after_its_name_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = ModuleType("minivllm.bench.engine")
    monkeypatch.setattr(module, "main", seen.append, raising=False)
    monkeypatch.setitem(sys.modules, "minivllm.bench.kernels", module)
    assert cli.main(["bench", "kernels", "--help", "--rounds", "3"]) == 0
    assert seen == [["--help", "--rounds", "3"]]


def test_bench_engine_is_handed_what_draws_its_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = ModuleType("minivllm.bench.engine"), list[object]()

    def main(argv: list[str], ledger_drawing: Callable[[], object]) -> int:
        seen.extend((argv, ledger_drawing()))
        return 0

    monkeypatch.setattr(module, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, "minivllm.bench.engine", module)
    assert cli.main(["bench", "engine", "--ledger", "x.png"]) == 0
    assert seen == [["--ledger", "x.png"], save_ledgers]


def test_bench_engine_without_the_packages_of_the_lab_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("minivllm.bench.engine")
    monkeypatch.setattr(module, "main", lambda argv, ledger_drawing: ledger_drawing(), raising=False)
    monkeypatch.setitem(sys.modules, "minivllm.bench.engine", module)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["bench", "engine", "--ledger", "x.png"]) == cli.UNUSABLE
    assert "minivllm: --ledger draws with anywidget and pillow: run `pip install" in capsys.readouterr().err


class BecameError(Exception):
    """What os.execv was asked for, in place of the end of this process."""


@pytest.fixture
def jupyter_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def execv(path: str, arguments: list[str]) -> None:
        raise BecameError(arguments)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(cli, "find_spec", lambda name: object())


@pytest.mark.usefixtures("jupyter_arguments")
@pytest.mark.parametrize(("user", "is_root"), [(0, True), (1000, False)])
def test_lab_listens_here_only_keeps_its_token_and_may_run_as_root(
    monkeypatch: pytest.MonkeyPatch, user: int, is_root: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(BecameError) as became:
        cli.main(["lab", "--no-browser", "--port", "9999"])
    arguments = became.value.args[0]
    assert {"--ip=127.0.0.1", "--port=9999", "--no-browser"} <= set(arguments)
    assert ("--allow-root" in arguments) == is_root
    assert not any("token" in argument for argument in arguments)
    root_dir = next(a.split("=", 1)[1] for a in arguments if a.startswith("--ServerApp.root_dir="))
    assert Path(root_dir) == Path(cli.__file__).parents[1]  # so that links from a notebook into the engine open
    assert "--LabApp.default_url=/lab/tree/notebooks" in arguments


@pytest.mark.usefixtures("jupyter_arguments")
@pytest.mark.parametrize("name", ["05", "5", "05_block_table", "block_table", "notebooks/05_block_table.ipynb"])
def test_lab_opens_one_notebook_by_number_or_name(name: str) -> None:
    with pytest.raises(BecameError) as became:
        cli.main(["lab", "--notebook", name])
    assert "--LabApp.default_url=/lab/tree/notebooks/05_block_table.ipynb" in became.value.args[0]


@pytest.mark.parametrize("name", ["77", "no_such", "*", "0x"])
def test_lab_names_the_notebooks_there_are_when_none_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "--notebook", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"minivllm: --notebook '{name}' fits none; there are: ") and "05_block_table.ipynb" in said


@pytest.mark.usefixtures("jupyter_arguments")
def test_lab_prints_the_address_only_where_no_window_can_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BecameError) as became:
        cli.main(["lab"])
    assert "--no-browser" in became.value.args[0]
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "get", lambda: object())
    with pytest.raises(BecameError) as became:
        cli.main(["lab"])
    assert "--no-browser" not in became.value.args[0]


def test_lab_without_jupyterlab_gives_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["lab"]) == 2
    assert capsys.readouterr().err == (
        "minivllm: jupyterlab is not installed: run `make lab`, or `pip install 'minivllm[lab]'`\n"
    )


# --- doctor


def rows() -> dict[str, doctor.Finding]:
    return {finding.part: finding for finding in doctor.examine()}


def test_doctor_reports_every_part_in_an_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if not line.strip().startswith("->")]
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "FAIL"}
    assert {"python", "cpu", "torch", "kernels", "memory", "jupyterlab"} <= {line.split()[1] for line in lines}
    assert "\033" not in text


@pytest.mark.parametrize("package", ["torch", "transformers", "jupyterlab", "triton"])
def test_doctor_survives_a_missing_package_and_only_needed_ones_fail(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = doctor.version

    def version(name: str) -> str:
        if name == package:
            raise doctor.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setitem(sys.modules, package, None)
    finding = rows()[package]
    expected = {"torch": doctor.FAIL, "transformers": doctor.FAIL, "jupyterlab": doctor.WARN, "triton": doctor.OK}
    assert finding.mark == expected[package]
    assert bool(finding.advice) == (finding.mark != doctor.OK)


def test_doctor_survives_a_check_that_breaks() -> None:
    def check() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", doctor.OK, "fine")
        raise OSError("libtorch.so: cannot open\nmore")

    assert doctor._survive("torch", check) == [
        doctor.Finding("torch", doctor.FAIL, "OSError: libtorch.so: cannot open", doctor.INSTALL)
    ]


def test_doctor_tells_a_missing_model_from_an_incomplete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path))
    assert rows()["model"].found == "smollm2-135m, not fetched yet"
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    assert rows()["model"].found == "smollm2-135m, incomplete"
    assert rows()["model"].mark == doctor.WARN


def test_doctor_fails_on_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "file" / "cache"))
    finding = rows()["model cache"]
    assert finding.mark == doctor.FAIL
    assert "MINIVLLM_CACHE" in finding.advice


def test_doctor_exit_code_is_1_only_for_a_failure() -> None:
    assert doctor.exit_code([doctor.Finding("a", doctor.OK, ""), doctor.Finding("b", doctor.WARN, "")]) == 0
    assert doctor.exit_code([doctor.Finding("a", doctor.FAIL, "")]) == 1


def test_table_puts_advice_below_its_row_and_colours_only_marks() -> None:
    findings = [doctor.Finding("torch", doctor.OK, "2.13"), doctor.Finding("model", doctor.WARN, "absent", "fetch it")]
    assert doctor.table(findings) == "ok    torch  2.13\nwarn  model  absent\n             -> fetch it"
    assert doctor.table(findings[:1], is_coloured=True) == "\033[32mok  \033[0m  torch  2.13"


def test_cpu_description_names_what_matters_for_speed() -> None:
    cpuinfo = "model name\t: A CPU\nflags\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\nmodel name\t: another\n"
    assert doctor.cpu_description(cpuinfo) == "A CPU; AVX2 AVX512 bf16 AMX"
    assert doctor.cpu_description("") == ""
