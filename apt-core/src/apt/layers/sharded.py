"""Parameters that may be split over ranks: how a plugin reads and writes them.

Under ``hardware.parallel: fsdp`` every parameter, gradient and moment is a `DTensor` of which this process holds some rows.
What goes by `whole` and `fill` works in one process, under ddp and under fsdp alike; all ranks call them together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
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
