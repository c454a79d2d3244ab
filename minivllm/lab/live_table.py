"""A live engine behind a block table: what its slots hold, what its tokens say, and buttons that drive it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from minivllm.course.slot_bytes import SlotBytes
from minivllm.engine.engine import Engine
from minivllm.events import EventBus
from minivllm.llm import LLM
from minivllm.request import SamplingParams
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.model_runner import ModelRunner
from minivllm.startup import limits_of
from minivllm.text_engine import TextEngine

Action = Callable[[str], str]  # what was typed -> what happened
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


class Follower(Protocol):
    """A view that can be told to follow another engine."""

    def watch(self, bus: EventBus, header: dict[str, object]) -> None: ...


def resized(llm: LLM, block_size: int, num_slots: int) -> LLM:
    """Another engine on the same weights, with a pool of its own: `num_slots`, in whole blocks of another size."""
    num_blocks = num_slots // block_size
    longest = min(llm.config.max_model_len, num_blocks * block_size)
    config = replace(llm.config, block_size=block_size, num_blocks=1 + num_blocks, max_model_len=longest)
    other = copy.copy(llm)
    other.storage = KVStorage(llm.model_config, config.num_blocks, block_size, llm.device, 0, llm.storage.groups)
    other.runner = ModelRunner(llm.runner.model, llm.model_config, other.storage, llm.device, limits_of(config))
    other.engine = Engine(config, other.runner)
    other.text_engine = TextEngine(other.engine, llm.tokenizer, llm.model, llm.model_config.vocab_size, llm.seed)
    return other


class LiveTable:
    """Reads an LLM for the views and drives it from buttons; another block size makes another engine on its weights."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._num_slots = llm.engine.kv.pool.num_usable * llm.config.block_size
        self._token_ids: dict[str, list[int]] = {}  # of requests seen, also when they have left the engine
        self._maps: Sequence[Follower] = ()

    def read_slot(self, layer: int, slot: int) -> SlotBytes:
        """The bytes of a slot, from the live tensors."""
        k, v = self.llm.storage.slot(layer, slot)
        start = self.llm.storage.layers[layer].k.data_ptr()
        head_bytes = k.stride(0) * k.itemsize
        numbers = [tuple(map(tuple, tensor.float().tolist())) for tensor in (k, v)]
        return SlotBytes(k.data_ptr() - start, k.data_ptr(), head_bytes, head_bytes, *numbers)

    def token_texts(self, request_id: str) -> list[str]:
        """What the tokens of a request say."""
        self._token_ids |= {id_: request.token_ids for id_, request in self.llm.engine.requests.items()}
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None, "a block table with words needs a model that has them"
        return [tokenizer.decode([token_id]) for token_id in self._token_ids.get(request_id, [])]

    def actions(self, *maps: Follower) -> dict[str, Action]:
        """What the buttons do; `maps` follow the engine when the block size changes."""
        self._maps = maps
        return {"add": self.add, "one step": self.step, "finish the oldest": self.finish, "block size": self.restart}

    def add(self, prompt: str) -> str:
        generation = self.llm.text_engine.add(self.llm.text_engine.check(prompt), GREEDY)
        return f"request {generation.request_id} waits with {len(generation.prompt.token_ids)} tokens"

    def step(self, _: str = "") -> str:
        self.llm.text_engine.step()
        running = self.llm.engine.scheduler.running
        said = [f"{r.id}: {r.num_computed} tokens in {len(r.block_ids)} blocks" for r in running]
        return ", ".join(said) or "idle"

    def finish(self, _: str = "") -> str:
        oldest = next(iter(self.llm.engine.requests), None)
        is_ended = oldest is not None and self.llm.text_engine.end(oldest)
        return f"request {oldest} finished" if is_ended else "nothing runs"

    def restart(self, block_size: str) -> str:
        """Another engine with other blocks; the maps watch that one from now on."""
        self._token_ids.clear()
        self.llm = resized(self.llm, int(block_size), self._num_slots)
        for block_map in self._maps:
            block_map.watch(self.llm.events, self.llm.trace_header())
        num_blocks = self.llm.engine.kv.pool.num_usable
        return f"a new pool: {num_blocks} blocks of {block_size}; add a request"
