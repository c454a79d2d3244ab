"""LLM: load a model, give it prompts, get text; vLLM's names throughout."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm

from minivllm.config import require_integers
from minivllm.defaults import (
    engine_config,
    load_tokenizer,
    longest_request,
    pool_size,
    read_model_config,
    refuse_unknown,
)
from minivllm.engine.engine import Engine
from minivllm.engine_config import CHOICES, EngineConfig, Policies
from minivllm.errors import ModelError, RequestError
from minivllm.events import EventBus
from minivllm.interrupts import held_interrupts
from minivllm.outputs import RequestOutput, Tokenizer
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.runner.device import choose_device
from minivllm.runner.kv_storage import KVStorage, block_bytes
from minivllm.runner.loader import build_model
from minivllm.runner.model_runner import ModelRunner
from minivllm.text_engine import Checked, Generation, Prompt, TextEngine, require_unicode
from minivllm.trace import Trace
from minivllm.weights import find_model

Message = Mapping[str, str]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model, its engine and its tokenizer.

    `model` is an alias (smollm2-135m), a folder, a Hugging Face id, or with load_format="dummy" a built-in config.
    `kv_cache_memory` is the byte budget of the KV pool, `num_blocks` its size outright, `swap_space` GiB of host memory
    for preemption by swap. The policies are fields of EngineConfig: enable_prefix_caching, batching, allocator ...
    Raises ModelError and ConfigError, one line each.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        swap_space: float = 0,
        seed: int = 0,
        load_format: str = "auto",
        device: str = "auto",
        show_progress: bool = True,
        **policies: Unpack[Policies],
    ) -> None:
        refuse_unknown(policies, LLM.__init__)
        sizes = {"max_model_len": max_model_len, "num_blocks": num_blocks, "kv_cache_memory": kv_cache_memory}
        budget = policies.get("max_num_batched_tokens")
        require_integers(**sizes, block_size=block_size, max_num_batched_tokens=budget, seed=seed)
        source = find_model(model, load_format, show_progress)
        self.model, self.seed = source.name, seed
        self.device = choose_device(device)
        self.model_config = read_model_config(source, str(dtype).removeprefix("torch."), self.device)
        num_blocks = pool_size(self.model_config, block_size, num_blocks, kv_cache_memory, self.device)
        max_model_len = longest_request(self.model_config, max_model_len, (num_blocks - 1) * block_size)
        config = engine_config(
            self.model_config, policies, num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len,
            swap_space=swap_space,
        )  # fmt: skip
        self.tokenizer = load_tokenizer(source)
        built = build_model(self.model_config, source.weight_files if load_format == "auto" else [], seed, self.device)
        self.storage = KVStorage(self.model_config, num_blocks, block_size, self.device, config.num_host_blocks)
        self.runner = ModelRunner(built, self.model_config, self.storage, self.device)
        self.engine = Engine(config, self.runner)
        self.text_engine = TextEngine(self.engine, self.tokenizer, self.model, self.model_config.vocab_size, seed)

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def events(self) -> EventBus:
        return self.engine.events

    def get_tokenizer(self) -> Tokenizer:
        """The Hugging Face tokenizer. Raises ModelError when the model has none."""
        if self.tokenizer is None:
            raise ModelError(f"{self.model} has no tokenizer; give lists of token ids")
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, batched as the pool allows; results in the order of the prompts.

        A prompt is a string, a list of token ids, or a dict with `prompt` or `prompt_token_ids` (and `cache_salt`).
        Raises RequestError before anything runs when one of them cannot be served. Ctrl-C drops them all.
        """
        many = _as_list(prompts)
        checked = [self.text_engine.check(prompt, f"prompts[{i}]") for i, prompt in enumerate(many)]
        priority = [0] * len(many) if priority is None else priority
        return self._run(checked, _per_prompt(sampling_params, len(many)), use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, put into the model's own chat template."""
        is_many = isinstance(messages, list | tuple) and not any(isinstance(m, Mapping) for m in messages)
        many = list(messages) if is_many else [messages]
        checked = [self._apply_template(m, f"messages[{i}]", add_generation_prompt) for i, m in enumerate(many)]
        return self._run(checked, _per_prompt(sampling_params, len(many)), use_tqdm, [0] * len(many))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the growing result of one prompt after each of its tokens; leaving the loop drops the request."""
        return self._stream(self.text_engine.check(prompt), *_per_prompt(sampling_params, 1))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the growing answer to one conversation."""
        return self._stream(self._apply_template(messages, "messages", True), *_per_prompt(sampling_params, 1))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changed, while requests hold blocks."""
        with self.text_engine.lock:
            return self.engine.kv.reset_cache()

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record every event of the block under `with`: a Trace to draw, save and replay."""
        trace = Trace(self.trace_header())
        stop = self.events.listen(trace)
        try:
            yield trace
        finally:
            stop()

    def trace_header(self) -> dict[str, object]:
        """Plain facts of this engine and of where it runs, for the head of a Trace."""
        model, config = self.model_config, self.config
        return {
            "model": self.model,
            "dtype": model.dtype,
            "device": self.device,
            "num_blocks": config.num_blocks,
            "block_size": config.block_size,
            "kv_bytes_per_token": block_bytes(model, 1),
            "num_layers": model.num_layers,
            "num_kv_heads": model.num_kv_heads,
            "head_size": model.head_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": config.max_model_len,
            **{name: getattr(config, name) for name in CHOICES},
            "live": "recorded",
            **provenance(self.seed),
        }

    def _run(
        self, prompts: list[Checked], params: list[SamplingParams], use_tqdm: bool, priority: Sequence[int]
    ) -> list[RequestOutput]:
        if not isinstance(priority, Sequence) or len(priority) != len(prompts):
            raise RequestError(f"priority must be a list of {len(prompts)} integers, one for each prompt")
        generations: list[Generation] = []
        try:
            with held_interrupts() as let_through:
                for prompt, chosen, urgency in zip(prompts, params, priority, strict=True):
                    generations.append(self.text_engine.add(prompt, chosen, urgency))
                with tqdm(total=len(generations), desc="Processed prompts", disable=not use_tqdm) as bar:
                    while not all(g.is_finished for g in generations):
                        self.text_engine.step()
                        _show_progress(bar, generations)
                        let_through()
        finally:
            for generation in generations:
                if not generation.is_finished:
                    self.text_engine.abort(generation)
        return [self.text_engine.result(generation) for generation in generations]

    def _stream(self, prompt: Checked, params: SamplingParams) -> Iterator[RequestOutput]:
        generation, num_shown, is_last = None, 0, False
        try:
            with held_interrupts():
                generation = self.text_engine.add(prompt, params)
            while not is_last:
                with held_interrupts():
                    if not generation.is_finished:  # another thread may have stepped it to its end
                        self.text_engine.step()
                    output = self.text_engine.result(generation)
                num_tokens, is_last = sum(len(sample.token_ids) for sample in output.outputs), output.finished
                if num_tokens > num_shown or is_last:
                    num_shown = num_tokens
                    yield output
        finally:
            if generation and not generation.is_finished:
                self.text_engine.abort(generation)

    def _apply_template(self, messages: object, where: str, add_generation_prompt: bool) -> Checked:
        tokenizer = self.get_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError(f"{where}: the model {self.model} has no chat template; use generate with plain text")
        if not isinstance(messages, Sequence) or not messages or not all(_is_message(m) for m in messages):
            raise RequestError(f"{where}: must be a non-empty list of dicts with the strings 'role' and 'content'")
        try:
            text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]  # checked above
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:  # templates refuse orders of roles they do not know
            raise RequestError(f"{where}: the chat template says: {' '.join(str(error).split())}") from error
        require_unicode(text, where)
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[call-arg]  # the template has them
        return Checked(text, token_ids)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of integers is one."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)  # type: ignore[arg-type, list-item]


def _per_prompt(params: Params, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if isinstance(params, Sequence) and all(isinstance(p, SamplingParams) for p in params):
        if len(params) == num_prompts:
            return list(params)
        raise RequestError(f"sampling_params has {len(params)} entries for {num_prompts} prompts; give one or as many")
    raise RequestError(f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}")


def _show_progress(bar: tqdm, generations: list[Generation]) -> None:
    num_finished = sum(g.is_finished for g in generations)
    if num_finished == bar.n or bar.disable:
        return
    elapsed_s = bar.format_dict["elapsed"] or 1e-9
    num_in = sum(len(g.prompt.token_ids) for g in generations if g.is_finished)
    num_out = sum(sample.request.num_output for g in generations for sample in g.samples)
    bar.set_postfix_str(f"in {num_in / elapsed_s:.0f}, out {num_out / elapsed_s:.0f} tokens/s", refresh=False)
    bar.update(num_finished - bar.n)
