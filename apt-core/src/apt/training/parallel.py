"""One computation on several ranks: each with a whole copy of the model (ddp), or each with a part of every parameter (fsdp).

Under either, experts may be shared out (``hardware.expert_parallel``): whole ones, each on some of the ranks. All give the
gradient of the mean loss over all ranks. What differs is who holds what, and all of that is in here: the trainer asks for the
gradient's norm, clips, and holds back the exchange between micro-batches without knowing which of them it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt.core.config import APTConfig
from apt.errors import UserError
from apt.layers.sharded import is_sharded, local, mesh_of
from apt.modeling.model import Decoder
from apt.modeling.parts import find_parts
from apt.training.loss import LossStep
from apt.training.ranks import Ranks

EXPERTS = ("replicas", "experts")
"""The dimensions of the mesh over which experts are shared out."""


def is_split(config: APTConfig, ranks: Ranks) -> bool:
    """Whether some parameters are not whole on every rank, so that it takes all ranks to run and to save the model."""
    return not ranks.is_alone and (config.hardware.parallel == "fsdp" or config.hardware.expert_parallel > 1)


def shard(model: Decoder, config: APTConfig, ranks: Ranks) -> None:
    """Split parameters over the ranks, as the profile says; before the optimizer is made.

    Experts are shared out first. Under fsdp all else is split by FSDP2: each block gathers its parameters when it runs, and so
    does what is not in a block (Zhao et al. 2023, arXiv:2304.11277). Buffers and parameters of a single number stay whole on
    every rank; the latter cannot be split.
    Weights are gathered in float32, and autocast rounds them where it does without sharding, so that bf16 means the same
    on any number of ranks; norms and routers stay in float32.
    """
    if ranks.is_alone:
        return
    shared = _share_out(model, config.hardware.expert_parallel, ranks) if config.hardware.expert_parallel > 1 else []
    if config.hardware.parallel != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Said, since PyTorch would take the machine's GPUs, whatever device the model is on.
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    ignored = {*shared, *(parameter for parameter in model.parameters() if parameter.dim() == 0)}
    for block in model.all_blocks():
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def _share_out(model: Decoder, among: int, ranks: Ranks) -> list[nn.Parameter]:
    """Let the parts that can be shared out be so, each among `among` neighbouring ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    if ranks.size % among:
        raise UserError(f"hardware.expert_parallel: {among} does not divide the {ranks.size} processes")
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.size // among, among), mesh_dim_names=EXPERTS)
    able = [each for each in model.modules() if callable(getattr(each, "share_out", None))]
    if not able:
        raise UserError(
            f"hardware.expert_parallel: {among}, but this model has nothing to share out: no mixture of experts"
        )
    return [parameter for each in able for parameter in each.share_out(mesh)]  # type: ignore[operator]


class Parallel:
    """The loss of a micro-batch, on this rank of however many there are."""

    def __init__(self, step: LossStep, config: APTConfig, ranks: Ranks) -> None:
        self.step, self.ranks = step, ranks
        self.sharded = not ranks.is_alone and config.hardware.parallel == "fsdp"
        shared = {name: each for name, each in step.named_parameters() if _is_shared_out(each)}
        self.shared = list(shared.values())
        self.forward: LossStep | DistributedDataParallel = step
        if not ranks.is_alone and not self.sharded:
            # Parts that are switched on later are unused until then, so they are looked for at every step.
            later = any(part.provider.switched_by is not None for part in find_parts(step.model))
            # What is shared out has its whole gradient already; DDP would take it for copies.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
                step, list(shared)
            )
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
        for parameter in self.shared:
            if parameter.grad is not None:
                share = local(parameter.grad)
                dist.all_reduce(share, group=mesh_of(parameter)[EXPERTS[0]].get_group())  # type: ignore[index]
                share /= self.ranks.size


@dataclass(frozen=True)
class Groups:
    """Parameters that are whole on this rank, and those that are split, by the ranks that they are split over."""

    whole: Sequence[Tensor]
    split: Mapping[object, Sequence[Tensor]]

    @property
    def all(self) -> list[Sequence[Tensor]]:
        """Each group; arithmetic does not mix them."""
        return [self.whole, *self.split.values()]


def alike(parameters: Sequence[Tensor]) -> Groups:
    """The groups of these parameters."""
    split: dict[object, list[Tensor]] = {}
    for each in parameters:
        if is_sharded(each):
            split.setdefault(mesh_of(each), []).append(each)
    return Groups([each for each in parameters if not is_sharded(each)], split)


def gradient_norm(groups: Groups) -> Tensor:
    """The norm of the whole gradient, the same on every rank."""
    norms = [nn.utils.get_total_norm(grads) for grads in map(_grads, groups.all) if grads]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    return torch.stack(whole).norm() if len(whole) > 1 else whole[0] if whole else torch.zeros(())


def clip(groups: Groups, limit: float, norm: Tensor) -> None:
    """Scale the gradient, whose norm is `norm`, down to at most `limit`; 0 is no limit."""
    for parameters in groups.all if limit else ():
        if parameters:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _is_shared_out(parameter: Tensor) -> bool:
    mesh = mesh_of(parameter)
    return mesh is not None and mesh.mesh_dim_names == EXPERTS


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]
