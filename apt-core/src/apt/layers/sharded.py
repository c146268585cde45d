"""Parameters that may be split over ranks: how a plugin reads and writes them.

Under ``hardware.parallel: fsdp`` every parameter, gradient and moment is a `DTensor` of which this process holds some rows;
under ``hardware.expert_parallel`` those of the experts are. What goes by `whole`, `fill` and `run_with` works in one process and
under all of these alike; all ranks call them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def has_ranks() -> bool:
    """Whether this process is one of a group of ranks, were it a group of one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks that a tensor is split over; None where this process holds all of it. Arithmetic does not mix meshes."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    if not has_ranks():
        return False
    from torch.distributed.tensor import DTensor  # a third of a second, that one process never pays

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without a copy: writing to it writes to the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all ranks where they share it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into `target`, each rank the part that it holds."""
    if not is_sharded(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    mine = distribute_tensor(
        values.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )  # without communication: every rank has all of it
    target.to_local().copy_(mine.to_local())


def let_go(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: give up what fsdp gathered for it.

    Until then modules show whole parameters that are not the ones which are trained: what is written to them is lost.
    """
    if not has_ranks():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def run_with(model: nn.Module, weights: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """What `model` makes of `inputs` with these weights, by name and split as its own are, in their place; without a gradient.

    It may come between a forward pass and its backward pass, which finds everything as it was.
    """
    let_go(model)
    own = dict(model.named_parameters())
    lent = {name: weight.to(own[name].dtype) for name, weight in weights.items() if not is_sharded(own[name])}
    # fsdp gathers from the memory that it was given, so there the values of what is split are exchanged; by `data`, since a
    # tensor that autograd sees written to has no backward pass.
    split = [(local(own[name]).data, local(weight)) for name, weight in weights.items() if is_sharded(own[name])]
    before = [mine.clone() for mine, _ in split]
    try:
        for mine, other in split:
            mine.copy_(other)
        torch.clear_autocast_cache()  # which knows a parameter and not its values
        return torch.func.functional_call(model, lent, inputs)
    finally:
        let_go(model)
        for (mine, _), was in zip(split, before, strict=True):
            mine.copy_(was)
        torch.clear_autocast_cache()
        _gather(model)


def _gather(model: nn.Module) -> None:
    """What fsdp gathers for a forward pass and keeps for the backward pass: all that is in no block.

    On a GPU its streams wait from here on for what was written before.
    """
    if not has_ranks():
        return
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.unshard()
