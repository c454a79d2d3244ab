"""The Llama family in nine launches a layer: the weights of a Decoder, whose own forward is this one's slow twin.

    x --qkv--> q and k normed, turned; k and v stored --attention--> --o--> added to the residual, normed --> x
    x --gate, up--> silu(gate) * up --down--> added to the residual, normed with the next layer's weight --> x

A single row takes five launches, those of one_row.py. Integers are int32, as kernels read them. Rows of padding have
position and slot -1 and no keys: nothing is stored.
It allocates only what a CUDA graph's pool may hold, and never waits for the GPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minivllm_kernels.activations import silu_and_mul
from minivllm_kernels.checks import BLOCK_SIZES, HEAD_SIZES
from minivllm_kernels.embedding import embed
from minivllm_kernels.fastest import fastest_attention, fastest_decode
from minivllm_kernels.norms import MAX_WIDTH, add_rms_norm, rms_norm
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode, workspace_rows
from minivllm_kernels.store_kv import qk_norm_rope_store
from minivllm_kernels.workspace import SplitWorkspace
from torch import nn

from minivllm.attention import LayerKV
from minivllm.attention.kernel_batch import KernelBatch
from minivllm.config import ModelConfig
from minivllm.models.decoder import Decoder
from minivllm.models.layers import GatedMLP
from minivllm.models.llama import SelfAttention
from minivllm.models.one_row import one_row_body, one_row_head

MOST_GROUPED = 128  # query heads of a KV head, in a tile of paged_attention


Matrix = tuple[torch.Tensor, torch.Tensor | None]  # weight [out, in], bias


@dataclass(frozen=True)
class LayerWeights:
    """A layer's tensors, taken from its modules once: looking them up costs as much as a launch."""

    input_norm: torch.Tensor
    qkv: Matrix
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerWeights":
        attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
        assert isinstance(attention, SelfAttention) and isinstance(mlp, GatedMLP)
        return cls(
            input_norm=layer.get_parameter("input_norm.weight"),
            qkv=(attention.qkv_proj.weight, attention.qkv_proj.bias),
            q_norm=attention.q_norm.weight if attention.has_qk_norm else None,
            k_norm=attention.k_norm.weight if attention.has_qk_norm else None,
            o=(attention.o_proj.weight, attention.o_proj.bias),
            mlp_norm=layer.get_parameter("mlp_norm.weight"),
            gate_up=(mlp.gate_up_proj.weight, mlp.gate_up_proj.bias),
            down=(mlp.down_proj.weight, mlp.down_proj.bias),
        )


class FusedLlama:
    """A built Decoder over the KV of its layers, run by our kernels.

    `most_sharing`: single tokens of a step at most whose requests share prefixes.
    """

    def __init__(
        self, model: Decoder, config: ModelConfig, layers: list[LayerKV], max_model_len: int, most_sharing: int = 0
    ) -> None:
        self.config = config
        self.weights = [LayerWeights.of(layer) for layer in model.layers]
        self.embeddings, self.norm, self.lm_head = model.embed.weight, model.norm.weight, model.lm_head.weight
        self.layers = layers
        self.cos_sin = angle_table(model, max_model_len)
        group = config.num_heads // config.num_kv_heads
        device, sizes = self.cos_sin.device, (most_sharing, config.num_heads, group, max_model_len)
        num_rows = workspace_rows(device, *sizes) if most_sharing else 0
        self.workspace = SplitWorkspace.allocate(device, num_rows, group, config.head_size)

    def body(self, batch: KernelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers: what the last one adds and the residual it is added to, both [T, hidden]."""
        if len(batch.token_ids) == 1:
            return one_row_body(self, batch)
        eps = self.config.rms_norm_eps
        residual = self.embeddings.new_empty(len(batch.token_ids), self.embeddings.shape[1])
        embed(batch.token_ids, batch.chosen, self.embeddings, residual)
        x = torch.empty_like(residual)
        rms_norm(residual, self.weights[0].input_norm, x, eps=eps)
        for number, weights in enumerate(self.weights):
            if number > 0:
                add_rms_norm(x, residual, weights.input_norm, x, eps=eps)
            x = self._attend(number, x, batch)
            add_rms_norm(x, residual, weights.mlp_norm, x, eps=eps)
            gate_up = F.linear(x, *weights.gate_up)
            gated = gate_up.new_empty(len(x), self.config.intermediate_size)
            silu_and_mul(gate_up, gated)
            x = F.linear(gated, *weights.down)
        return x, residual

    def head(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] into `out`, from rows of what `body` gave; overwrites these rows."""
        if len(x) == 1:
            one_row_head(self, x, residual, out)
            return out
        add_rms_norm(x, residual, self.norm, x, eps=self.config.rms_norm_eps)
        return torch.mm(x, self.lm_head.t(), out=out)

    def _attend(self, number: int, x: torch.Tensor, batch: KernelBatch) -> torch.Tensor:
        """A layer's attention: normed residual in, what is to be added to it out; [T, hidden] both."""
        weights, config, kv = self.weights[number], self.config, self.layers[number]
        qkv = F.linear(x, *weights.qkv)
        num_q = config.num_heads * config.head_size
        q = qkv[:, :num_q].unflatten(1, (config.num_heads, config.head_size))  # turned in place
        qk_norm_rope_store(
            qkv, weights.q_norm, weights.k_norm, self.cos_sin, batch.positions, batch.slots, q, kv.k, kv.v,
            num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, eps=config.rms_norm_eps,
        )  # fmt: skip
        out = q.new_empty(q.shape)
        chunks, singles, window = batch.chunks, batch.singles, config.window_of(number)
        first_single = len(q) - len(singles)
        if chunks is not None:
            inputs = (q[:first_single], kv.k, kv.v)
            attend = fastest_attention(*inputs, len(chunks), batch.max_query_len)
            attend(
                *inputs, chunks.block_table, chunks.num_tokens, batch.query_starts, out[:first_single],
                max_query_len=batch.max_query_len, window=window,
            )  # fmt: skip
        if len(singles):
            self._attend_singles((q[first_single:], kv.k, kv.v), batch, out[first_single:], window)
        return F.linear(out.flatten(1), *weights.o)

    def _attend_singles(
        self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch: KernelBatch, out: torch.Tensor,
        window: int | None,
    ) -> None:  # fmt: skip
        """Single queries over all their keys; what a group shares is read once, if the batch says so."""
        keys, prefixes = batch.singles, batch.prefixes
        if prefixes is None:
            decode = fastest_decode(*inputs)
            decode(*inputs, keys.block_table, keys.num_tokens, out, self.workspace, window=window)
            return
        groups = (prefixes.num_tokens, prefixes.group_starts, prefixes.members)
        shared_prefix_decode(
            *inputs, keys.block_table, keys.num_tokens, *groups, out, self.workspace,
            max_own_tokens=len(self.cos_sin),
        )  # fmt: skip


def angle_table(model: Decoder, max_model_len: int) -> torch.Tensor:
    """Cosines, then sines, of every position: [max_model_len, D] in fp32, as the kernel reads them."""
    device = model.embed.weight.device
    cos, signed_sin = model.rope.angles(torch.arange(max_model_len, device=device), torch.float32)
    half = cos.shape[-1] // 2
    return torch.cat((cos[:, 0, :half], signed_sin[:, 0, half:]), dim=-1).contiguous()


def kernel_obstacle(config: ModelConfig, block_size: int) -> str | None:
    """What of a model of the Llama family our kernels cannot do; None if nothing."""
    obstacles = {
        f"head size {config.head_size} is not one of {HEAD_SIZES}": config.head_size not in HEAD_SIZES,
        f"block_size {block_size} is not one of {BLOCK_SIZES}": block_size not in BLOCK_SIZES,
        "the hidden size must be a multiple of 8": config.hidden_size % 8 != 0 or config.hidden_size > MAX_WIDTH,
        "the MLP's size must be a multiple of 8": config.intermediate_size % 8 != 0,
        f"more than {MOST_GROUPED} query heads share a KV head": config.num_heads > MOST_GROUPED * config.num_kv_heads,
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)
