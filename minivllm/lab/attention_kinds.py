"""Four attentions of one width through the real engine: what its cache tensors hold of a token, and what that changes.

All have 64 query heads of size 64 over one hidden size; only what they keep differs. MLA has DeepSeek's proportions: a
latent of four head sizes, a rotary key of half a one. Weights are random where only bytes and times are asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minivllm.attention.latent_torch import prefers_absorbed
from minivllm.config import ARCHITECTURES, DTYPE_BYTES, ModelConfig
from minivllm.course.calculators import public_config
from minivllm.course.published_quality import Point, Study
from minivllm.errors import ConfigError, short
from minivllm.events import StepRan
from minivllm.lab.bytes_study import Agreement, compare_bytes
from minivllm.lab.conversion import convert
from minivllm.lab.conversion_study import CONTEXT, NUM_NEW, RESULTS, Row, decode_speed, held_out_loss
from minivllm.lab.corpus import help_topics, packed
from minivllm.lab.tune_conversions import Tuned
from minivllm.layer_groups import group_layers
from minivllm.llm import LLM
from minivllm.request import SamplingParams
from minivllm.runner.kv_storage import KVStorage
from minivllm.text_files import read_text

KINDS = ("mha", "gqa-8", "mqa", "mla")
NUM_HEADS, HEAD_SIZE, NUM_LAYERS, HIDDEN_SIZE = 64, 64, 2, 512
LATENT, ROPE = 4 * HEAD_SIZE, HEAD_SIZE // 2
LONGEST = 2048
JUDGED_TOKENS = 128


@dataclass(frozen=True)
class KindBytes:
    """One attention: what the engine's tensors hold of a token, beside the calculators."""

    kind: str
    agreement: Agreement
    numbers_per_layer: int

    @property
    def is_exact(self) -> bool:
        return self.agreement.is_exact


@dataclass(frozen=True)
class TwoForms:
    """One prompt through latent attention twice: all its tokens at once, and one by one."""

    num_expanded: int  # steps that built keys and values of every head
    num_absorbed: int  # steps that read the latent rows as they are
    largest_gap: float  # of two log-probabilities of a prompt token


def kind_config(kind: str) -> dict[str, object]:
    """The config.json of mha, mqa, mla or gqa-G. Raises ConfigError for another kind."""
    shared: dict[str, object] = {
        "vocab_size": 1024, "hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "hidden_act": "silu",
        "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS, "max_position_embeddings": LONGEST,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if kind == "mla":
        latent = {
            "q_lora_rank": None, "kv_lora_rank": LATENT, "qk_nope_head_dim": HEAD_SIZE, "qk_rope_head_dim": ROPE,
            "v_head_dim": HEAD_SIZE, "first_k_dense_replace": NUM_LAYERS, "num_key_value_heads": NUM_HEADS,
        }  # fmt: skip
        return {**shared, **latent, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    groups = {"mha": str(NUM_HEADS), "mqa": "1"}.get(kind, kind.removeprefix("gqa-"))
    if not groups.isdecimal() or not int(groups) or NUM_HEADS % int(groups):
        raise ConfigError(f"unknown kind {short(kind)}: use mha, mqa, mla or gqa-G, where G divides {NUM_HEADS}")
    heads = {"num_key_value_heads": int(groups), "head_dim": HEAD_SIZE}
    return {**shared, **heads, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def build_kind(kind: str, *, dtype: str = "bfloat16", block_size: int = 16, num_tokens: int = LONGEST,
               max_num_batched_tokens: int = 2048) -> LLM:  # fmt: skip
    """An engine over a model of this kind with random weights, and room for so many tokens."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(kind_config(kind)), encoding="utf-8")
        return LLM(folder, load_format="dummy", dtype=dtype, block_size=block_size,
                   num_blocks=1 + -(-num_tokens // block_size), enable_prefix_caching=False, show_progress=False,
                   max_num_batched_tokens=max_num_batched_tokens)  # fmt: skip


def read_kind(kind: str) -> KindBytes:
    """Run a request of 300 tokens, and read how many bytes the tensors and its blocks have for them."""
    llm, config = build_kind(kind, block_size=1), kind_config(kind)
    agreement = compare_bytes(llm, config)
    numbers = agreement.tensors_per_token // (NUM_LAYERS * DTYPE_BYTES[llm.model_config.dtype])
    return KindBytes(kind, agreement, numbers)


def decode_ms(kind: str, num_requests: int = 16) -> float:
    """A decode step of requests with 128 tokens each: the median, in milliseconds."""
    llm = build_kind(kind, num_tokens=num_requests * (CONTEXT + NUM_NEW + 16))
    return 1e3 * num_requests / decode_speed(llm, num_requests)


def public_tensor_bytes(name: str, num_kv_heads: int | None = None) -> int:
    """Bytes of a token in a cache tensor of a public model's shape; `num_kv_heads` gives it others than its own.

    Two blocks are allocated, no weights. Raises ModelError for a family that the engine does not build.
    """
    raw = public_config(name)
    families = {family: architecture for architecture, family in ARCHITECTURES.items()}
    architecture = families.get(str(raw.get("model_type")), "none")
    heads = {"num_key_value_heads": num_kv_heads} if num_kv_heads else {}
    config = ModelConfig.from_json({"hidden_act": "silu", **raw, **heads, "architectures": [architecture]})
    groups = group_layers(config.num_layers, config.windows)
    storage = KVStorage(config, 2, 16, "cpu", groups=groups)
    return storage.num_bytes // (2 * 16) * config.num_layers // groups.num_rows


def compare_forms(num_tokens: int = 96) -> TwoForms:
    """Latent attention expanded and absorbed on one prompt, by the engine's own choice: it hangs on tokens a step."""
    prompt = [1 + i * 31 % 1000 for i in range(num_tokens)]
    found = [_prompt_logprobs(build_kind("mla", dtype="float32", max_num_batched_tokens=step), prompt)
             for step in (num_tokens, 1)]  # fmt: skip
    (at_once, expanded), (one_by_one, absorbed) = found
    gap = max(abs(a - b) for a, b in zip(at_once, one_by_one, strict=True))
    return TwoForms(expanded.count(False), absorbed.count(True), gap)


def mqa_as_mla_gap(num_tokens: int = 64) -> float:
    """Largest gap between log-probabilities of a small random MQA model, and of the same weights as a full latent.

    One KV head of size 16 and the constant make a latent of 18 with a rotary key of 16: nothing is cut off.
    """
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, head_dim=16,
        num_key_value_heads=1, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    rows = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(1))
    prompt = rows[0, :num_tokens].tolist()
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "mqa"
        source.mkdir()
        config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
        latent = convert(source, "mla-18", Path(scratch) / "mla", calibration=rows, show_progress=False)
        engines = [LLM(folder, dtype="float32", num_blocks=200, show_progress=False) for folder in (source, latent)]
    before, after = (_prompt_logprobs(llm, prompt)[0] for llm in engines)
    return max(abs(a - b) for a, b in zip(before, after, strict=True))


def converted_loss(variant: str, model: str | Path = "smollm2-135m") -> float:
    """`short_loss` of converted weights before any tuning."""
    with TemporaryDirectory() as scratch:
        folder = convert(model, variant, Path(scratch) / variant, show_progress=False)
        llm = LLM(folder, num_blocks=40, max_model_len=512, max_num_seqs=1, show_progress=False)
        return short_loss(llm)


def short_loss(llm: LLM) -> float:
    """Held-out loss in nats per token, of the first 128 tokens of Python's help topics: seconds on a CPU."""
    rows = packed(help_topics(held_out=True), llm.get_tokenizer())[:1, :JUDGED_TOKENS].tolist()
    return held_out_loss(llm, rows)


def own_study(folder: Path = RESULTS) -> Study:
    """Our conversions of SmolLM2-135M as recorded: cache, held-out loss before and after tuning, what was paid."""
    tuned = read_text(folder / "tuned_h200.json", json.loads, "results")
    measured = read_text(folder / "measured_h200.json", json.loads, "results")
    facts, losses = tuned["provenance"], {row["variant"]: row for row in tuned["rows"]}
    kept = {row.variant: row.numbers_per_layer for row in (Row(**row) for row in measured["measured"])}
    points = tuple(_own_point(losses[variant], numbers, kept["mha"]) for variant, numbers in kept.items())
    run = f"{facts['device']}, commit {facts['commit']}, seed {facts['seed']}"
    source = f"our run of minivllm/lab/tune_conversions.py on {run}"
    return Study("ours", "SmolLM2", source, ("loss after tuning", "loss before tuning"), "mha", False, points)


def _own_point(row: Tuned, numbers: int, numbers_of_mha: int) -> Point:
    values = {"loss after tuning": row["after"]["all"], "loss before tuning": row["before"]["all"]}
    begun = "the model itself" if row["variant"] == "gqa-3" else "converted"
    paid = f"{begun}, all weights tuned on {row['num_tokens'] / 1e6:.3g}M tokens"
    kind = row["variant"].partition("-")[0]
    return Point(row["variant"], kind, row["variant"].upper(), 100 * numbers / numbers_of_mha, values, paid)


def _prompt_logprobs(llm: LLM, prompt: Sequence[int]) -> tuple[list[float], list[bool]]:
    """What the model gives to each token of the prompt, and whether each step's latent attention was absorbed."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    with llm.record() as trace:
        [output] = llm.generate([list(prompt)], params, use_tqdm=False)
    judged: Sequence[Mapping[int, object] | None] = output.prompt_logprobs or []
    logprobs = [known[token].logprob for token, known in zip(prompt, judged, strict=True) if known]  # type: ignore[attr-defined]
    mla = llm.model_config.mla
    steps = [entry for event in trace if isinstance(event, StepRan) for entry in event.scheduled]
    absorbed = [new == 1 or prefers_absorbed(mla, new, end) for _, new, end in steps] if mla else []
    return logprobs, absorbed
