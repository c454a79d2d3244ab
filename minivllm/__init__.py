"""minivllm: a compact LLM serving engine to read, run and learn from.

Names load on first use (PEP 562), so that the engine, the views and `minivllm --help` never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivllm.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from minivllm.errors import MiniVLLMError
    from minivllm.llm import LLM
    from minivllm.outputs import CompletionOutput, Logprob, RequestOutput
    from minivllm.request import SamplingParams
    from minivllm.serving.async_engine import AsyncEngine

__version__ = "0.1.0"
__all__ = [
    "LLM", "AsyncEngine", "BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence", "CompletionOutput", "Logprob",
    "MiniVLLMError", "RequestOutput", "SamplingParams",
]  # fmt: skip

_HOME = {
    "LLM": "minivllm.llm",
    "AsyncEngine": "minivllm.serving.async_engine",
    "BeamSearchOutput": "minivllm.beam_search",
    "BeamSearchParams": "minivllm.beam_search",
    "BeamSearchSequence": "minivllm.beam_search",
    "CompletionOutput": "minivllm.outputs",
    "Logprob": "minivllm.outputs",
    "MiniVLLMError": "minivllm.errors",
    "RequestOutput": "minivllm.outputs",
    "SamplingParams": "minivllm.request",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'minivllm' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
