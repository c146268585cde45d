"""The optimizer and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW

from apt.core.config import APTConfig


def make_optimizer(model: nn.Module, config: APTConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with weight decay on matrices alone.

    Every parameter has its state from the start, inert ones too, so that what a checkpoint holds never changes its shape. A
    parameter without a gradient is left alone: no decay, no step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.base_lr, betas=config.training.betas, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(config: APTConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of each step: linear warm-up, then the profile's schedule down to `min_lr_ratio` of it.

    cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5; wsd: warm-up, stable, and a linear decay over the last
    fifth (Hu et al. 2024, arXiv:2404.06395).
    """
    high, low = config.base_lr, config.base_lr * config.training.min_lr_ratio
    warmup, shape = config.warmup_steps, config.training.lr_schedule

    def at(step: int) -> float:
        if step < warmup:
            return high * (step + 1) / warmup
        p = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        if shape == "constant":
            return high
        if shape == "linear":
            return high + (low - high) * p
        if shape == "wsd":
            return high + (low - high) * max(0.0, (p - 0.8) / 0.2)
        return low + (high - low) * (1 + math.cos(math.pi * p)) / 2

    return at
