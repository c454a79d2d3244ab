"""Tokens chosen on the device: one kernel for all rows, and again for the few whose logits must be changed first.

Noise is a function of (seed, position) as in sampler.py, but made by the kernel: other numbers than on a CPU, the same
in every batch, with and without a graph. Greedy rows get the token that they get on a CPU.
"""

from collections.abc import Sequence

import torch
from minivllm_kernels.sampling import MAX_TILES, TILE
from minivllm_kernels.sampling import sample as sample_rows

from minivllm.request import Request
from minivllm.runner.batch_rows import signed
from minivllm.runner.sampler import apply_penalties, forbid_early_end
from minivllm.runner.step_buffers import StepBuffers


class KernelSampler:
    """The kernel, its workspace, and where the chosen tokens lie."""

    def __init__(self, max_rows: int, device: str) -> None:
        self.token_ids = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._partial = torch.empty(max_rows, MAX_TILES, dtype=torch.int64, device=device)
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._floors = torch.empty(max_rows, dtype=torch.float32, device=device)

    def filtered(self, logits: torch.Tensor, buffers: StepBuffers) -> None:
        """Choose again, now from what each row's top_k, top_p and min_p leave; rows without get the same token."""
        rows = slice(len(logits))
        sample_rows(
            logits, buffers.temperatures[rows], buffers.seeds[rows], buffers.num_tokens[rows], self.token_ids[rows],
            self._partial[rows], self._arrivals[rows], self._floors[rows],
            top_k=buffers.top_k[rows], top_p=buffers.top_p[rows], min_p=buffers.min_p[rows],
        )  # fmt: skip

    def __call__(
        self, logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Choose for every row of logits [R, vocab]; row r's token goes to token_ids[r]."""
        rows = slice(len(logits))
        sample_rows(
            logits, temperatures[rows], seeds[rows], positions[rows], self.token_ids[rows], self._partial[rows],
            self._arrivals[rows],
        )  # fmt: skip


def sample_changed(logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int]) -> list[int]:
    """The next token of each request by all of its parameters; row r of logits [R, vocab] belongs to requests[r]."""
    logits, device = logits.to(torch.float32, copy=True), logits.device
    for row, request in enumerate(requests):
        forbid_early_end(logits[row], request, eos_token_ids)
        apply_penalties(logits[row], request)

    def column(values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    params = [request.params for request in requests]
    token_ids = column([0] * len(requests), torch.int32)
    sample_rows(
        logits,
        column([each.temperature for each in params], torch.float32),
        column([signed(request.seed) for request in requests], torch.int64),
        column([request.num_tokens for request in requests], torch.int32),
        token_ids,
        partial=torch.empty(len(requests), MAX_TILES, dtype=torch.int64, device=device),
        arrivals=torch.zeros_like(token_ids),
        floors=torch.empty_like(logits[:, 0]),
        top_k=column([max(each.top_k, 0) for each in params], torch.int32),
        top_p=column([each.top_p for each in params], torch.float32),
        min_p=column([each.min_p for each in params], torch.float32),
    )
    return token_ids.tolist()


def fits_sampler(vocab_size: int) -> bool:
    return vocab_size <= MAX_TILES * TILE.value
