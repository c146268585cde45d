"""Held-out loss: nats a token and bits a byte over non-overlapping windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from apt.data.batches import send, windows
from apt.data.tokens import TokenSplit
from apt.hookspecs import Batch
from apt.layers.sharded import let_go
from apt.modeling.model import Decoder
from apt.training.randoms import same_randoms
from apt.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token; `bits_per_byte` compares models with different tokenizers."""

    loss: float
    bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int | None = None,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Score, dict[str, Tensor]]:
    """Score a split, or `max_batches` batches spread over it; also the model's own metrics.

    Auxiliary losses are not counted, nothing is dropped, and no random state is touched.
    """
    batches = windows(split, seq_len, batch_size, max_batches)
    return score(model, batches, bytes_per_token=split.bytes_per_token, device=device, ranks=ranks)


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    training: bool = False,
) -> tuple[Score, dict[str, Tensor]]:
    """Score these batches, each rank its rows of each; losses and metrics are weighted by tokens.

    With `training` the model is scored as it trains: with dropout, and with what a capacity drops.
    """
    was_training = model.training
    model.train(training)
    # On the model's device, so that no batch waits for the sums of the one before.
    sums: dict[str, Tensor] = {
        _LOSS: torch.zeros((), dtype=torch.float64, device=device),
        _COUNT: torch.zeros((), dtype=torch.float64, device=device),
    }
    try:
        for batch in batches:
            here = _rows(batch, ranks)
            here = here if device is None else here.map(lambda each: send(each, device))
            targets = here.targets if here.mask is None else here.targets.masked_fill(~here.mask, -100)
            # What fills up a window or the ranks' rows is read, and is no token of the split. The model is told where there is
            # nothing of the kind, too: compiled, it would be compiled once more.
            counted = torch.ones_like(targets, dtype=torch.bool) if here.mask is None else here.mask
            output = model(*here.inputs, counted=counted) if isinstance(model, Decoder) else model(*here.inputs)
            loss = nn.functional.cross_entropy(
                output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100
            )
            count = (targets != -100).sum()
            sums[_LOSS] += loss.double()
            sums[_COUNT] += count
            for name, metric in output.metrics.items():
                weighted = metric.to(count.device, torch.float64) * count
                sums[name] = sums[name] + weighted if name in sums else weighted
    finally:
        model.train(was_training)
        let_go(model)
    sums = {name: each.cpu() for name, each in ranks.sum(sums).items()}
    num_tokens = int(sums.pop(_COUNT).item())
    mean = sums.pop(_LOSS).item() / max(1, num_tokens)
    metrics = {name: (total / max(1, num_tokens)).float() for name, total in sums.items()}
    return Score(mean, mean / math.log(2) / bytes_per_token, num_tokens), metrics


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A context after which random states and the model's buffers are what they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with same_randoms():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


_LOSS, _COUNT = "(loss)", "(count)"


def _rows(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's rows; where there are too few for all, rows that do not count fill the batch up."""
    if ranks.size == 1:
        return batch
    mask = torch.ones_like(batch.targets, dtype=torch.bool) if batch.mask is None else batch.mask
    short = -len(mask) % ranks.size
    if short:
        batch = batch.map(lambda each: torch.cat((each, each[:1].expand(short, -1))))
        mask = torch.cat((mask, torch.zeros_like(mask[:1]).expand(short, -1)))
    return replace(batch, mask=mask).map(ranks.share)
