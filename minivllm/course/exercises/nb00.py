"""Notebook 00, Start: units, the pool, time per token, and which machine computes."""

from random import Random

from minivllm.course.answer_units import BINARY_BYTES
from minivllm.course.calculators import time_per_output_token_ms, tokens_in_pool
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, choice, named
from minivllm.course.exercises.place import Place

GIB, GB = 2**30, 10**9
HINTS_OF_UNITS = (
    "How many bytes is 1 GiB? Its i stands for binary: a power of two.",
    "1 GiB = 2^30 = 1,073,741,824 bytes, and 1 GB = 1,000,000,000 bytes.",
    "Multiply by 2^30 to get bytes, then divide by 10^9. The number in GB must be the larger one.",
)


def binary_to_decimal(random: Random, facts: Facts) -> Problem:
    """GiB to GB: published figures print both under one name."""
    size = random.randrange(9, 800) / 8
    answer = size * GIB / GB
    slips = {
        "GB for GiB: 1 GiB is 7.4% more than 1 GB, so the number of GB is larger, not the same": size,
        "divided instead of multiplied: GB are the smaller units, so there are more of them": size * GB / GIB,
        "bits for bytes": answer * 8,
        "one step of 1024 only: From GiB to bytes there are three steps of 1024, not one": size * 1.024,
        "unit left out": size * GIB,
    }
    question = f"A card has {size:g} GiB free. How many GB is that? Give three digits: 1% off is near enough."
    working = (f"{size:g} × 2^30 B = {size * GIB:,.0f} B", f"{size * GIB:,.0f} B / 10^9 = {answer:.4g} GB")
    return Problem(question, (Part(answer, named(slips), "GB", refused_units=BINARY_BYTES),), working, {"gib": size})


def tokens_in_the_pool(random: Random, facts: Facts) -> Problem:
    """Blocks and block size from the live engine's header, or an engine of drawn size."""
    num_blocks, block_size = random.randrange(40, 900), random.choice((8, 16, 32))
    per_token = 23_040
    if "num_blocks" in facts:
        num_blocks, block_size, per_token = (
            int(str(facts[name])) for name in ("num_blocks", "block_size", "kv_bytes_per_token")
        )
    usable = num_blocks - 1
    pool = usable * block_size * per_token
    worked = tokens_in_pool(pool, per_token)
    answer = int(worked)
    slips = {
        "null block counted: Block 0 only pads tables, no request can own it": num_blocks * block_size,
        "blocks for slots": usable,
        "bytes for tokens: Divide the pool's bytes by those of one token": pool,
        "two blocks too few: Only block 0 is set aside": (usable - 1) * block_size,
        "divided by the block size: Every block holds several tokens, so multiply": usable / block_size,
    }
    question = (
        f"The engine has num_blocks = {num_blocks:,} of block_size = {block_size}; block 0 is the null block, which "
        f"nobody owns. One token takes {per_token:,} bytes. How many tokens does the pool hold?"
    )
    working = (f"{usable:,} usable blocks × {block_size} tokens = {answer:,} tokens", *worked.derivation)
    given = {"num_blocks": num_blocks, "block_size": block_size, "kv_bytes_per_token": per_token}
    return Problem(question, (Part(answer, named(slips), "tokens"),), working, given)


def time_per_token(random: Random, facts: Facts) -> Problem:
    """TPOT of a run: measured (facts first_s, total_s, num_prompt, num_new), or drawn."""
    num_prompt, num_new = random.randrange(9, 90), random.randrange(20, 200)
    first_s, step_s = random.randrange(40, 900) / 1000, random.randrange(11, 90) / 1000
    total_s = first_s + step_s * (num_new - 1)
    if "total_s" in facts:
        first_s, total_s = float(str(facts["first_s"])), float(str(facts["total_s"]))
        num_prompt, num_new = int(str(facts["num_prompt"])), int(str(facts["num_new"]))
    worked = time_per_output_token_ms(total_s * 1e3, first_s * 1e3, num_new)
    answer = float(worked)
    slips = {
        "first token's time counted: The time to the first token is prefill; take it off": total_s * 1e3 / num_new,
        "one token too many: The first token is there already, so num_new − 1 steps follow": answer
        * (num_new - 1)
        / num_new,
        "tokens per second: That is the rate; the time of one token is its inverse": 1e3 / answer,
        "unit left out": answer / 1e3,
        "prompt counted: Prompt tokens are computed together, before the first token": answer
        * (num_new - 1)
        / (num_new - 1 + num_prompt),
    }
    question = (
        f"A run with a prompt of {num_prompt} tokens gave its first token after {first_s:.4g} s and the last of "
        f"{num_new} after {total_s:.4g} s. How many milliseconds did each token after the first take?"
    )
    return Problem(question, (Part(answer, named(slips), "ms"),), worked.derivation)


MODES = {
    "live on a GPU": "A GPU computes now only where the card says cuda.",
    "Triton kernel, interpreted on the CPU": "The interpreter runs only with TRITON_INTERPRET=1; it checks results.",
    "torch on the CPU": "Torch computes attention only where the card says attention: torch.",
    "replay of a recorded run": "A replay computes nothing: it draws events that a machine recorded earlier.",
    "a simulation": "Nothing here is simulated: tensors are computed, or events were recorded by an engine that did.",
    "live on a TPU": "The engine knows CPUs and CUDA GPUs.",
}
DESCRIBED = {
    "live on a GPU": "device: cuda; live: live; attention: minivllm_kernels, compiled for the device",
    "Triton kernel, interpreted on the CPU": "device: cpu; live: live; attention: minivllm_kernels, TRITON_INTERPRET=1",
    "torch on the CPU": "device: cpu; live: live; attention: torch",
    "replay of a recorded run": "device: cuda; live: recorded; events only, no tensors behind them",
}


def mode_of_the_kernel(random: Random, facts: Facts) -> Problem:
    """What computes: read from the environment card (facts `mode` and `card`), or from a drawn one."""
    mode = random.choice(list(DESCRIBED))
    card = DESCRIBED[mode]
    if facts.get("mode") in MODES:
        mode, card = str(facts["mode"]), str(facts.get("card", "see the card above"))
    wrong = {name: why for name, why in MODES.items() if name != mode}
    question = f"The environment card says: {card}. What computes (or computed) the attention?"
    return Problem(question, (choice(mode, wrong, random),), (f"{card}: {mode}",))


EXERCISES = (
    Exercise("00.1", "GiB and GB", HINTS_OF_UNITS, Place("minivllm.course.calculators.units", "decimal_and_binary"),
             binary_to_decimal),
    Exercise("00.2", "Tokens in the pool", (
        "The pool is made of blocks, and every block has the same number of slots, one for each token.",
        "Block 0 is the null block: it pads block tables and is never handed out.",
        "(num_blocks − 1) × block_size; the same as ⌊pool bytes / bytes per token⌋.",
    ), Place("minivllm.engine.block_pool", "BlockPool.num_usable"), tokens_in_the_pool),
    Exercise("00.3", "Time per token", (
        "Two times are given: until the first token, and until the last.",
        "Between the first token and the last one lies one step for each token after the first.",
        "(total − first) / (num_new − 1), and 1 s = 1000 ms.",
    ), Place("minivllm.outputs", "RequestOutput"), time_per_token),
    Exercise("00.4", "Which machine computes?", (
        "First: is anything computed in this process, or are recorded events drawn?",
        "Then: which device do the tensors live on?",
        "On a CPU, TRITON_INTERPRET=1 makes the GPU's kernels run in Triton's interpreter; else torch computes.",
    ), Place("minivllm.llm", "LLM.trace_header"), mode_of_the_kernel),
)  # fmt: skip
