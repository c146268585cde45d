"""The plugin `moe`: when a schedule switches the experts on, it fills them from the dense layer that trained so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from apt.core.providers import Plugin
from apt.hookspecs import RunState, hookimpl

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class MoEPlugin(Plugin):
    """Sparse upcycling at the switch (Komatsuzaki et al. 2022, arXiv:2212.05055)."""

    api_level: ClassVar[int] = 1

    @hookimpl
    def apt_phase_changed(self, state: RunState, plugin: str, model: nn.Module, optimizer: Optimizer) -> None:
        """Make every expert the dense layer, in its weights and in the optimizer's memory of them."""
        from apt_moe.layer import MixtureOfExperts
        from apt_moe.upcycling import upcycle

        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                upcycle(module, optimizer)
