"""Evidence from the text itself: what followed the most similar states of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from apt.layers.sharded import has_ranks
from apt_align.functional import unrounded


class Evidence(nn.Module):
    """log p with p = trust p_knn + (1 - trust) p_model, a prediction that the model is to follow.

    p_knn(y) is proportional to sum over the nearest states k_i of earlier tokens of exp(cos(f, k_i) / tau) [y_i = y], y_i
    the token that followed (kNN-LM: Khandelwal et al. 2020, arXiv:1911.00172, by cosines; as a teacher in training:
    Yang et al. 2022, arXiv:2205.00479). States are the model's last ones, as they were when their batch went by.
    The memory is a ring of the latest `memory` tokens of earlier micro-batches, so that no token is its own evidence: of those
    of all ranks, the same on each. It is kept in checkpoints, in float32 where the model is.
    """

    keys: Tensor
    values: Tensor
    written: Tensor

    def __init__(self, d_model: int, memory: int, neighbours: int, trust: float, temperature: float) -> None:
        super().__init__()
        self.memory, self.neighbours, self.trust, self.temperature = memory, neighbours, trust, temperature
        self.register_buffer("keys", torch.zeros(memory, d_model))
        self.register_buffer("values", torch.zeros(memory, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Log probabilities [batch, seq, vocab] from last states [batch, seq, d_model] and the model's own logits.

        While nothing is remembered they are the model's.
        """
        queries = functional.normalize(hidden.float(), dim=-1).flatten(0, -2)
        with unrounded(queries):
            scores = queries @ self.keys.float().t() / self.temperature
        empty = torch.arange(self.memory, device=scores.device) >= self.written
        scores = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
        best, found = scores.topk(self.neighbours, dim=-1)
        shares = self.trust * best.softmax(-1) * ~empty[found]
        own = logits.float().flatten(0, -2).softmax(-1)
        mixed = own * (1 - shares.sum(-1, keepdim=True))
        mixed = mixed.scatter_add(-1, self.values[found], shares)
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log().view(logits.shape)

    @torch.no_grad()
    def remember(self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Keep states [batch, seq, d_model] and the tokens that followed [batch, seq], where `mask` is True.

        All ranks call it. States that are not finite are left out: they would speak for every token of later batches.
        """
        keys, values = functional.normalize(hidden.float(), dim=-1).flatten(0, -2), targets.flatten()
        kept = keys.isfinite().all(-1)
        if mask is not None:
            kept = kept & mask.flatten()
        keys, values, kept = (_of_all_ranks(each) for each in (keys, values, kept))
        keys, values = keys[kept][-self.memory :], values[kept][-self.memory :]
        places = (self.written + torch.arange(len(values), device=values.device)) % self.memory
        self.keys[places] = keys.to(self.keys.dtype)
        self.values[places] = values
        self.written += len(values)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; alone, the rows themselves. Each rank has as many."""
    if not has_ranks():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
