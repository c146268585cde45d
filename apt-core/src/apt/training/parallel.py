"""One computation on several ranks: each with a whole copy of the model (ddp), or each with a part of every parameter (fsdp).

Both give the gradient of the mean loss over all ranks. What differs is who holds what, and all of that is in here: the trainer
asks for the gradient's norm, clips, and holds back the exchange between micro-batches without knowing which of them it is.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt.core.config import APTConfig
from apt.layers.sharded import is_sharded
from apt.modeling.model import Decoder
from apt.modeling.parts import find_parts
from apt.training.loss import LossStep
from apt.training.ranks import Ranks


def shard(model: Decoder, config: APTConfig, ranks: Ranks) -> None:
    """Split every parameter over the ranks, where the profile says fsdp; before the optimizer is made.

    By FSDP2: each block gathers its parameters when it runs, and so does what is not in a block (Zhao et al. 2023,
    arXiv:2304.11277). Buffers and parameters of a single number stay whole on every rank; the latter cannot be split.
    Weights are gathered in float32, and autocast rounds them where it does without sharding, so that bf16 means the same
    on any number of ranks; norms and routers stay in float32.
    """
    if ranks.size == 1 or config.hardware.parallel != "fsdp":
        return
    from torch.distributed.fsdp import fully_shard

    single = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for block in model.blocks:
        fully_shard(block, ignored_params=single)
    fully_shard(model, ignored_params=single)


class Parallel:
    """The loss of a micro-batch, on this rank of however many there are."""

    def __init__(self, step: LossStep, config: APTConfig, ranks: Ranks) -> None:
        self.step, self.ranks = step, ranks
        self.sharded = ranks.size > 1 and config.hardware.parallel == "fsdp"
        self.forward: LossStep | DistributedDataParallel = step
        if ranks.size > 1 and not self.sharded:
            # Parts that are switched on later are unused until then, so they are looked for at every step.
            later = any(part.provider.switched_by is not None for part in find_parts(step.model))
            with warnings.catch_warnings():
                # Newer versions have another name for it, which older ones do not know.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
                self.forward = DistributedDataParallel(step, find_unused_parameters=later, broadcast_buffers=False)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of one micro-batch: whole gradients are exchanged once a step.

        Split ones are exchanged after each: a rank that waited would have to hold the whole gradient.
        """
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def gather(self, groups: Groups) -> None:
        """After the last micro-batch: the mean over the ranks of those gradients that nothing has exchanged yet."""
        if self.sharded:
            for grad in _grads(groups.whole):
                dist.all_reduce(grad)
                grad /= self.ranks.size


class Groups(NamedTuple):
    """Parameters that are whole on this rank, and those that are split: arithmetic does not mix the two."""

    whole: Sequence[Tensor]
    split: Sequence[Tensor]


def alike(parameters: Sequence[Tensor]) -> Groups:
    """The two groups of these parameters."""
    return Groups(
        [each for each in parameters if not is_sharded(each)], [each for each in parameters if is_sharded(each)]
    )


def gradient_norm(groups: Groups) -> Tensor:
    """The norm of the whole gradient, the same on every rank."""
    norms = [nn.utils.get_total_norm(grads) for grads in map(_grads, groups) if grads]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    return torch.stack(whole).norm() if len(whole) > 1 else whole[0] if whole else torch.zeros(())


def clip(groups: Groups, limit: float, norm: Tensor) -> None:
    """Scale the gradient, whose norm is `norm`, down to at most `limit`; 0 is no limit."""
    for parameters in groups:
        if parameters:
            nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, norm)


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]
