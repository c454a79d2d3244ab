"""Shuffled blocks (FM2): a live step keeps every bit when its tables follow, and loses them when they do not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.attention.reference import paged_attention_reference
from minivllm.course.block_order import shuffled_order
from minivllm.errors import MiniVLLMError
from minivllm.lab.block_shuffle import LiveStep, bytes_of
from minivllm.views.block_shuffle import BlockShuffle, holders
from minivllm.views.sketch import Box, Line

Model = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [list(range(10, 10 + count)) for count in (21, 9, 2)]


def engine(model: Model, family: str = "llama-gqa", **options: object) -> LLM:
    """Three requests in their fourth step, in blocks of 4."""
    llm = LLM(str(model(family)[0]), dtype="float32", block_size=4, num_blocks=32, show_progress=False, **options)  # type: ignore[arg-type]
    for prompt in PROMPTS:
        llm.text_engine.add(llm.text_engine.check(prompt), GREEDY)
    for _ in range(4):
        llm.text_engine.step()
    return llm


@pytest.mark.parametrize("family", ["llama-gqa", "llama-9to3", "qwen3", "mistral"])
def test_no_bit_changes_when_the_tables_follow(reference_model: Model, family: str) -> None:
    step = LiveStep(engine(reference_model, family))
    for num_moved, seed in ((0, 0), (2, 1), (17, 2), (31, 3)):
        found = step.shuffle(num_moved, seed)
        assert (found.num_moved, found.num_different, found.greatest_difference) == (num_moved, 0, 0.0)
        assert found.num_values == 3 * 320
        assert [found.order[block] for block in found.before[0]] == list(found.after[0])


def test_almost_every_logit_changes_when_the_tables_stay(reference_model: Model) -> None:
    found = LiveStep(engine(reference_model)).shuffle(31, 3, is_followed=False)
    assert found.after == found.before and found.num_different > 900 and found.greatest_difference > 0.1


def test_one_foreign_number_in_the_cache_is_noticed(reference_model: Model) -> None:
    step = LiveStep(engine(reference_model))
    step.data[0, 0, step.tables[0][0], 0, 0, 0] += 1e-3
    assert step.shuffle(31, 3).num_different > 0


def test_the_step_is_the_engines_own_and_leaves_the_engine_alone(reference_model: Model) -> None:
    llm = engine(reference_model)
    tokens = [request.token_ids[-1] for request in llm.engine.scheduler.running]
    before, hashed = llm.storage.data.clone(), llm.engine.state_hash()
    step = LiveStep(llm)
    step.shuffle(31)
    assert torch.equal(llm.storage.data, before) and llm.engine.state_hash() == hashed
    assert step._untouched.argmax(dim=1).tolist() == tokens  # greedy: what the newest stored token led to
    assert step.tables == tuple(tuple(r.block_ids[: -(-r.num_computed // 4)]) for r in llm.engine.scheduler.running)


def test_inputs_of_a_layer_give_what_the_layer_computes(reference_model: Model) -> None:
    """The layer's attention as the model ran it, against the reference on the inputs that were taken out."""
    step = LiveStep(engine(reference_model, "llama-9to3"))
    inputs = step.inputs(layer=1)
    seen: list[torch.Tensor] = []
    attention = step._attention(step.batch, step.data.clone())

    class Watch:
        def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = attention.attend(layer, q, k, v)
            seen.append(out.clone())
            return out

    step._forward(step.batch, Watch())
    tables, counts = inputs.block_table.tolist(), inputs.num_tokens.tolist()
    wanted = paged_attention_reference(inputs.q, inputs.k_cache, inputs.v_cache, tables, [1, 1, 1], counts)
    torch.testing.assert_close(seen[1].double(), wanted, atol=1e-5, rtol=1e-5)


def test_bits_tell_minus_zero_from_zero() -> None:
    zero, minus = torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]])
    assert (bytes_of(zero) != bytes_of(minus)).any(-1).tolist() == [[True, False]]


def test_an_idle_engine_and_one_with_latents_are_refused(reference_model: Model) -> None:
    idle = LLM(str(reference_model("llama-gqa")[0]), num_blocks=16, show_progress=False)
    with pytest.raises(MiniVLLMError, match="add one and take two steps"):
        LiveStep(idle)
    with pytest.raises(MiniVLLMError, match="take a plain Llama or Qwen"):
        LiveStep(engine(reference_model, "v2-dense"))


@pytest.mark.parametrize(("num_blocks", "num_moved"), [(24, 0), (24, 2), (24, 23), (3, 2)])
def test_an_order_moves_as_many_blocks_as_asked_and_never_the_null_block(num_blocks: int, num_moved: int) -> None:
    order = shuffled_order(num_blocks, num_moved, seed=4)
    assert sorted(order) == list(range(num_blocks)) and order[0] == 0
    assert sum(new != old for old, new in enumerate(order)) == num_moved
    assert order == shuffled_order(num_blocks, num_moved, seed=4)


@pytest.fixture(scope="module")
def step(reference_model: Model) -> LiveStep:
    return LiveStep(engine(reference_model))


def test_every_control_of_the_view_computes_the_step_again(step: LiveStep) -> None:
    view = BlockShuffle(step.shuffle, step.num_blocks)
    title = "31 blocks moved: of 960 logits none differs in a single bit; greatest difference 0."
    assert view.drawn()["title"] == title and view.drawn()["num_different"] == 0
    first = view.drawn()["after"]
    view.move("seed", 3)
    assert view.drawn()["after"] != first and view.drawn()["num_different"] == 0
    view.move("moved", 0)
    assert view.drawn()["after"] == view.drawn()["before"] and view.drawn()["title"].startswith("0 blocks moved:")
    view.move("moved", 30)
    view.move("tables", "stay")
    picture = view.drawn()
    assert picture["after"] == picture["before"] and picture["num_different"] >= 640  # two requests or three
    assert "30 blocks moved and the tables did not follow" in picture["title"]
    assert f"by up to {picture['greatest_difference']:.4g}" in picture["title"]
    view.flush()
    assert view.picture["title"] == picture["title"] and view.picture["status"] == ""
    view.close()


def test_the_map_shows_where_each_block_was_and_went(step: LiveStep) -> None:
    view = BlockShuffle(step.shuffle, step.num_blocks)
    order = step.shuffle(31, 0).order
    cells = [mark for mark in view.drawn()["marks"] if isinstance(mark, Box)]
    before, after = (
        {box.words.split(":")[0]: box.words.split(": ")[1] for box in half} for half in (cells[:32], cells[32:])
    )
    for block, readers in holders(step.tables).items():
        names = ", ".join(f"{'ABC'[request]}{logical}" for request, logical in readers)
        assert before[f"block {block}"] == after[f"block {order[block]}"] == names
    assert before["block 0"] == after["block 0"] == "nobody reads it"
    lines = [mark for mark in view.drawn()["marks"] if isinstance(mark, Line)]
    assert len(lines) == len(holders(step.tables))


def test_the_views_twins_repeat_and_hold_the_tables(step: LiveStep) -> None:
    bundles = [BlockShuffle(step.shuffle, step.num_blocks)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"] and bundles[0]["text/plain"] == bundles[1]["text/plain"]
    assert " ".join(map(str, step.tables[0])) in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(BlockShuffle(step.shuffle, step.num_blocks).drawn()))["marks"]


@pytest.mark.parametrize(("control", "value"), [("moved", 1), ("moved", 32), ("seed", -1), ("tables", "x"), ("y", 1)])
def test_the_view_refuses_what_it_cannot_take(step: LiveStep, control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        BlockShuffle(step.shuffle, step.num_blocks).move(control, value)
    assert "\n" not in str(caught.value)


def test_a_pool_too_small_to_shuffle_is_refused(step: LiveStep) -> None:
    with pytest.raises(MiniVLLMError, match="take 3 or more"):
        BlockShuffle(step.shuffle, 2)
