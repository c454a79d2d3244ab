"""A live decode step, computed again after its blocks were moved about: do the logits keep their bits? (FM2)

Works on a copy of the KV storage. Each running request's last computed token is computed once more through the whole
model, with the engine's own attention backend, where the blocks lie and where they were moved to.
"""

from copy import copy
from dataclasses import replace

import torch

from minivllm.attention import Attention, ForwardBatch, LayerKV, choose_backend
from minivllm.course.block_order import Shuffled, Tables, shuffled_order
from minivllm.engine.plan import StepPlan
from minivllm.errors import MiniVLLMError
from minivllm.lab.kernel_steps import KernelInputs
from minivllm.llm import LLM
from minivllm.runner.batch import build_batches
from minivllm.runner.kv_storage import LayerStorage


class LiveStep:
    """The newest stored token of every running request, as one decode step on a copy of the cache."""

    def __init__(self, llm: LLM) -> None:
        requests = [copy(request) for request in llm.engine.scheduler.running]
        if not requests or any(request.num_computed < 2 for request in requests):
            raise MiniVLLMError("no request has a decode step behind it: add one and take two steps")
        if len(requests[0].tables) > 1 or llm.runner.config.mla:
            raise MiniVLLMError("this model has several block tables, or latents: take a plain Llama or Qwen")
        for request in requests:
            request.num_computed -= 1  # of a copy: the engine's own request stays as it is
        self.config, self.device = llm.runner.config, llm.runner.device
        self.data = llm.storage.data.clone()  # [rows, planes, num_blocks, block_size, heads, size]
        plan = StepPlan(0, [(request, 1) for request in requests], [], [])
        [batch] = build_batches(plan, llm.storage.block_size, self.device)
        self.batch = replace(batch, logit_rows=torch.arange(len(requests), device=self.device))
        self.tables = tables_of(self.batch, llm.storage.block_size)
        self._model = llm.runner.model
        self._backend = choose_backend(self.device, self.config)
        self._untouched = self._logits(self.batch, self.data.clone())

    @property
    def num_blocks(self) -> int:
        """Of the pool, the null block included."""
        return self.data.shape[2]

    def shuffle(self, num_moved: int, seed: int = 0, is_followed: bool = True) -> Shuffled:
        """Move blocks in every layer, and the tables with them if `is_followed`; compute the step, compare bits."""
        order = shuffled_order(self.num_blocks, num_moved, seed)
        places = torch.tensor(order, device=self.device)
        moved = torch.empty_like(self.data)
        moved[:, :, places] = self.data
        batch, block_size = self.batch, self.data.shape[3]
        if is_followed:
            slots = places[batch.slots // block_size] * block_size + batch.slots % block_size
            batch = replace(batch, block_table=places[batch.block_table], slots=slots)
        logits = self._logits(batch, moved)
        different = bytes_of(logits) != bytes_of(self._untouched)
        distance = (logits.double() - self._untouched.double()).abs().max()
        return Shuffled(
            self.tables, tables_of(batch, block_size), tuple(order), is_followed, logits.numel(),
            int(different.any(-1).sum()), float(distance), self.device,
        )  # fmt: skip

    def inputs(self, layer: int = 0) -> KernelInputs:
        """What the decode kernel of a layer is handed in this step."""
        spy = Spy(self._attention(self.batch, data := self.data.clone()), layer)
        self._forward(self.batch, spy)
        assert spy.q is not None, f"the model has no layer {layer}"
        k, v = (data[layer, plane] for plane in (0, 1))
        return KernelInputs.of(spy.q, k, v, self.batch.block_table, self.batch.num_tokens)

    def _logits(self, batch: ForwardBatch, data: torch.Tensor) -> torch.Tensor:
        """[requests, vocab]; the step stores its own K and V, so `data` is written to."""
        return self._forward(batch, self._attention(batch, data))

    @torch.inference_mode()
    def _forward(self, batch: ForwardBatch, attention: Attention) -> torch.Tensor:
        logits = self._model(batch.token_ids, batch.positions, batch.logit_rows, attention)
        return logits.contiguous()

    def _attention(self, batch: ForwardBatch, data: torch.Tensor) -> Attention:
        layers: list[LayerKV] = [LayerStorage(k=row[0], v=row[1]) for row in data]
        return self._backend(self.config, batch, layers)  # type: ignore[return-value]  # no latents here


class Spy:
    """Passes every layer's attention on, and keeps the queries of one layer."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self.q: torch.Tensor | None = None
        self._attention, self._layer = attention, layer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer == self._layer:
            self.q = q.clone()
        return self._attention.attend(layer, q, k, v)


def bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    """[requests, vocab, bytes of a number]: unlike ==, this tells 0 from -0 and finds NaN equal to itself."""
    return numbers.view(torch.uint8).unflatten(-1, (-1, numbers.itemsize))


def tables_of(batch: ForwardBatch, block_size: int) -> Tables:
    """Each request's table without its padding."""
    rows = zip(batch.block_table.tolist(), batch.num_tokens.tolist(), strict=True)
    return tuple(tuple(row[: -(-count // block_size)]) for row, count in rows)
