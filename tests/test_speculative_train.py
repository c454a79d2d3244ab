"""Drafts are trained the way they draft, repeat under a seed, and are judged by rounds that were played."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minivllm import LLM, SamplingParams
from minivllm.config import ModelConfig, RopeConfig
from minivllm.errors import ModelError
from minivllm.models.decoder import Decoder
from minivllm.models.llama import llama
from minivllm.speculative.eagle_model import (
    WEIGHTS,
    EagleDraft,
    SmallDraft,
    load_eagle,
    load_small,
    own_tensors,
    reduced_lm_head,
    save_draft,
)
from minivllm.speculative.held_out import measure, rounds_of
from minivllm.speculative.prompts import WORDS, Grammar
from minivllm.speculative.train import main
from minivllm.speculative.train_data import Example, batches, frequent_tokens
from minivllm.speculative.training import Settings, losses, new_drafts, shapes, train
from minivllm.speculative.unrolled import target_features, unroll
from minivllm.transforms.prepack import can_prepack, prepack_linears

CONFIG = ModelConfig(
    "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=3,
    head_size=8, max_position=64, eos_token_ids=(0,), dtype="float32",
    rope=RopeConfig(original_max_position=64),
)  # fmt: skip
VOCABULARY = torch.arange(0, 64, 2)


@pytest.fixture
def target() -> Decoder:
    torch.manual_seed(0)
    model = llama(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.fill_(1)
    return model


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(12, 40, size=48)
    return [Example("question", draw.integers(1, 12, n).astype(np.uint16), 6) for n in lengths]


def drafts(target: Decoder, seed: int = 0) -> tuple[EagleDraft, SmallDraft]:
    return new_drafts(target, *shapes(CONFIG), VOCABULARY, seed)


class Cache:
    """An attention with a cache that only grows: the twin of the mask of a chain."""

    def __init__(self) -> None:
        self.keys, self.values = list[torch.Tensor](), list[torch.Tensor]()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert len(q) == 1
        self.keys.append(k[0].repeat_interleave(2, dim=0))
        self.values.append(v[0].repeat_interleave(2, dim=0))
        keys, values = torch.stack(self.keys), torch.stack(self.values)  # [T, H, D]
        weights = (torch.einsum("hd,thd->ht", q[0], keys) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, values)[None]


def test_unrolled_steps_are_those_of_a_draft_token_by_token(target: Decoder) -> None:
    head, _ = drafts(target)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    features = target_features(target, ids)
    with torch.no_grad():
        steps = list(unroll(head, ids, features, 4))
        for row, begin in ((0, 5), (1, 0), (1, 7)):
            cache, given = Cache(), torch.zeros(1, 32)
            for position in range(begin + 4):
                embedding = target.embed(ids[row, position : position + 1])
                out = head.head(embedding, given, torch.tensor([position]), cache)
                drafted = position - begin
                if drafted >= 0:
                    torch.testing.assert_close(steps[drafted][row, position], out[0], atol=1e-5, rtol=1e-4)
                given = features[row, position : position + 1] if drafted < 0 else out


def test_features_make_the_logits_of_the_target_whatever_the_padding(target: Decoder) -> None:
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), dim=1)
    caches = [Cache() for _ in range(CONFIG.num_layers)]

    class Layers:
        def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return caches[layer].attend(layer, q, k, v)

    expected = [target(ids[0, i : i + 1], torch.tensor([i]), torch.tensor([0]), Layers())[0] for i in range(9)]
    logits = target.lm_head(target.norm(target_features(target, padded)[0, :9]))
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_both_drafts_learn_and_a_seed_repeats_every_bit(target: Decoder, examples: list[Example]) -> None:
    settings = Settings(steps=50, tokens_per_batch=256, learning_rate=5e-3, warm_up=5)
    trained = []
    for _ in range(2):
        head, small = drafts(target)
        before = _losses(head, small, target, examples)
        train(head, small, target, examples, settings)
        after = _losses(head, small, target, examples)
        trained.append({**own_tensors(head.head), **own_tensors(small.model)})
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert torch.equal(
        own_tensors(drafts(target)[0].head)["fc.weight"], own_tensors(drafts(target)[0].head)["fc.weight"]
    )
    assert not torch.equal(drafts(target, 1)[0].head.fc.weight, drafts(target, 2)[0].head.fc.weight)


def _losses(head: EagleDraft, small: SmallDraft, target: Decoder, examples: list[Example]) -> list[float]:
    batch = next(iter(batches(examples, 10_000, 0)))
    _, parts = losses(head, small, batch, target_features(target, batch.token_ids), Settings())
    return [float(parts[0]), float(parts[1]), float(parts[3])]


def test_what_is_saved_is_what_is_loaded_but_for_rounding(target: Decoder, tmp_path: Path) -> None:
    head, small = drafts(target)
    head_config, small_config = shapes(CONFIG)
    save_draft(tmp_path / "head.safetensors", head.head, head_config, VOCABULARY, "eagle", "tiny", {"seed": 0})
    save_draft(
        tmp_path / "small.safetensors", small.model, small_config, VOCABULARY, "draft_model", "tiny", {"seed": 0}
    )
    loaded, loaded_small = (
        load_eagle(tmp_path / "head.safetensors", target),
        load_small(tmp_path / "small.json", target),
    )
    pairs = ((head.head, loaded.head), (small.model, loaded_small.model))
    for made, read in pairs:
        for name, tensor in own_tensors(made).items():
            assert torch.equal(tensor.bfloat16().float(), own_tensors(read)[name])
    assert loaded.vocabulary.tolist() == VOCABULARY.tolist() == loaded_small.vocabulary.tolist()
    assert (loaded.head.config, loaded_small.config) == (head_config, small_config)
    assert loaded_small.model.embed is target.embed
    assert json.loads((tmp_path / "head.json").read_text())["provenance"] == {"seed": 0}


def test_a_file_for_another_target_or_of_another_kind_is_refused(target: Decoder, tmp_path: Path) -> None:
    head, _ = drafts(target)
    save_draft(tmp_path / "head.safetensors", head.head, shapes(CONFIG)[0], VOCABULARY, "eagle", "tiny", {})
    with pytest.raises(ModelError, match="method 'eagle', not 'draft_model'"):
        load_small(tmp_path / "head.safetensors", target)
    with pytest.raises(ModelError, match="no draft model can be read"):
        load_eagle(tmp_path / "missing.safetensors", target)
    other = llama(ModelConfig(**{**CONFIG.__dict__, "vocab_size": 80}))
    with pytest.raises(ModelError, match="hidden size 32, the target has 80 and 32"):
        load_eagle(tmp_path / "head.safetensors", other)
    document = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps(document | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="not those that its JSON describes"):
        load_eagle(tmp_path / "head.safetensors", target)


def test_packed_lm_head_gives_the_same_rows(target: Decoder) -> None:
    if not can_prepack(torch.float32):
        pytest.skip("this torch does not pack linears")
    rows = reduced_lm_head(target, VOCABULARY).weight
    prepack_linears(target)
    assert torch.equal(reduced_lm_head(target, VOCABULARY).weight, rows)


def test_rounds_are_played_as_the_engine_plays_them() -> None:
    matches = np.zeros((2, 12), dtype=bool)
    # the prompt has 3 tokens, the answer 7: positions 3 to 9; position 3 is the first answer token
    matches[0, 3], matches[1, 4] = True, True  # the draft after 3 is right twice: gains 2 and the extra token
    matches[0, 6] = True  # the draft after 6 is right once; the second guess is wrong
    matches[0, 8], matches[1, 9] = True, True  # after 8 only one token is left: it counts, the extra one does not
    assert rounds_of(matches, 3, 10) == [(2, 3), (1, 2), (1, 1)]
    assert rounds_of(matches, 3, 4) == []


def test_a_draft_that_knows_the_target_is_always_right(target: Decoder) -> None:
    perfect = SmallDraft(target, CONFIG, torch.arange(64))
    ids = torch.randint(0, 64, (1, 6), generator=torch.Generator().manual_seed(3))
    for _ in range(20):
        logits = target.lm_head(target.norm(target_features(target, ids)[:, -1]))
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    figures = measure(perfect, target, [Example("question", ids[0].numpy().astype(np.uint16), 6)], 4)
    assert figures["tokens_per_step"] == pytest.approx(19 / 4, abs=1e-3)  # rounds of 5, 5, 5, 4
    assert figures["accepted_by_position"] == [1.0] * 4
    blind = SmallDraft(target, CONFIG, VOCABULARY)
    blind.model.lm_head.weight.zero_()
    assert measure(blind, target, [Example("question", ids[0].numpy().astype(np.uint16), 6)], 4)["tokens_per_step"] < 2


def test_held_out_prompts_share_no_template_and_no_topic_with_training() -> None:
    seen, unseen = Grammar.of(held_out=False), Grammar.of(held_out=True)
    for name in ("topics", "ask", "with_text", "follow_ups"):
        assert not set(getattr(seen, name)) & set(getattr(unseen, name))
        assert len(getattr(seen, name)) + len(getattr(unseen, name)) == len(WORDS[name])
    assert len(WORDS["topics"]) >= 300 and len(set(WORDS["topics"])) == len(WORDS["topics"])
    assert len(WORDS["ask"]) >= 60 and all(len(set(WORDS[name])) == len(WORDS[name]) for name in WORDS)


def test_vocabulary_is_what_answers_hold_most_often_and_what_is_asked_for() -> None:
    answer = np.array([9, 9, 5, 5, 5, 7, 7, 3], dtype=np.uint16)
    example = Example("question", answer, 2)  # the two 9 are the prompt's
    assert frequent_tokens([example], 3, 64, [60]).tolist() == [5, 7, 60]


def test_batches_hold_every_example_once_and_mark_answers(examples: list[Example]) -> None:
    parts = list(batches(examples, 256, 0))
    assert sum(len(part.token_ids) for part in parts) == len(examples)
    assert all(part.token_ids.numel() <= 256 for part in parts)
    assert sum(int(part.is_answer.sum()) for part in parts) == sum(len(e.token_ids) - 6 for e in examples)


@pytest.mark.parametrize(("name", "least"), [("eagle_smollm2", 1.8), ("draft_smollm2", 1.6)])
def test_committed_drafts_are_what_their_json_says_and_good_enough_to_ship(name: str, least: float) -> None:
    document = json.loads((WEIGHTS / f"{name}.json").read_text())
    tensors = load_file(WEIGHTS / f"{name}.safetensors")
    assert len(tensors.pop("vocabulary")) == document["speculative"]["vocabulary"]
    assert sum(tensor.numel() for tensor in tensors.values()) == document["speculative"]["parameters"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert document["held_out"]["tokens_per_step"] >= least and document["held_out"]["draft_length"] == 4
    assert {"machine", "commit", "seed", "command", "device", "settings", "data"} <= set(document["provenance"])
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    assert (
        f"{document['held_out']['tokens_per_step']:.2f}" in card
        and f"{document['speculative']['parameters']:,}" in card
    )
    assert f"{document['provenance']['data']['answer_tokens']:,}" in card
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) < 15e6


@pytest.mark.weights
def test_committed_drafts_guess_the_target_on_held_out_prompts_here() -> None:
    llm = LLM("smollm2-135m", max_model_len=512, num_blocks=64, device="cpu", show_progress=False)
    prompts = ["Tell me about the history of writing.", "Define photosynthesis.", "Give an example of wood."]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    examples = [
        Example("question", np.array([*o.prompt_token_ids, *o.outputs[0].token_ids]), len(o.prompt_token_ids))
        for o in outputs
    ]
    target = llm.runner.model
    head = measure(load_eagle(WEIGHTS / "eagle_smollm2.safetensors", target), target, examples, 4)
    small = measure(load_small(WEIGHTS / "draft_smollm2.safetensors", target), target, examples, 4)
    assert head["tokens_per_step"] > 1.6 and small["tokens_per_step"] > 1.3, (head, small)


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0 and "--corpus" in capsys.readouterr().out
