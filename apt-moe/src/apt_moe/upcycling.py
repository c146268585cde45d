"""Sparse upcycling: every expert starts as the dense layer, in its weights and in the optimizer's memory of them.

With weights that sum to 1 and nothing dropped, sum_e w_e f(x) = f(x): the switch leaves the function as it was, to
rounding. The router starts from its random initialisation, so the experts part ways from the next step on.

Komatsuzaki et al. 2022, arXiv:2212.05055.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt_moe.layer import MixtureOfExperts


@torch.no_grad()
def upcycle(layer: MixtureOfExperts, optimizer: Optimizer | None = None) -> None:
    """Fill the experts of `layer` from its dense layer, and their optimizer state from that layer's state.

    The dense layer's gradients are let go: it is idle from here on, and an optimizer leaves alone what has none.
    """
    if layer.dense is None:
        raise RuntimeError("this mixture holds no dense layer to grow its experts from; give it upcycle: true")
    stacks = dict(layer.experts.layer.named_parameters())
    for name, dense in layer.dense.named_parameters():
        stack = stacks[name]
        stack.copy_(dense.expand_as(stack))
        if optimizer is not None and dense in optimizer.state:
            optimizer.state[stack] = {
                key: _stacked(value, dense, stack) if key != "step" else _copied(value)
                for key, value in optimizer.state[dense].items()
            }
        dense.grad = None


def _stacked(value: object, dense: Tensor, stack: Tensor) -> object:
    """What the optimizer keeps for each number of `dense`, once for each expert; anything else as it is."""
    if isinstance(value, Tensor) and value.shape == dense.shape:
        return value.expand(stack.shape).clone()
    return _copied(value)


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
