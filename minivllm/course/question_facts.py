"""Every number that the bank prints is worked out again: `numbers` of a question says how, or who measured it.

An entry "327,680 B = kv_bytes_per_token('llama-2-70b')" must agree to the printed digits; an entry "96.3: Kwon et al.,
figure 2" names whose measurement it is, or that it is a premise. An entry with a unit speaks for the number in that
unit only. Whole numbers up to 16 need none, unless a unit follows ("16 MiB", "12 empty slots") or "=" stands before.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator

from minivllm.course import calculators
from minivllm.course.answer_units import UNITS
from minivllm.course.questions.question import Question
from minivllm.errors import MiniVLLMError

# A number that stands alone: not part of a name such as H100, FP8, Llama-3-8B or 4k; 3x is three times.
LONE = re.compile(r"(?<![\w.,/^-])\d+(?:,\d{3})*(?:\.\d+)?(?!(?!x\b)\w|\.\d|,\d|-\w)")
COUNTED = "blocks?|slots?|tokens?|requests?|heads?|layers?|rows?|steps?|entry|entries|samples?|GPUs?|workers?|users?"
MEASURED = "|".join(re.escape(unit) for unit in sorted(UNITS.keys() - {"x", "×"}, key=len, reverse=True))
UNIT = re.compile(  # of the number before it: 3x, 12 empty slots; not 2 × layers, nor the B of a formula 2 B D
    rf"x\b|×(?!\d)|\s*(?:{MEASURED})(?!\w| [A-Z]\b)|\s(?:[A-Za-z]+ )?(?:{COUNTED})(?![\w-])"
)
PRINTED = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*(\S*)")
MOST_PLAIN = 16
SIGNS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip


def problems_with_numbers(question: Question) -> Iterator[str]:
    """What is wrong with the numbers of a question, in words; nothing where all agree."""
    text = " ".join(question.texts)
    accounted = set()
    for entry in question.numbers:
        printed, is_computed, expression = entry.partition(" = ")
        if not is_computed:
            printed, is_cited, _ = entry.partition(": ")
            if not is_cited:
                yield f"{question.id}: {entry!r} is neither 'number = expression' nor 'number: source'"
        match = PRINTED.fullmatch(printed)
        if match is None or not re.search(rf"(?<![\d.,]){re.escape(printed)}(?!\w|[.,]\d)", text):
            yield f"{question.id}: {printed!r} stands in numbers, but not in the text"
            continue
        accounted.add((match[1], match[2]))
        if is_computed:
            yield from _disagreement(question.id, match[1], match[2], expression)
    for number, unit in dict.fromkeys(_to_account_for(text)):
        if not accounted & {(number, ""), (number, unit)}:
            yield f"{question.id}: nobody says where {number}{unit and f' {unit}'} comes from; add it to numbers"


def _to_account_for(text: str) -> Iterator[tuple[str, str]]:
    """Each number that needs an entry, and the unit behind it or ""."""
    for match in LONE.finditer(text):
        unit = UNIT.match(text, match.end())
        is_plain = match[0].isdigit() and int(match[0]) <= MOST_PLAIN
        if unit or not is_plain or re.search(r"(?<!\S)= $", text[: match.start()]):
            yield match[0], unit[0].split()[-1] if unit else ""


def evaluate(expression: str) -> float:
    """An expression of calculators, numbers and + - * / // ** : evaluate("2 * ridge_point('h100')").

    Raises MiniVLLMError for anything else.
    """
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise MiniVLLMError(f"{expression!r} is no expression: {error.msg}") from error
    return float(value)  # type: ignore[arg-type]


def _disagreement(question_id: str, printed: str, unit: str, expression: str) -> Iterator[str]:
    try:
        value = evaluate(expression) / UNITS.get(unit, ("", 1.0))[1]
    except (MiniVLLMError, TypeError) as error:
        yield f"{question_id}: {expression}: {error}"
        return
    number = float(printed.replace(",", ""))
    decimals = len(printed.partition(".")[2])
    if abs(value - number) > 0.5001 * 10**-decimals:
        yield f"{question_id}: the text says {printed} {unit}, {expression} gives {value:.6g} {unit}"


def _value(node: ast.expr) -> object:
    """The value of a node; calls reach nothing but the calculators."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_value(element) for element in node.elts]
        case ast.BinOp() if type(node.op) in SIGNS:
            return SIGNS[type(node.op)](_number(node.left), _number(node.right))
        case ast.Call(func=ast.Name(id=name)) if name in calculators.__all__:
            named = {word.arg: _value(word.value) for word in node.keywords if word.arg}
            return getattr(calculators, name)(*map(_value, node.args), **named)
        case ast.Subscript(value=of, slice=ast.Constant(value=str(part))):
            return getattr(_value(of), "parts")[part]  # noqa: B009
    raise MiniVLLMError(f"{ast.unparse(node)!r} is no calculator and no arithmetic")


def _number(node: ast.expr) -> float:
    return float(_value(node))  # type: ignore[arg-type]
