"""Machine code of sm_90 in which a register is written while a warp-group product still reads or fills it.

A product (HGMMA) runs on after it was issued, until a WARPGROUP.DEPBAR waits for it. Triton 3.6 once moved a softmax
between the two and let it write the weights that the product was reading: right or wrong by luck of timing, and nothing
but the machine code shows it (kernels/NOTES.md). Looked at: innermost loops, round the back edge, up to the next wait.
"""

import re

LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
PRODUCT = re.compile(
    r"HGMMA\.64x(\d+)\S* R(\d+), (?:R(\d+)|gdesc)"
)  # columns, accumulator, and A if it is in registers
WRITE = re.compile(r"(?:@!?U?P\d+ )?([A-Z][\w.]*) (?:U?P[T\d]+, )*R(\d+)\b")
NO_WRITE = ("ST", "BAR", "SYNCS", "R2UR")


def overwritten_registers(sass: str) -> list[str]:
    """Instructions that write a register of a product under way; empty if all wait."""
    return [line for body in _innermost_loops(sass.splitlines()) for line in _hazards(body)]


def _innermost_loops(lines: list[str]) -> list[list[str]]:
    """Instructions of each innermost loop that has a product in it."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    jumps = [(labels.get(match[1], i), i) for i, line in enumerate(lines) if (match := BRANCH.search(line))]
    loops = [(a, b) for a, b in jumps if a < b and any("HGMMA" in line for line in lines[a:b])]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = [[re.sub(r"/\*[0-9a-fx]+\*/", "", line).strip() for line in lines[a : b + 1]] for a, b in inner]
    return [[line for line in body if line and not line.startswith(".")] for body in bodies]


def _hazards(body: list[str]) -> list[str]:
    """From the first product with weights in registers round the loop to the wait for all products."""
    first = next((i for i, line in enumerate(body) if (match := PRODUCT.search(line)) and match[3]), None)
    if first is None:
        return []
    busy: set[int] = set()
    found = []
    for line in body[first:] + body[:first]:
        if "WARPGROUP.DEPBAR" in line and re.search(r"\b0x0\b", line):
            break
        if product := PRODUCT.search(line):
            columns, accumulator, weights = int(product[1]), int(product[2]), product[3]
            filled = set(range(accumulator, accumulator + columns // 2))
            if weights:
                busy |= filled | set(range(int(weights), int(weights) + 4))
            elif filled & busy:
                found.append(line)
        elif (write := WRITE.match(line)) and not write[1].startswith(NO_WRITE):
            width = 4 if ".128" in write[1] else 2 if ".64" in write[1] or "WIDE" in write[1] else 1
            if busy & set(range(int(write[2]), int(write[2]) + width)):
                found.append(line)
    return found
