"""The linter of the question bank: `python -m minivllm.course.question_bank` checks every question and its numbers."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from minivllm.course.numeric_forms import Form, clashes, drawn
from minivllm.course.question_facts import problems_with_numbers
from minivllm.course.questions import FORMS, Question, questions
from minivllm.course.slips import EXPLANATIONS

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 200
MOST_CLASHES = NUM_SEEDS // 3  # rarer ones are drawn again; beyond it a slip is no slip for this question

EXPECTED = {"A": 12, "B": 9, "C": 13, "D": 13, "E": 14, "F": 13, "G": 14, "J": 8, "K": 8, "L": 8}  # stems of each group


def lint() -> list[str]:
    """Everything that is wrong with the bank, a line each; an empty list where all is well."""
    bank = questions()
    found = [*_missing(bank), *(f"{name}: a form without a question" for name in FORMS if name not in bank)]
    for question in bank.values():
        found += [*problems_with_numbers(question), *_broken_links(question)]
    for name, form in FORMS.items():
        found += problems_with_form(name, form)
    return found


def problems_with_form(name: str, form: Form) -> list[str]:
    """What is wrong with a numeric form over many seeds: unknown slips, slips that equal the truth or each other."""
    pairs: Counter[str] = Counter()
    unknown: set[str] = set()
    for seed in range(NUM_SEEDS):
        problem = form(Random(seed))
        pairs.update(clashes(problem))
        unknown |= {slip.name for slip in problem.slips} - set(EXPLANATIONS)
    found = [f"{name}: slip {slip!r} has no explanation in slips.py" for slip in sorted(unknown)]
    often = [f"{name}: {pair} in {count} of {NUM_SEEDS} draws" for pair, count in pairs.items() if count > MOST_CLASHES]
    if often or unknown:
        return found + often
    for seed in range(NUM_SEEDS):
        if not float(drawn(form, str(seed)).truth) > 0:
            found.append(f"{name}: the answer of seed {seed} is not above 0")
    return found


def names_in(path: Path) -> set[str]:
    """Functions and classes of a Python file, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def _missing(bank: dict[str, Question]) -> Iterator[str]:
    for letter, count in EXPECTED.items():
        for i in range(1, count + 1):
            if f"{letter}{i}" not in bank:
                yield f"{letter}{i}: the stem is missing"


def _broken_links(question: Question) -> Iterator[str]:
    if not question.links:
        yield f"{question.id}: no link to the engine"
    for link in question.links:
        path = ROOT / link.path
        if not path.is_file() or link.name not in names_in(path):
            yield f"{question.id}: {link} does not exist"


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    found = lint()
    print("\n".join(found) or f"{len(questions())} questions, {len(FORMS)} numeric forms: all agree")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
