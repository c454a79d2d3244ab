"""Where partial results wait until they are merged: tensors that the caller owns, so that no launch allocates."""

from dataclasses import dataclass

import torch

from minivllm_kernels.attention_configs import MOST_PROGRAMS_PER_SM
from minivllm_kernels.checks import require
from minivllm_kernels.configs import num_multiprocessors


@dataclass(frozen=True)
class SplitWorkspace:
    """Where partial results wait to be merged; made once, then used by every layer and step in turn."""

    parts: torch.Tensor  # [rows, D] fp32; a part takes one row per query head of its KV head
    lse: torch.Tensor  # [rows] fp32
    arrivals: torch.Tensor  # [programs] int32, zero between launches: how many parts of a pair are stored

    @classmethod
    def allocate(cls, device: torch.device, num_rows: int, group: int, head_size: int) -> "SplitWorkspace":
        """Room for equal shares at any batch, `group` query heads to a KV head, and for `num_rows` parts if more.

        A fixed split stores one row per request, query head and chunk: B * H * ceil(max_tokens / split_tokens).
        """
        device = torch.device(device)
        programs = MOST_PROGRAMS_PER_SM * num_multiprocessors(device)
        num_rows = max(num_rows, 2 * programs * group)
        return cls(
            parts=torch.empty(num_rows, head_size, dtype=torch.float32, device=device),
            lse=torch.empty(num_rows, dtype=torch.float32, device=device),
            arrivals=torch.zeros(programs, dtype=torch.int32, device=device),
        )

    def behind(self, num_rows: int) -> "SplitWorkspace":
        """What is left when another launch that runs at the same time takes the first rows."""
        return SplitWorkspace(self.parts[num_rows:], self.lse[num_rows:], self.arrivals)

    def require_room(self, num_rows: int, head_size: int, num_programs: int = 0) -> None:
        """Raise ValueError when a launch would write past the end, or something else than these tensors hold."""
        rows = min(len(self.lse), self.parts.numel() // head_size)
        require(rows >= num_rows, f"the workspace has {rows} rows, this launch needs {num_rows}: allocate it larger")
        counters = len(self.arrivals)
        require(counters >= num_programs, f"the workspace counts {counters} programs, this launch has {num_programs}")
        is_ours = self.parts.is_contiguous() and self.parts.dtype == self.lse.dtype == torch.float32
        require(is_ours, "the workspace must hold contiguous fp32 tensors: SplitWorkspace.allocate makes them")
