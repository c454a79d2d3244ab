"""Numeric forms of group G: acceptance, tokens of a round, speed-ups, the ridge, and blocks that go back."""

from random import Random

from minivllm.course.calculators import (
    accelerator,
    acceptance,
    blocks_freed,
    break_even_batch,
    break_even_cost,
    critical_batch,
    expected_tokens,
    lenient_acceptance,
    speedup,
    verified_tokens,
)
from minivllm.course.calculators.worked import Worked
from minivllm.course.numeric_forms import Form, Problem, Slip


def batch_that_is_free(random: Random) -> Problem:
    chip, drafts = random.choice(["a100", "h100", "h200", "b200", "l40s"]), random.randint(2, 7)
    card, limit = accelerator(chip), critical_batch(chip)
    truth = break_even_batch(drafts, limit)
    ask = (
        f"{card.name}: {card.flops_of() / 1e12:g} TFLOP/s in bf16, {card.bandwidth / 1e12:g} TB/s. Each request has "
        f"{drafts} drafts checked in a step. Up to which batch does reading the weights still hide the products?"
    )
    slips = (
        Slip("extra place forgotten", int(float(limit) // drafts)),
        Slip("drafts forgotten", int(limit)),
        Slip("ridge upside down", 1 / float(limit)),
    )
    return Problem(ask, "sequences", truth, slips)


def overlap_of_rows(random: Random) -> Problem:
    p, q = _row(random), _row(random)
    truth = acceptance(p, q)
    ask = (
        f"The target says {_written(p)} over four tokens, the drafter {_written(q)}. Which share of drafts is accepted?"
    )
    slips = (
        Slip("share for its complement", 1 - float(truth)),
        Slip("product for the smaller", sum(a * b for a, b in zip(p, q, strict=True))),
        Slip("larger for the smaller", sum(map(max, p, q))),
    )
    return Problem(ask, "", truth, slips)


def tokens_of_a_round(random: Random) -> Problem:
    alpha, gamma = random.choice([0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]), random.randint(2, 5)
    truth = expected_tokens(alpha, gamma)
    ask = f"{gamma} drafts a round, each accepted with chance {alpha}. How many tokens does a round yield on average?"
    slips = (
        Slip("extra token forgotten", float(truth) - 1),
        Slip("rejected tail counted", 1 + alpha * gamma),
        Slip("endless drafts", 1 / (1 - alpha)),
        Slip("one power too few", float(expected_tokens(alpha, gamma - 1))),
    )
    return Problem(ask, "tokens", truth, slips)


def gain_of_a_round(random: Random) -> Problem:
    alpha, gamma = random.choice([0.6, 0.7, 0.75, 0.8, 0.85]), random.randint(3, 7)
    cost = random.choice([0.05, 0.08, 0.1, 0.15, 0.2])
    truth, tokens = speedup(alpha, gamma, cost), float(expected_tokens(alpha, gamma))
    ask = (
        f"{gamma} drafts a round, each accepted with chance {alpha} and written in {cost:g} target steps. What is the "
        "speed-up?"
    )
    slips = (
        Slip("extra token forgotten", (tokens - 1) / (gamma * cost + 1)),
        Slip("drafting forgotten", tokens),
        Slip("target step forgotten", tokens / (gamma * cost)),
        Slip("one draft's cost", tokens / (cost + 1)),
    )
    return Problem(ask, "×", truth, slips)


def chance_of_the_residual(random: Random) -> Problem:
    p, q = _row(random), _row(random)
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    best = max(range(4), key=left.__getitem__)
    value = left[best] / sum(left)
    line = f"{left[best]:.2f} / {sum(left):.2f} = {value:.4g}"
    ask = (
        f"The target says {_written(p)} over the tokens A to D, the drafter {_written(q)}. A draft was rejected: with "
        f"which chance is it replaced by {'ABCD'[best]}?"
    )
    slips = (Slip("residual not normalised", left[best]), Slip("replaced from p", p[best]))
    return Problem(ask, "", Worked(value, "", (line,)), slips)


def share_of_the_ridge(random: Random) -> Problem:
    chip, drafts, batch = random.choice(["a100", "h100", "h200"]), random.randint(2, 6), random.randint(8, 200)
    card, limit = accelerator(chip), critical_batch(chip)
    truth = verified_tokens(batch, drafts, limit)
    ask = (
        f"{batch} requests with {drafts} drafts each are checked in a step on an {card.name} "
        f"({card.flops_of() / 1e12:g} TFLOP/s, {card.bandwidth / 1e12:g} TB/s, bf16). How many times the "
        "critical batch is that?"
    )
    slips = (
        Slip("extra place forgotten", batch * drafts / float(limit)),
        Slip("drafts forgotten", batch / float(limit)),
        Slip("ratio upside down", 1 / float(truth)),
    )
    return Problem(ask, "", truth, slips)


def blocks_given_back(random: Random) -> Problem:
    size, drafts = random.choice([2, 4]), random.randint(6, 16)
    tokens, rejected = random.randint(30, 200), random.randint(5, drafts)
    truth = blocks_freed(tokens, rejected, size)
    ask = (
        f"After a step a request's blocks of {size} hold {tokens} tokens, {drafts} of them drafts. The last {rejected} "
        "are rejected. How many blocks go back to the pool?"
    )
    slips = (
        Slip("rejected for blocks", rejected),
        Slip("rounded up", -(-rejected // size) if rejected % size else rejected // size + 1),
        Slip("slots for blocks", int(truth) * size),
        Slip("blocks that stay", -(-tokens // size) - int(truth)),
    )
    return Problem(ask, "blocks", truth, slips)


def cost_that_gains_nothing(random: Random) -> Problem:
    alpha, gamma = random.choice([0.55, 0.62, 0.68, 0.75, 0.8, 0.82]), random.randint(3, 8)
    truth, tokens = break_even_cost(alpha, gamma), float(expected_tokens(alpha, gamma))
    ask = (
        f"{gamma} drafts a round, each accepted with chance {alpha}. At which cost of a draft, in target steps, is "
        "nothing gained?"
    )
    slips = (
        Slip("target step forgotten", tokens / gamma),
        Slip("cost of the round", tokens - 1),
        Slip("extra token forgotten", (tokens - 2) / gamma),
    )
    return Problem(ask, "target steps", truth, slips)


def lenient_overlap(random: Random) -> Problem:
    p, q, lenience = _row(random), _row(random), random.choice([0.3, 0.4, 0.5, 0.6])
    truth = lenient_acceptance(p, q, lenience)
    ask = (
        f"The target says {_written(p)} over four tokens, the drafter {_written(q)}. With lenience l = {lenience:g}, "
        "which share of drafts is accepted?"
    )
    slips = (
        Slip("lenience forgotten", float(acceptance(p, q))),
        Slip("multiplied by the lenience", sum(min(a * lenience, b) for a, b in zip(p, q, strict=True))),
        Slip("lenience at the drafter", sum(min(a, b / lenience) for a, b in zip(p, q, strict=True))),
    )
    return Problem(ask, "", truth, slips)


def _row(random: Random) -> list[float]:
    """Four chances in whole percent."""
    cuts = sorted(random.sample(range(5, 96, 5), 3))
    return [(b - a) / 100 for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]


def _written(row: list[float]) -> str:
    return ", ".join(f"{chance:g}" for chance in row)


FORMS: dict[str, Form] = {
    "G2": batch_that_is_free, "G3": overlap_of_rows, "G4": tokens_of_a_round, "G5": gain_of_a_round,
    "G6": chance_of_the_residual, "G10": share_of_the_ridge, "G11": blocks_given_back,
    "G12": cost_that_gains_nothing, "G14": lenient_overlap,
}  # fmt: skip
