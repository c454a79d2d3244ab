"""What this machine offers, and the defaults that follow: device, dtype, KV budget."""

import os
from pathlib import Path

import torch

from minivllm.errors import ConfigError

GIB = 2**30


def choose_device(device: str) -> str:
    """The device to run on: a GPU when there is one. Raises ConfigError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch sees no GPU here; use device='cpu' or install a CUDA build of torch")
    return device


def choose_dtype(device: str) -> str:
    """bfloat16 where the hardware multiplies it, else float32."""
    return "bfloat16" if device == "cuda" or cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux prints them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = path.read_text().splitlines()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def default_kv_cache_memory(device: str, weight_bytes: int) -> int:
    """KV budget in bytes when the user names none: an eighth of free memory up to 1 GiB; on a GPU, most of it."""
    if device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return int(0.8 * max(free_bytes - weight_bytes, 0))
    return min(GIB, available_memory() // 8)


def available_memory() -> int:
    """Bytes of main memory that can be had now: what Linux says, at most what the control group allows."""
    path = Path("/proc/meminfo")
    if path.exists():
        fields = dict(line.split(":") for line in path.read_text().splitlines())
        free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return free_bytes if text == "max" else min(free_bytes, int(text))
