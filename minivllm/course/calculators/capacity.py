"""How many tokens and sequences fit a card, and what blocks, reservations and buddies leave unused.

The convention of the course: pool = card x utilisation - weights - workspace; tokens = floor(pool / bytes per token);
sequences = floor(tokens / length). An "80 GB card" has 80e9 bytes.
"""

from collections.abc import Sequence

from minivllm.course.calculators.checks import at_least, chosen, listed, positive, share, whole
from minivllm.course.calculators.units import counted, plain
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, scalar, work
from minivllm.errors import ConfigError


def pool_bytes(
    card_bytes: Amount,
    weight_bytes: Amount,
    utilisation: Amount = 0.9,
    workspace_bytes: Amount = 0,
    num_gpus: Amount = 1,
) -> Worked:
    """Bytes left for KV on all GPUs together: GPUs x card x utilisation - weights - workspace. Weights are of all GPUs.

    Raises ConfigError where nothing is left.
    """
    card, weights = positive("card_bytes", card_bytes), at_least("weight_bytes", weight_bytes)
    used, workspace = share("utilisation", utilisation, can_be_zero=False), at_least("workspace_bytes", workspace_bytes)
    gpus = whole("num_gpus", num_gpus)
    if card < 1e6:
        raise ConfigError(f"card_bytes is {plain(card)}: give bytes, such as 80e9 for 80 GB")
    value = int(round(gpus * card * used, 3) - weights - workspace)  # 0.9 x 80e9 is 72e9, not a hair less
    if value <= 0:
        raise ConfigError(
            f"weights of {plain(weights)} B leave no room on {counted(gpus, 'cards')} of {plain(card)} B; "
            "use more or larger ones"
        )
    formula = f"{f'{gpus} × ' if gpus > 1 else ''}{plain(card)} × {plain(used)} − {plain(weights)}"
    formula += f" − {plain(workspace)}" if workspace else ""
    return work("KV pool", formula, value, "bytes", card_bytes, weight_bytes)


def tokens_in_pool(pool: Amount, bytes_per_token: Amount) -> Worked:
    """floor(pool / bytes per token): the slots of a server."""
    size, per_token = at_least("pool", pool), positive("bytes_per_token", bytes_per_token)
    return work("tokens", f"⌊{plain(size)} / {plain(per_token)}⌋", int(size // per_token), "tokens",
                pool, bytes_per_token)  # fmt: skip


def sequences_in_pool(num_tokens: Amount, sequence_length: Amounts) -> Worked:
    """floor(tokens / length); several lengths give several results."""
    tokens = whole("num_tokens", num_tokens, 0)

    def of_length(length: Amount) -> Worked:
        size = whole("sequence_length", length)
        return work(f"sequences of {size:,}", f"⌊{tokens:,} / {size:,}⌋", tokens // size, "sequences", num_tokens)

    return for_each(sequence_length, of_length)


def blocks_in_pool(num_tokens: Amount, block_size: Amount = 16) -> Worked:
    """Whole blocks that so many slots make."""
    tokens, size = whole("num_tokens", num_tokens, 0), whole("block_size", block_size)
    return work("blocks", f"⌊{tokens:,} / {size}⌋", tokens // size, "blocks", num_tokens)


def max_concurrency(num_tokens: Amount, max_model_len: Amount) -> Worked:
    """What a server prints at start: pool / longest request, not rounded."""
    tokens, longest = whole("num_tokens", num_tokens, 0), whole("max_model_len", max_model_len)
    return work("maximum concurrency", f"{tokens:,} / {longest:,}", tokens / longest, "requests", num_tokens)


def blocks_needed(num_tokens: Amounts, block_size: Amount = 16) -> Worked:
    """Blocks that hold so many tokens: blocks_needed(17, 16) == 2."""
    size = whole("block_size", block_size)

    def of_length(length: Amount) -> Worked:
        tokens = whole("num_tokens", length, 0)
        return work("blocks", f"⌈{tokens:,} / {size}⌉", -(-tokens // size), "blocks")

    return for_each(num_tokens, of_length)


def empty_slots(num_tokens: Amounts, block_size: Amount = 16) -> Worked:
    """Slots of a sequence's blocks that hold nothing: empty_slots(3001, 128) == 71."""
    size = whole("block_size", block_size)

    def of_length(length: Amount) -> Worked:
        tokens = whole("num_tokens", length, 0)
        blocks = -(-tokens // size)
        return work("empty slots", f"{blocks} blocks × {size} − {tokens:,}", blocks * size - tokens, "slots")

    return for_each(num_tokens, of_length)


def slot_of(position: Amount, block_table: Sequence[int], block_size: Amount = 16) -> Worked:
    """Where a token lies: table[position // size] x size + position % size; slot_of(37, [7, 1, 3]) == 53."""
    place, size = whole("position", position, 0), whole("block_size", block_size)
    table = [whole(f"block_table[{i}]", block, 0) for i, block in enumerate(listed("block_table", block_table))]
    if place >= len(table) * size:
        raise ConfigError(f"position {place} lies beyond the {len(table) * size} slots of {len(table)} blocks")
    index, offset = divmod(place, size)
    formula = f"table[{place} // {size}] × {size} + {place} % {size} = {table[index]} × {size} + {offset}"
    return work("slot", formula, table[index] * size + offset, "")


def tail_waste(mean_tokens: Amounts, block_size: Amount = 16) -> Worked:
    """Percent of a sequence's slots that its last block leaves empty, on average: t / (n + t) with t = (B - 1) / 2."""
    size = whole("block_size", block_size)
    tail = (size - 1) / 2

    def of_length(length: Amount) -> Worked:
        tokens = positive("mean_tokens", length)
        formula = f"{plain(tail)} / ({plain(tokens)} + {plain(tail)}) with ({size} − 1) / 2 = {plain(tail)} slots empty"
        return work("tail waste", formula, 100 * tail / (tokens + tail), "%")

    return for_each(mean_tokens, of_length)


def reserved_slots(policy: str, num_prompt: Amount, num_output: Amount, max_model_len: Amount) -> Worked:
    """Slots set aside by Orca's "max", "pow2" or "oracle" (SOSP 2023, section 6.1), or held in "paged" blocks of 16.

    Max reserves the longest request; Pow2 rounds the true output up to a power of two (25 -> 32); Oracle knows it.
    """
    prompt, output = whole("num_prompt", num_prompt, 0), whole("num_output", num_output, 0)
    longest = whole("max_model_len", max_model_len)
    if prompt + output > longest:
        raise ConfigError(f"{prompt} + {output} tokens exceed max_model_len {longest}; shorten them")
    match chosen("policy", policy, ("max", "pow2", "oracle", "paged")):
        case "max":
            return work("reserved, max", "max_model_len", longest, "slots")
        case "pow2":
            rounded = int(next_power_of_two(output)) if output else 0
            value = min(prompt + rounded, longest)
            return work("reserved, pow2", f"{prompt} + {output} rounded up to {rounded}", value, "slots")
        case "oracle":
            return work("reserved, oracle", f"{prompt} + {output}", prompt + output, "slots")
    return work("held, paged", f"⌈{prompt + output} / 16⌉ × 16", -(-(prompt + output) // 16) * 16, "slots")


def slots_of_request(num_prompt: Amount, num_generated: Amount, num_output: Amount, reserved: Amount) -> Worked:
    """Slots of one request that are live; in parts those `reserved` for later and those `internal`, never used.

    slots_of_request(100, 20, 50, 2048): 120 live, 30 reserved, 1,898 internal fragmentation.
    """
    prompt, now = whole("num_prompt", num_prompt, 0), whole("num_generated", num_generated, 0)
    output, slots = whole("num_output", num_output, now), whole("reserved", reserved, 0)
    if prompt + output > slots:
        raise ConfigError(f"{prompt} + {output} tokens do not fit the {slots} slots reserved; reserve more")
    later = work("reserved for later", f"{output} − {now}", output - now, "slots")
    never = work("internal fragmentation", f"{slots:,} − {prompt} − {output}", slots - prompt - output, "slots")
    return work("live", f"{prompt} + {now}", prompt + now, "slots", reserved=later, internal=never)


def next_power_of_two(number: Amount) -> Worked:
    """What a buddy allocator hands out: next_power_of_two(25) == 32."""
    wanted = whole("number", number)
    value = 1 << (wanted - 1).bit_length()
    return work("power of two", f"smallest 2^k ≥ {wanted}", value, "")


def reservation_waste(reserved_tokens: Amount, used_tokens: Amount) -> Worked:
    """Slots reserved and never used: reservation_waste(8192, 3000) == 5192."""
    reserved, used = whole("reserved_tokens", reserved_tokens, 0), whole("used_tokens", used_tokens, 0)
    if used > reserved:
        raise ConfigError(f"{used} tokens are more than the {reserved} reserved; reserve at least what is used")
    return work("wasted slots", f"{reserved:,} − {used:,}", reserved - used, "slots", reserved_tokens, used_tokens)


def contiguous_requests(num_slots: Amount, max_model_len: Amount) -> Worked:
    """Requests that each reserve the longest, and (in parts) the percent of the pool too small for another."""
    slots, longest = whole("num_slots", num_slots), whole("max_model_len", max_model_len)
    fit = slots // longest
    left = work("left over", f"1 − {fit} × {longest:,} / {slots:,}", 100 * (1 - fit * longest / slots), "%")
    return work("requests", f"⌊{slots:,} / {longest:,}⌋", fit, "requests", num_slots, left_over=left)


def memory_bar(live: Amount, reserved: Amount, internal: Amount, external: Amount) -> Worked:
    """One bar of the paper's figure 2: the waste in percent, and (in parts) what the four sum to."""
    names = ("live", "reserved", "internal", "external")
    values = [at_least(n, v) for n, v in zip(names, (live, reserved, internal, external), strict=True)]
    total = sum(values)
    if abs(total - 100) > 1 or values[0] > 100:
        raise ConfigError(f"the four shares must sum to 100%, within rounding, not {total:.4g}")
    whole_bar = work("sum", " + ".join(plain(v) for v in values), round(total, 9), "%")
    return work("waste", f"100 − live {plain(values[0])}", round(100 - values[0], 9), "%", sum=whole_bar)


def mean_live_tokens(live_share: Amount, num_slots: Amount, num_requests: Amount) -> Worked:
    """Tokens per running request behind a memory bar: live share x slots / requests."""
    live, slots = share("live_share", live_share), whole("num_slots", num_slots)
    requests = positive("num_requests", num_requests)
    formula = f"{plain(live)} × {slots:,} / {plain(requests)}"
    return work("live tokens per request", formula, live * slots / requests, "tokens", num_slots)


def shared_blocks_saved(prompt_tokens: Amount, num_samples: Amount, block_size: Amount = 16) -> Worked:
    """Blocks that n samples of one prompt save: full prompt blocks x (n - 1); each sample copies the tail it writes."""
    prompt, samples = whole("prompt_tokens", prompt_tokens), whole("num_samples", num_samples)
    size = whole("block_size", block_size)
    full, tail = divmod(prompt, size)
    copies = work("tail copies", f"{samples} − 1" if tail else "no partial tail", (samples - 1) * bool(tail), "blocks")
    formula = f"⌊{prompt} / {size}⌋ × ({samples} − 1)"
    return work("blocks saved", formula, full * (samples - 1), "blocks", tail_copies=copies)


def sharing_saving(shared_share: Amount, num_samples: Amount) -> Worked:
    """Percent saved when a share s of each of n sequences is common: s (n - 1) / n."""
    common, samples = share("shared_share", shared_share), whole("num_samples", num_samples)
    value = 100 * common * (samples - 1) / samples
    return work("saved", f"{plain(common)} × ({samples} − 1) / {samples}", value, "%", shared_share)


def slots_to_bytes(num_slots: Amount, bytes_per_token: Amount) -> Worked:
    """Bytes behind a number of slots."""
    slots, per_token = whole("num_slots", num_slots), positive("bytes_per_token", bytes_per_token)
    value = int(slots * scalar(per_token))
    return work("KV memory", f"{slots:,} slots × {plain(per_token)} B", value, "bytes", bytes_per_token)


def external_fragmentation(free_runs: Sequence[Amount]) -> Worked:
    """Percent of free slots outside the longest run: what a contiguous request of all that is free cannot use."""
    runs = [whole(f"free_runs[{i}]", run, 0) for i, run in enumerate(listed("free_runs", free_runs))]
    if not sum(runs):
        raise ConfigError("free_runs holds no free slot; give the lengths of the holes, such as [3, 1, 4]")
    value = 100 * (1 - max(runs) / sum(runs))
    return work("external fragmentation", f"1 − longest {max(runs)} / free {sum(runs)}", value, "%")
