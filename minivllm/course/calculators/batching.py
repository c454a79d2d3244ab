"""Counting steps: static against continuous batches, chunks of a prompt, tiles and captured sizes, tokens and money."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import pairwise

from minivllm.course.calculators.checks import at_least, listed, positive, share, whole
from minivllm.course.calculators.units import counted, listing, plain
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work
from minivllm.errors import ConfigError


def static_steps(lengths: Sequence[Amount], num_slots: Amount) -> Worked:
    """Decode steps when each batch runs to its longest, with the slots' use in parts: 750 steps, 37.8% in N66."""
    tokens, slots = _lengths(lengths), whole("num_slots", num_slots)
    longest = [max(tokens[i : i + slots]) for i in range(0, len(tokens), slots)]
    steps = sum(longest)
    return work("static steps", listing(map(str, longest), " + "), steps, "steps", use=_slot_use(tokens, steps, slots))


def continuous_steps(lengths: Sequence[Amount], num_slots: Amount) -> Worked:
    """Decode steps when the next request takes a slot as soon as one is free, with the slots' use in parts."""
    tokens, slots = _lengths(lengths), whole("num_slots", num_slots)
    ends = [0] * min(slots, len(tokens))
    heapify(ends)
    for length in tokens:
        heapreplace(ends, ends[0] + length)  # the slot that is free first
    steps = max(ends)
    formula = "the last of the slots' ends " + listing(map(str, sorted(ends)))
    return work("continuous steps", formula, steps, "steps", use=_slot_use(tokens, steps, slots))


def static_idle_share(lengths: Sequence[Amount]) -> Worked:
    """Percent of one static batch's slots that idle: 1 - mean / max."""
    tokens = _lengths(lengths)
    mean, longest = sum(tokens) / len(tokens), max(tokens)
    return work("idle", f"1 − {plain(mean)} / {longest}", 100 * (1 - mean / longest), "%")


def token_forwards(num_tokens: Amount) -> Worked:
    """Token-forwards to get n tokens without a cache, n (n + 1) / 2; with one it is n, in parts."""
    count = whole("num_tokens", num_tokens)
    cached = work("with a cache", "one per token", count, "token-forwards")
    formula = f"{count} × {count + 1} / 2"
    return work("token-forwards without a cache", formula, count * (count + 1) // 2, "token-forwards", cached=cached)


def chunk_steps(num_prompt: Amounts, token_budget: Amount, num_decodes: Amount = 0) -> Worked:
    """Steps to prefill a prompt beside running decodes: ceil(P / (budget - decodes)); 10 for 20,000, 2048 and 32."""
    budget, decodes = whole("token_budget", token_budget), whole("num_decodes", num_decodes, 0)
    if decodes >= budget:
        raise ConfigError(f"{decodes} decodes fill the budget of {budget} tokens; raise the budget above them")

    def of_prompt(prompt: Amount) -> Worked:
        tokens = whole("num_prompt", prompt)
        formula = f"⌈{tokens:,} / ({budget} − {decodes})⌉" if decodes else f"⌈{tokens:,} / {budget}⌉"
        return work("prefill steps", formula, -(-tokens // (budget - decodes)), "steps")

    return for_each(num_prompt, of_prompt)


def chunk_reread_tokens(num_prompt: Amount, chunk_size: Amount) -> Worked:
    """Cached tokens that chunks read again: the sum of what stands before each chunk."""
    prompt, chunk = whole("num_prompt", num_prompt), whole("chunk_size", chunk_size)
    last = (prompt - 1) // chunk  # number of the last chunk, counted from 0
    formula = f"{chunk} × (0 + 1 + ... + {last})"
    return work("tokens read again", formula, chunk * last * (last + 1) // 2, "tokens")


def tile_padding(num_tokens: Amounts, tile_size: Amount) -> Worked:
    """Rows that tiles compute: 257 rows cost as much as 384 in tiles of 128."""
    tile = whole("tile_size", tile_size)

    def of_tokens(tokens: Amount) -> Worked:
        rows = whole("num_tokens", tokens)
        tiles = -(-rows // tile)
        waste = work("padding", f"1 − {rows}/{tiles * tile}", 100 * (1 - rows / (tiles * tile)), "%")
        return work("rows computed", f"⌈{rows} / {tile}⌉ × {tile}", tiles * tile, "rows", padding=waste)

    return for_each(num_tokens, of_tokens)


def captured_size(batch_size: Amount, captured: Sequence[Amount]) -> Worked:
    """The smallest captured CUDA graph that takes the batch, with the share of useful rows in parts."""
    batch = whole("batch_size", batch_size)
    fitting = [size for size in (whole("captured", c) for c in listed("captured", captured)) if size >= batch]
    if not fitting:
        raise ConfigError(
            f"no captured size takes a batch of {batch}; it runs without a graph, or capture a larger one"
        )
    size = min(fitting)
    useful = work("useful rows", f"{batch} / {size}", 100 * batch / size, "%")
    return work("captured size", f"smallest captured ≥ {batch}", size, "rows", useful=useful)


def decode_limit(max_num_seqs: Amount, max_num_batched_tokens: Amount, pool_sequences: Amount) -> Worked:
    """Sequences that decode at once: the smallest of slots, token budget and what the pool holds."""
    slots, budget = whole("max_num_seqs", max_num_seqs), whole("max_num_batched_tokens", max_num_batched_tokens)
    pool = whole("pool_sequences", pool_sequences, 0)
    value = min(slots, budget, pool)
    formula = f"min({slots} slots, {budget} tokens, {pool} in the pool)"
    return work("running sequences", formula, value, "sequences", pool_sequences)


def goodput(
    latencies_ms: Sequence[tuple[Amount, Amount]], ttft_limit_ms: Amount, tpot_limit_ms: Amount, seconds: Amount
) -> Worked:
    """Requests per second that met both limits, from a log of (TTFT, TPOT); throughput and share in parts."""
    first, each = positive("ttft_limit_ms", ttft_limit_ms), positive("tpot_limit_ms", tpot_limit_ms)
    time = positive("seconds", seconds)
    requests = [listed("a request's (TTFT, TPOT)", pair, 2) for pair in listed("latencies_ms", latencies_ms)]
    good = sum(positive("TTFT", ttft) <= first and at_least("TPOT", tpot) <= each for ttft, tpot, *_ in requests)
    count = len(requests)
    met = work("met", f"{good} / {count}", 100 * good / count, "%")
    rate = work("throughput", f"{count} / {plain(time)} s", count / time, "requests/s")
    formula = f"{counted(good, 'requests')} within {plain(first)} ms and {plain(each)} ms / {plain(time)} s"
    return work("goodput", formula, good / time, "requests/s", met=met, throughput=rate)


def time_per_output_token_ms(end_to_end_ms: Amount, ttft_ms: Amount, num_output: Amount) -> Worked:
    """TPOT of one request: (E2E - TTFT) / (tokens - 1), for the first token is TTFT's."""
    total, first, tokens = positive("end_to_end_ms", end_to_end_ms), positive("ttft_ms", ttft_ms), whole(
        "num_output", num_output, 2
    )  # fmt: skip
    if first > total:
        raise ConfigError(f"ttft_ms {plain(first)} exceeds end_to_end_ms {plain(total)}; are they swapped?")
    formula = f"({plain(total)} − {plain(first)}) / ({tokens} − 1)"
    return work("TPOT", formula, (total - first) / (tokens - 1), "ms/token")


def request_latency_ms(arrival_ms: Amount, token_times_ms: Sequence[Amount]) -> Worked:
    """TTFT of one request of a trace; in parts `e2e`, `tpot`, the mean gap, and `longest_gap`, the worst stall.

    request_latency_ms(0, [200, 240, 330]): TTFT 200, E2E 330, TPOT 65, longest gap 90.
    """
    start = at_least("arrival_ms", arrival_ms)
    times = [at_least(f"token_times_ms[{i}]", t, start) for i, t in enumerate(listed("token_times_ms", token_times_ms))]
    gaps = [later - before for before, later in pairwise(times)]
    if any(gap < 0 for gap in gaps):
        raise ConfigError("token_times_ms must not fall: the time of each token on the clock, in order")
    parts = {"e2e": work("E2E", f"{plain(times[-1])} − {plain(start)}", times[-1] - start, "ms")}
    if gaps:
        span = f"({plain(times[-1])} − {plain(times[0])}) / {len(gaps)}"
        parts["tpot"] = work("TPOT", span, (times[-1] - times[0]) / len(gaps), "ms/token")
        parts["longest_gap"] = work("longest gap", f"max({listing(map(plain, gaps))})", max(gaps), "ms")
    return work("TTFT", f"{plain(times[0])} − {plain(start)}", times[0] - start, "ms", **parts)


def cost_per_million_tokens(price_per_hour: Amount, tokens_per_s: Amount, utilisation: Amount = 1) -> Worked:
    """Price of a million tokens: price per hour / (3600 x tokens/s x utilisation) x 1e6."""
    price, rate = positive("price_per_hour", price_per_hour), positive("tokens_per_s", tokens_per_s)
    used = share("utilisation", utilisation, can_be_zero=False)
    formula = f"{plain(price)} / (3600 × {plain(rate)} × {plain(used)}) × 1e6"
    value = price / (3600 * rate * used) * 1e6
    return work("price of a million tokens", formula, value, "", tokens_per_s)


def _slot_use(tokens: Sequence[int], steps: int, slots: int) -> Worked:
    formula = f"{sum(tokens)} / ({steps} × {slots})"
    return work("slots in use", formula, 100 * sum(tokens) / (steps * slots), "%")


def _lengths(lengths: Sequence[Amount]) -> list[int]:
    return [whole(f"lengths[{i}]", length) for i, length in enumerate(listed("lengths", lengths))]
