"""Random lives: odd sizes, tiny pools, every policy, and all that users do, in any order; pressure is the rule."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from minivllm.engine_config import CHOICES, WHOLE_PROMPTS, EngineConfig, capacity_tokens
from minivllm.lab.life import VOCAB_SIZE, Life
from minivllm.request import Request, SamplingParams
from minivllm.speculative_config import OFF, SpeculativeConfig

BLOCK_SIZES = (1, 2, 3, 5, 8, 16)
PREFIXES = [[Random(seed).randrange(VOCAB_SIZE) for _ in range(80)] for seed in range(3)]
ACTIONS_PER_LIFE = 120
MOST_ALIVE = 12


def live_at_random(random: Random, num_steps: int, seen: Counter[str] | None = None, **fixed: Any) -> Counter[str]:
    """Engine after engine, each drained at its end, until `num_steps` steps have run; `fixed` options hold for all.

    Returns `seen`, with how often each thing happened. Raises AssertionError, whose text names the invariant, in the
    first step in which something is wrong.
    """
    seen = Counter() if seen is None else seen
    while seen["steps"] < num_steps:
        live_once(random_config(random, **fixed), random, seen, is_async=random.random() < 0.4)
    return seen


def live_once(config: EngineConfig, random: Random, seen: Counter[str], *, is_async: bool = False) -> None:
    """One engine from its first request to its last."""
    for name in CHOICES:
        seen[f"{name} {getattr(config, name)}"] += 1
    is_patient, alpha = random.random() < 0.3, random.choice((0.0, 0.3, 0.7, 0.95))
    life = Life(config, seen, is_patient, is_async and not config.speculative, alpha)
    for _ in range(ACTIONS_PER_LIFE):
        act_at_random(life, random)
    life.drain()


def random_config(random: Random, **fixed: Any) -> EngineConfig:
    """A valid config; options that `fixed` names have the values given there."""
    block_size = fixed.get("block_size", random.choice(BLOCK_SIZES))
    num_blocks = fixed.get("num_blocks", random.choice((3, 4, 6, 9, 9, 14, 14, 25, 40)))
    max_model_len = min((num_blocks - 1) * block_size, random.choice((16, 30, 48, 64)))
    options: dict[str, Any] = {name: random.choice(choices) for name, choices in CHOICES.items()}
    options |= {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_model_len": max(2, max_model_len - random.randrange(3)),
        "max_num_seqs": random.choice((1, 2, 4, 8, 8)),
        "max_num_batched_tokens": random.choice((1, 2, 2, 3, 3, 5, 8, 13, 21, 34, 64)),
        "batching": random.choice((*CHOICES["batching"], "chunked")),
        "allocator": random.choice(("paged",) * 8 + CHOICES["allocator"][1:]),  # the others share nothing
        "enable_chunked_prefill": random.random() < 0.8,
        "enable_prefix_caching": random.random() < 0.9,
        "aging_steps": random.choice((None, 1, 4, 20)),
        "num_host_blocks": random.choice((1, 2, 4, num_blocks, 2 * num_blocks)),
        "group_windows": random_windows(random),
        "watermark": random.choice((0.0, 0.01, 0.1, 0.3)),
        "eos_token_ids": random.choice(((), (), (0,))),
        "speculative": random_drafters(random),
    }
    if options["group_windows"] != (None,) and random.random() < 0.7:  # the only cache that goes with windows
        options |= {"prefix_cache": "hash", "eviction_policy": "lru"}
    return fitting(**(options | fixed))


def fitting(**options: Any) -> EngineConfig:
    """The config, with what contradicts a policy left out: a cache nobody can share, a window that frees its stems."""
    if options["allocator"] != "paged":
        options["enable_prefix_caching"] = False
    keeps_stems = (options["prefix_cache"], options["eviction_policy"]) != ("hash", "lru")
    if options["enable_prefix_caching"] and keeps_stems:
        options["group_windows"] = (None,)
    if options["allocator"] != "paged" or _room(options) < 2:
        options["group_windows"] = options["group_windows"][:1]
    if options["allocator"] != "paged":
        options["speculative"] = ()
    if len(options["group_windows"]) > 1:
        options["speculative"] = tuple(each for each in options.get("speculative", ()) if each.method == "ngram")
    options["max_model_len"] = min(options["max_model_len"], _room(options))
    if options["preemption_mode"] != "swap":
        options["num_host_blocks"] = 0
    if _keeps_whole(options):
        options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], options["max_model_len"])
    return EngineConfig(**options)


def random_drafters(random: Random) -> tuple[SpeculativeConfig, ...]:
    """None, one or two, of fixed or adaptive length; what they propose is the fake runner's affair."""
    return tuple(
        SpeculativeConfig(
            method,
            num_speculative_tokens=random.choice((1, 2, 4, 4, 7)),
            adaptive=random.random() < 0.4,
            max_step_tokens=random.choice((None, None, 6, 40)),
            disable_by_batch_size=random.choice((None, None, None, 3)),
        )
        for method in random.choice(((), (), ("ngram",), ("ngram",), ("ngram", "early_exit")))
    )


def random_windows(random: Random) -> tuple[int | None, ...]:
    """One group that sees all or has a window; or one that sees all and others, most of them with a window."""
    windows = [random.choice((1, 2, 3, 5, 8, 13, 20)) for _ in range(random.randint(1, 3))]
    if random.random() < 0.4:
        return (None,)
    return (windows[0],) if random.random() < 0.5 else (None, *windows[1:], random.choice((None, *windows * 3)))


def _room(options: dict[str, Any]) -> int:
    """The longest request that the pool can hold."""
    budget = options["max_model_len"] if _keeps_whole(options) else options["max_num_batched_tokens"]
    return capacity_tokens(options["num_blocks"] - 1, options["block_size"], options["group_windows"], budget)


def _keeps_whole(options: dict[str, Any]) -> bool:
    return options["batching"] in WHOLE_PROMPTS or not options.get("enable_chunked_prefill", True)


def act_at_random(life: Life, random: Random) -> None:
    """One action; steps are the most frequent."""
    chance = random.random()
    if chance < 0.20:
        if len(life.alive) < MOST_ALIVE:
            life.add(random_request(life, random))
    elif chance < 0.28:
        for request_id in life.held:  # some stay held, so that the engine must make room round them
            if life.is_patient or random.random() < 0.6:
                life.choose(request_id, random.randrange(VOCAB_SIZE))
    elif chance < 0.33:
        if life.alive and len(life.alive) < MOST_ALIVE:
            new_id = f"r{len(life.requests)}"
            life.fork(a_rare_one(life, random), new_id, random.choice((None, random.randrange(99))))
    elif chance < 0.36:
        if life.alive:
            life.abort(a_rare_one(life, random))
    elif chance < 0.37:
        if life.alive:
            life.finish_at_stop_string(random.choice(life.alive))
    elif chance < 0.39:
        pin_at_random(life, random)
    elif chance < 0.395:
        life.reset_cache()
    else:
        life.fails_next = random.random() < 0.01
        life.abort_next = random.choice(life.alive) if life.alive and random.random() < 0.02 else None
        life.step()


def a_rare_one(life: Life, random: Random) -> str:
    """Somebody alive, in a state of few if possible."""
    states = Counter(life.state_of(request) for request in life.engine.requests.values())
    rarest = random.choice(sorted(states))
    return random.choice([id_ for id_, request in life.engine.requests.items() if life.state_of(request) == rarest])


def pin_at_random(life: Life, random: Random) -> None:
    """Pin the start of some request under one of two names, or unpin what has the name."""
    name = random.choice("xy")
    if name in life.engine.pins.blocks_of and random.random() < 0.8:
        life.unpin(name)
    elif life.requests:
        request = random.choice(list(life.requests.values()))
        life.pin(name, request.token_ids[: random.randint(1, request.num_tokens)], request.salt)


def random_request(life: Life, random: Random) -> Request:
    """One of few beginnings and an end of its own, so that hits are frequent; with samples to fork off, or steered."""
    config = life.engine.config
    longest = config.max_model_len + (2 if random.random() < 0.05 else -1)
    tail = [random.randrange(VOCAB_SIZE) for _ in range(random.randrange(4))]
    prompt = (PREFIXES[random.randrange(3)][: random.randint(0, longest)] + tail)[:longest]
    params = random_params(random, list(life.engine.scheduler.drafting.configs))
    priority, salt, kind = random.randint(-1, 2), random.choice(("", "", "a")), random.random()
    num_samples = random.randint(2, 4) if kind < 0.25 else 1
    leader, *forks = (
        Request(
            id=f"r{len(life.requests)}" + f".{index}" * (index > 0),
            token_ids=list(prompt),
            num_prompt=len(prompt),
            params=params,
            max_tokens=params.max_tokens or config.max_model_len,
            seed=random.randrange(3),
            priority=priority,
            salt=salt,
            is_steered=kind > (0.4 if life.is_patient else 0.88),
        )
        for index in range(num_samples)
    )
    leader.pending_forks = forks
    return leader


def random_params(random: Random, methods: Sequence[str] = ()) -> SamplingParams:
    max_tokens = random.choice((1, 3, 7, 12, 30, 30, None))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(max_tokens or 9, random.choice((0, 0, 0, 1, 4))),
        ignore_eos=random.random() < 0.3,
        stop_token_ids=random.choice((None, None, None, None, [1], [2, 5])),
        prompt_logprobs=random.choice((None,) * 9 + (1,)),
        num_speculative_tokens=random.choice((None, None, None, 0, 1, 5)),
        speculative_method=random.choice((None, None, None, OFF, *methods)),
    )
