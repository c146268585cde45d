"""The modules that providers made: found by the maker they remember, whatever wraps them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.core.provider import Provider
from apt.errors import Fault, ScheduleError, nearest


@dataclass(frozen=True)
class BoundPart:
    """A module, where it is in the model, and the provider that made it."""

    path: str
    module: nn.Module
    provider: Provider


def find_parts(model: nn.Module) -> list[BoundPart]:
    """Every module that a provider made, outer before inner, each once."""
    return [
        BoundPart(path, module, module.apt_provider)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "apt_provider", None), Provider)
    ]


def scheduled_buffers(model: nn.Module) -> dict[str, list[Tensor]]:
    """Each scheduled value's buffers. Raises `ScheduleError` where a provider declares one that its module has not."""
    buffers: dict[str, list[Tensor]] = {}
    for part in find_parts(model):
        for name, attribute in part.provider.scheduled.items():
            buffer = dict(part.module.named_buffers(recurse=False)).get(attribute)
            if buffer is None or buffer.dim() or buffer.dtype != torch.float32:
                who = f"{part.provider.kind}.{part.provider.get_name()}"
                what = f"{who} declares the scheduled value {name!r}, but its module has no zero-dimensional float32 buffer"
                raise ScheduleError([Fault(part.path, f"{what} {attribute!r}")])
            buffers.setdefault(name, []).append(buffer)
    return buffers


@torch.no_grad()
def set_value(model: nn.Module, name: str, value: float) -> None:
    """Give a scheduled value to every module that uses it. Raises `ScheduleError` where none does."""
    buffers = scheduled_buffers(model)
    if name not in buffers:
        hint = nearest(name, buffers) or f"it has: {', '.join(buffers)}"
        raise ScheduleError([Fault(name, "this model has no such value", hint)])
    for buffer in buffers[name]:
        buffer.fill_(value)


def get_values(model: nn.Module) -> dict[str, float]:
    """The scheduled values as they stand."""
    return {name: buffers[0].item() for name, buffers in scheduled_buffers(model).items()}


def set_active(model: nn.Module, plugin: str, on: bool) -> None:
    """Switch the parts that `plugin` governs on or off: their attribute `active`."""
    for part in find_parts(model):
        if part.provider.switched_by == plugin:
            part.module.active = on  # type: ignore[assignment]
