"""The plugin `moe`: when a schedule switches the experts on, it fills them from the dense layer that trained so far.

It also takes the steps of routers that balance the load without a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from apt.core import registry
from apt.core.providers import Plugin
from apt.core.resolve import walk
from apt.errors import Fault, ProfileError
from apt.hookspecs import Batch, RunState, hookimpl
from apt_moe.provider import MoE

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from apt.core.config import APTConfig
    from apt.layers import Output


_SWITCHES = ("enable_moe_at_epoch", "enable_moe_at_step")


def _changes_the_function(mixture: MoE) -> str | None:
    """Why experts that were grown are not the layer that they grew out of; None where they are."""
    if mixture.redraw:
        return f"redraw: {mixture.redraw:g} draws hidden units anew"
    if not mixture.router.keeps_scale():
        return f"router: {mixture.router.get_name()} weighs a token's experts by numbers whose sum is not 1"
    return None


class MoEPlugin(Plugin):
    """Sparse upcycling at the switch (Komatsuzaki et al. 2022, arXiv:2212.05055)."""

    api_level: ClassVar[int] = 1

    _dropped: Any = PrivateAttr(default=None)  # a tensor [2]: tokens times the share dropped, and tokens

    @hookimpl
    def apt_config_resolved(self, config: APTConfig) -> None:
        """Refuse a plugin with nothing to switch, and a late switch with nothing to run until then."""
        ffn = registry.resolve("ffn", config.choice("ffn")).provider
        mixtures = [(where, part) for where, part in walk(ffn, "model.ffn") if isinstance(part, MoE)]
        faults = []
        if not mixtures:
            hint = "set model.ffn.provider to moe, or leave the plugin out"
            faults.append(Fault("plugins", f"'moe' has nothing to switch: the ffn is {config.ffn_name!r}", hint))
        late = next((key for key in _SWITCHES if config.schedules.get(key)), None)
        # Whoever has set another tolerance, or none, knows of it.
        rounding_alone = config.training.switch_tolerance == type(config.training)().switch_tolerance
        for where, mixture in mixtures:
            if late is not None and rounding_alone and (why := _changes_the_function(mixture)):
                what = (
                    f"{config.training.switch_tolerance:g}, but {where}.{why}, which changes the function at the switch"
                )
                faults.append(Fault("training.switch_tolerance", what, "null, or the change that may be"))
            if late is not None and not mixture.upcycle:
                what = f"false, but schedules.{late} needs a dense layer to run until then"
                faults.append(Fault(f"{where}.upcycle", what, "upcycle: true, or switch the experts on from the start"))
        if faults:
            raise ProfileError(faults)

    @hookimpl
    def apt_model_built(self) -> None:
        """Forget what a run before this one dropped: a process may train one model after another with the same plugin."""
        self._dropped = None

    @hookimpl
    def apt_phase_changed(self, state: RunState, plugin: str, model: nn.Module, optimizer: Optimizer) -> None:
        """Make every expert the dense layer, in its weights and in the optimizer's memory of them."""
        from apt_moe.layer import MixtureOfExperts
        from apt_moe.upcycling import upcycle

        mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        for number, mixture in enumerate(mixtures):
            upcycle(mixture, optimizer, number)

    @hookimpl
    def apt_loss_extra(self, batch: Batch, output: Output) -> None:
        """Add no loss; note the share that a capacity dropped, which evaluation never shows."""
        import torch

        dropped = output.metrics.get("moe_dropped")
        if dropped is not None:
            tokens = dropped.new_tensor(batch.targets.numel()) if batch.mask is None else batch.mask.sum().to(dropped)
            seen = torch.stack((dropped.detach() * tokens, tokens)).double()
            self._dropped = seen if self._dropped is None else self._dropped.to(seen.device) + seen

    @hookimpl
    def apt_evaluation_end(self, metrics: dict[str, float]) -> None:
        """Report the share of assignments that training has dropped since the last evaluation, of all ranks' tokens."""
        if self._dropped is None:
            return
        dropped, tokens = self._sum_up()
        metrics["moe_dropped_in_training"] = dropped / max(tokens, 1.0)
        self._dropped = None

    @hookimpl
    def apt_checkpoint_save(self) -> Mapping[str, object]:
        """What was dropped since the last evaluation, of all ranks."""
        dropped, tokens = (0.0, 0.0) if self._dropped is None else self._sum_up()
        return {"dropped": dropped, "tokens": tokens}

    @hookimpl
    def apt_checkpoint_load(self, saved: Mapping[str, Any]) -> None:
        """What was dropped until then; each rank takes an equal share of it."""
        import torch

        from apt_moe.functional import over_ranks

        sums = torch.tensor((saved["dropped"], saved.get("tokens", 0.0)), dtype=torch.float64)
        self._dropped = sums / over_ranks(torch.ones(())).double() if sums[1] else None

    def _sum_up(self) -> tuple[float, float]:
        """Tokens times the share that was dropped of them, and tokens, over all ranks."""
        from apt_moe.functional import over_ranks

        dropped, tokens = over_ranks(self._dropped).tolist()
        return dropped, tokens

    @hookimpl
    def apt_step_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """Move the balancing biases by the load of the step."""
        from apt_moe.router import BiasRouter

        for module in model.modules():
            if isinstance(module, BiasRouter):
                module.step()
