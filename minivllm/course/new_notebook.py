"""A new notebook from the house template: `new 07 "When can two requests own one block?"`.

The template is a notebook that runs as it is; the words NN and TITLE in it become the number and the question.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from minivllm.errors import ConfigError, short

TEMPLATE = Path(__file__).resolve().parents[2] / "notebooks" / "template" / "notebook.py"
MOST_WORDS = 5  # of the title that the file is called after


def new_notebook(folder: Path, words: Sequence[str]) -> Path:
    """Write NN_title.py into a folder. Raises ConfigError for a bad number or title, and for one that exists."""
    if len(words) != 2 or not re.fullmatch(r"[0-9]{2}", words[0]):
        raise ConfigError(
            f'new takes a number of two digits and a title, such as 07 "Who owns it?", not {short(words)}'
        )
    number, title = words[0], " ".join(words[1].split())
    slug = "_".join(re.findall(r"[a-z0-9]+", title.lower())[:MOST_WORDS])
    if not slug:
        raise ConfigError(f"the title {short(title)} has no letter or digit; give a question")
    taken = sorted(folder.glob(f"{number}_*.py"))
    if taken:
        raise ConfigError(f"notebook {number} exists: {taken[0].name}; take another number or edit that one")
    target = folder / f"{number}_{slug}.py"
    text = TEMPLATE.read_text().replace("NN_name", target.stem)
    target.write_text(text.replace("TITLE", title).replace("NN", number))
    return target
