"""Expert parallelism: each rank holds a part of every layer's experts, and tokens travel to them and back.

The stacks become `DTensor`s that are sharded by expert. Each rank routes its own tokens; their rows go to the ranks that
hold their experts by one all-to-all, and the results come back by another (Lepikhin et al. 2020, arXiv:2006.16668,
section 3.2). An expert's gradient is then the sum over all ranks' losses, with nothing left to reduce; whatever is not an
expert (router, attention, ...) is replicated, and its gradients are summed as in data parallelism.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from apt.errors import UserError
from apt_moe.experts import replace

if TYPE_CHECKING:
    from apt_moe.dispatch import Plan
    from apt_moe.experts import Backend, Experts
    from apt_moe.layer import MixtureOfExperts


def shard_experts(layer: MixtureOfExperts, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Give each rank along the last dimension of `mesh` its equal part of the experts of `layer`, in place.

    Along the other dimensions ranks hold equal parts. Every rank must hold the same weights before. Call it before the
    optimizer is made: the parameters are new ones, which are returned. Raises `UserError` where the ranks do not divide the
    experts, and for the reference, which has every expert here.
    """
    experts, ranks = layer.experts, mesh.size(mesh.ndim - 1)
    if experts.num_experts % ranks:
        raise UserError(f"{experts.num_experts} experts cannot be shared out evenly among {ranks} ranks")
    if layer.backend == "naive":
        raise UserError("backend: naive runs every expert on every token, and cannot share them out; use auto or loop")
    placements = [Replicate() for _ in range(mesh.ndim - 1)] + [Shard(0)]
    # Without communication: every rank has all of it.
    shares = {
        name: distribute_tensor(stack.detach(), mesh, placements, src_data_rank=None)
        for name, stack in experts.layer.named_parameters()
    }
    made = replace(experts.layer, shares)
    if mesh.ndim == 1:
        layer.mesh = mesh
    else:
        assert mesh.mesh_dim_names is not None
        layer.mesh = mesh[mesh.mesh_dim_names[-1]]
    return made


def run_sharded(experts: Experts, rows: Tensor, plan: Plan, mesh: DeviceMesh, backend: Backend) -> Tensor:
    """What `experts` make of this rank's `rows`, wherever each expert is; rows that were dropped give 0."""
    ranks = mesh.size()
    counts = plan.offsets.diff(prepend=plan.offsets.new_zeros(1)).long().view(ranks, -1)
    # Row r: what rank r sends to each of this rank's experts.
    coming = all_to_all_single(counts, None, None, mesh).view(ranks, -1)
    sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()
    owned = int(plan.offsets[-1])
    arrived = all_to_all_single_autograd(rows[:owned], received, sent, mesh)
    # They arrive by rank and then by expert; the experts want them by expert alone.
    local = torch.arange(counts.shape[1], device=rows.device)
    owner = local.repeat(ranks).repeat_interleave(coming.flatten())
    order = owner.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=rows.device))
    ends = coming.sum(0).cumsum(0).to(torch.int32)
    output = experts(arrived.index_select(0, order), ends, owner[order], backend, tail=False).index_select(0, inverse)
    returned = all_to_all_single_autograd(output, sent, received, mesh)
    return torch.cat([returned, returned.new_zeros(len(rows) - owned, rows.shape[1])])
