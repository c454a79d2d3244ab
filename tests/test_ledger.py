"""The step ledger: bytes are those of the tensors that the model touched, FLOPs those that torch counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.attention.latent_torch import prefers_absorbed
from minivllm.course.calculators import Accelerator, num_parameters
from minivllm.course.step_ledger import FloorParts, LedgerFold, by_group, cost_line, ledger_rows, row_of, summed
from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.errors import ConfigError
from minivllm.events import (
    BlocksReleased,
    BlocksTaken,
    Event,
    Forked,
    PrefixHit,
    StepCosted,
    StepRan,
)
from minivllm.lab import ledger as ledger_module
from minivllm.lab.counted_steps import flop_counter
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.ledger import SharedBlocks, keep_ledger
from minivllm.lab.step_floor import ModelWork
from minivllm.trace import Trace
from minivllm.weights import builtin_configs, find_model

Build = Callable[[str], tuple[Path, PreTrainedModel]]
MACHINE = Accelerator("a made-up machine", 2**34, 1e10, {"float32": 1e11, "bf16": 2e11}, "this test")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
# tied and not, GQA, MHA, MQA with biases, windows in all layers and in some, MLA, experts with MLA
SHAPES = ["llama-gqa", "llama-mha-tied", "llama-mqa-bias", "qwen3", "mistral", "ministral-1to1", "v2-dense"]
MIXTURES = ["v2-moe", "v3-moe-yarn"]


class Touched(TorchDispatchMode):
    """Adds up what torch's operators read of the weights and of the KV storage, and what they write to it."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        modules = [m for m in llm.runner.model.modules() if not isinstance(m, torch.nn.Embedding)]
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        self._weights = {weight.untyped_storage().data_ptr(): weight for weight in weights}
        self._kv = llm.storage.data.untyped_storage().data_ptr()
        self.seen: set[int] = set()
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self.seen.add(tensor.untyped_storage().data_ptr())
        name = str(func)
        if name.startswith("aten.index_select") and args[0].untyped_storage().data_ptr() == self._kv:
            self.read += out.numel() * out.element_size()
        if name.startswith("aten.index_copy_") and args[0].untyped_storage().data_ptr() == self._kv:
            self.written += args[3].numel() * args[3].element_size()
        return out

    @property
    def weight_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for pointer, w in self._weights.items() if pointer in self.seen)


@dataclass(frozen=True)
class Counted:
    """One step as torch saw it."""

    shape: list[tuple[int, int]]  # new and stored tokens of each request
    weight_bytes: int
    kv_bytes: int
    logit_bytes: int
    products: int  # FLOPs
    attention: int


@contextmanager
def counted(llm: LLM) -> Iterator[list[Counted]]:
    """Put torch's counters round the runner; logits are the tensor that the model gives."""
    runner, steps = llm.engine.runner, list[Counted]()

    class Runner:
        def run(self, plan: StepPlan) -> StepResult:
            shape = [(new, request.num_computed + new) for request, new in plan.scheduled]
            logits = list[torch.Tensor]()
            model, made = llm.runner.model, llm.runner.model.logits

            def watched(hidden: torch.Tensor) -> torch.Tensor:
                logits.append(made(hidden))
                return logits[-1]

            model.logits = watched  # type: ignore[method-assign]
            with flop_counter() as counter, Touched(llm) as touched:
                result = runner.run(plan)
            del model.logits
            flops = {str(name): n for name, n in counter.get_flop_counts().get("Global", {}).items()}
            attention = sum(n for name, n in flops.items() if "attention" in name or "bmm" in name)
            steps.append(
                Counted(
                    shape, touched.weight_bytes, touched.read + touched.written,
                    2 * sum(each.numel() * each.element_size() for each in logits), sum(flops.values()) - attention,
                    attention,
                )
            )  # fmt: skip
            return result

    llm.engine.runner = Runner()
    try:
        yield steps
    finally:
        llm.engine.runner = runner


@pytest.fixture
def small(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An engine on a family's small model: a token a block, so that blocks read are tokens read, and plain weights."""
    monkeypatch.setattr("minivllm.runner.loader.can_prepack", lambda dtype: False)

    def build(family: str, **options: Any) -> LLM:
        chosen = {"block_size": 1, "num_blocks": 600, "enable_prefix_caching": False, **options}
        return LLM(reference_model(family)[0], dtype="float32", device="cpu", show_progress=False, **chosen)

    return build


def run(llm: LLM, *prompts: list[int], params: SamplingParams = GREEDY) -> tuple[Trace, list[Counted]]:
    with keep_ledger(llm, MACHINE), llm.record() as trace, counted(llm) as steps:
        llm.generate([*prompts], params, use_tqdm=False)
    return trace, steps


def costs(trace: Trace) -> list[StepCosted]:
    return [event for event in trace if isinstance(event, StepCosted)]


def steps_of_every_kind(llm: LLM) -> tuple[list[StepCosted], list[Counted]]:
    """A prompt alone, chunks of one, decode, and a step that has both: the second request comes while one decodes."""
    first = list(range(7, 27))
    with keep_ledger(llm, MACHINE), llm.record() as trace, counted(llm) as steps:
        one = llm.text_engine.add(llm.text_engine.check(first), GREEDY)
        llm.text_engine.step()
        llm.text_engine.step()
        other = llm.text_engine.add(llm.text_engine.check(list(range(30, 70))), GREEDY)
        while not (one.is_finished and other.is_finished):
            llm.text_engine.step()
    return costs(trace), steps


@pytest.mark.parametrize("family", SHAPES)
def test_bytes_are_those_of_the_tensors_that_every_kind_of_step_touched(small: Callable[..., LLM], family: str) -> None:
    llm = small(family, max_num_batched_tokens=24)
    told, steps = steps_of_every_kind(llm)
    row = llm.model_config.kv_bytes_per_token // llm.model_config.num_layers
    kinds = {tuple(new > 1 for new, _ in step.shape) for step in steps}
    assert kinds == {(True,), (False,), (False, True), (False, False)}
    assert any(stored < 40 for new, stored in steps[2].shape if new > 1)  # a chunk that wants no logits of its own
    for cost, step in zip(told, steps, strict=True):
        assert (cost.weight_bytes, cost.logit_bytes) == (step.weight_bytes, step.logit_bytes)
        padding = sum(keys - seen for layer in layers(llm) for _, keys, seen in gathered(llm, step.shape, layer))
        assert cost.kv_bytes == step.kv_bytes - row * padding
        moved_ms = 1e3 * (cost.weight_bytes + cost.kv_bytes + cost.logit_bytes) / MACHINE.bandwidth
        assert cost.floor_ms == pytest.approx(max(moved_ms, 1e3 * cost.flops / 1e11))


@pytest.mark.parametrize("family", SHAPES)
def test_flops_are_those_that_torch_counts(small: Callable[..., LLM], family: str) -> None:
    """To the FLOP, but for norms and biases, and for masked pairs, which torch multiplies too."""
    llm = small(family, max_num_batched_tokens=24)
    config = find_model(str(llm.model), "dummy").config
    parts, model = num_parameters(config).parts, ModelWork(config, "float32").model
    told, steps = steps_of_every_kind(llm)
    for cost, step in zip(told, steps, strict=True):
        vectors = 2 * (int(parts["norms"]) + int(parts["biases"])) * sum(new for new, _ in step.shape)
        attention = model.attention_of(step.shape, "float32").flops
        rectangles = sum(
            request_flops(llm, new, keys) for layer in layers(llm) for new, keys, _ in gathered(llm, step.shape, layer)
        )
        assert cost.flops - vectors - attention + rectangles == step.products + step.attention
        assert attention <= rectangles
        if all(new == 1 for new, _ in step.shape) and len(step.shape) == 1:
            assert attention == rectangles


def layers(llm: LLM) -> range:
    return range(llm.model_config.num_layers)


def gathered(llm: LLM, shape: list[tuple[int, int]], layer: int) -> list[tuple[int, int, int]]:
    """For each request its new tokens, the keys that torch's attention gathers for them, and those that they see.

    Single queries are gathered together, from the first that one of them sees to the end of the longest.
    """
    window = llm.model_config.window_of(layer)
    first = {(new, stored): max(0, stored - new + 1 - window) if window else 0 for new, stored in shape}
    singles = [(new, stored) for new, stored in shape if new == 1]
    longest = max((stored for _, stored in singles), default=0) - min((first[each] for each in singles), default=0)
    return [(new, longest if new == 1 else stored - first[new, stored], stored - first[new, stored])
            for new, stored in shape]  # fmt: skip


def request_flops(llm: LLM, new: int, keys: int) -> int:
    """Of one layer: every new token with every key; latents in the form that the engine says it takes."""
    config = llm.model_config
    if config.mla is None:
        return 4 * config.num_heads * config.head_size * new * keys
    if new == 1 or prefers_absorbed(config.mla, new, keys):
        return 2 * config.num_heads * (config.mla.row_size + config.mla.kv_lora_rank) * new * keys
    built = config.mla.kv_lora_rank * (config.mla.nope_head_size + config.mla.v_head_size) * (keys - new)
    return 2 * config.num_heads * ((config.mla.qk_head_size + config.mla.v_head_size) * new * keys + built)


@pytest.mark.parametrize("name", ["tiny-mla", "qwen3-0.6b", "public ministral-8b", "deepseek-v2-lite", "tiny-hybrid"])
def test_attention_without_loops_is_a_loop_over_queries_and_keys(name: str) -> None:
    random = Random(name)
    work = ModelWork(builtin_configs().get(name) or name.removeprefix("public "), "bfloat16").model
    shape = [(new := random.choice([1, 1, 2, 5, 40]), new + random.choice([0, 3, 50, 9000])) for _ in range(12)]
    num_bytes = flops = 0
    for layer in work.shape.layers:
        for new, stored in shape:
            seen = [range(max(0, q + 1 - (layer.window or q + 1)), q + 1) for q in range(stored - new, stored)]
            pairs = sum(map(len, seen))
            num_bytes += 2 * layer.elements_per_token * (stored - seen[0].start)
            one = 2 * layer.num_heads * (layer.key_size + layer.value_size) * pairs
            if layer.latent_size:
                up = layer.latent_size * (layer.key_size - layer.rope_size + layer.value_size)
                one += 2 * layer.num_heads * up * (stored - new)
                one = min(one, 2 * layer.num_heads * (2 * layer.latent_size + layer.rope_size) * pairs)
            flops += one
    found = work.attention_of(shape, "bfloat16")
    assert (found.num_bytes, found.flops) == (num_bytes, flops)


@pytest.mark.parametrize("family", MIXTURES)
def test_of_experts_one_token_reads_its_own_and_many_tokens_all(small: Callable[..., LLM], family: str) -> None:
    """To the byte in both; between them the ledger expects as many as tokens that choose at random touch."""
    llm = small(family)
    trace, steps = run(llm, list(range(7, 247)))
    prompt, *decodes = steps
    many, *singles = costs(trace)
    assert many.weight_bytes == prompt.weight_bytes and len(decodes) == 5
    for cost, step in zip(singles, decodes, strict=True):
        assert step.shape[0][0] == 1 and cost.weight_bytes == step.weight_bytes < prompt.weight_bytes
        assert cost.kv_bytes == step.kv_bytes
    trace, steps = run(llm, *([7 + i, 8 + 2 * i] for i in range(3)))
    for cost, step in zip(costs(trace)[1:], steps[1:], strict=True):
        assert singles[0].weight_bytes < cost.weight_bytes < many.weight_bytes
        assert cost.weight_bytes == pytest.approx(step.weight_bytes, rel=0.15)


def test_a_step_is_bound_by_compute_where_arithmetic_takes_longer_than_moving(small: Callable[..., LLM]) -> None:
    llm = small("llama-gqa")
    slow = Accelerator("slow arithmetic", 2**34, 1e10, {"float32": 1e10}, "this test")
    with keep_ledger(llm, slow), llm.record() as trace:
        llm.generate([list(range(7, 107))], GREEDY, use_tqdm=False)
    prompt, *decodes = costs(trace)
    moved_ms = (prompt.weight_bytes + prompt.kv_bytes + prompt.logit_bytes) / 1e7
    assert prompt.unhidden_ms == pytest.approx(prompt.flops / 1e7 - moved_ms)
    assert prompt.floor_ms == prompt.flops / 1e7 > moved_ms > 0
    assert len(decodes) == 5 and all(cost.unhidden_ms == 0 < cost.floor_ms for cost in decodes)


def test_costs_follow_their_steps_for_everybody_who_listens(small: Callable[..., LLM], tmp_path: Path) -> None:
    llm, heard = small("llama-gqa"), list[Event]()
    stop = llm.events.listen(heard.append)
    with keep_ledger(llm, MACHINE) as ledger, llm.record() as trace:
        llm.generate([list(range(7, 30))], GREEDY, use_tqdm=False)
    assert ledger.machine is MACHINE
    stop()
    for events in (heard, trace.events):
        pairs = [event for event in events if isinstance(event, StepRan | StepCosted)]
        assert [type(event) for event in pairs] == [StepRan, StepCosted] * 6
        assert [event.step for event in pairs] == [step for step in range(1, 7) for _ in range(2)]
        assert all(cost.run_ms == ran.run_ms for ran, cost in zip(pairs[::2], pairs[1::2], strict=True))
    assert Trace.load(trace.save(tmp_path / "trace.json")).events == trace.events
    assert not llm.events  # nobody listens any more
    with llm.record() as silent:
        llm.generate([[7, 8]], GREEDY, use_tqdm=False)
    assert not costs(silent)


def test_a_shared_prefix_is_read_once(small: Callable[..., LLM]) -> None:
    """Blocks that a step reads, each once, taken from the tables that the runner was given."""
    llm = small("qwen3", enable_prefix_caching=True, block_size=4)
    prefix = list(range(7, 47))
    blocks, runner = list[int](), llm.engine.runner
    block_bytes = 4 * llm.model_config.kv_bytes_per_token

    class Runner:
        def run(self, plan: StepPlan) -> StepResult:
            blocks.append(len({block for request, _ in plan.scheduled for block in request.block_ids}))
            return runner.run(plan)

    llm.engine.runner = Runner()
    with keep_ledger(llm, MACHINE), llm.record() as trace:
        llm.generate([prefix], GREEDY, use_tqdm=False)
        llm.generate([[*prefix, 50 + i] for i in range(5)], GREEDY, use_tqdm=False)
        forked = llm.stream([7] * 9, SamplingParams(temperature=1, n=3, max_tokens=4, ignore_eos=True))
        list(forked)
    assert any(isinstance(event, PrefixHit) for event in trace) and any(isinstance(event, Forked) for event in trace)
    for cost, num_blocks, ran in zip(costs(trace), blocks, trace.of(StepRan), strict=True):
        assert isinstance(ran, StepRan)
        written = sum(new for _, new, _ in ran.scheduled) * llm.model_config.kv_bytes_per_token
        empty = sum(-stored % 4 for _, _, stored in ran.scheduled) * llm.model_config.kv_bytes_per_token
        assert cost.kv_bytes == num_blocks * block_bytes - empty + written
        assert cost.logit_bytes == 2 * 4 * llm.model_config.vocab_size * len(ran.scheduled)  # of a fork's samples one
    assert any(len(ran.new_tokens) > len(ran.scheduled) for ran in trace if isinstance(ran, StepRan))


def test_a_ledger_that_comes_late_knows_the_blocks_in_use(small: Callable[..., LLM]) -> None:
    llm = small("llama-gqa", enable_prefix_caching=True, block_size=4)
    prompts = [[*range(7, 47), 60 + i] for i in range(3)]
    llm.generate(prompts[:1], GREEDY, use_tqdm=False)
    running = [llm.text_engine.add(llm.text_engine.check(prompt), GREEDY) for prompt in prompts]
    llm.text_engine.step()
    with keep_ledger(llm, MACHINE), llm.record() as trace:
        llm.text_engine.step()
    for each in running:
        llm.text_engine.abort(each)
    (cost,) = costs(trace)
    tokens = 3 * 42 - 2 * 40 + 3  # read, the ten full blocks of the prefix once; written
    assert cost.kv_bytes == tokens * llm.model_config.kv_bytes_per_token


LIVES: list[dict[str, Any]] = [
    {"num_blocks": 9, "max_model_len": 32},
    {"prefix_cache": "radix", "max_model_len": 20},
    {"preemption_mode": "swap", "num_host_blocks": 8, "num_blocks": 7, "max_model_len": 20},
    {"group_windows": (None, 5), "num_blocks": 40},
]


@pytest.mark.parametrize("is_async", [False, True], ids=["one by one", "launched ahead"])
@pytest.mark.parametrize("options", LIVES, ids=["small pool", "radix", "swap", "windows"])
def test_shared_blocks_are_those_of_the_tables_that_the_runner_was_given(
    options: dict[str, Any], is_async: bool
) -> None:
    """Random lives with hits, forks, copies, exchanges, preemptions, windows and aborts; every step to the block."""
    seen, most = set[type[Event]](), 0
    for seed in range(12):
        random, (engine, runner) = Random(seed), fake_engine(**options)
        runner.is_async = is_async
        groups = range(len(engine.config.group_windows) or 1)
        sharing, truth, told = SharedBlocks(len(groups)), dict[int, list[int]](), dict[int, list[int]]()

        def given(plan: StepPlan, truth: dict[int, list[int]] = truth, groups: range = groups) -> None:
            held = [[id_ for r, _ in plan.scheduled for id_ in r.tables[group].block_ids if id_] for group in groups]
            truth[plan.step] = [len(ids) - len({*ids}) for ids in held]

        def hear(event: Event, sharing: SharedBlocks = sharing, told: dict[int, list[int]] = told) -> None:
            seen.add(type(event))
            sharing.apply(event)
            if isinstance(event, StepRan):
                sharing.begin_step(event.step, tuple(id_ for id_, _, _ in event.scheduled))
                told[event.step] = [*sharing.num_spared]
                sharing.end_step(event.step)

        runner.before = given
        engine.events.listen(hear)
        live(engine, random)
        assert told == truth
        most = max(most, *(sum(each) for each in told.values()))
    assert most > 5 and {BlocksTaken, BlocksReleased, Forked} <= seen


def live(engine: Engine, random: Random) -> None:
    """Requests with a common beginning come, fork and are aborted while others run; ids are used again."""
    for i in range(14):
        prompt = [*range(8), *(random.randrange(3) for _ in range(random.randrange(6)))]
        if (name := f"r{i % 9}") not in engine.requests:
            engine.add(fake_request(name, prompt, max_tokens=random.randint(1, 8), priority=-i))
        for _ in range(random.randrange(3)):
            if engine.has_work:
                engine.step()
        chance = random.random()
        if chance < 0.4:
            engine.catch_up()
        if chance < 0.3 and engine.requests:
            engine.fork(random.choice([*engine.requests]), f"f{i}")
        elif chance > 0.9 and engine.requests:
            engine.abort(random.choice([*engine.requests]))
    while engine.has_work:
        engine.step()


def test_rows_are_the_two_events_of_a_step_and_their_sums() -> None:
    def ran(step: int, *new: int, run_ms: float = 4.0) -> StepRan:
        return StepRan(
            step, tuple((str(i), n, 50) for i, n in enumerate(new)), (), len(new), 0, 0, 0.5, run_ms, 0.25, ""
        )

    events: list[Event] = [
        ran(1, 30, 20), StepCosted(1, 60, 30, 10, 7, 2.0, 4.0, 1.0), ran(2), StepCosted(2, 0, 0, 0, 0, 0.0, 0.0),
        ran(3, 1, 20), StepCosted(3, 60, 40, 0, 8, 1.0, 4.0), ran(4, *[1] * 5), ran(5, *[1] * 5),
        StepCosted(5, 10, 20, 70, 9, 3.0, 4.0), ran(6, 1), StepCosted(6, 1, 1, 2, 9, 1.0, 4.0),
    ]  # fmt: skip
    rows = ledger_rows(events)
    assert [(row.step, row.group, row.num_tokens) for row in rows] == [
        (1, "prefill", 50), (3, "mixed", 21), (5, "decode 5-8", 5), (6, "decode 1", 1),
    ]  # fmt: skip
    assert rows[0].parts == FloorParts(0.6, 0.3, 0.1, 1.0) and rows[0].is_bound_by_compute
    assert not rows[1].is_bound_by_compute and rows[2].num_bytes == 100
    assert (rows[2].remainder_ms, rows[2].host_ms) == (1.0, 0.75)
    assert cost_line(rows) == [(1, 2.0, 4.0), (3, 1.0, 4.0), (5, 3.0, 4.0), (6, 1.0, 4.0)]
    whole, groups = summed(rows), by_group(rows)
    assert [each.name for each in groups] == ["prefill", "mixed", "decode 1", "decode 5-8"]
    assert (whole.num_steps, whole.run_ms, whole.floor_ms, whole.remainder_ms) == (4, 16.0, 7.0, 9.0)
    assert whole.share == 7 / 16 and summed(()).share == 0
    assert (whole.weight_bytes, whole.kv_bytes, whole.logit_bytes, whole.flops) == (131, 91, 82, 33)
    assert [each.most_of_floor for each in groups] == ["arithmetic", "weights", "logits", "logits"]
    assert row_of(ran(1, 1, 1, 1), StepCosted(1, 1, 1, 1, 1, 1.0, 1.0)).group == "decode 3-4"
    fold = LedgerFold(num_kept=2)
    for event in events:
        fold.apply(event)
    assert fold.state() == rows[-2:] and fold.step == 6


def test_a_machine_without_the_models_type_is_refused_before_anything_runs(small: Callable[..., LLM]) -> None:
    llm = small("llama-gqa")
    with pytest.raises(ConfigError, match="no figure for 'float32'"), keep_ledger(llm, "h200"):
        pass
    assert not llm.events


def test_without_a_machine_its_rates_are_measured_once_in_a_process(
    small: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def measured(device: str, dtype: str) -> Accelerator:
        asked.append(device)
        return MACHINE

    monkeypatch.setattr(ledger_module, "measured_roofs", measured)
    ledger_module._roofs.cache_clear()
    llm = small("llama-gqa")
    machines = []
    for _ in range(2):
        with keep_ledger(llm) as ledger:
            machines.append(ledger.machine)
    ledger_module._roofs.cache_clear()
    assert asked == ["cpu"] and machines == [MACHINE, MACHINE]


def test_a_ledger_that_is_kept_is_not_kept_twice(small: Callable[..., LLM]) -> None:
    llm = small("llama-gqa")
    with keep_ledger(llm, MACHINE), pytest.raises(ConfigError, match="a ledger of this LLM is kept already"):
        keep_ledger(llm, MACHINE).__enter__()
    with keep_ledger(llm, MACHINE):
        pass


def test_what_is_no_llm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the ledger follows an LLM: keep_ledger\(LLM\(...\)\), not NoneType"):
        keep_ledger(None).__enter__()  # type: ignore[arg-type]


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    step = StepRan(1, (("a", 1, 1), ("b", 9, 9)), (), 2, 0, 0, 0.5, 4.0, 0.25, "")
    cost = StepCosted(1, 1, 1, 1, 1, 0.5, 1.0)
    assert row_of(step, cost).kind == "prefill"
    assert row_of(replace(step, scheduled=(("a", 1, 1),)), cost).kind == "prefill"
    assert row_of(replace(step, scheduled=(("a", 1, 2), ("b", 9, 9))), cost).kind == "mixed"
    assert row_of(replace(step, scheduled=(("a", 1, 2),)), cost).kind == "decode"
