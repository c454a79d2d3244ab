"""What only a GPU has: a step's kernels as one CUDA graph, and the utilisation that nvidia-smi shows."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from minivllm.attention import choose_backend
from minivllm.engine.plan import StepPlan
from minivllm.llm import LLM
from minivllm.runner.batch import build_batches

BUSY_S = 1.0  # how long the GPU works before nvidia-smi is asked


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with what it reads: tensors that must live as long as it does."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[object, ...]

    def __call__(self) -> None:
        self.graph.replay()


@torch.inference_mode()
def captured(llm: LLM, plan: StepPlan) -> Captured:
    """The step's kernels as one CUDA graph: what is left when the host launches once instead of for every kernel."""
    model, [batch] = llm.runner.model, build_batches(plan, llm.config.block_size, llm.device)
    attention = choose_backend(llm.device, llm.model_config)(llm.model_config, batch, list(llm.storage.layers))
    model.rope.inv_freq = model.rope.inv_freq.to(llm.device)  # a copy from the host cannot be captured

    def run() -> None:
        model(batch.token_ids, batch.positions, batch.logit_rows, attention)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warms up outside the capture
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Captured(graph, (batch, attention))


def nvidia_busy(run: Callable[[], object]) -> float | None:
    """The "GPU utilisation" that nvidia-smi shows while this runs again and again; None where it does not answer."""
    number = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--id={number}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    started_s, asked = perf_counter(), None
    while asked is None or asked.poll() is None:
        run()
        torch.cuda.synchronize()
        if asked is None and perf_counter() - started_s > BUSY_S:
            try:
                asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                return None
    text = asked.communicate()[0].strip()
    return float(text) if text.isdigit() else None
