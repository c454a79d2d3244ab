"""LLM: load a model, give it prompts, get text; vLLM's names throughout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from tqdm.auto import tqdm

from minivllm.arguments import Params, as_list, per_prompt
from minivllm.beam_search import BeamSearchOutput, BeamSearchParams, search_all
from minivllm.chat_template import apply_template
from minivllm.collector import older_objects_frozen
from minivllm.config import require_integers
from minivllm.defaults import load_tokenizer, read_model_config, refuse_unknown
from minivllm.engine.engine import Engine
from minivllm.engine_config import CHOICES, EngineConfig, Policies
from minivllm.errors import ModelError, RequestError
from minivllm.events import EventBus
from minivllm.interrupts import held_interrupts
from minivllm.outputs import RequestOutput, Tokenizer
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.runner.device import choose_device
from minivllm.runner.kv_storage import block_bytes
from minivllm.startup import GpuOptions, Sizes, start
from minivllm.text_engine import Checked, Generation, Prompt, TextEngine
from minivllm.trace import Trace
from minivllm.weights import find_model

Message = Mapping[str, str]
LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")


class LLM:
    """A model, its engine and its tokenizer.

    `model` is an alias (smollm2-135m), a folder, a Hugging Face id, or with load_format="dummy" a built-in config.
    `kv_cache_memory` is the byte budget of the KV pool, `num_blocks` its size outright, `swap_space` GiB of host memory
    for preemption by swap; `batch_invariant` makes every bit of an answer independent of the batch. On a GPU the
    pool takes what `gpu_memory_utilization` of its memory leaves when nothing else says, steps are launched before the
    last one's tokens are read (`async_scheduling`), and `enforce_eager=True` turns this and CUDA graphs off; a CPU
    accepts all three, and they do nothing there. The policies are fields of EngineConfig: batching, allocator ...
    Raises ModelError and ConfigError, one line each.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        dtype: str | torch.dtype = "auto",
        batch_invariant: bool = False,
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        swap_space: float = 0,
        seed: int = 0,
        load_format: str = "auto",
        device: str = "auto",
        show_progress: bool = True,
        enforce_eager: bool = False,
        gpu_memory_utilization: float = 0.9,
        async_scheduling: bool | None = None,
        **policies: Unpack[Policies],
    ) -> None:
        refuse_unknown(policies, LLM.__init__)
        sizes = {"max_model_len": max_model_len, "num_blocks": num_blocks, "kv_cache_memory": kv_cache_memory}
        require_integers(**sizes, block_size=block_size, seed=seed)
        wished = Sizes(block_size, max_model_len, num_blocks, kv_cache_memory, swap_space)
        gpu = GpuOptions(enforce_eager, gpu_memory_utilization, async_scheduling)
        source = find_model(model, load_format, show_progress)
        self.model, self.seed = source.name, seed
        self.device = choose_device(device)
        dtype = str(dtype).removeprefix("torch.")
        self.model_config = read_model_config(source, dtype, self.device, batch_invariant)
        started = start(
            source, self.model_config, policies, wished, gpu, device=self.device,
            has_weights=load_format == "auto", seed=seed, show_progress=show_progress,
        )  # fmt: skip
        self.tokenizer = load_tokenizer(source)
        self.storage, self.runner = started.storage, started.runner
        self.engine = Engine(started.config, self.runner)
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
        checked = self._check_all(prompts)
        priority = [0] * len(checked) if priority is None else priority
        return self._run(checked, per_prompt(sampling_params, len(checked)), use_tqdm, priority)

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
        template = partial(apply_template, self.get_tokenizer(), self.model)
        checked = [template(given, f"messages[{i}]", add_generation_prompt) for i, given in enumerate(many)]
        return self._run(checked, per_prompt(sampling_params, len(many)), use_tqdm, [0] * len(many))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the growing result of one prompt after each of its tokens; leaving the loop drops the request."""
        return self._stream(self.text_engine.check(prompt), *per_prompt(sampling_params, 1))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the growing answer to one conversation."""
        prompt = apply_template(self.get_tokenizer(), self.model, messages, "messages")
        return self._stream(prompt, *per_prompt(sampling_params, 1))

    def fork(self, request_id: str, seed: int | None = None, index: int = 0) -> Iterator[RequestOutput]:
        """Split sample `index` off a running stream: a stream of its own that begins with what the parent has now.

        They share all blocks until one writes to the last; without a `seed` the fork gets one of its own. Raises
        RequestError when no request of that id runs.
        """
        parent = self.text_engine.find(request_id)
        if parent is None:
            raise RequestError(f"fork: no request {request_id!r} runs here; take the request_id of a stream's output")
        follow = self._follow(partial(self.text_engine.fork, parent, index, seed), num_shown=-1)
        return _resumed(next(follow), follow)  # begun here and now, so that dropping it drops the request

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the likeliest continuations of one prompt or many, as transformers' beam search does; best first.

        `concurrency_limit` is how many prompts are searched at a time: by default as many as have a seat (max_num_seqs)
        for each of their beams. Raises RequestError before anything runs; Ctrl-C drops them all.
        """
        return search_all(self.text_engine, self._check_all(prompts), params, use_tqdm, concurrency_limit)

    def pin_prefix(self, prompt: Prompt, name: str | None = None) -> str:
        """Keep the full blocks of `prompt` in the prefix cache, computing what is missing; returns the pin's name.

        Raises RequestError for a name in use, less than one block, and when too little of the pool would be left.
        """
        checked, size = self.text_engine.check(prompt), self.config.block_size
        if not self.config.enable_prefix_caching:
            raise RequestError("pin_prefix: nothing is cached here; build the LLM with enable_prefix_caching=True")
        if len(checked.token_ids) < size:
            raise RequestError(f"pin_prefix: {len(checked.token_ids)} tokens do not fill a block of {size}; pin more")
        with self.text_engine.lock:  # so that nobody evicts what was just computed
            name = f"prefix {self.text_engine.new_id()}" if name is None else name
            self.engine.pins.require_room(name, len(checked.token_ids))
            self._run([checked], [SamplingParams(temperature=0, max_tokens=1)], False, [0])
            self.engine.pins.pin(name, checked.token_ids, checked.salt)
        return name

    def unpin_prefix(self, name: str) -> None:
        """Let a pinned prefix go; it stays cached until it is evicted. Raises RequestError for an unknown name."""
        with self.text_engine.lock:
            self.engine.pins.unpin(name)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changed, while requests or pins hold blocks."""
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
            "batch_invariant": model.batch_invariant,
            "device": self.device,
            "num_blocks": config.num_blocks,
            "block_size": config.block_size,
            "kv_bytes_per_token": block_bytes(model, 1, self.storage.groups),  # of one group
            "num_layers": self.storage.groups.num_rows,  # that a block serves
            "layer_groups": self.storage.groups.layers,
            "group_windows": config.group_windows,
            "num_host_blocks": config.num_host_blocks,
            "async_scheduling": self.runner.is_async,
            "num_kv_heads": model.cache_entry[1],
            "head_size": model.cache_entry[2],
            **{name: getattr(config, name) for name in (*LIMITS, *CHOICES)},
            "live": "recorded",
            **provenance(self.seed),
        }

    def _check_all(self, prompts: Prompt | Sequence[Prompt]) -> list[Checked]:
        return [self.text_engine.check(prompt, f"prompts[{i}]") for i, prompt in enumerate(as_list(prompts))]

    def _run(
        self, prompts: list[Checked], params: list[SamplingParams], use_tqdm: bool, priority: Sequence[int]
    ) -> list[RequestOutput]:
        if not isinstance(priority, Sequence) or len(priority) != len(prompts):
            raise RequestError(f"priority must be a list of {len(prompts)} integers, one for each prompt")
        generations: list[Generation] = []
        try:
            with held_interrupts() as let_through, older_objects_frozen():
                for prompt, chosen, urgency in zip(prompts, params, priority, strict=True):
                    generations.append(self.text_engine.add(prompt, chosen, urgency))
                with tqdm(total=len(generations), desc="Processed prompts", disable=not use_tqdm) as bar:
                    running = generations
                    while running:
                        self.text_engine.step()
                        running = [g for g in running if not g.is_finished]
                        _show_progress(bar, generations, len(generations) - len(running))
                        let_through()
        finally:
            for generation in generations:
                if not generation.is_finished:
                    self.text_engine.abort(generation)
        return [self.text_engine.result(generation) for generation in generations]

    def _stream(self, prompt: Checked, params: SamplingParams) -> Iterator[RequestOutput]:
        return self._follow(partial(self.text_engine.add, prompt, params))

    def _follow(self, begin: Callable[[], Generation], num_shown: int = 0) -> Iterator[RequestOutput]:
        """Yield a request's result whenever it has more than `num_shown` tokens; leaving the loop drops it."""
        generation = None
        try:
            with held_interrupts():
                generation = begin()
            while True:
                output = self.text_engine.result(generation)
                num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
                if num_tokens > num_shown or output.finished:
                    num_shown = num_tokens
                    yield output
                if output.finished:
                    return
                with held_interrupts():
                    if not generation.is_finished:  # another thread may have stepped it to its end
                        self.text_engine.step()
        finally:
            if generation and not generation.is_finished:
                self.text_engine.abort(generation)


def _resumed(first: RequestOutput, rest: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
    """A generator again, with its `close`, of which the first result was taken."""
    yield first
    yield from rest


def _show_progress(bar: tqdm, generations: list[Generation], num_finished: int) -> None:
    if num_finished == bar.n or bar.disable:
        return
    elapsed_s = bar.format_dict["elapsed"] or 1e-9
    num_in = sum(len(g.prompt.token_ids) for g in generations if g.is_finished)
    num_out = sum(sample.request.num_output for g in generations for sample in g.samples)
    bar.set_postfix_str(f"in {num_in / elapsed_s:.0f}, out {num_out / elapsed_s:.0f} tokens/s", refresh=False)
    bar.update(num_finished - bar.n)
