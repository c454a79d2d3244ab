"""Tokens become text without loss, stop where they should, and come back under vLLM's names."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from minivllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from minivllm.outputs import Detokenizer, Tokenizer
from minivllm.weights import fetch_default_model

Build = Callable[[str], tuple[Path, PreTrainedModel]]
PROMPT = [5, 9, 200, 31]


PIECES = [*(bytes([b]) for b in range(256)), b"ab", b"bc", b"STOP", b"TO", b"<end>", "\u4f60".encode()]
END = PIECES.index(b"<end>")


class Letters:
    """A tokenizer of a test: token i is one fixed piece of text, some of them half a character."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        pieces = [PIECES[t] if t < len(PIECES) else b"?" for t in token_ids]
        kept = [p for p in pieces if not (skip_special_tokens and p == b"<end>")]
        return b"".join(kept).decode(errors="replace")


def fed(text_pieces: list[str], **params: object) -> tuple[Detokenizer, list[str | None], list[str]]:
    """Feed pieces one token at a time; also what each step returned and showed."""
    detokenizer = Detokenizer(Letters(), [], SamplingParams(**params))  # type: ignore[arg-type]
    returned, shown = [], []
    for index, piece in enumerate(text_pieces):
        token_id = PIECES.index(piece.encode())
        returned.append(detokenizer.feed([token_id], is_last=index == len(text_pieces) - 1))
        shown.append(detokenizer.shown_text)
        if returned[-1]:
            break
    return detokenizer, returned, shown


# --- Stop strings


def test_stop_string_across_tokens_is_found_and_cut() -> None:
    detokenizer, returned, _ = fed(["x", "S", "TO", "P", "y"], stop="STOP")
    assert returned == [None, None, None, "STOP"] and detokenizer.text == "x"


def test_stop_string_is_kept_when_asked_but_nothing_after_it() -> None:
    detokenizer, _, _ = fed(["x", "STOP"], stop="TO", include_stop_str_in_output=True)
    assert detokenizer.text == "xSTO"  # in the middle of a token: its P is gone


def test_the_earliest_of_several_stop_strings_wins() -> None:
    detokenizer, returned, _ = fed(["x", "STOP"], stop=["OP", "TO"])
    assert returned[-1] == "TO" and detokenizer.text == "xS"


def test_a_possible_start_of_a_stop_string_is_held_back_while_streaming() -> None:
    _, returned, shown = fed(["x", "S", "TO", "S", "TO", "x"], stop=["STOP", "zz"])
    assert shown == ["x", "x", "x", "xSTO", "xSTO", "xSTOSTOx"] and not any(returned)


def test_text_held_back_comes_out_at_the_end() -> None:
    detokenizer, _, _ = fed(["x", "S", "TO"], stop="STOP")
    assert detokenizer.text == "xSTO"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    detokenizer, returned, _ = fed(["a", "b", "a", "b"], stop="b", min_tokens=3)
    assert returned == [None, None, None, "b"] and detokenizer.text == "aba"


def test_half_a_character_waits_for_the_rest() -> None:
    detokenizer = Detokenizer(Letters(), [], SamplingParams())
    shown = []
    for byte in "é😀你".encode():
        detokenizer.feed([byte], is_last=False)
        shown.append(detokenizer.text)
    assert shown == ["", "é", "é", "é", "é", "é😀", "é😀", "é😀", "é😀你"]


def test_half_a_character_at_the_very_end_is_marked() -> None:
    detokenizer = Detokenizer(Letters(), [], SamplingParams())
    detokenizer.feed([*b"ok", 0xE4], is_last=True)
    assert detokenizer.text == "ok\ufffd"


# --- In the engine, with a tokenizer of 262 pieces on a model of 320 tokens


def lettered(build: Build, eos: tuple[int, ...] = (), **options: object) -> LLM:
    folder, _ = build("llama-gqa")
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 100, "block_size": 4, "max_model_len": 64}
    llm = LLM(folder, **(settings | options))  # type: ignore[arg-type]
    llm.tokenizer = llm.text_engine.tokenizer = Letters()
    if eos:
        end_tokens(llm, eos)
    return llm


def end_tokens(llm: LLM, eos: tuple[int, ...]) -> None:
    """Give a model that has none its ends: as if config.json had listed them."""
    for config in (llm.engine.config, llm.runner.config):
        object.__setattr__(config, "eos_token_ids", eos)


def answer(llm: LLM, **params: object) -> CompletionOutput:
    settings: dict[str, object] = {"temperature": 0, "max_tokens": 20}
    [output] = llm.generate(PROMPT, SamplingParams(**(settings | params)), use_tqdm=False)  # type: ignore[arg-type]
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
    return output.outputs[0]


def test_length_is_the_reason_when_max_tokens_end_it(reference_model: Build) -> None:
    found = answer(lettered(reference_model), max_tokens=5)
    assert (len(found.token_ids), found.finish_reason, found.stop_reason) == (5, "length", None)


def test_max_tokens_none_runs_to_max_model_len(reference_model: Build) -> None:
    found = answer(lettered(reference_model), max_tokens=None)
    assert (len(found.token_ids), found.finish_reason) == (64 - len(PROMPT), "length")


def test_a_stop_token_ends_it_and_is_no_part_of_the_text(reference_model: Build) -> None:
    llm = lettered(reference_model)
    free = answer(llm)
    stop = free.token_ids[5]
    assert stop not in free.token_ids[:5]
    found = answer(llm, stop_token_ids=[stop, 319])
    assert found.token_ids == free.token_ids[:6]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert found.text == Letters().decode(free.token_ids[:5])
    kept = answer(llm, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert kept.text == Letters().decode(free.token_ids[:6])


def test_eos_ends_it_without_a_stop_reason_unless_ignored(reference_model: Build) -> None:
    free = answer(lettered(reference_model))
    llm = lettered(reference_model, eos=(319, free.token_ids[5]))
    found = answer(llm)
    assert found.token_ids == free.token_ids[:6]
    assert (found.finish_reason, found.stop_reason) == ("stop", None)
    assert answer(llm, ignore_eos=True).token_ids == free.token_ids


def test_min_tokens_puts_the_end_off(reference_model: Build) -> None:
    free = answer(lettered(reference_model))
    llm = lettered(reference_model, eos=(free.token_ids[5],))
    found = answer(llm, min_tokens=12)
    assert len(found.token_ids) >= 12 and free.token_ids[5] not in found.token_ids[:12]
    assert found.token_ids[:5] == free.token_ids[:5]


@pytest.mark.parametrize("max_tokens", [20, 7])  # 7: the stop string ends with the last token allowed
def test_a_stop_string_in_the_engine_gives_reason_and_frees_blocks(reference_model: Build, max_tokens: int) -> None:
    llm = lettered(reference_model)
    free = answer(llm)
    texts = [Letters().decode(free.token_ids[:count]) for count in range(len(free.token_ids) + 1)]
    stop = texts[7][-2:]
    assert stop not in texts[6] and "\ufffd" not in stop
    found = answer(llm, stop=["never", stop], max_tokens=max_tokens)
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert found.text == texts[7][:-2] and found.token_ids == free.token_ids[:7]


def test_detokenize_false_gives_tokens_only(reference_model: Build) -> None:
    found = answer(lettered(reference_model), detokenize=False)
    assert found.text == "" and len(found.token_ids) == 20


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    for skip, text in ((True, "ab"), (False, "a<end>b")):
        detokenizer = Detokenizer(Letters(), [], SamplingParams(skip_special_tokens=skip))
        for token_id in (ord("a"), END, ord("b")):
            detokenizer.feed([token_id], is_last=False)
        assert detokenizer.text == text


def test_streamed_text_only_grows_and_ends_as_generate_does(reference_model: Build) -> None:
    llm = lettered(reference_model)
    params = SamplingParams(temperature=0, max_tokens=20, stop=["zq"])
    outputs = list(llm.stream(PROMPT, params))
    texts = [output.outputs[0].text for output in outputs]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 21))
    assert [output.finished for output in outputs] == [False] * 19 + [True]
    [whole] = llm.generate(PROMPT, params, use_tqdm=False)
    assert outputs[-1].outputs == whole.outputs


# --- What surrounds the text


def test_times_are_in_order_and_cached_tokens_are_counted(reference_model: Build) -> None:
    llm, prompt = lettered(reference_model), list(range(1, 14))
    outputs: list[RequestOutput] = []
    for _ in range(2):
        outputs += llm.generate(prompt, SamplingParams(max_tokens=3), use_tqdm=False)
    for output in outputs:
        m = output.metrics
        assert m.first_scheduled_time and m.first_token_time and m.finished_time and m.time_to_first_token
        assert 0 < m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
        assert output.prompt_token_ids == prompt and output.prompt is None and output.finished
    assert [output.num_cached_tokens for output in outputs] == [0, 12]
    assert outputs[0].request_id != outputs[1].request_id


def test_a_fully_cached_prompt_still_computes_its_last_token(reference_model: Build) -> None:
    llm, prompt = lettered(reference_model), list(range(1, 13))  # three full blocks
    for expected in (0, 8):
        [output] = llm.generate(prompt, SamplingParams(max_tokens=3), use_tqdm=False)
        assert output.num_cached_tokens == expected


def test_a_cache_salt_keeps_prompts_apart(reference_model: Build) -> None:
    llm, prompt = lettered(reference_model), list(range(1, 14))
    for salt, expected in (("a", 0), ("b", 0), ("a", 12), (None, 0)):
        [output] = llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, use_tqdm=False)
        assert output.num_cached_tokens == expected


# --- The real tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(fetch_default_model(show_progress=False))


TEXTS = [
    "Plain words, punctuation. And   spaces\n\n\ttabs, don't 1234.5",
    "😀👩‍👩‍👧‍👦🇩🇪 emoji, 你好，世界。 Ünïcödé Здравствуй ไทย नमस्ते",
    "code: def f(x):\n    return x**2  # ok <b>&amp;</b>",
    " leading space , odd . cleanup ! ' s",
    "\u200b\ufffd a real replacement character",
]


@pytest.mark.weights
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("num_prompt", [0, 1, 7])
@pytest.mark.parametrize("text", TEXTS)
def test_growing_text_equals_one_decode(tokenizer: Tokenizer, text: str, num_prompt: int, chunk: int) -> None:
    prompt = tokenizer.encode("Tell me a story about")[:num_prompt]
    token_ids = [*tokenizer.encode(text), 2]
    detokenizer, seen = Detokenizer(tokenizer, prompt, SamplingParams()), ""
    for start in range(0, len(token_ids), chunk):
        detokenizer.feed(token_ids[start : start + chunk], is_last=start + chunk >= len(token_ids))
        assert detokenizer.text.startswith(seen)
        seen = detokenizer.text
    assert seen == tokenizer.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.weights
def test_growing_text_keeps_special_tokens_when_asked(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>user\nhi 你好<|im_end|>\n")
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(skip_special_tokens=False))
    for token_id in token_ids:
        detokenizer.feed([token_id], is_last=False)
    assert detokenizer.text == "<|im_start|>user\nhi 你好<|im_end|>\n"


@pytest.mark.weights
@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_lose_nothing(tokenizer: Tokenizer, seed: int) -> None:
    token_ids = [(7919 * (i + 1) * (seed + 3)) % 49152 for i in range(200)]  # halves of characters everywhere
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    for index, token_id in enumerate(token_ids):
        detokenizer.feed([token_id], is_last=index == len(token_ids) - 1)
    assert detokenizer.text == tokenizer.decode(token_ids, skip_special_tokens=True)
