"""Proof of use: what the profile names has really run and really learns, or the run stops.

A provider that is switched on and does nothing is the failure that no loss curve shows. So at the first optimizer step in which
a part is on, its modules are watched: each must have run, and each trainable parameter must have got a finite gradient.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt.core.registry import record_of
from apt.errors import ProofOfUseError
from apt.modeling.parts import BoundPart, find_parts


class ProofOfUse:
    """Watches the parts that have not proven themselves yet."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pending = find_parts(model)
        self._ran: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []

    def due(self) -> list[BoundPart]:
        """The parts that are on and have not been proven."""
        idle = self._idle()
        return [part for part in self.pending if getattr(part.module, "active", True) and part.module not in idle]

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

    def check(self, parts: list[BoundPart], step: int) -> None:
        """After the backward pass: raise `ProofOfUseError` naming every part that did not run or got no gradient."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        idle = self._idle()
        faults = [fault for part in parts for fault in self._faults(part, idle)]
        if faults:
            raise ProofOfUseError(
                f"step {step}: what is switched on does not take part in training:\n  " + "\n  ".join(faults)
            )
        proven = {part.path for part in parts}
        self.pending = [part for part in self.pending if part.path not in proven]
        self._ran.clear()

    def _faults(self, part: BoundPart, idle: Collection[nn.Module]) -> list[str]:
        record = record_of(part.provider)
        who = f"{record.key} ({record.distribution} {record.version}), {part.path}"
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
                elif parameter.grad is not None and not torch.isfinite(parameter.grad).all():
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
