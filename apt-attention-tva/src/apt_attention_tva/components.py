"""Principal components of a trained attention: which projectors of rank r lose least of its scores and outputs.

Second moments are taken of queries and keys as they meet (normed and turned) and of values, for each key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from apt.layers.heads import Heads


class Moments:
    """Sums over tokens of q q^T, k k^T, v v^T, each [kv_heads, d, d] in float64; queries of a group together."""

    def __init__(self, kv_heads: int, width: int) -> None:
        self.q, self.k, self.v = (torch.zeros(kv_heads, width, width, dtype=torch.float64) for _ in range(3))

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Count these heads [batch, heads, seq, d]."""
        for total, heads in ((self.q, q), (self.k, k), (self.v, v)):
            rows = heads.detach().transpose(0, 1).flatten(1, 2).double().cpu()  # [heads, tokens, d]
            total += (rows.mT @ rows).view(len(total), -1, *total.shape[1:]).sum(1)


@contextmanager
def watch(layer: Heads) -> Iterator[Moments]:
    """The moments of what a layer attends with, until the block of code ends."""
    shape, attend = layer.shape, layer.attend
    moments = Moments(shape.num_kv_heads, shape.width)

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        moments.add(q, k, v)
        return attend(q, k, v, **options)  # type: ignore[arg-type]

    layer.attend = counted  # type: ignore[method-assign]
    try:
        yield moments
    finally:
        del layer.attend


def score_projector(
    q: Float[Tensor, "kv_heads d d"], k: Float[Tensor, "kv_heads d d"], rank: int
) -> tuple[Float[Tensor, "kv_heads rank d"], float]:
    """P with orthonormal rows for queries and keys alike, and the share of their energy that it keeps.

    The first `rank` principal components of both together, each of them of energy 1 (Eigen Attention, Saxena et al. 2024,
    arXiv:2408.05646, section 3.1).
    """
    both = sum(each / _trace(each) for each in (q, k)) / 2
    assert isinstance(both, Tensor)
    values, vectors = torch.linalg.eigh(both)
    kept = values[:, -rank:].sum() / values.sum()
    return vectors[:, :, -rank:].flip(-1).mT.contiguous(), kept.item()


def value_maps(
    v: Float[Tensor, "kv_heads d d"], outward: Float[Tensor, "kv_heads group d_model d"], rank: int
) -> tuple[Float[Tensor, "kv_heads rank d"], Float[Tensor, "kv_heads d rank"], float]:
    """A and B of rank r for which the outputs W_o B A v are nearest to W_o v, and the share of their energy that is kept.

    With G = sum of W_o^T W_o over the heads of a group, the mean of ||W_o (v - B A v)||^2 is least for A = E^T G^(1/2)
    and B = G^(-1/2) E, E the first principal components of G^(1/2) v (Eckart and Young 1936). With orthonormal W_o these are the
    principal components of v.
    """
    weight = outward.double().flatten(1, 2)  # [kv_heads, group * d_model, d]
    values, vectors = torch.linalg.eigh(weight.mT @ weight)
    values = values.clamp(min=values[:, -1:] * 1e-12)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    inverse = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
    energy, components = torch.linalg.eigh(root @ v @ root)
    chosen = components[:, :, -rank:].flip(-1)
    kept = energy[:, -rank:].sum() / energy.sum()
    return chosen.mT @ root, inverse @ chosen, kept.item()


def _trace(each: Tensor) -> Tensor:
    return each.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp(min=torch.finfo(each.dtype).tiny)
