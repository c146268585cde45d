"""An exponential moving average of a model's weights, that teaches the model it follows.

Tarvainen and Valpola 2017 (Mean Teacher), arXiv:1703.01780.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apt.layers.sharded import fill, local, run_with

if TYPE_CHECKING:
    from apt.layers import Output

_PREFIX = "weights.ema."
"""What apt-core offers as ``--weights ema``: see `apt.hookspecs.Hooks.apt_checkpoint_save`."""


class Average:
    """w' = m w' + (1 - m) w after each step, m = min(decay, (1 + t) / (10 + t)): young averages forget faster.

    The average is float32 whatever the model is. A parameter is averaged from the first step that trains it on; until
    then it has no average and stands for itself, so that parts which a plugin switches on in mid-run (and fills at that
    moment) do not drag their idle past along. What grows out of parameters that are averaged has an average that has grown
    out of theirs (`apt.layers.Growing`). Of a parameter that is split over ranks each averages what it holds.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._trained: set[str] = set()
        self._grown: set[str] = set()
        """The parts whose averages have grown."""

    def see_gradients(self, model: nn.Module) -> None:
        """Note, before a step, which parameters it trains."""
        self._trained |= {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self._grow(model)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in model.named_parameters():
            if name in self.weights:
                local(self.weights[name]).lerp_(local(parameter).float(), 1 - decay)
            elif name in self._trained:
                self.weights[name] = parameter.detach().float().clone()

    def __call__(self, model: nn.Module, tokens: Tensor) -> Output:
        """What the averaged model says of `tokens` [batch, seq]: in evaluation mode, without dropout or gradient."""
        self._grow(model)
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            output: Output = run_with(model, self.weights, tokens)
        finally:
            for module in training:
                module.training = True
        return output

    @torch.no_grad()
    def _grow(self, model: nn.Module) -> None:
        for place, part in model.named_modules(prefix="part"):
            ask = getattr(part, "grow_weights", None)
            if place in self._grown or not callable(ask):
                continue
            own = {name: (f"{place}.{name}".removeprefix("part."), each) for name, each in part.named_parameters()}
            grown = ask({name: self.weights[key] for name, (key, _) in own.items() if key in self.weights})
            if grown:
                self._grown.add(place)
            for name, values in grown.items():
                key, parameter = own[name]
                if key not in self.weights:
                    self.weights[key] = torch.empty_like(parameter, dtype=torch.float32)
                    fill(self.weights[key], values)

    def save(self) -> dict[str, object]:
        """JSON values and tensors from which `load` makes it again."""
        return {"updates": self.updates, **{_PREFIX + name: weight for name, weight in self.weights.items()}}

    def load(self, saved: Mapping[str, object]) -> None:
        """Be what was saved, where the weights are now; before there are any, where they were saved to."""
        updates = saved["updates"]
        if not isinstance(updates, int):
            raise TypeError("the saved average of the weights has another form than apt-align gives it")
        here = next((weight.device for weight in self.weights.values()), None)
        self.updates, self._trained, self._grown = updates, set(), set()
        self.weights = {
            name.removeprefix(_PREFIX): weight
            for name, weight in saved.items()
            if name.startswith(_PREFIX) and isinstance(weight, Tensor)
        }
        if here is not None:
            self.to(here)

    def to(self, device: torch.device) -> None:
        """Move it to where the model is."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
