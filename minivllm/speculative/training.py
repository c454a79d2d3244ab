"""The training of both drafts of a target: seeded weights, losses over unrolled chains, and the loop.

The head learns the way it drafts: each step of a chain reads the features of the step before (HASS, Zhang et al. 2024;
EAGLE-3, Li et al. 2025). Both learn the target's distribution over the draft vocabulary. Weights of the optimiser are
in fp32, the drafts in the target's dtype.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from minivllm.config import ModelConfig
from minivllm.models.decoder import Decoder
from minivllm.speculative.eagle_model import EagleDraft, EagleHead, SmallDraft, reduced_lm_head, small_model
from minivllm.speculative.train_data import Batch, Example, batches
from minivllm.speculative.unrolled import RowAttention, row_positions, target_features, unroll

LINE_EVERY = 100  # steps
PARTS = ("head", "later steps", "features", "draft")  # of a line's losses


@dataclass(frozen=True)
class Settings:
    """How drafts are trained."""

    seconds: float = 270  # of training, unless `steps` says how many
    steps: int | None = None
    tokens_per_batch: int = 32768
    vocabulary: int = 8192
    unrolled: int = 4  # steps of a chain
    later_weight: float = 0.8  # of each step's loss, to the one before
    feature_weight: float = 0.2  # of the distance between features, both at length 1
    learning_rate: float = 1e-3
    warm_up: int = 100  # steps
    weight_decay: float = 0.05
    seed: int = 0

    def rate_at(self, step: int, elapsed_s: float) -> float:
        done = step / self.steps if self.steps else min(1.0, elapsed_s / self.seconds)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * done))


class Trainee:
    """A module in the target's dtype, and its optimiser's weights in fp32."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=True)

    def step(self, rate: float) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)


def new_drafts(
    target: Decoder, config: ModelConfig, small: ModelConfig, vocabulary: torch.Tensor, seed: int
) -> tuple[EagleDraft, SmallDraft]:
    """Both drafts of a target with seeded weights, to be trained; `config` is the head's."""
    weight = target.embed.weight
    head = EagleHead(config)
    _set_weights(head, seed)
    head.to(weight.device, weight.dtype)
    ids = vocabulary.to(weight.device)
    lm_head = reduced_lm_head(target, ids)
    model = small_model(small, target, ids)
    model.layers.to_empty(device="cpu")
    model.norm.to_empty(device="cpu")
    for part in (model.layers, model.norm):
        _set_weights(part, seed + 1)
        part.to(weight.device, weight.dtype)
    return EagleDraft(head, target.embed, target.norm, lm_head, ids), SmallDraft(model, small, ids)


def shapes(target: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The head's config, one layer as the target's, and the small model's, two thin ones (5.9 MB for SmolLM2)."""
    plain = replace(target, tie_word_embeddings=False, windows=())
    kv = max(1, target.num_kv_heads * 2 // 3)
    small = replace(
        plain, num_layers=2, num_heads=kv * (target.num_heads // target.num_kv_heads), num_kv_heads=kv,
        intermediate_size=target.intermediate_size // 3,
    )  # fmt: skip
    return replace(plain, num_layers=1), small


def train(
    head: EagleDraft, small: SmallDraft, target: Decoder, examples: Sequence[Example], settings: Settings
) -> list[list[float]]:
    """Train both in place; the mean losses of every 100 steps, in the order of PARTS."""
    head.head.train().requires_grad_(True)
    small.model.layers.requires_grad_(True)
    small.model.norm.requires_grad_(True)
    trainees = [Trainee(head.head, settings), Trainee(small.model, settings)]
    lines, recent, begun = list[list[float]](), list[torch.Tensor](), time.perf_counter()
    bar = tqdm(desc="train", unit=" steps", total=settings.steps, mininterval=10)
    for step, (batch, features) in enumerate(_with_features(target, examples, settings)):
        elapsed = time.perf_counter() - begun
        if step == settings.steps or (settings.steps is None and elapsed > settings.seconds):
            break
        loss, parts = losses(head, small, batch, features, settings)
        loss.backward()
        for trainee in trainees:
            trainee.step(settings.rate_at(step, elapsed))
        recent.append(parts)
        bar.update()
        if len(recent) == LINE_EVERY or step + 1 == settings.steps:
            lines.append([round(x, 4) for x in torch.stack(recent).mean(0).tolist()])
            words = ", ".join(f"{name} {x:.3f}" for name, x in zip(PARTS, lines[-1], strict=True))
            tqdm.write(f"step {step + 1:5}, {time.perf_counter() - begun:4.0f} s: {words}")
            recent.clear()
    bar.close()
    for module in (head.head, small.model):
        module.eval().requires_grad_(False)
    return lines


def losses(
    head: EagleDraft, small: SmallDraft, batch: Batch, features: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its parts [4]; judged where the next token is one of an answer."""
    ids = batch.token_ids
    judged = F.pad(batch.is_answer[:, 1:], (0, 1))
    judged[:, : settings.unrolled - 1] = False  # a chain needs as many tokens before it
    rows = judged.flatten().nonzero()[:, 0]
    with torch.no_grad():
        truth = features.flatten(0, 1)[rows]
        chances = head.logits(truth).float().softmax(-1)
        truth = F.rms_norm(truth.float(), truth.shape[-1:])
    entropies, distances = list[torch.Tensor](), list[torch.Tensor]()
    for guess in unroll(head, ids, features, settings.unrolled):
        chosen = guess.flatten(0, 1)[rows]
        entropies.append(F.cross_entropy(head.logits(chosen).float(), chances))
        distances.append(F.smooth_l1_loss(F.rms_norm(chosen.float(), chosen.shape[-1:]), truth))
    logits = small.model(ids.flatten(), row_positions(ids), rows, RowAttention(len(ids)))
    of_small = F.cross_entropy(logits.float(), chances)
    weights = [settings.later_weight**i for i in range(settings.unrolled)]
    pairs = zip(weights, entropies, distances, strict=True)
    of_head = sum(((e + settings.feature_weight * d) * w for w, e, d in pairs), start=torch.zeros_like(of_small))
    later, first = torch.stack(entropies[1:] or entropies).mean(), entropies[0]
    parts = torch.stack((first, later, torch.stack(distances).mean(), of_small)).detach()
    return of_head / sum(weights) + of_small, parts


def _with_features(
    target: Decoder, examples: Sequence[Example], settings: Settings
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Batches for ever, in another order each epoch; the target runs in the first one only, features are kept."""
    device = target.embed.weight.device
    kept = list[tuple[Batch, torch.Tensor]]()
    for batch in batches(examples, settings.tokens_per_batch, settings.seed):
        moved = Batch(batch.token_ids.to(device), batch.is_answer.to(device))
        kept.append((moved, target_features(target, moved.token_ids)))
        yield kept[-1]
    generator = torch.Generator().manual_seed(settings.seed)
    while kept:
        yield from (kept[i] for i in torch.randperm(len(kept), generator=generator).tolist())


def _set_weights(module: nn.Module, seed: int) -> None:
    """Norms at 1, matrices normal with deviation 0.02, seeded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
