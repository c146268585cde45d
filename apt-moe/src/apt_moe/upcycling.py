"""Sparse upcycling: every expert starts as the dense layer, in its weights and in the optimizer's memory of them.

With weights that sum to 1 and nothing dropped, sum_e w_e f(x) = f(x): the switch leaves the function as it was, to
rounding. The router starts from its random initialisation, so the experts part ways from the next step on.

Fine-grained experts start as slices of the dense layer's hidden units, in virtual groups: the m slices of one dense
layer stand side by side and share one row of the router, so a token gets all of them or none.

Komatsuzaki et al. 2022, arXiv:2212.05055; virtual groups: He et al. 2024, arXiv:2410.07524, section 3.2; drop-upcycling:
Nakamura et al. 2025, arXiv:2502.19261.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt.errors import Fault, OptionsError
from apt.layers import as_part
from apt.layers.memory import memory_for
from apt.layers.sharded import fill, whole
from apt_moe.hidden import check_units, hidden_axes, slice_units, units_first

if TYPE_CHECKING:
    from apt.core.providers import FFNProvider
    from apt_moe.layer import MixtureOfExperts

STACKS = "experts.layer."
"""What the names of the experts' parameters begin with."""
Moments = Literal["copied", "fresh", "scaled"]

POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}
"""What optimizers keep for each number, and the power of the gradient that it is."""


@dataclass(frozen=True)
class Upcycling:
    """How experts grow out of the dense layer.

    `redraw` is the share of hidden units that each expert draws anew, a choice of its own, from a normal distribution
    with the mean and the deviation of the dense matrix (arXiv:2502.19261, section 3.1): the experts differ at once, and
    the function is not kept. `moments` says what becomes of the optimizer's state: ``copied``; ``fresh``, as before any
    step; or ``scaled``: an expert's gradient is about 1/E of the dense layer's, and each moment is divided by E to the
    power in which the gradient stands in it. `seed` and the layer's number decide what is drawn, the same on every rank.
    """

    redraw: float = 0.0
    moments: Moments = "copied"
    seed: int = 0


@torch.no_grad()
def upcycle(layer: MixtureOfExperts, optimizer: Optimizer | None = None, number: int = 0) -> None:
    """Fill the experts of `layer` from its dense layer, its buffers too, and their optimizer state from that layer's state.

    `number` is the layer's place among the mixtures of its model; what is redrawn depends on it. The dense layer's
    gradients are let go: it is idle from here on, and an optimizer leaves alone what has none.
    """
    if layer.dense is None:
        raise RuntimeError("this mixture holds no dense layer to grow its experts from; give it upcycle: true")
    own, before = dict(layer.named_parameters()), dict(layer.dense.named_parameters())
    for name, weights in grow(layer, before, number):
        fill(own[name], weights)
    shape = _Shape(layer.experts.num_experts, layer.granularity, layer.experts.d_ff)
    for name, dense in before.items():
        if optimizer is not None:
            _carry(optimizer, dense, own[STACKS + name], layer.experts.axes.get(name), shape, layer.upcycling)
            _carry_to_shared(optimizer, dense, [own[each + name] for each in _shared(layer)], layer.upcycling)
        dense.grad = None
    for heir in (layer.experts.layer, *(layer.shared or ())):
        _copy_buffers(layer.dense, heir)
    _group(layer.router, layer.experts.num_experts, layer.granularity)


def grow(layer: MixtureOfExperts, dense: Mapping[str, Tensor], number: int = 0) -> Iterator[tuple[str, Tensor]]:
    """What grows out of these dense weights: the names in `layer`, and all of each."""
    recipe, parts = layer.upcycling, layer.granularity
    shape = _Shape(layer.experts.num_experts, parts, layer.experts.d_ff)
    units = _drawn_units(recipe, shape, number)
    generator = torch.Generator().manual_seed(recipe.seed + 7919 * number + 1)
    for name, each in dense.items():
        source, axis = whole(each), layer.experts.axes.get(name)
        weights = shape.spread(source, axis)
        if axis is None:
            weights = weights / parts
        if axis is not None and units is not None:
            weights = _redrawn(weights, source, axis, shape, units, generator)
        yield STACKS + name, weights
        for expert in _shared(layer):
            yield expert + name, source


def _shared(layer: MixtureOfExperts) -> list[str]:
    """What the names of each shared expert's parameters begin with; each is the dense layer too."""
    return [f"shared.{number}." for number in range(len(layer.shared or ()))]


def check_slices(provider: FFNProvider, parts: int, activation: str) -> None:
    """Raise `OptionsError` unless a small layer of the provider is the sum of its slices, on random tokens."""
    d_model, width = 8, 4
    dense, narrow = (provider.create_layer(d_model, size, 0.0, activation) for size in (width * parts, width))
    assert isinstance(dense, torch.nn.Module)
    assert isinstance(narrow, torch.nn.Module)
    wide = {name: each.shape for name, each in dense.named_buffers()}
    split = [name for name, each in narrow.named_buffers() if each.shape != wide.get(name)]
    if split:
        kept = f"ffn.{provider.get_name()} keeps {', '.join(split)} for its hidden units"
        what = f"{parts}, but {kept}, and experts have one set of buffers"
        hint = "granularity: 1, upcycle: false, or another expert"
        raise OptionsError("ffn", "moe", [Fault("ffn.moe.granularity", what, hint)])
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        state = {name: torch.randn(parameter.shape) for name, parameter in dense.named_parameters()}
        # Whatever they will be at the switch, the same for every slice.
        buffers = {name: torch.rand(each.shape) for name, each in dense.named_buffers() if each.is_floating_point()}
        x = torch.randn(1, 3, d_model)
        axes = hidden_axes(provider, d_model, width, activation)
        check_units(provider, axes)
        shape = _Shape(parts, parts, width)
        spread = {name: shape.spread(each, axes.get(name)) for name, each in state.items()}
        total = torch.zeros_like(x)
        for part in range(parts):
            own = {name: each[part] if name in axes else each[part] / parts for name, each in spread.items()}
            total += as_part(torch.func.functional_call(narrow, (own, _copies(buffers)), (x,))).output
        expected = as_part(torch.func.functional_call(dense, (state, _copies(buffers)), (x,))).output
    if not torch.allclose(total, expected, rtol=1e-3, atol=1e-3):
        name = provider.get_name()
        what = f"{parts}, but a layer of ffn.{name} is not the sum of slices of its hidden units, so it cannot be split"
        hint = "granularity: 1, upcycle: false, or another expert"
        raise OptionsError("ffn", "moe", [Fault("ffn.moe.granularity", what, hint)])


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer may change its buffers in place."""
    return {name: each.clone() for name, each in buffers.items()}


def check_rows(router: torch.nn.Module, name: str, experts: int, parts: int) -> None:
    """Raise `OptionsError` unless the router keeps a row for each expert, which the slices of a dense layer can share."""
    if not _rows(router, experts):
        what = f"{parts}, but router.{name} has no parameter with a row for each expert, which slices could share"
        hint = "granularity: 1, upcycle: false, or another router"
        raise OptionsError("ffn", "moe", [Fault("ffn.moe.granularity", what, hint)])


class _Shape:
    """How `experts` stacked layers of hidden width `d_ff` are made of `parts` slices of a dense one."""

    def __init__(self, experts: int, parts: int, d_ff: int) -> None:
        self.experts, self.parts, self.d_ff = experts, parts, d_ff

    def spread(self, dense: Tensor, axis: int | None) -> Tensor:
        """What belongs to a number of the dense layer, for every expert: [experts, ...]."""
        if self.parts == 1 or axis is None:
            return dense.expand(self.experts, *dense.shape)
        wide = self.d_ff * self.parts
        slices = torch.stack([slice_units(dense, axis, wide, part, self.parts) for part in range(self.parts)])
        return slices.repeat(self.experts // self.parts, *[1] * dense.dim())


def _drawn_units(recipe: Upcycling, shape: _Shape, number: int) -> Tensor | None:
    """[experts, units] the hidden units that each expert draws anew, or None."""
    count = int(recipe.redraw * shape.d_ff)
    if not count:
        return None
    generator = torch.Generator().manual_seed(recipe.seed + 7919 * number)
    return torch.stack([torch.randperm(shape.d_ff, generator=generator)[:count] for _ in range(shape.experts)])


def _redrawn(
    weights: Tensor, dense: Tensor, axis: int, shape: _Shape, units: Tensor, generator: torch.Generator
) -> Tensor:
    """`weights` [experts, ...] with the chosen units drawn from a normal distribution of the dense matrix's moments.

    They are drawn on the CPU, so that every device and every rank gets the same.
    """
    mean, deviation = dense.float().mean(), dense.float().std()
    weights = weights.clone()
    for expert, chosen in zip(weights, units.to(weights.device), strict=True):
        view = units_first(expert, axis, shape.d_ff)
        fresh = torch.randn(view[chosen].shape, generator=generator).to(weights.device)
        view[chosen] = (mean + deviation * fresh).to(weights.dtype)
    return weights


def _carry(
    optimizer: Optimizer, dense: Tensor, stack: Tensor, axis: int | None, shape: _Shape, recipe: Upcycling
) -> None:
    """The optimizer's state of the experts.

    Only what the optimizer already keeps for the stack is filled where it keeps anything: two optimizers in one may
    treat matrices and stacks of them otherwise.
    """
    state = memory_for(stack, dense, optimizer)
    if not state or recipe.moments == "fresh":
        return
    there = optimizer.state.get(stack)
    groups = shape.experts // shape.parts
    carried: dict[str, object] = {} if there is None else dict(there)
    for key, value in state.items():
        if there and key not in there:
            continue
        # Of a single number a moment has the shape of a count of steps.
        counts = not dense.dim() and key not in POWERS
        if not isinstance(value, Tensor) or value.shape != dense.shape or counts:
            carried[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        spread = shape.spread(whole(value), axis)
        if recipe.moments == "scaled":
            spread = spread / groups ** POWERS.get(key, 0)
        carried[key] = _like(stack, spread)
    optimizer.state[stack] = carried


def _group(router: torch.nn.Module, experts: int, parts: int) -> None:
    """Let the slices of one dense layer share one row of whatever the router keeps for each expert."""
    if parts == 1:
        return
    for parameter in _rows(router, experts):
        fill(parameter, whole(parameter)[::parts].repeat_interleave(parts, 0))


def _rows(router: torch.nn.Module, experts: int) -> list[torch.nn.Parameter]:
    """The parameters that have a row for each expert."""
    return [each for each in router.parameters() if each.dim() and each.shape[0] == experts]


def _copy_buffers(dense: torch.nn.Module, heir: torch.nn.Module) -> None:
    """Experts hold one set of buffers for all of them."""
    own = dict(heir.named_buffers())
    for name, buffer in dense.named_buffers():
        if name in own and own[name].shape == buffer.shape:
            own[name].copy_(buffer)
        else:
            # Made or grown in use.
            owner, _, attribute = name.rpartition(".")
            setattr(heir.get_submodule(owner), attribute, buffer.clone())


def _carry_to_shared(optimizer: Optimizer, dense: Tensor, shared: Sequence[Tensor], recipe: Upcycling) -> None:
    if recipe.moments == "fresh" or not optimizer.state.get(dense):
        return
    for heir in shared:
        optimizer.state[heir] = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in memory_for(heir, dense, optimizer).items()
        }


def _like(target: Tensor, value: Tensor) -> Tensor:
    """`value` in memory of its own, sharded as `target` is."""
    made = torch.empty_like(target, dtype=value.dtype)
    fill(made, value)
    return made
