"""The algebra of turning a trained attention into multi-head latent attention (MLA): moments in, matrices out; float64.

DeepSeek-V2's MLA (arXiv 2405.04434, section 2.1) stores per token one latent of `rank` numbers, from which every head's
K and V are linear maps, and one RoPE key that all heads share. Two approximations lead there, both chosen by what the
model computes on a calibration text:

1. RoPE keeps ONE key. A rotary pair is a complex number that the position turns by a phase, so a mix of the KV heads
   with complex coefficients commutes with RoPE. Per frequency, the first principal component over the KV heads becomes
   the shared key (TransMLA, arXiv 2502.07864). What is left of each head's K loses its turning: its query is multiplied
   by `phase`, the turn that stands for all distances.
2. The rest of K and all of V, jointly, are cut to the principal components of their weighted covariance: by
   Eckart and Young no other factors of that rank have a smaller weighted error on the calibration text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What calibration keeps of a layer's normed inputs n: E[n], [hidden], and E[n n^T], [hidden, hidden]."""

    mean: Tensor
    second: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Heads:
    """The projections of one layer as heads: q [H, D, hidden]; k, v [G, D, hidden]; o [hidden, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @property
    def group(self) -> int:
        """Query heads that share a KV head: head h reads KV head h // group."""
        return len(self.q) // len(self.k)


@dataclass(frozen=True)
class SharedKey:
    """One RoPE key for all heads, and what it does not cover.

    `key` [F, hidden] complex; head h reads it with its query times `coefficients` [F, G] of its KV head;
    `rest` [G, F, hidden] complex is what is left of each KV head's K.
    """

    key: Tensor
    coefficients: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Factors:
    """target(n) ~ up @ (down @ (n - mean)) + offset; the latents have mean 0 and variance 1."""

    down: Tensor  # [rank, hidden]
    up: Tensor  # [out, rank]
    offset: Tensor  # [out]
    error: float  # share of the weighted variance that the cut loses


def as_complex(halves: Tensor) -> Tensor:
    """Rows i and i + D/2 of a head are one rotary pair: [heads, D, hidden] -> [heads, D/2, hidden]."""
    real, imaginary = halves.double().chunk(2, dim=1)
    return torch.complex(real, imaginary)


def as_halves(pairs: Tensor) -> Tensor:
    """Undo `as_complex`."""
    return torch.cat((pairs.real, pairs.imag), dim=1)


def share_key(heads: Heads, moments: Moments) -> SharedKey:
    """Per frequency, the component over the KV heads that carries most of what queries read of K.

    The KV heads are weighted by the mean square of the queries that read them: the loss of a head that is asked with
    large queries counts for more.
    """
    k, second = as_complex(heads.k), moments.second.to(torch.complex128)
    power = torch.einsum("hfi,ij,hfj->fh", as_complex(heads.q), second, as_complex(heads.q).conj()).real
    weight = power.unflatten(1, (len(k), heads.group)).sum(2).clamp_min(1e-12).sqrt()  # [F, G]
    weight = weight / weight.mean(1, keepdim=True)
    gram = torch.einsum("gfi,ij,kfj->fgk", k, second, k.conj())  # E[k k^H] over the KV heads, [F, G, G]
    direction = torch.linalg.eigh(weight[:, :, None] * gram * weight[:, None, :]).eigenvectors[:, :, -1]  # [F, G]
    key = torch.einsum("fg,gfi->fi", direction.conj() * weight, k)
    spread = direction / weight  # K of head g ~ spread[:, g] * key
    return SharedKey(key, spread.conj(), k - spread.T[:, :, None] * key)


def factorise(target: Tensor, weight: Tensor, moments: Moments, rank: int) -> Factors:
    """The best factors of `rank` for target(n) = target @ n, errors measured as |weight @ error|^2 over n.

    target [out, hidden], weight [out, out] symmetric. PCA of weight @ target(n): the singular vectors of
    weight @ target @ covariance^(1/2), and so the optimum (Eckart and Young 1936).
    """
    seen = weight @ target  # [out, hidden]
    variances, directions = torch.linalg.eigh(seen @ moments.covariance @ seen.T)  # ascending
    variances = variances.clamp_min(0)
    kept, scale = directions[:, -rank:], variances[-rank:].clamp_min(1e-12 * variances[-1]).sqrt()
    total = variances.sum()
    return Factors(
        down=(kept.T @ seen) / scale[:, None],
        up=torch.linalg.pinv(weight, rtol=1e-9, hermitian=True) @ kept * scale,
        offset=target @ moments.mean,
        error=float(variances[:-rank].sum() / total) if total > 0 else 0.0,
    )


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
