"""The lives of test_engine_fuzz.py in the hands of hypothesis, which shrinks what it finds."""

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from minivllm import SamplingParams
from minivllm.engine_config import CHOICES
from minivllm.lab.life import VOCAB_SIZE, Life
from minivllm.lab.random_life import BLOCK_SIZES, PREFIXES, fitting
from minivllm.request import Request
from minivllm.speculative_config import OFF, SpeculativeConfig

SEEN: Counter[str] = Counter()
# Seen dozens of times in any twenty runs; what is rarer, the fixed seeds of test_engine_fuzz.py assert.
MUST_SEE = (
    "PrefixHit", "Evicted", "Preempted", "Preempted held", "hit after preemption", "chunk", "chunk beside decode",
    "Refused", "failed step", "Forked", "BlockCopied", "BlockExchanged", "samples", "drafts none stood",
    "drafts some stood", "BlocksTrimmed",
)  # fmt: skip


class EngineMachine(RuleBasedStateMachine):
    """One life; every rule is an action of its owner or some steps."""

    life: Life

    @initialize(
        block_size=st.sampled_from(BLOCK_SIZES),
        num_blocks=st.integers(3, 20),
        max_model_len=st.sampled_from((64, 40, 20, 9, 2)),
        max_num_seqs=st.sampled_from((8, 4, 2, 1)),
        max_num_batched_tokens=st.sampled_from((64, 21, 8, 5, 3, 2, 1)),
        enable_chunked_prefill=st.sampled_from((True, True, False)),
        enable_prefix_caching=st.sampled_from((True, True, True, False)),
        batching=st.sampled_from(CHOICES["batching"]),
        scheduling_policy=st.sampled_from(CHOICES["scheduling_policy"]),
        aging_steps=st.sampled_from((None, 5)),
        preemption_mode=st.sampled_from(CHOICES["preemption_mode"]),
        num_host_blocks=st.integers(1, 20),
        allocator=st.sampled_from(("paged",) * 4 + CHOICES["allocator"][1:]),
        prefix_cache=st.sampled_from(CHOICES["prefix_cache"]),
        eviction_policy=st.sampled_from(CHOICES["eviction_policy"]),
        group_windows=st.sampled_from(((None,), (None,), (3,), (8,), (None, 3), (None, 5, 5))),
        watermark=st.floats(0, 0.3),
        eos_token_ids=st.sampled_from(((), (), (0,))),
        speculative=st.sampled_from(
            (
                (),
                (SpeculativeConfig("ngram"),),
                (SpeculativeConfig("ngram", 6, adaptive=True), SpeculativeConfig("early_exit", 2)),
            )
        ),
    )
    def start(self, block_size: int, num_blocks: int, max_model_len: int, **rest: Any) -> None:
        most = (num_blocks - 1) * block_size
        sizes = {"block_size": block_size, "num_blocks": num_blocks, "max_model_len": max(2, min(max_model_len, most))}
        self.life = Life(fitting(**rest, **sizes), SEEN)

    @rule(
        prefix=st.integers(0, 1),
        num_tokens=st.integers(1, 63),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        count=st.integers(1, 3),
        num_samples=st.sampled_from((1, 1, 2, 3)),
        is_steered=st.sampled_from((False, False, False, True)),
        max_tokens=st.sampled_from((30, 12, 5, 1, None)),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from((None, None, None, [1], [2, 5])),
        prompt_logprobs=st.sampled_from((None, None, None, None, 1)),
        num_speculative_tokens=st.sampled_from((None, None, 0, 3)),
        drafter=st.integers(0, 5),
        priority=st.integers(-1, 2),
        salt=st.sampled_from(("", "", "a")),
    )
    def add(
        self, prefix: int, num_tokens: int, tail: list[int], count: int, num_samples: int, is_steered: bool,
        drafter: int, priority: int, salt: str, **rest: Any,
    ) -> None:  # fmt: skip
        """One to three requests with a common beginning that fit; what is steered has no samples."""
        rest["min_tokens"] = min(rest["min_tokens"], rest["max_tokens"] or 3)
        methods = dict(enumerate((OFF, *self.life.engine.scheduler.drafting.configs)))
        rest["speculative_method"] = methods.get(drafter)
        longest = self.life.engine.config.max_model_len - 1
        for index in range(count):
            prompt = [*PREFIXES[prefix][: num_tokens % (longest + 1)], *tail, index][:longest]
            samples = [
                self._request(prompt, SamplingParams(**rest), priority, salt, number, is_steered)
                for number in range(1 if is_steered else num_samples)
            ]
            samples[0].pending_forks = samples[1:]
            self.life.add(samples[0])

    @rule(is_empty=st.booleans())
    def add_what_cannot_run(self, is_empty: bool) -> None:
        num_tokens = 0 if is_empty else self.life.engine.config.max_model_len
        self.life.add(self._request(PREFIXES[0][:num_tokens], SamplingParams()))

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.life.step()

    @rule(num_steps=st.integers(4, 12), token_id=st.integers(0, VOCAB_SIZE - 1))
    def step_and_choose(self, num_steps: int, token_id: int) -> None:
        """Steps in which whoever is held gets a token at once."""
        for _ in range(num_steps):
            for request_id in self.life.held:
                self.life.choose(request_id, token_id)
            self.life.step()

    @precondition(lambda self: 0 < len(self.life.alive) < 12)
    @rule(choice=st.integers(0, 9), seed=st.sampled_from((None, 1, 2)))
    def fork(self, choice: int, seed: int | None) -> None:
        self.life.fork(self.life.alive[choice % len(self.life.alive)], f"r{len(self.life.requests)}", seed)

    @precondition(lambda self: self.life.alive)
    @rule(choice=st.integers(0, 9), how=st.sampled_from(("abort", "stop string", "abort in a step", "failed step")))
    def end(self, choice: int, how: str) -> None:
        life = self.life
        preempted = [request.id for request in life.engine.scheduler.waiting if request.num_preemptions]
        candidates = preempted or life.alive
        request_id = candidates[choice % len(candidates)]
        if how == "abort":
            life.abort(request_id)
        elif how == "stop string":
            life.finish_at_stop_string(request_id)
        else:
            life.fails_next = how == "failed step"
            life.abort_next = None if life.fails_next else request_id
            life.step()

    @precondition(lambda self: self.life.requests)
    @rule(choice=st.integers(0, 9), num_tokens=st.integers(1, 20))
    def pin_or_unpin(self, choice: int, num_tokens: int) -> None:
        if "x" in self.life.engine.pins.blocks_of:
            self.life.unpin("x")
        else:
            request = list(self.life.requests.values())[choice % len(self.life.requests)]
            self.life.pin("x", request.token_ids[:num_tokens], request.salt)

    @precondition(lambda self: self.life.requests)
    @rule(really=st.sampled_from((False, False, False, True)))
    def reset_cache(self, really: bool) -> None:
        if really:
            self.life.reset_cache()

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.drain()

    def _request(
        self, prompt: list[int], params: SamplingParams, priority: int = 0, salt: str = "", number: int = 0,
        is_steered: bool = False,
    ) -> Request:  # fmt: skip
        id_ = f"r{len(self.life.requests)}" + f".{number}" * (number > 0)
        most = params.max_tokens or self.life.engine.config.max_model_len
        return Request(id_, list(prompt), len(prompt), params, most, number, priority, salt, is_steered=is_steered)


def test_state_machine_of_hypothesis() -> None:
    """Many short runs: the examples of one run are drawn from each other, and a whole run may lack a feature."""
    SEEN.clear()
    for number in range(40):
        machine = type("Machine", (EngineMachine,), {})
        seed(number)(machine)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=6, stateful_step_count=40, deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    assert [what for what in MUST_SEE if not SEEN[what]] == []
