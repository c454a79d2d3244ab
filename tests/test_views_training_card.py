"""The training card: its counts are the closed forms 2 N and 6 N, and it says what is counted, whatever is moved."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from minivllm.config import ModelConfig
from minivllm.course.calculators import (
    inference_flops_per_token,
    kv_bytes_per_token,
    num_matrix_parameters,
    ridge_point,
    training_flops_per_token,
)
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.training_card import Kind, Pass, count, count_passes
from minivllm.models.llama import llama
from minivllm.views.sketch import Box, Line
from minivllm.views.step_work import chip_options
from minivllm.views.training_card import TrainingCard

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
MATRICES = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 320  # layers x (q, o, k, v, gate, up, down), head
CARDS: list[Pass] = []


def passes() -> list[Pass]:
    """Counted once."""
    if not CARDS:
        CARDS.extend(count_passes("smollm2-135m", (1, 64)))  # decode, prefill and training of each
    return CARDS


def test_products_are_2n_served_and_6n_trained_to_the_last_flop() -> None:
    for done in [*passes(), *count_passes("llama-3.2-1b", (16,))]:
        num_weights = num_matrix_parameters(done.model)
        per_token = (training_flops_per_token if done.kind == "training" else inference_flops_per_token)(num_weights)
        assert done.products == int(per_token) * done.num_tokens
        assert done.weight_bytes == 2 * int(num_weights)


def test_served_keeps_k_and_v_and_trained_keeps_more_in_proportion_to_the_tokens() -> None:
    kept = {(p.num_stored, p.kind): p.kept_bytes for p in count_passes("smollm2-135m", (8, 16, 32))}
    per_token = int(kv_bytes_per_token("smollm2-135m", "bfloat16"))
    assert [kept[n, "decode"] for n in (8, 16, 32)] == [per_token] * 3
    assert [kept[n, "prefill"] for n in (8, 16, 32)] == [n * per_token for n in (8, 16, 32)]
    trained = [kept[n, "training"] for n in (8, 16, 32)]
    assert trained[2] - trained[1] == 2 * (trained[1] - trained[0]) > 2 * 8 * 20 * per_token


def test_a_decode_reads_all_weights_and_all_k_and_v_for_one_token() -> None:
    alone, _, _, after_63, *_ = passes()
    per_token = int(kv_bytes_per_token("smollm2-135m", "bfloat16"))
    assert (after_63.kind, after_63.num_tokens, after_63.num_stored) == ("decode", 1, 64)
    assert after_63.attention == 30 * 4 * 9 * 64 * 64  # layers, 2 products x 2 FLOPs, heads, size, keys
    assert after_63.moved_bytes - after_63.weight_bytes == 64 * per_token == 64 * after_63.kept_bytes
    assert (alone.products, alone.weight_bytes) == (after_63.products, after_63.weight_bytes)
    assert (after_63.products + after_63.attention) / after_63.moved_bytes < 1.02  # longer, and starved as before


def test_attention_with_backward_does_seven_products_where_forward_does_two() -> None:
    served, trained = passes()[-2:]
    assert served.attention == 30 * 4 * 9 * 64 * 64 * 64  # layers, 2 products x 2 FLOPs, heads, size, all pairs
    assert trained.attention * 2 == served.attention * 7


def test_real_tensors_count_alike_and_transformers_does_the_same_products() -> None:
    """The closed form for ours on real numbers, and for another implementation of the same model."""
    config = ModelConfig.from_json({**SIZES, "architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    torch.manual_seed(0)
    decoder = llama(config)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.02)
    oracle = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    ids = torch.arange(24)[None]
    kinds: tuple[Kind, ...] = ("prefill", "training")
    for kind in kinds:
        real, has_backward = count(decoder, "small", 24, kind), kind == "training"
        assert real.products == (6 if has_backward else 2) * MATRICES * 24
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(has_backward):
            out = oracle(ids, labels=ids)
            if has_backward:
                out.loss.backward()
        theirs = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
        # Theirs spells attention out, without the second pass over the scores, and turns angles by a product.
        assert sum(flops for name, flops in theirs.items() if "bmm" not in name) == real.products
        assert real.attention <= sum(flops for name, flops in theirs.items() if "bmm" in name) * 1.25


def test_models_with_latent_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="latent attention"):
        count_passes("tiny-mla", (1,))


def test_bars_are_the_counted_numbers() -> None:
    picture = TrainingCard(passes(), tokens=64).drawn()
    decoded, served, trained = passes()[-3:]
    for state, done in (("off", served), ("on", trained), ("decode", decoded)):
        assert picture["flops_per_token"][state] == (done.products + done.attention) / done.num_tokens
        assert picture["kept_per_token"][state] == done.kept_bytes / done.num_tokens
        assert picture["intensity"][state] == (done.products + done.attention) / done.moved_bytes
    assert trained.moved_bytes == 3 * trained.weight_bytes + 2 * trained.kept_bytes
    boxes = [mark for mark in picture["marks"] if isinstance(mark, Box) and mark.click]
    assert [box.click for box in boxes] == [("backward", state) for state in ("decode", "off", "on")] * 3
    assert boxes[1].width / boxes[2].width == pytest.approx(
        picture["flops_per_token"]["off"] / picture["flops_per_token"]["on"]
    )
    text = picture["text"]
    assert f"{served.kept_bytes // 64:,}" in text and f"{(trained.products + trained.attention) / 64:,.0f}" in text


def test_tokens_move_the_intensity_and_not_the_work_of_a_token() -> None:
    view = TrainingCard(passes(), tokens=1, backward="on")
    alone = view.drawn()
    assert "1 token at once" in alone["title"] and "below the ridge" in alone["title"]
    assert max(alone["intensity"].values()) < 1.01  # with backward or without: one token starves
    view.move("tokens", 64)
    view.flush()
    together = view.picture
    assert together["intensity"]["on"] > 30 * alone["intensity"]["on"]
    assert together["flops_per_token"]["on"] == pytest.approx(alone["flops_per_token"]["on"], rel=0.02)
    assert "64 tokens" in together["title"] and together["status"] == ""
    view.close()


def test_backward_moves_the_frame_and_the_title() -> None:
    view = TrainingCard(passes(), tokens=64)
    assert view.drawn()["title"].startswith("Prefilling 64 tokens at once")
    frames = [[m.y for m in TrainingCard(passes(), backward=state).drawn()["marks"] if isinstance(m, Box) and m.border]
              for state in ("decode", "off", "on")]  # fmt: skip
    assert [len(frame) for frame in frames] == [3, 3, 3]
    assert all(decode < off < on for decode, off, on in zip(*frames, strict=True))
    view.move("backward", "on")
    assert view.drawn()["title"].startswith("Trained on 64 tokens")
    view.move("backward", "decode")
    assert view.drawn()["title"].startswith("Decoding the last of 64 tokens") and "below" in view.drawn()["title"]


def test_lines_say_what_attention_adds_to_the_products() -> None:
    lines, served = TrainingCard(passes(), tokens=64).drawn()["lines"], passes()[-2]
    assert f"{served.attention / 64 / 1e6:,.0f} MFLOP for each token" in lines[1] and "masked ones too" in lines[1]


@pytest.mark.parametrize("chip", [name for name, _ in chip_options()])
def test_every_chip_draws_its_own_ridge(chip: str) -> None:
    picture = TrainingCard(passes(), chip=chip).drawn()
    dtype = "bf16" if chip not in ("t4", "v100-sxm2-32gb") else "fp16"
    assert picture["ridge"] == float(ridge_point(chip, dtype))
    where = "above" if picture["intensity"]["off"] >= picture["ridge"] else "below"
    assert chip in picture["title"] and f"{where} the ridge" in picture["title"]


def test_ridge_lies_further_right_on_a_chip_with_a_higher_one() -> None:
    places = []
    for chip in ("h200-sxm", "h100-sxm"):
        marks = TrainingCard(passes(), chip=chip).drawn()["marks"]
        places.append(next(mark.x for mark in marks if isinstance(mark, Line) and mark.is_dashed))
    assert places[0] < places[1]


@pytest.mark.parametrize(
    ("control", "value"), [("tokens", 2), ("tokens", True), ("backward", "maybe"), ("chip", "h1"), ("x", 1)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        TrainingCard(passes()).move(control, value)


def test_a_card_needs_every_pass_of_each_length() -> None:
    for given in ([], passes()[:1], passes()[:2], passes()[:5]):
        with pytest.raises(MiniVLLMError, match="as decode, as prefill and as training"):
            TrainingCard(given)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [TrainingCard(passes())._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert "23,040" in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(TrainingCard(passes()).drawn()))["marks"]
    image = TrainingCard(passes()).image()
    assert isinstance(image, Image.Image) and image.width > 1400 and len(image.getcolors(1 << 24) or []) > 20
