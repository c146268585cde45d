"""What an optimizer remembers of one parameter, for another one to inherit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt.layers.sharded import whole


@torch.no_grad()
def memory_for(heir: Tensor, source: Tensor, optimizer: Optimizer) -> dict[str, Any]:
    """The memory of the parameter `source`, in the form in which the optimizer remembers `heir`; nothing where there is none.

    Numbers and tensors stand under the optimizer's own names, tensors of the shape of `source`. Where the two are remembered in
    different forms (Muon keeps a momentum, AdamW two moments), the one becomes the other: the momentum m, an average with factor
    mu, is the first moment. The second is what gradients that are mostly noise must have had to leave such a momentum: an
    average of independent numbers has (1 - mu) / (1 + mu) of their variance, so v = mean(m^2) (1 + mu) / (1 - mu), one number
    for the matrix. The step is that of the parameters which AdamW has trained all along.
    """
    memory: dict[str, Any] = dict(optimizer.state.get(source, {}))
    if "momentum_buffer" not in memory or "exp_avg" not in optimizer.state.get(heir, {}):
        return memory
    groups = optimizer.param_groups
    factor = next(group["momentum"] for group in groups if any(each is source for each in group["params"]))
    momentum = whole(memory["momentum_buffer"])
    noise = momentum.square().mean() * (1 + factor) / (1 - factor)
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    return {"step": max(steps), "exp_avg": momentum, "exp_avg_sq": noise.expand(momentum.shape).clone()}
