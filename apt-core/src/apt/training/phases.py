"""The phases of a run: at each step the scheduled values are set, and what is due is switched on, with a certificate.

The certificate is the measured answer to the question that every switch in mid-run raises: did it change what the model had
learnt? One fixed held-out batch is scored just before and just after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.schedules import Schedule
from apt.errors import SwitchError
from apt.hookspecs import RunState
from apt.modeling.parts import set_active

Measure = Callable[[bool], tuple[float, dict[str, Tensor]]]
"""Loss (nats a token) and metrics of the fixed batch; given True, of the model as it trains."""


@dataclass(frozen=True)
class Certificate:
    """What switching a plugin on changed. Losses are nats a token of one fixed held-out batch.

    `training` is the change of the loss of that batch in training mode, where a capacity drops tokens; `metrics` are those
    numbers of that pass which the plugin's parts report and nothing reported before, such as `moe_dropped`.
    """

    plugin: str
    step: int
    loss_before: float
    loss_after: float
    training: float
    tolerance: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """By how much the loss rose."""
        return self.loss_after - self.loss_before

    @property
    def holds(self) -> bool:
        """Whether the change is within the tolerance; one that is no number never is, where there is a tolerance."""
        return self.tolerance is None or abs(self.change) <= self.tolerance

    def __str__(self) -> str:
        allowed = "nothing is too much" if self.tolerance is None else f"allowed {self.tolerance:.0e}"
        more = "".join(f", {name} {value:.4f}" for name, value in self.metrics.items())
        return (
            f"step {self.step}: {self.plugin} on; loss of a fixed held-out batch {self.loss_before:.6f} -> {self.loss_after:.6f} "
            f"({self.change:+.1e} nats a token, {allowed}; in training mode {self.training:+.1e}{more})"
        )

    def check(self) -> None:
        """Raise `SwitchError` where the change is too large, or cannot be told since the loss was no number before."""
        if not self.holds and not math.isfinite(self.loss_before):
            raise SwitchError(
                f"step {self.step}: the loss of the fixed held-out batch was {self.loss_before} before {self.plugin!r} was "
                "switched on, though training's was finite: the weights of the last steps are broken; lower "
                "training.learning_rate or training.gradient_clip; what was saved is untouched"
            )
        if not self.holds:
            raise SwitchError(
                f"step {self.step}: switching {self.plugin!r} on changed the loss of the fixed held-out batch by "
                f"{self.change:+.2e} nats a token, from {self.loss_before:.6f} to {self.loss_after:.6f}; "
                f"training.switch_tolerance allows {self.tolerance:.0e}. If the change is meant, raise it, or set it "
                "to null; what was saved is untouched"
            )


class Phases:
    """Enters each step of a run: values, switches, the hooks of epochs and steps.

    A run that `begins_anew` has learnt nothing before its first step, so that what is on from there changes nothing.
    """

    def __init__(
        self,
        config: APTConfig,
        hooks: HookRunner,
        model: nn.Module,
        optimizer: Optimizer,
        buffers: Mapping[str, list[Tensor]],
        measure: Measure,
        certified: Callable[[Certificate, RunState], None],
        *,
        begins_anew: bool,
    ) -> None:
        self.config, self.hooks, self.model, self.optimizer = config, hooks, model, optimizer
        self.schedule = Schedule(config)
        self.buffers, self.measure, self.certified = buffers, measure, certified
        self.begins_anew = begins_anew
        self._options = {name: [buffer.item() for buffer in each] for name, each in buffers.items()}

    def enter(self, state: RunState, *, first_of_epoch: bool) -> RunState:
        """The state of the step that is about to run. Raises `SwitchError` where a switch changes too much."""
        values = self.schedule.get_all_params(state.epoch, state.step, state.max_epochs, state.max_steps)
        on = tuple(self.schedule.list_enabled_plugins(self.config.plugins, state.epoch, state.step))
        fresh = [plugin for plugin in on if plugin not in state.plugins_on]
        state = replace(state, values=values, plugins_on=on)
        self.set_values(state)
        for plugin in fresh:
            self._switch_on(plugin, state)
        if first_of_epoch:
            self.hooks.hook.apt_epoch_start(state=state)
        self.hooks.hook.apt_step_start(state=state)
        return state

    def restore(self, state: RunState, *, is_branch: bool) -> None:
        """Values and switches as a checkpoint's state says, its weights being in place.

        A value that is scheduled no longer is what the profile's options say, and so are all that a branch does not schedule:
        it may have other options than its trunk.
        """
        for plugin in self.config.plugins:
            set_active(self.model, plugin, plugin in state.plugins_on)
        scheduled = self.schedule.get_all_params(state.epoch, state.step, state.max_epochs, state.max_steps)
        for name, values in self._options.items():
            if name not in scheduled and (is_branch or name in state.values):
                for buffer, value in zip(self.buffers[name], values, strict=True):
                    buffer.fill_(value)
        self.set_values(replace(state, values={name: state.values[name] for name in scheduled if name in state.values}))

    @torch.no_grad()
    def set_values(self, state: RunState) -> None:
        """Give the scheduled values to the modules that use them."""
        for name, value in state.values.items():
            for buffer in self.buffers.get(name, ()):
                buffer.fill_(value)

    def _switch_on(self, plugin: str, state: RunState) -> None:
        if state.step == 0 and self.begins_anew:
            set_active(self.model, plugin, True)
            return
        before, _ = self.measure(False)
        training_before, known = self.measure(True)
        set_active(self.model, plugin, True)
        self.hooks.phase_changed(plugin, state, self.model, self.optimizer)
        after, _ = self.measure(False)
        training_after, seen = self.measure(True)
        certificate = Certificate(
            plugin=plugin,
            step=state.step,
            loss_before=before,
            loss_after=after,
            training=training_after - training_before,
            tolerance=self.config.training.switch_tolerance,
            metrics={name: value.item() for name, value in seen.items() if name not in known and value.dim() == 0},
        )
        self.certified(certificate, state)
        certificate.check()
