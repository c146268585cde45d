"""Held-out loss: nats a token and bits a byte over non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from apt.data.batches import windows
from apt.data.corpus import TokenSplit
from apt.hookspecs import Batch


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
) -> tuple[Score, dict[str, torch.Tensor]]:
    """Score a split, or its first `max_batches` batches; also the model's own metrics, averaged over batches.

    Auxiliary losses are not counted, nothing is dropped, and no random state is touched.
    """
    return score(
        model, windows(split, seq_len, batch_size, max_batches), bytes_per_token=split.bytes_per_token, device=device
    )


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable[Batch], *, bytes_per_token: float, device: torch.device | None = None
) -> tuple[Score, dict[str, torch.Tensor]]:
    """Score these batches."""
    was_training = model.training
    model.eval()
    total, count, number = 0.0, 0, 0
    metrics: dict[str, torch.Tensor] = {}
    try:
        for batch in batches:
            tokens, targets = batch.tokens.to(device), batch.targets.to(device)
            if batch.mask is not None:
                targets = targets.masked_fill(~batch.mask.to(device), -100)
            output = model(tokens)
            loss = nn.functional.cross_entropy(
                output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100
            )
            total += loss.item()
            count += int((targets != -100).sum())
            number += 1
            for name, metric in output.metrics.items():
                metrics[name] = metrics[name] + metric if name in metrics else metric
    finally:
        model.train(was_training)
    mean = total / max(1, count)
    return (
        Score(mean, mean / math.log(2) / bytes_per_token, count),
        {name: metric / max(1, number) for name, metric in metrics.items()},
    )
