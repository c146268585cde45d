"""Proof of use: what the profile names has really run and really learns, or the run stops.

A provider that is switched on and does nothing is the failure that no loss curve shows. So at the first optimizer step in which
a part is on, its modules are watched: each must have run, and each trainable parameter must have got a finite gradient. A loss
that a provider declares must have arrived by the first step in which it weighs anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt.core.provider import Provider
from apt.core.providers import Plugin
from apt.core.resolution import describe
from apt.errors import ProofOfUseError
from apt.hookspecs import RunState
from apt.layers.sharded import local
from apt.modeling.parts import BoundPart, find_parts


@dataclass
class Declared:
    """A loss that a provider says it adds, and what weighs it."""

    name: str
    weight: str
    provider: Provider
    where: str
    module: nn.Module | None
    read: float | None = None
    """A weight that no schedule moves, once it was read."""

    def is_due(self, state: RunState) -> bool:
        """Whether it must be there: its provider is on, and its weight is not 0."""
        if self.module is None:
            on = self.where.removeprefix("plugins.") in state.plugins_on
        else:
            on = getattr(self.module, "active", True)
        return on and self._weight(state) != 0

    def _weight(self, state: RunState) -> float:
        # The buffer holds the scheduled value; on a GPU it would have to be waited for.
        if self.weight in state.values:
            return state.values[self.weight]
        buffer = getattr(self.module, self.provider.scheduled.get(self.weight, self.weight), None)
        if isinstance(buffer, torch.Tensor):
            if self.read is None:
                self.read = buffer.item()
            return self.read
        option = getattr(self.provider, self.weight, 1.0) if self.weight else 1.0
        return float(option)


class ProofOfUse:
    """Watches the parts that have not proven themselves yet."""

    def __init__(self, model: nn.Module, plugins: Mapping[str, Plugin] | None = None) -> None:
        self.model = model
        self.pending = find_parts(model)
        self.proven: list[str] = []
        """The paths of the parts that have proven themselves, for a run that goes on: they are not watched again."""
        parts: list[tuple[str, nn.Module | None, Provider]] = [
            (part.path, part.module, part.provider) for part in self.pending
        ]
        parts += [(f"plugins.{name}", None, plugin) for name, plugin in (plugins or {}).items()]
        self.awaited = [
            Declared(name, weight, provider, where, module)
            for where, module, provider in parts
            for name, weight in provider.losses.items()
        ]
        self._settled: object = None
        self._idle_then: set[nn.Module] = set()
        self._idle_when: object = None
        self._ran: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []

    def due(self, state: RunState) -> list[BoundPart]:
        """The parts that are on and have not been proven."""
        if not self.pending or _phase(state) == self._settled:
            return []
        idle = self._idle()
        return [part for part in self.pending if getattr(part.module, "active", True) and part.module not in idle]

    def awaits(self, state: RunState) -> bool:
        """Whether a declared loss is to arrive in this step for the first time."""
        if self._idle_when != _phase(state):
            self._idle_then, self._idle_when = self._idle(), _phase(state)
        return any(each.module not in self._idle_then and each.is_due(state) for each in self.awaited)

    def take_over(self, proven: Iterable[str]) -> None:
        """The parts at these paths have proven themselves."""
        self.proven += proven
        self.pending = [part for part in self.pending if part.path not in self.proven]

    def watch(self, parts: list[BoundPart]) -> None:
        """Note which modules run from now on."""
        for part in parts:
            self._handles.append(part.module.register_forward_hook(self._note))

    def abandon(self) -> None:
        """The step is not taken: its parts are due again at the next."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ran.clear()

    def check(self, parts: list[BoundPart], state: RunState, losses: Collection[str]) -> None:
        """After the backward pass, with the names of the `losses` that it had.

        Raises `ProofOfUseError` naming every part that did not run or got no gradient, and every declared loss that is not there.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        faults = self._missing(state, losses)
        if parts:
            idle = self._idle()
            faults += [fault for part in parts for fault in self._faults(part, idle)]
        if faults:
            raise ProofOfUseError(
                f"step {state.step}: what is switched on does not take part in training:\n  " + "\n  ".join(faults)
            )
        self.take_over([part.path for part in parts])
        self._settled = _phase(state)
        self._ran.clear()

    def _missing(self, state: RunState, losses: Collection[str]) -> list[str]:
        due = [each for each in self.awaited if each.is_due(state)]
        if not due:
            return []
        idle = self._idle()
        due = [each for each in due if each.module not in idle]
        self.awaited = [each for each in self.awaited if each not in due]
        return [
            f"{describe(each.provider)}, {each.where}: declares the loss {each.name!r}, which did not arrive"
            for each in due
            if each.name not in losses
        ]

    def _faults(self, part: BoundPart, idle: Collection[nn.Module]) -> list[str]:
        who = f"{describe(part.provider)}, {part.path}"
        if part.module not in self._ran:
            return [f"{who}: its module did not run"]
        faults = []
        for path, module in part.module.named_modules():
            if module in idle:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                full = ".".join(filter(None, (path, name)))
                if parameter.requires_grad and parameter.grad is None:
                    faults.append(f"{who}: its parameter {full} got no gradient")
                elif parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
                    faults.append(f"{who}: the gradient of its parameter {full} is not finite")
        return faults

    def _idle(self) -> set[nn.Module]:
        """Every module that some part says is idle as things stand, all levels of them."""
        idle: set[nn.Module] = set()
        for module in self.model.modules():
            say = getattr(module, "idle", None)
            if callable(say):
                idle.update(inner for said in say() for inner in said.modules())
        return idle

    def _note(self, module: nn.Module, *_: object) -> None:
        self._ran.add(module)


def _phase(state: RunState) -> object:
    """What changes wherever a part can begin to take part: with the plugins that are on, with a value that is 0 no longer, or
    with an epoch, by which a part may warm up by itself. A run that goes on asks at the same steps so."""
    return state.plugins_on, tuple(name for name, value in state.values.items() if value), state.epoch
