"""What accelerators promise: dense FLOP/s by type, memory, bandwidth. Data sheets, not measurements.

NVIDIA prints Hopper's and Ada's figures with sparsity, twice the dense ones; only dense ones stand here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from minivllm.course.calculators.checks import positive
from minivllm.errors import ConfigError, short

ALIASES = {
    "a100": "a100-80gb-sxm", "a100-80gb": "a100-80gb-sxm", "a100-40gb": "a100-40gb-sxm", "h100": "h100-sxm",
    "h200": "h200-sxm", "b200": "b200-sxm", "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "v4": "tpu-v4",
}  # fmt: skip
SAME = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip


@dataclass(frozen=True)
class Accelerator:
    """One chip. Bytes and bytes/s are decimal."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s
    flops: Mapping[str, float] = field(hash=False)  # dense FLOP/s by type
    source: str = ""

    def __post_init__(self) -> None:
        positive(f"{self.name}: memory_bytes", self.memory_bytes)
        positive(f"{self.name}: bandwidth", self.bandwidth)
        if not self.flops or not isinstance(self.flops, Mapping):
            raise ConfigError(f"{self.name}: flops is empty; give FLOP/s by type, such as {{'bf16': 989e12}}")
        for dtype, rate in self.flops.items():
            positive(f"{self.name}: flops[{dtype}]", rate)

    def flops_of(self, dtype: str = "bf16") -> float:
        """Dense FLOP/s in this type. Raises ConfigError where the chip has none."""
        wanted = str(dtype).lower().removeprefix("torch.")
        name = SAME.get(wanted, wanted)
        if name not in self.flops:
            raise ConfigError(f"{self.name} has no figure for {short(dtype)}; it has {', '.join(self.flops)}")
        return self.flops[name]


@lru_cache
def accelerators() -> Mapping[str, Accelerator]:
    """Every chip of accelerators.json by name."""
    raw = json.loads((Path(__file__).parent / "accelerators.json").read_text())
    return {
        name: Accelerator(name, int(entry["memory_bytes"]), entry["bandwidth"], entry["flops"], entry["source"])
        for name, entry in raw.items()
    }


def accelerator(chip: str | Accelerator) -> Accelerator:
    """A chip by its name: accelerator("h100-sxm"), or "h100" for short. Raises ConfigError, with the nearest names."""
    if isinstance(chip, Accelerator):
        return chip
    known = accelerators()
    name = chip.lower() if isinstance(chip, str) else ""
    name = ALIASES.get(name, name)
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)[:3]
        raise ConfigError(f"no accelerator is called {short(chip)}; close: {', '.join(near)}; or pass an Accelerator")
    return known[name]
