"""What computes in this process: the facts of a live engine for the environment card, and of a kernel called by hand.

The header of a trace says what an engine is; here stand beside it which attention it runs, and what the machine lacks
for the other ways.
"""

import os
from importlib.util import find_spec

import torch

from minivllm.attention import choose_backend
from minivllm.errors import ConfigError
from minivllm.lab.forward_sweep import RECORDINGS, load_sweeps
from minivllm.llm import LLM
from minivllm.provenance import provenance

Facts = dict[str, object]
COMPILED = "minivllm_kernels, compiled for the device"
INTERPRETED = "minivllm_kernels, TRITON_INTERPRET=1"
TORCH = "torch"


def environment(llm: LLM) -> Facts:
    """The engine's header, live, with its attention, the bytes and tokens of its pool and how many requests it bears.

    `max_concurrency` is the pool over the longest request, as vLLM prints it at start; not rounded.
    """
    header, config = llm.trace_header(), llm.config
    usable = (config.num_blocks - 1) * config.block_size
    backend = choose_backend(llm.device, llm.model_config)
    return {
        **header,
        "live": "live",
        "attention": attention_words(backend, llm.device),
        "pool_bytes": llm.storage.num_bytes,
        "usable_tokens": usable,
        "max_concurrency": config.capacity_tokens / config.max_model_len,
        **machine(),
    }


def kernel_environment(device: str) -> Facts:
    """The same for a kernel that is called by hand, as notebook 06 does. Raises ConfigError where it cannot run."""
    found = machine()
    if not found["triton"]:
        raise ConfigError("the kernels need triton: pip install -e '.[gpu]', or stay with the torch backend")
    if not device.startswith("cuda") and not found["interpreter"]:
        raise ConfigError(
            "on a CPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
        )
    attention = INTERPRETED if found["interpreter"] else COMPILED
    return {"device": device, "live": "live", "attention": attention, **provenance(0), **found}


def recorded_environment(name: str = "forward_h200.json") -> Facts:
    """What a recording that comes with the package says of the machine that made it: a GPU that need not be here."""
    found = load_sweeps(RECORDINGS / name)[0]
    device = "cuda" if found.provenance.get("gpu") else "cpu"
    return {**found.provenance, "model": found.model, "dtype": found.dtype, "device": device, "live": "recorded"}


def attention_words(backend: object, device: str) -> str:
    """Which code attends: torch's functions, or our kernels, compiled or interpreted."""
    if "triton" not in str(getattr(backend, "__module__", "")):
        return TORCH
    return COMPILED if device.startswith("cuda") and not is_interpreter() else INTERPRETED


def machine() -> Facts:
    """What this process could use: the GPU's name or "", triton's presence, and whether the interpreter is on."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "",
        "triton": find_spec("triton") is not None,
        "interpreter": is_interpreter(),
    }


def is_interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
