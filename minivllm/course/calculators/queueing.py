"""Waiting, in closed form: M/D/1 and M/M/1 with load rho = rate x service time, DistServe's TTFT, Little's law.

Times are in seconds, rates in 1/s. Arrivals are Poisson; prefill of equal prompts takes equal time D, hence M/D/1.
"""

from minivllm.course.calculators.checks import at_least, positive, whole
from minivllm.course.calculators.units import plain
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work
from minivllm.errors import ConfigError


def load(rate: Amount, service_s: Amount) -> Worked:
    """Share of time a server is busy, rate x service time. Raises ConfigError from 1 on: the queue never ends."""
    arrivals, service = at_least("rate", rate), positive("service_s", service_s)
    busy = arrivals * service
    if busy >= 1:
        raise ConfigError(
            f"load {busy:.4g} is 1 or more: {plain(arrivals)}/s of {plain(service)} s; lower the rate or add servers"
        )
    return work("load ρ", f"{plain(arrivals)}/s × {plain(service)} s", busy, "", rate, service_s)


def md1_wait_s(rate: Amounts, service_s: Amount) -> Worked:
    """Mean wait for a server with constant service time D: rho / (2 (1 - rho)) x D."""

    def of_rate(arrivals: Amount) -> Worked:
        busy, service = load(arrivals, service_s), positive("service_s", service_s)
        formula = f"ρ / (2 (1 − ρ)) × D = {plain(float(busy))} / (2 × {plain(1 - float(busy))}) × {plain(service)} s"
        return work("mean wait, M/D/1", formula, float(busy) / (2 * (1 - float(busy))) * service, "s", busy)

    return for_each(rate, of_rate)


def md1_ttft_s(rate: Amounts, prefill_s: Amount) -> Worked:
    """Mean TTFT on one GPU: D + R D^2 / (2 (1 - R D)), DistServe (arXiv 2401.09670) equation 1."""

    def of_rate(arrivals: Amount) -> Worked:
        wait, service = md1_wait_s(arrivals, prefill_s), positive("prefill_s", prefill_s)
        formula = f"D + wait = {plain(service)} s + {plain(float(wait))} s"
        return work("mean TTFT", formula, service + float(wait), "s", wait)

    return for_each(rate, of_rate)


def inter_op_ttft_s(rate: Amounts, prefill_s: Amount, num_stages: Amount = 2) -> Worked:
    """Mean TTFT through a pipeline of n stages of D / n: D + R D^2 / (4 (2 - R D)) for two, equation 2."""
    stages, service = whole("num_stages", num_stages), positive("prefill_s", prefill_s)

    def of_rate(arrivals: Amount) -> Worked:
        wait = md1_wait_s(arrivals, service / stages)
        formula = f"D + wait for the first of {stages} stages = {plain(service)} s + {plain(float(wait))} s"
        return work("mean TTFT, inter-op", formula, service + float(wait), "s", wait)

    return for_each(rate, of_rate)


def intra_op_ttft_s(rate: Amounts, prefill_s: Amount, speedup: Amount) -> Worked:
    """Mean TTFT when all GPUs share each prefill and it runs K < n times faster: D/K + R D^2 / (2 K (K - R D))."""
    service, faster = positive("prefill_s", prefill_s), positive("speedup", speedup)

    def of_rate(arrivals: Amount) -> Worked:
        total = md1_ttft_s(arrivals, service / faster)
        return work("mean TTFT, intra-op", f"M/D/1 with D / K = {plain(service / faster)} s", float(total), "s", total)

    return for_each(rate, of_rate)


def ttft_crossover_rate(prefill_s: Amount, speedup: Amount, num_stages: Amount = 2) -> Worked:
    """Rate from which a pipeline answers sooner than shared prefills. Raises ConfigError where it never does."""
    service, faster = positive("prefill_s", prefill_s), positive("speedup", speedup)
    stages = whole("num_stages", num_stages, 2)
    if not 1 < faster < stages:
        raise ConfigError(f"speedup must be above 1 and below {stages} for the curves to cross, not {plain(faster)}")
    low, high = 0.0, faster / service
    for _ in range(100):  # intra-op is better at `low`, worse at `high`, where its queue never ends
        middle = (low + high) / 2
        is_better = _ttft(middle, service / faster, service / faster) < _ttft(middle, service / stages, service)
        low, high = (middle, high) if is_better else (low, middle)
    formula = f"intra-op TTFT = inter-op TTFT, by bisection with D = {plain(service)} s, K = {plain(faster)}"
    return work("crossover rate", formula, low, "requests/s")


def mm1_time_s(rate: Amounts, service_s: Amount) -> Worked:
    """Mean time in a system with exponential service: D / (1 - rho); the wait alone, in parts, is twice M/D/1's."""

    def of_rate(arrivals: Amount) -> Worked:
        busy, service = load(arrivals, service_s), positive("service_s", service_s)
        value = service / (1 - float(busy))
        wait = work("mean wait, M/M/1", f"{plain(value)} − {plain(service)}", value - service, "s")
        return work("mean time, M/M/1", f"{plain(service)} / (1 − {plain(float(busy))})", value, "s", busy, wait=wait)

    return for_each(rate, of_rate)


def littles_law(rate: Amount, time_s: Amount) -> Worked:
    """Mean number in a system: L = lambda W, whatever the distributions."""
    arrivals, time = at_least("rate", rate), at_least("time_s", time_s)
    formula = f"{plain(arrivals)}/s × {plain(time)} s"
    return work("mean number present", formula, arrivals * time, "requests", rate, time_s)


def max_rate_within(limit_s: Amount, prefill_s: Amount) -> Worked:
    """Highest rate whose mean M/D/1 TTFT keeps the limit: R = 2 w / (D (D + 2 w)) with w = limit - D."""
    limit, service = positive("limit_s", limit_s), positive("prefill_s", prefill_s)
    if limit < service:
        raise ConfigError(
            f"one prefill of {plain(service)} s is longer than the limit of {plain(limit)} s; speed it up"
        )
    wait = limit - service
    formula = f"2 × {plain(wait)} / ({plain(service)} × ({plain(service)} + 2 × {plain(wait)}))"
    return work("highest rate", formula, 2 * wait / (service * (service + 2 * wait)), "requests/s", prefill_s)


def replicas_needed(
    rate: Amount,
    num_prompt: Amount,
    num_output: Amount,
    prefill_tokens_per_s: Amount,
    tpot_s: Amount,
    max_batch: Amount,
) -> Worked:
    """Replicas for a load: the larger of prefill's need, rate x P / prefill rate, and decode's, rate x G x TPOT / B."""
    arrivals, prompt, output = positive("rate", rate), whole("num_prompt", num_prompt), whole("num_output", num_output)
    speed, step = positive("prefill_tokens_per_s", prefill_tokens_per_s), positive("tpot_s", tpot_s)
    batch = whole("max_batch", max_batch)
    prefill, decode = arrivals * prompt / speed, arrivals * output * step / batch
    formula = f"⌈max(prefill {plain(prefill)}, decode {plain(decode)})⌉"
    return work("replicas", formula, int(-(-max(prefill, decode) // 1)), "replicas")


def _ttft(rate: float, stage_s: float, total_s: float) -> float:
    busy = rate * stage_s
    return total_s + busy / (2 * (1 - busy)) * stage_s if busy < 1 else float("inf")
