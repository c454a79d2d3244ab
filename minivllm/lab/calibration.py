"""What a model computes on a calibration text: mean and second moment of every layer's normed input."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from minivllm.errors import RequestError
from minivllm.lab.low_rank import Moments
from minivllm.runner.device import choose_device
from minivllm.weights import ModelSource

ROWS_AT_A_TIME = 4


class RunningMoments:
    """Sums of n and n n^T over all tokens seen so far, in fp64 on the CPU."""

    def __init__(self, hidden_size: int) -> None:
        self.num_tokens = 0
        self.total = torch.zeros(hidden_size, dtype=torch.float64)
        self.products = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Take in [..., hidden]."""
        rows = inputs.detach().flatten(0, -2).double()
        self.num_tokens += len(rows)
        self.total += rows.sum(0).cpu()
        self.products += (rows.T @ rows).cpu()

    def moments(self) -> Moments:
        return Moments(self.total / self.num_tokens, self.products / self.num_tokens)


@torch.inference_mode()
def calibrate(
    source: ModelSource, weights: Mapping[str, Tensor], token_ids: Tensor, show_progress: bool = True
) -> list[Moments]:
    """Moments of each layer's attention input over [rows, tokens]. Raises RequestError when there is no such text."""
    if token_ids.ndim != 2 or not token_ids.numel():
        raise RequestError(f"calibration must be token ids [rows, tokens], not of shape {list(token_ids.shape)}")
    device = choose_device("auto")
    model = LlamaForCausalLM(LlamaConfig.from_dict(dict(source.config))).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)  # tied: no lm_head
    model.to(device)
    running = [RunningMoments(model.config.hidden_size) for _ in model.model.layers]
    for layer, sums in zip(model.model.layers, running, strict=True):
        layer.input_layernorm.register_forward_hook(_into(sums))
    bar = tqdm(token_ids.split(ROWS_AT_A_TIME), desc="calibrate", unit=" batches", disable=not show_progress)
    for rows in bar:
        model.model(rows.to(device), use_cache=False)
    return [sums.moments() for sums in running]


def _into(sums: RunningMoments) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def take(module: nn.Module, given: tuple[Tensor, ...], normed: Tensor) -> None:
        sums.add(normed)

    return take
