"""Notebook 12, Can checking be cheaper than writing: a row of the table, the rule, lengths, counts, batch, blocks."""

from random import Random

from minivllm.course.calculators import (
    accelerator,
    best_gamma,
    blocks_freed,
    break_even_batch,
    critical_batch,
    expected_tokens,
    operations_factor,
    speedup,
    speedup_without_bonus,
    tokens_per_round_from_shares,
)
from minivllm.course.exercises import nb12_code
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, Slip, named
from minivllm.course.exercises.place import Place

SPECULATION = "minivllm.course.calculators.speculation"
CHIPS = ("a100-80gb-sxm", "h100-sxm", "h200-sxm", "l40s")


def row_of_the_table(random: Random, facts: Facts) -> Problem:
    """Leviathan's table 1: tokens of a round and operations, at a free drafter."""
    alpha, gamma = random.choice((0.5, 0.6, 0.7, 0.8, 0.9)), random.randrange(2, 9)
    tokens, work = expected_tokens(alpha, gamma), operations_factor(alpha, gamma)
    speed_slips = {
        "extra token forgotten: a round yields one token even where every draft is wrong": float(tokens) - 1,
        "every draft accepted: drafts behind a rejected one are dropped": gamma + 1,
        "mean of the drafts: a draft counts only where all before it were accepted": 1 + alpha * gamma,
        "bound: that is the limit of endless drafts": 1 / (1 - alpha),
        "last power forgotten: the sum runs up to alpha^gamma": float(expected_tokens(alpha, gamma - 1)),
        "last power only: add up the chances of all lengths": alpha**gamma,
    }
    work_slips = {
        "upside down: more operations than without drafts": 1 / float(work),
        "extra place forgotten: the target looks at gamma + 1 places": gamma / float(tokens),
        "operations of a round: divide by the tokens it yields": gamma + 1,
        "accepted drafts only: the extra token is one of the tokens": (gamma + 1) / (float(tokens) - 1),
        "tokens for operations: that is the speed-up": float(tokens),
    }
    parts = (
        Part(float(tokens), named(speed_slips), "tokens", label="tokens a round"),
        Part(float(work), named(work_slips), "×", label="operations"),
    )
    question = (
        f"A drafter costs nothing, drafts gamma = {gamma} tokens a round, and each is accepted with chance alpha = "
        f"{alpha} (Leviathan et al., table 1). Give two numbers: the expected tokens of a round, which is the "
        "speed-up, and the target's operations for a token, as a factor over decoding without drafts."
    )
    working = (tokens.derivation[-1], work.derivation[-1])
    return Problem(question, parts, working, {"alpha": alpha, "gamma": gamma})


def best_length(random: Random, facts: Facts) -> Problem:
    """The draft length of the highest speed-up, and that speed-up."""
    alpha, cost = random.choice((0.6, 0.65, 0.7, 0.75, 0.8, 0.85)), random.choice((0.02, 0.03, 0.05, 0.08, 0.1))
    best = best_gamma(alpha, cost)
    gain, length = float(best.parts["speedup"]), int(best)
    length_slips = {
        "a draft too few: try one more before you stop": length - 1,
        "a draft too many: it falls again there": length + 1,
        "as many as the drafter can write in a target step: later drafts are seldom reached": round(1 / cost),
        "as for a free drafter: its time counts, too": length + 20,
        "only one: more drafts gain more here": 1 if length > 2 else length + 9,
    }
    gain_slips = {
        "drafting time forgotten: divide by gamma × c + 1": float(expected_tokens(alpha, length)),
        "extra token forgotten: a round yields one token more than it accepts": float(
            speedup_without_bonus(alpha, length, cost)
        ),
        "the target's step forgotten: a round takes gamma × c + 1": float(expected_tokens(alpha, length))
        / (length * cost),
        "bound: endless free drafts would reach that": 1 / (1 - alpha),
        "one draft: that is the speed-up of gamma = 1": float(speedup(alpha, 1, cost)),
    }
    parts = (
        Part(length, named(length_slips), "drafts", label="best gamma"),
        Part(gain, named(gain_slips), "×", label="speed-up"),
    )
    question = (
        f"A draft is accepted with chance {alpha} and costs {cost:g} target steps. Give two numbers: how many drafts a "
        "round are best, and the speed-up with so many."
    )
    return Problem(question, parts, best.derivation, {"alpha": alpha, "cost": cost})


def counted_and_formula(random: Random, facts: Facts) -> Problem:
    """Counts by position against the closed form with one alpha for all."""
    given = facts.get("accepted_by_position")
    num_rounds = int(str(facts.get("num_rounds", random.randrange(60, 160))))
    accepted = [int(str(n)) for n in given] if isinstance(given, list | tuple) else _falling(random, num_rounds)
    reached = [num_rounds, *accepted[:-1]]
    alpha, length = sum(accepted) / sum(reached), len(accepted)
    counted = tokens_per_round_from_shares([n / num_rounds for n in accepted])
    formula = expected_tokens(alpha, length)
    total = sum(accepted) / num_rounds
    alpha_slips = {
        "first position only: the formula's alpha is over all judged drafts": accepted[0] / num_rounds,
        "all drafts counted: those behind a rejected one were never judged": total / length,
        "last position only: add up all positions": accepted[-1] / max(reached[-1], 1),
        "share for its complement": 1 - alpha,
        "accepted over rounds: that counts several drafts of a round": total,
    }
    counted_slips = {
        "extra token forgotten: add the one that each round gains": total,
        "drafted for accepted: most rounds end before": length + 1.0,
        "the formula's: count instead": float(formula),
        "share of the drafts: a mean of tokens is wanted": total / (length + 1),
        "twice the extra token: a round has one": total + 2,
    }
    parts = (
        Part(alpha, named(alpha_slips), label="alpha"),
        Part(float(counted), named(counted_slips), "tokens", label="tokens a round, counted"),
    )
    question = (
        f"{num_rounds} rounds of {length} drafts; accepted at position 1, 2, …: {accepted}. Give two numbers: alpha, "
        "the accepted share of all drafts that were judged (all before them were accepted), and the tokens of a round "
        "as counted, the extra one included. Compare with the formula at that alpha."
    )
    working = (
        f"alpha = {sum(accepted)} / ({' + '.join(map(str, reached))}) = {alpha:.4f}",
        counted.derivation[-1],
        f"by the formula: {formula.derivation[-1]}",
    )
    return Problem(question, parts, working, {"num_rounds": num_rounds, "accepted_by_position": accepted})


def _falling(random: Random, num_rounds: int) -> list[int]:
    accepted, left = [], num_rounds
    for _ in range(4):
        left = max(round(left * random.uniform(0.55, 0.9)), 4)
        accepted.append(left)
    return accepted


def batch_of_the_ridge(random: Random, facts: Facts) -> Problem:
    """The largest batch whose verification stays left of the ridge."""
    chip, drafts = random.choice(CHIPS), random.randrange(2, 8)
    card, limit = accelerator(chip), critical_batch(chip)
    worked = break_even_batch(drafts, limit)
    answer, ridge = int(worked), float(limit)
    slips = {
        "extra place forgotten: k drafts are k + 1 places": int(ridge // drafts),
        "drafts forgotten: each request brings k + 1 tokens": int(ridge),
        "multiplied: more drafts leave room for fewer requests": int(ridge * (drafts + 1)),
        "ridge upside down": round(card.bandwidth / card.flops_of(), 6),
        "rounded up: one request more stands right of the ridge": answer + 1,
        "tokens for requests: each request brings k + 1 tokens": answer * (drafts + 1),
    }
    slips = {name: value for name, value in slips.items() if value != answer}
    question = (
        f"{card.name}: {card.flops_of() / 1e12:g} TFLOP/s and {card.bandwidth / 1e12:g} TB/s in bf16. Every request "
        f"has {drafts} drafts checked in a step. Up to how many requests does reading the weights take longer than the "
        "products, so that checking is free?"
    )
    given = {"chip": chip, "num_drafts": drafts}
    return Problem(question, (Part(answer, named(slips), "requests"),), (*limit.derivation, *worked.derivation), given)


def blocks_of_a_rewind(random: Random, facts: Facts) -> Problem:
    """Which blocks of the table go back when a tail is rejected."""
    freed = 0
    while freed < 2:
        size, drafts = random.choice((2, 4)), random.randrange(4, 9)
        known, kept = random.randrange(2 * size + 1, 5 * size), random.randrange(0, drafts - 1)
        freed = int(blocks_freed(known + drafts, drafts - kept, size))
    num_held, stored = -(-(known + drafts) // size), known + kept
    table = random.sample(range(1, 60), num_held)
    first = -(-stored // size)
    count_slips = {
        "the partly filled block given back: it holds a token that stays": num_held - stored // size,
        "all blocks of the drafts: accepted ones stay": num_held - -(-known // size),
        "one block a draft: several drafts share a block": drafts - kept,
        "tokens divided by the block size, up: what counts is where the blocks end": -(-(drafts - kept) // size),
        "blocks that stay: those that go are asked for": first,
        "all of them: the known tokens stay": num_held,
        "slots for blocks: divide by the block size": freed * size,
        "tokens that stay: blocks that go are asked for": stored,
        "tokens for blocks: several share a block": known + drafts,
        "a block for every draft: accepted ones stay, and several share a block": drafts,
        "known tokens: they stay": known,
    }
    id_slips = {
        "block number for block id: look it up in the table": first,
        "the partly filled block: it holds a token that stays": table[first - 1],
        "from the front of the table: the tail is rejected": table[0],
        "position for block: divide by the block size, then look in the table": stored,
        "the last one: the first of them in the table's order is asked for": table[-1],
        "the slot: the block's id alone": table[first] * size,
        "one block too far: that one goes, too, but not first": table[min(first + 1, num_held - 1)],
    }
    parts = (
        Part(freed, _apart(count_slips, freed), "blocks", label="how many"),
        Part(table[first], _apart(id_slips, table[first]), label="the first of them"),
    )
    question = (
        f"Block size {size}, block table {table}. In a step K and V of the last known token and of {drafts} drafts "
        f"are stored; with them the request holds {known + drafts} tokens. {kept} drafts are accepted. Give two "
        "numbers: how many blocks go back to the pool, and the id of the first of them in the table's order."
    )
    working = (
        f"{known} + {kept} = {stored} tokens stay: ⌈{stored} / {size}⌉ = {first} blocks of {num_held}",
        f"table[{first}:] = {table[first:]}: {freed} blocks",
    )
    given = {"block_size": size, "block_table": table, "num_stored": known + drafts, "num_kept": stored}
    return Problem(question, parts, working, given)


def _apart(slips: dict[str, int], answer: int) -> tuple[Slip, ...]:
    """Slips whose numbers differ from the answer and from those before."""
    kept: dict[str, int] = {}
    for name, value in slips.items():
        if value not in (answer, *kept.values()):
            kept[name] = value
    return named(kept)


EXERCISES = (
    Exercise("12.1", "A row of the published table", (
        "A round gives 1 token for sure, a second one with chance alpha, a third with alpha².",
        "1 + alpha + … + alpha^gamma = (1 − alpha^(gamma + 1)) / (1 − alpha) tokens.",
        "The target looks at gamma + 1 places a round: operations = (gamma + 1) / tokens.",
    ), Place(SPECULATION, "expected_tokens"), row_of_the_table),
    Exercise("12.2", "Accept, or draw from the residual", (
        "Two cases: u < p[draft] / q[draft], and all others.",
        "Accepted: 1.0 at the draft, 0.0 elsewhere. Rejected: max(p − q, 0) at every token.",
        "left = [max(a - b, 0) for a, b in zip(p, q)]; the residual is [x / sum(left) for x in left].",
    ), Place("minivllm.speculative.verify", "accept_or_resample"), nb12_code.judge_problem),
    Exercise("12.3", "The best number of drafts", (
        "speed-up = expected tokens / (gamma × c + 1): one more draft adds alpha^gamma tokens and costs c.",
        "Work it out for gamma = 1, 2, 3, … until it falls; it has one peak.",
        "best_gamma(alpha, cost) of minivllm.course.calculators does that.",
    ), Place(SPECULATION, "best_gamma"), best_length),
    Exercise("12.4", "Counted and by the formula", (
        "Position 1 is judged in every round, position 2 only where position 1 was accepted.",
        "alpha = sum of accepted / sum of judged; judged = rounds, then accepted of the position before.",
        "Counted tokens = 1 + sum of accepted / rounds.",
    ), Place("minivllm.course.speculation_records", "Positions"), counted_and_formula),
    Exercise("12.5", "Where checking is no longer free", (
        "Products of a step with n tokens do n FLOPs for each byte of bf16 weights.",
        "n = batch × (k + 1), and the ridge is FLOP/s over bytes/s.",
        "⌊ridge / (k + 1)⌋",
    ), Place(SPECULATION, "break_even_batch"), batch_of_the_ridge),
    Exercise("12.6", "Which blocks does a rewind free?", (
        "How many tokens are still valid after the step?",
        "A block stays if it holds one valid token: the first ⌈valid / block size⌉ entries of the table.",
        "table[⌈(known + accepted) / block size⌉ :]",
    ), Place("minivllm.engine.kv_manager", "KVManager.trim"), blocks_of_a_rewind),
)  # fmt: skip
