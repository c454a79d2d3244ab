"""Speculative decoding in closed form: acceptance, tokens per round, speed-up, and the proof on a small vocabulary.

alpha is the chance that one draft is accepted, gamma how many are drafted, c the drafter's time per token in target
steps. A round yields the accepted drafts AND one token of the target's own: Leviathan et al., arXiv 2211.17192.
"""

from collections.abc import Sequence
from itertools import pairwise

from minivllm.course.calculators.checks import at_least, distribution, listed, share, whole
from minivllm.course.calculators.units import listing, plain, shown
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work
from minivllm.errors import ConfigError

MAX_GAMMA = 100_000


def expected_tokens(alpha: Amounts, gamma: Amount) -> Worked:
    """Tokens of one round, the bonus token included: (1 - alpha^(gamma + 1)) / (1 - alpha), equation 1."""
    drafted = whole("gamma", gamma, 0)

    def of_alpha(chance: Amount) -> Worked:
        accepted = share("alpha", chance)
        formula = (
            f"(1 − {plain(accepted)}^{drafted + 1}) / (1 − {plain(accepted)})" if accepted < 1 else f"{drafted} + 1"
        )
        return work("expected tokens", formula, _tokens(accepted, drafted), "tokens", chance)

    return for_each(alpha, of_alpha)


def speedup(alpha: Amounts, gamma: Amount, cost: Amount = 0) -> Worked:
    """Wall-time gain: expected tokens / (gamma c + 1), theorem 3.8; below 1 it is a loss."""
    drafted, price = whole("gamma", gamma, 0), at_least("cost", cost)

    def of_alpha(chance: Amount) -> Worked:
        tokens = expected_tokens(chance, drafted)
        formula = f"{plain(float(tokens))} tokens / ({drafted} × {plain(price)} + 1)"
        return work("speed-up", formula, float(tokens) / (drafted * price + 1), "×", tokens)

    return for_each(alpha, of_alpha)


def speedup_without_bonus(alpha: Amount, gamma: Amount, cost: Amount = 0) -> Worked:
    """A mistake seen in print, kept to be recognised: it counts accepted drafts only and so forgets a token a round."""
    accepted, drafted, price = share("alpha", alpha), whole("gamma", gamma, 0), at_least("cost", cost)
    tokens = _tokens(accepted, drafted) - 1
    formula = f"{plain(tokens)} accepted / ({drafted} × {plain(price)} + 1)"
    return work("speed-up without the bonus token (wrong)", formula, tokens / (drafted * price + 1), "×")


def best_gamma(alpha: Amount, cost: Amount) -> Worked:
    """How many to draft for the highest speed-up, which is in `.parts`; 0 where drafting only loses."""
    accepted, price = share("alpha", alpha, can_be_one=False), at_least("cost", cost)
    if not price:
        raise ConfigError("a drafter that costs nothing should draft without end; give a cost above 0")
    best = 0
    while _gain(accepted, best + 1, price) > _gain(accepted, best, price):  # it rises to one peak and falls
        best += 1
        if best == MAX_GAMMA:
            raise ConfigError(f"with cost {plain(price)} even {MAX_GAMMA:,} drafts are too few; give a higher cost")
    near = ", ".join(f"γ={g}: {_gain(accepted, g, price):.3f}×" for g in range(max(best - 1, 0), best + 2))
    return work("best γ", f"largest of {near}", best, "drafts", speedup=speedup(accepted, best, price))


def speedup_bound(alpha: Amount) -> Worked:
    """What no number of free drafts can pass: 1 / (1 - alpha)."""
    accepted = share("alpha", alpha, can_be_one=False)
    return work("bound", f"1 / (1 − {plain(accepted)})", 1 / (1 - accepted), "×", alpha)


def break_even_cost(alpha: Amount, gamma: Amount) -> Worked:
    """The drafter's cost at which speculation gains nothing: (expected tokens - 1) / gamma."""
    drafted = whole("gamma", gamma)
    tokens = expected_tokens(alpha, drafted)
    value = (float(tokens) - 1) / drafted
    return work("break-even cost", f"({plain(float(tokens))} − 1) / {drafted}", value, "target steps", tokens)


def operations_factor(alpha: Amount, gamma: Amount, cost: Amount = 0) -> Worked:
    """Growth of arithmetic work: (1 - alpha)(gamma c + gamma + 1) / (1 - alpha^(gamma + 1)), theorem 3.11."""
    accepted, drafted, price = share("alpha", alpha), whole("gamma", gamma, 0), at_least("cost", cost)
    value = (drafted * price + drafted + 1) / _tokens(accepted, drafted)
    formula = f"({drafted} × {plain(price)} + {drafted} + 1) / {plain(_tokens(accepted, drafted))} tokens"
    return work("operations per token", formula, value, "×")


def acceptance(target: Sequence[float], drafter: Sequence[float]) -> Worked:
    """alpha of two distributions: sum of min(p, q) = 1 - total variation, theorem 3.5."""
    p, q = _pair(target, drafter)
    formula = listing((f"min({plain(a)}, {plain(b)})" for a, b in zip(p, q, strict=True)), " + ")
    return work("acceptance", formula, sum(map(min, p, q)), "")


def lenient_acceptance(target: Sequence[float], drafter: Sequence[float], lenience: Amount) -> Worked:
    """Acceptance when p may fall short by a factor l <= 1: sum of min(p / l, q), appendix A.5; no longer exact."""
    p, q = _pair(target, drafter)
    factor = share("lenience", lenience, can_be_zero=False)
    value = sum(min(a / factor, b) for a, b in zip(p, q, strict=True))
    formula = listing((f"min({plain(a)}/{plain(factor)}, {plain(b)})" for a, b in zip(p, q, strict=True)), " + ")
    return work("lenient acceptance", formula, value, "")


def residual(target: Sequence[float], drafter: Sequence[float]) -> Worked:
    """What a rejected position is drawn from: max(p - q, 0), normalised; all zeros only where none rejects."""
    p, q = _pair(target, drafter)
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    total = sum(left)
    if not total:
        raise ConfigError("target and drafter are equal: every draft is accepted and nothing is left to draw from")
    values = tuple(round(value / total, 12) for value in left)
    formula = "max(p − q, 0) / " + plain(total)
    return Worked(values, "", (f"residual = {formula} = {shown(values)}",))


def output_distribution(target: Sequence[float], drafter: Sequence[float]) -> Worked:
    """What the procedure emits: min(p, q) + P(reject) x residual, which is p again, appendix A.1."""
    p, q = _pair(target, drafter)
    kept = [min(a, b) for a, b in zip(p, q, strict=True)]
    rejected = 1 - sum(kept)
    rest = residual(p, q).value if rejected > 1e-12 else (0.0,) * len(p)
    assert isinstance(rest, tuple)
    values = tuple(round(k + rejected * r, 12) for k, r in zip(kept, rest, strict=True))
    line = f"output = min(p, q) + {plain(rejected)} × residual = {shown(values)}"
    return Worked(values, "", (line,))


def tokens_per_round(position_acceptance: Sequence[Amount]) -> Worked:
    """Mean tokens of a round from measured acceptance by position, each given that all before it were accepted.

    1 + a1 + a1 a2 + ...: EAGLE's tau, with its n-alpha falling from position to position.
    """
    rates = [
        float(share(f"position_acceptance[{i}]", a))
        for i, a in enumerate(listed("position_acceptance", position_acceptance, 0))
    ]
    reached, terms = 1.0, [1.0]
    for rate in rates:
        reached *= rate
        terms.append(reached)
    return work("tokens per round", " + ".join(plain(round(t, 6)) for t in terms), sum(terms), "tokens")


def tokens_per_round_from_shares(position_shares: Sequence[Amount]) -> Worked:
    """The same from the share of rounds in which each position was accepted, as vLLM counts: 1 + their sum."""
    shares = [
        float(share(f"position_shares[{i}]", value))
        for i, value in enumerate(listed("position_shares", position_shares, 0))
    ]
    if any(later > before for before, later in pairwise(shares)):
        raise ConfigError("shares by position must not rise: a draft is accepted only where all before it were")
    return work("tokens per round", " + ".join(["1", *map(plain, shares)]), 1 + sum(shares), "tokens")


def tree_tokens_per_round(accepted_shares_by_depth: Sequence[Sequence[Amount]]) -> Worked:
    """Tokens of a round with a draft tree: at each depth the children's chances add up, and depths multiply."""
    depths = [listed("a depth's shares", children) for children in listed("depths", accepted_shares_by_depth, 0)]
    rates = [sum(float(share("child", child)) for child in children) for children in depths]
    if any(rate > 1 + 1e-9 for rate in rates):
        raise ConfigError("children of one node exclude each other: their chances must sum to at most 1")
    return tokens_per_round([min(rate, 1.0) for rate in rates])


def verified_tokens(batch_size: Amount, num_drafts: Amount, critical_batch: Amount) -> Worked:
    """Share of the critical batch that verification fills: B (k + 1) / B_crit; from 1 on it is no longer free."""
    batch, drafts = whole("batch_size", batch_size), whole("num_drafts", num_drafts, 0)
    limit = at_least("critical_batch", critical_batch, 1)
    formula = f"{batch} × ({drafts} + 1) / {plain(limit)}"
    return work("B (k + 1) / critical batch", formula, batch * (drafts + 1) / limit, "", critical_batch)


def break_even_batch(num_drafts: Amount, critical_batch: Amount) -> Worked:
    """Batch from which verifying k drafts costs compute: floor(B_crit / (k + 1))."""
    drafts, limit = whole("num_drafts", num_drafts, 0), at_least("critical_batch", critical_batch, 1)
    formula = f"⌊{plain(limit)} / ({drafts} + 1)⌋"
    return work(
        "largest batch that verifies for free", formula, int(limit // (drafts + 1)), "sequences", critical_batch
    )


def blocks_freed(num_tokens: Amount, num_rejected: Amount, block_size: Amount = 16) -> Worked:
    """Blocks that fall empty when so many of the stored tokens are rejected."""
    tokens, rejected = whole("num_tokens", num_tokens), whole("num_rejected", num_rejected, 0)
    size = whole("block_size", block_size)
    if rejected > tokens:
        raise ConfigError(f"{rejected} tokens cannot be rejected out of {tokens}")
    before, after = -(-tokens // size), -(-(tokens - rejected) // size)
    formula = f"⌈{tokens}/{size}⌉ − ⌈{tokens - rejected}/{size}⌉ = {before} − {after}"
    return work("blocks freed", formula, before - after, "blocks")


def _tokens(alpha: float, gamma: int) -> float:
    return (1 - alpha ** (gamma + 1)) / (1 - alpha) if alpha < 1 else gamma + 1.0


def _gain(alpha: float, gamma: int, cost: float) -> float:
    return _tokens(alpha, gamma) / (gamma * cost + 1)


def _pair(target: Sequence[float], drafter: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    p, q = distribution("target", target), distribution("drafter", drafter)
    if len(p) != len(q):
        raise ConfigError(f"target has {len(p)} tokens, drafter {len(q)}; both need the same vocabulary")
    return p, q
