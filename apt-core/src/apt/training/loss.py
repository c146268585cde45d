"""The loss of a micro-batch as a module: what data parallelism wraps, so that it sees every use of every parameter."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt.core.hooks import HookRunner
from apt.hookspecs import Batch, RunState
from apt.layers import Output
from apt.modeling.model import Decoder
from apt.modeling.parts import find_parts
from apt.training.ranks import Ranks


class LossStep(nn.Module):
    """(state, batch) -> the share of a micro-batch in the step's loss, and its losses by name, detached.

    The plugins' losses are computed in here too: they may call the model again.
    """

    def __init__(self, model: Decoder, hooks: HookRunner, precision: str) -> None:
        super().__init__()
        self.model, self.hooks = model, hooks
        self.precision = torch.bfloat16 if precision == "bf16" else None

    def forward(
        self, state: RunState, batch: Batch, *, weight: float, extra_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`weight` multiplies the mean cross entropy, `extra_weight` the losses of parts and plugins."""
        with torch.autocast(batch.tokens.device.type, self.precision, enabled=self.precision is not None):
            output: Output = self.model(batch.tokens)
            targets = batch.targets if batch.mask is None else batch.targets.masked_fill(~batch.mask, -100)
            logits = output.logits.flatten(0, 1).float()
            loss = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
            extra = dict(output.losses)
            hook = self.hooks.hook.apt_loss_extra
            for losses in hook(state=state, model=self.model, batch=batch, output=output):
                extra.update(losses)
        share = loss * weight
        for more in extra.values():
            share = share + more * extra_weight
        return share, {"loss": loss.detach(), **{name: more.detach() for name, more in extra.items()}}


def distribute(step: LossStep, ranks: Ranks) -> LossStep | DistributedDataParallel:
    """The same computation, with gradients averaged over all ranks after each backward pass.

    Parts that are switched on later are unused until then, so they are looked for at every step.
    """
    if ranks.size == 1:
        return step
    later = any(part.provider.switched_by is not None for part in find_parts(step.model))
    with warnings.catch_warnings():
        # Newer versions have another name for it, which older ones do not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
        return DistributedDataParallel(step, find_unused_parameters=later, broadcast_buffers=False)
