"""Text to calibrate, tune and judge converted models with: from Debian packages and from Python itself.

Every source's licence allows it. A document is held out by the hash of its name, the same on every machine, and
training text loses each paragraph that shares eight words in a row with held-out text: Python's help topics, which are
only judged by, repeat parts of its manual. The texts are not in the repository; `python -m minivllm.lab.corpus FOLDER`
makes FOLDER/corpus.npz (token ids) and FOLDER/corpus.json (what it was made of) on a machine with apt.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from minivllm.defaults import load_tokenizer
from minivllm.errors import MiniVLLMError, ModelError
from minivllm.outputs import Tokenizer
from minivllm.text_files import write_text
from minivllm.weights import find_model

Document = tuple[str, str]  # name, text
Documents = Callable[[Path], Iterator[Document]]

LENGTH = 512  # tokens of a sequence
CALIBRATION_ROWS = 16
SHARED_WORDS = 8  # in a row, that held-out and training text may not have in common
SEPARATOR = "<|endoftext|>"  # SmolLM2's, between documents; other models: their end of sequence


@dataclass(frozen=True)
class Source:
    """A Debian package, its licence, and the documents in the folder it was unpacked to."""

    package: str
    licence: str
    documents: Documents


def python_manual(folder: Path) -> Iterator[Document]:
    """The sources of Python's manual: a page is a document."""
    for path in sorted(folder.rglob("_sources/**/*.rst.txt")):
        yield str(path.relative_to(folder)), path.read_text(encoding="utf-8")


def jargon_file(folder: Path) -> Iterator[Document]:
    """The Jargon File by 40 paragraphs; short ones are its table of contents."""
    text = gzip.decompress(next(folder.rglob("jargon.txt.gz")).read_bytes()).decode("utf-8")
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    return _grouped("jargon", [re.sub(r"\n +", "\n", p) for p in paragraphs if len(p) > 60], 40, "\n\n")


def wordnet_glosses(folder: Path) -> Iterator[Document]:
    """WordNet by 100 neighbouring meanings: "dog, domestic dog: a member of the genus Canis ..."."""
    for path in sorted(folder.rglob("wordnet/data.*")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:8].isdigit()]
        yield from _grouped(path.name, [_gloss(line) for line in lines], 100, "\n")


SOURCES = (
    Source("python3.11-doc", "PSF-2.0", python_manual),
    Source("jargon-text", "public domain", jargon_file),
    Source("wordnet-base", "WordNet-3.0", wordnet_glosses),
)
TOPICS = "pydoc topics"  # of the standard library, PSF-2.0: on every machine; held out from training altogether


def is_held_out(name: str) -> bool:
    """Whether a document is for judging only: one of 20, by the hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 20 == 0


def help_topics(*, held_out: bool) -> list[Document]:
    """Python's own help topics: those to judge with (one of ten), or the rest, to calibrate with."""
    chosen = [name for name in sorted(topics) if _is_judged(name) == held_out]
    return [(name, topics[name]) for name in chosen]


def packed(documents: Iterable[Document], tokenizer: Tokenizer, length: int = LENGTH) -> torch.Tensor:
    """Documents end to end in rows of `length` tokens, a separator after each; the rest is dropped: [rows, length]."""
    ids = list[int]()
    for _, text in documents:
        ids += [*tokenizer.encode(text), separator(tokenizer)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def calibration_rows(tokenizer: Tokenizer) -> torch.Tensor:
    """16 rows from all over the help topics that are not held out: 8,192 samples for covariances of 576 x 576."""
    rows = packed(help_topics(held_out=False), tokenizer)
    return rows[:: max(1, len(rows) // CALIBRATION_ROWS)][:CALIBRATION_ROWS]


def separator(tokenizer: Tokenizer) -> int:
    """The token between documents."""
    ids = tokenizer.encode(SEPARATOR)
    return ids[0] if len(ids) == 1 else int(getattr(tokenizer, "eos_token_id", None) or 0)


def without_shared(text: str, held_out: set[int]) -> str:
    """The paragraphs that share no run of words with held-out text; `held_out` holds the hashes of `runs_of`."""
    return "\n\n".join(p for p in text.split("\n\n") if held_out.isdisjoint(runs_of(p)))


def runs_of(text: str) -> set[int]:
    """Hashes of all runs of eight words, markup and case apart."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)}


def build(folder: Path, tokenizer: Tokenizer) -> dict[str, object]:
    """Fetch, split, clean and tokenize all sources into folder/corpus.npz; return the facts of folder/corpus.json."""
    arrays = {f"held out {TOPICS}": _tokens(help_topics(held_out=True), tokenizer, TOPICS)}
    arrays["calibration"] = calibration_rows(tokenizer).numpy().astype(np.uint16)
    held_out_runs = set[int]().union(*(runs_of(text) for _, text in help_topics(held_out=True)))
    training, facts = list[Document](), list[dict[str, object]]()
    with TemporaryDirectory() as scratch:
        for source in SOURCES:
            version = fetch_package(source.package, Path(scratch) / source.package)
            documents = list(source.documents(Path(scratch) / source.package))
            judged = [document for document in documents if is_held_out(document[0])]
            arrays[f"held out {source.package}"] = _tokens(judged, tokenizer, f"{source.package}, held out")
            held_out_runs.update(*(runs_of(text) for _, text in judged))
            kept = [document for document in documents if not is_held_out(document[0])]
            training += kept
            facts.append({"package": source.package, "version": version, "licence": source.licence,
                          "documents": len(kept), "documents_held_out": len(judged)})  # fmt: skip
    facts.append({"package": TOPICS, "version": f"Python {python_version()}", "licence": "PSF-2.0", "documents": 0,
                  "documents_held_out": len(help_topics(held_out=True))})  # fmt: skip
    arrays["training"] = _tokens([(n, without_shared(t, held_out_runs)) for n, t in training], tokenizer, "training")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "corpus.npz", allow_pickle=False, **arrays)
    counts = {name: int(array.size) for name, array in arrays.items()}
    document: dict[str, object] = {"sources": facts, "tokens": counts, "sequence_length": LENGTH}
    write_text(folder / "corpus.json", json.dumps(document, indent=1) + "\n", "corpus")
    return document


def fetch_package(package: str, folder: Path) -> str:
    """Unpack a Debian package into `folder`, without installing it; its version. Raises MiniVLLMError, one line."""
    folder.mkdir(parents=True)
    for command in (["apt-get", "download", package], ["sh", "-c", "dpkg-deb -x ./*.deb ."]):
        try:
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MiniVLLMError(
                f"{package}: '{' '.join(command)}' failed; this needs Debian with its sources"
            ) from error
    return next(folder.glob("*.deb")).name.split("_")[1].replace("%3a", ":")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.corpus", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer (%(default)s)")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(find_model(options.model))
    if tokenizer is None:
        raise ModelError(f"{options.model} has no tokenizer; choose a model that has one")
    print(json.dumps(build(options.folder, tokenizer), indent=1))
    return 0


def _tokens(documents: list[Document], tokenizer: Tokenizer, what: str) -> NDArray[np.uint16]:
    return packed(tqdm(documents, desc=what), tokenizer).numpy().astype(np.uint16)


def _grouped(name: str, parts: list[str], size: int, between: str) -> Iterator[Document]:
    for start in range(0, len(parts), size):
        yield f"{name}/{start}", between.join(parts[start : start + size])


def _gloss(line: str) -> str:
    """One line of WordNet's data files, wndb(5WN): the fourth field is the number of words, in hexadecimal."""
    fields, _, meaning = line.partition("|")
    parts = fields.split()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    return f"{', '.join(words).replace('_', ' ')}: {meaning.strip()}"


def _is_judged(topic: str) -> bool:
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8]) % 10 == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
