"""Moving KV: from prefill to decode workers, to the host and back, and what it costs to compute it again instead.

Links are named by what one direction promises. Bits and bytes, decimal and binary are kept apart: 400 Gbit/s is
50 GB/s, and DistServe's "90 Gbps" for 10 requests/s of 1.13 GB counts in 2^30.
"""

from minivllm.course.calculators.accelerators import accelerator
from minivllm.course.calculators.checks import at_least, chosen, positive, share, whole
from minivllm.course.calculators.roofline import Chip
from minivllm.course.calculators.units import plain, shown
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work

LINKS = {  # bytes/s, one direction
    "pcie3-x16": 15.75e9, "pcie4-x16": 31.5e9, "pcie5-x16": 63e9, "pcie6-x16": 121e9,
    "nvlink3": 300e9, "nvlink4": 450e9, "nvlink5": 900e9,
    "infiniband-hdr": 25e9, "infiniband-ndr": 50e9, "infiniband-xdr": 100e9,
    "ethernet-25g": 3.125e9, "ethernet-100g": 12.5e9, "ethernet-400g": 50e9,
}  # fmt: skip
Link = str | int | float | Worked  # a name above, or bytes/s


def link_bytes_per_s(link: Link) -> Worked:
    """Bytes per second of a named link, or of a number as it is."""
    if isinstance(link, str):
        rate = LINKS[chosen("link", link, tuple(LINKS))]
        return work(f"{link}, one direction", "", rate, "bytes/s")
    return work("link", "", positive("link", link), "bytes/s", link)


def gbit_to_bytes_per_s(gbit_per_s: Amount) -> Worked:
    """400 Gbit/s are 50 GB/s."""
    rate = positive("gbit_per_s", gbit_per_s)
    return work("link", f"{plain(rate)} Gbit/s / 8 bits", rate * 1e9 / 8, "bytes/s", gbit_per_s)


def transfer_bytes(kv_bytes_per_token: Amount, num_tokens: Amounts) -> Worked:
    """KV of a prompt that moves from prefill to decode: 1.13 GiB for 512 tokens of OPT-66B."""
    per_token = positive("kv_bytes_per_token", kv_bytes_per_token)

    def of_length(length: Amount) -> Worked:
        tokens = whole("num_tokens", length, 0)
        formula = f"{tokens:,} × {plain(per_token)} B"
        return work("KV to move", formula, int(tokens * per_token), "bytes", kv_bytes_per_token)

    return for_each(num_tokens, of_length)


def transfer_ms(num_bytes: Amounts, link: Link, latency_ms: Amount = 0) -> Worked:
    """Time over a link: latency + bytes / rate."""
    rate, start = float(link_bytes_per_s(link)), at_least("latency_ms", latency_ms)

    def of_bytes(size: Amount) -> Worked:
        moved = at_least("num_bytes", size)
        formula = f"{plain(moved)} B / {shown(rate, 'bytes/s')}" + (f" + {plain(start)} ms" if start else "")
        return work("transfer", formula, 1e3 * moved / rate + start, "ms", size)

    return for_each(num_bytes, of_bytes)


def required_bandwidth(kv_bytes_per_token: Amount, num_prompt: Amount, requests_per_s: Amount) -> Worked:
    """Bytes/s between the pools, kv x P x rate; in parts as `gbit_per_s` (10^9) and `gibit_per_s` (2^30)."""
    per_token, prompt = positive("kv_bytes_per_token", kv_bytes_per_token), whole("num_prompt", num_prompt)
    rate = positive("requests_per_s", requests_per_s)
    value = per_token * prompt * rate
    decimal = work("in Gbit/s", f"{plain(value)} × 8 / 10^9", value * 8 / 1e9, "Gbit/s")
    binary = work("in Gibit/s", f"{plain(value)} × 8 / 2^30", value * 8 / 2**30, "Gibit/s")
    formula = f"{plain(per_token)} B × {prompt} × {plain(rate)}/s"
    return work(
        "bandwidth needed", formula, value, "bytes/s", kv_bytes_per_token, gbit_per_s=decimal, gibit_per_s=binary
    )


def prefill_workers_per_decode_worker(
    prefill_ms: Amount, batch_size: Amount, step_ms: Amount, num_output: Amount
) -> Worked:
    """Matched service rates: prefill time x B / (step time x G); .91 s x 32 / (19 ms x 512) is 3 to 1."""
    first, batch = positive("prefill_ms", prefill_ms), whole("batch_size", batch_size)
    step, output = positive("step_ms", step_ms), whole("num_output", num_output)
    formula = f"{plain(first)} ms × {batch} / ({plain(step)} ms × {output})"
    return work("prefill workers per decode worker", formula, first * batch / (step * output), "workers",
                prefill_ms, step_ms)  # fmt: skip


def tokens_freed_per_step(batch_size: Amount, num_prompt: Amount, num_output: Amount) -> Worked:
    """Tokens of KV that finishing requests free each step, so that must arrive anew: B (P + G) / G."""
    batch = whole("batch_size", batch_size)
    prompt, output = whole("num_prompt", num_prompt), whole("num_output", num_output)
    formula = f"{batch} × ({prompt} + {output}) / {output}"
    return work("tokens freed per step", formula, batch * (prompt + output) / output, "tokens")


def swap_us_per_token(kv_bytes_per_token: Amount, link: Link, num_ways: Amount = 1) -> Worked:
    """Time to move one token's KV to the host; `num_ways=2` for there and back."""
    per_token, rate = positive("kv_bytes_per_token", kv_bytes_per_token), float(link_bytes_per_s(link))
    ways = whole("num_ways", num_ways)
    formula = f"{f'{ways} × ' if ways > 1 else ''}{plain(per_token)} B / {shown(rate, 'bytes/s')}"
    return work("swap", formula, 1e6 * ways * per_token / rate, "µs/token", kv_bytes_per_token)


def recompute_us_per_token(
    num_parameters: Amount, chip: Chip, efficiency: Amount = 0.5, dtype: str = "bf16", num_chips: Amount = 1
) -> Worked:
    """Time to prefill one token again: 2 P / (efficiency x FLOP/s)."""
    count, rate = positive("num_parameters", num_parameters), accelerator(chip).flops_of(dtype)
    used, chips = share("efficiency", efficiency, can_be_zero=False), whole("num_chips", num_chips)
    formula = f"2 × {plain(count)} / ({plain(used)} × {f'{chips} × ' if chips > 1 else ''}{shown(rate, 'FLOP/s')})"
    return work("recompute", formula, 1e6 * 2 * count / (used * chips * rate), "µs/token", num_parameters)


def crossover_bytes_per_s(kv_bytes_per_token: Amount, recompute_us: Amount) -> Worked:
    """Link rate below which recomputing beats a swap there and back: 2 x kv / recompute time."""
    per_token, time = positive("kv_bytes_per_token", kv_bytes_per_token), positive("recompute_us", recompute_us)
    formula = f"2 × {plain(per_token)} B / {plain(time)} µs"
    return work("crossover rate", formula, 2e6 * per_token / time, "bytes/s", kv_bytes_per_token, recompute_us)


def effective_bytes_per_s(block_bytes: Amounts, link: Link, overhead_us: Amount) -> Worked:
    """What small transfers leave of a link: b / (b / rate + overhead); why tiny blocks make swapping slow."""
    rate, start = float(link_bytes_per_s(link)), at_least("overhead_us", overhead_us)

    def of_block(block: Amount) -> Worked:
        size = positive("block_bytes", block)
        formula = f"{plain(size)} B / ({plain(1e6 * size / rate)} µs + {plain(start)} µs)"
        return work("effective rate", formula, size / (size / rate + start / 1e6), "bytes/s", block)

    return for_each(block_bytes, of_block)
