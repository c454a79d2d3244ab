"""`minivllm`: one function for each subcommand. Torch and Jupyter load inside them, so `--help` is instant."""

import argparse
import io
import os
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm import __version__, doctor
from minivllm.errors import ConfigError, MiniVLLMError, RequestError, short
from minivllm.request import SamplingParams
from minivllm.speculative_config import parse_speculative

if TYPE_CHECKING:
    from minivllm.bench.engine import Draw
    from minivllm.llm import LLM
    from minivllm.outputs import RequestOutput

Command = Callable[[argparse.Namespace], int]
OK, UNUSABLE, INTERRUPTED = 0, 2, 130
# Generated text may hold any character; a terminal would obey the control characters among them.
VISIBLE = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 2 with one line on stderr, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model writes characters that an old terminal lacks
    options = build_parser().parse_args(argv)
    command: Command = options.command
    try:
        return command(options)
    except MiniVLLMError as error:
        print(f"minivllm: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `minivllm generate ... | head -1`: the reader left, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minivllm", description="A compact LLM serving engine and its notebooks.")
    parser.add_argument("--version", action="version", version=f"minivllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, command, add_options in (
        ("lab", "Open JupyterLab on the notebooks.", open_lab, _add_lab),
        ("fetch", "Download and convert the default model, once.", fetch, None),
        ("generate", "Answer or continue a prompt, as the tokens come.", generate, _add_generate),
        ("convert", "Write a Llama model with another attention: MHA, GQA, MQA or MLA.", convert, _add_convert),
        ("bench", "Measure: minivllm bench engine --help, also kernels, policies and speculation.", bench, _add_bench),
        ("study", "Try the engine's policies on itself and print what came of it.", study, _add_study),
        ("quiz", "Flash cards and mock interviews on the course, spaced over time.", quiz, _add_quiz),
        ("doctor", "Say what this machine has, and what to do about each lack.", examine, None),
    ):
        subparser = commands.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(command=command)
        if add_options:
            add_options(subparser)
    return parser


def _add_lab(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--notebook", default="", metavar="NN", help="open this one, by number or name: 04")
    parser.add_argument("--port", type=int, default=8888, help="first port to try (default 8888)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def open_lab(options: argparse.Namespace) -> int:
    """Become JupyterLab: it makes the token, listens on this machine only, and answers Ctrl-C itself."""
    if find_spec("jupyterlab") is None:
        raise MiniVLLMError("jupyterlab is not installed: run `make lab`, or `pip install 'minivllm[lab]'`")
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535, not {options.port}")
    folder = notebooks_folder()
    opened = f"notebooks/{notebook_named(options.notebook, folder)}" if options.notebook else "notebooks"
    arguments = [  # the root is the repository, so that a notebook's links into the engine open there
        *(sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.parent}"),
        f"--LabApp.default_url=/lab/tree/{opened}",
        *("--ip=127.0.0.1", f"--port={options.port}", "--ServerApp.answer_yes=True", "--log-level=WARN"),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    if options.no_browser or not has_browser():
        arguments.append("--no-browser")
        print("Starting JupyterLab; open the address below. Ctrl-C ends it.", flush=True)
    else:
        print("Starting JupyterLab in your browser. Ctrl-C ends it.", flush=True)
    os.execv(sys.executable, arguments)


def notebooks_folder() -> Path:
    """The notebooks of this checkout, or of the folder we stand in."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "notebooks").is_dir():
            return root / "notebooks"
    raise MiniVLLMError("no notebooks folder here: run this inside a clone of the repository")


def notebook_named(name: str, folder: Path) -> str:
    """The file of a notebook by its number or the start of its name. Raises ConfigError where none or several fit."""
    stem = Path(name).name.removesuffix(".ipynb").removesuffix(".py")
    stem = stem.zfill(2) if stem.isdecimal() else stem
    names = sorted(path.name for path in folder.glob("[0-9][0-9]_*.ipynb"))
    found = [known for known in names if known.startswith(stem) or known[3:].startswith(stem)]
    if len(found) != 1:
        raise ConfigError(f"--notebook {short(name)} fits {found or 'none'}; there are: {', '.join(names)}")
    return found[0]


def has_browser() -> bool:
    """Whether a window could open; a text browser in this terminal does not count."""
    is_headless = sys.platform == "linux" and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    try:
        return not is_headless and bool(webbrowser.get())
    except webbrowser.Error:
        return False


def fetch(options: argparse.Namespace) -> int:
    from minivllm.weights import fetch_default_model  # numpy, safetensors, gguf

    print(f"default model: {fetch_default_model()}")
    return OK


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from stdin")
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a Hugging Face id (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="stop after so many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many tokens; 0: all")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--chat", action="store_true", help="ask as a chat message; the default if the model has a template"
    )
    shape.add_argument("--raw", action="store_true", help="continue the text as it stands")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    parser.add_argument("--speculative-config", metavar="JSON", help='draft, for example \'{"method": "ngram"}\'')
    parser.add_argument("--stats", action="store_true", help="then say how many tokens, and how fast")


def generate(options: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )  # before the model loads: a wrong option should not cost seconds
    drafting = parse_speculative(options.speculative_config)
    prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    if not prompt:
        raise RequestError("the prompt is empty; give some text")

    from minivllm.llm import LLM  # torch and transformers: seconds

    llm = LLM(model=options.model, dtype=options.dtype, load_format=options.load_format, speculative_config=drafting)
    num_shown = 0
    try:
        for result in _ask(llm, prompt, params, options):
            text = result.outputs[0].text  # all of it so far
            print(text[num_shown:].translate(VISIBLE), end="", flush=True)
            num_shown = len(text)
    finally:
        print(end="\n" if num_shown else "", flush=True)
    if options.stats:
        print(_stats(result), file=sys.stderr)
    return OK


def _ask(llm: "LLM", prompt: str, params: SamplingParams, options: argparse.Namespace) -> Iterator["RequestOutput"]:
    has_template = bool(getattr(llm.get_tokenizer(), "chat_template", None))
    if options.chat and not has_template:
        raise ConfigError(f"{options.model} has no chat template: use --raw")
    if has_template and not options.raw:
        return llm.stream_chat([{"role": "user", "content": prompt}], params)
    return llm.stream(prompt, params)


def _stats(result: "RequestOutput") -> str:
    """One line: 12 prompt tokens (0 cached), first token after 80 ms, 21 tokens, then 40.0 tokens/s; stop."""
    sample, metrics = result.outputs[0], result.metrics
    line = f"{len(result.prompt_token_ids)} prompt tokens ({result.num_cached_tokens} cached)"
    if metrics.first_token_time is not None and metrics.finished_time is not None:
        decode_s = metrics.finished_time - metrics.first_token_time
        line += f", first token after {(metrics.first_token_time - metrics.arrival_time) * 1e3:.0f} ms"
        line += f", {len(sample.token_ids)} tokens"
        line += f", then {(len(sample.token_ids) - 1) / decode_s:.1f} tokens/s" if decode_s else ""
    if metrics.num_drafted:
        line += f", {metrics.num_accepted_drafts} of {metrics.num_drafted} drafts accepted"
    return f"{line}; {sample.finish_reason}"


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Llama model: a name, a folder or a Hugging Face id")
    parser.add_argument("--to", required=True, help="mha, mqa, gqa-G (G KV heads) or mla-R (a latent of R numbers)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new")


def convert(options: argparse.Namespace) -> int:
    from minivllm.lab.conversion import convert as write_converted  # torch and transformers: seconds

    print(f"{options.to}: {write_converted(options.model, options.to, options.out)}")
    return OK


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["engine", "kernels", "policies", "speculation"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of that benchmark")


def bench(options: argparse.Namespace) -> int:
    run = import_module(f"minivllm.bench.{options.what}").main  # torch, and transformers for some: seconds
    drawing = {"ledger_drawing": _ledger_drawing} if options.what == "engine" else {}  # bench knows no views
    return run(options.arguments, **drawing) or OK


def _ledger_drawing() -> "Draw":
    if find_spec("anywidget") is None or find_spec("PIL") is None:
        raise MiniVLLMError("--ledger draws with anywidget and pillow: run `pip install 'minivllm[lab]'`")
    from minivllm.views.step_ledger import save_ledgers

    return save_ledgers


STUDIES = {  # module of minivllm.lab, and what it answers
    "allocators": ("allocator_study", "how much memory paging saves, beside four rivals"),
    "attentions": ("conversion_study", "what MHA, GQA, MQA and MLA of one model cost in bytes, in loss and in time"),
    "bytes": ("bytes_study", "whether formulas and the engine agree on bytes, and how near steps come to their floors"),
    "equality": ("equality", "whether a cached, chunked, preempted or forked run equals a cold one in every bit"),
    "futures": ("time_travel", "what changes when one policy is changed halfway through a run"),
    "hits": ("hit_study", "how near prefix caches, evictions and orders come to the best hit rate there is"),
    "museum": ("museum", "which invariant catches which historical fault, and how soon"),
    "security": ("security", "what a shared prefix cache gives away, and what stops it"),
    "whatif": ("simulator", "throughput and latency at request rates that were not run"),
}


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"{name:12}{answer}" for name, (_, answer) in STUDIES.items())
    parser.add_argument("what", choices=STUDIES)
    parser.add_argument("--model", help="where the study runs a model (default smollm2-135m)")
    parser.add_argument("--seed", type=int, help="where the study draws at random")


def study(options: argparse.Namespace) -> int:
    run = import_module(f"minivllm.lab.{STUDIES[options.what][0]}").study
    given = {name: value for name in ("model", "seed") if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in signature(run).parameters:
            raise ConfigError(f"study {options.what} takes no --{name}; leave it out")
    print(run(**given))
    return OK


def _add_quiz(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", default="", metavar="LETTERS", help="only these groups, such as A or AC")
    parser.add_argument("--num", type=int, default=10, help="cards in a round (%(default)s)")
    parser.add_argument("--due", action="store_true", help="only cards whose time has come")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--mock", type=int, metavar="MINUTES", help="a mock interview of 15, 30 or 45 minutes")
    instead.add_argument("--stats", action="store_true", help="say what was learned, and which slips recur")
    instead.add_argument("--anki", type=Path, metavar="FILE", help="write the deck for Anki's File > Import")
    instead.add_argument("--export", type=Path, metavar="FILE", help="copy the progress to a file")
    instead.add_argument("--import", type=Path, metavar="FILE", dest="import_from", help="replace it by such a file")
    instead.add_argument("--delete", action="store_true", help="forget all progress")


def quiz(options: argparse.Namespace) -> int:
    if find_spec("fsrs") is None:
        raise MiniVLLMError("fsrs is not installed: run `pip install 'minivllm[lab]'`")
    from minivllm.course.quiz_terminal import run  # the question bank: a tenth of a second

    return run(options)


def examine(options: argparse.Namespace) -> int:
    findings = doctor.examine()
    print(doctor.table(findings, is_coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return doctor.exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
