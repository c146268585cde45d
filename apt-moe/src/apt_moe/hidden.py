"""Where a feed-forward layer keeps its hidden units: the axis of each parameter that grows with d_ff.

Found by comparing the shapes of a layer with those of one that is twice as wide, so it holds for any provider. An axis
may hold several runs of d_ff one behind the other, as the two halves of a gated layer's first matrix do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apt.errors import Fault, OptionsError

if TYPE_CHECKING:
    from apt.core.providers import FFNProvider


def hidden_axes(provider: FFNProvider, d_model: int, d_ff: int, activation: str = "gelu") -> dict[str, int]:
    """Parameter name -> the axis of its hidden units.

    What has none is left out, and so is everything of a layer that is not `d_ff` wide, or a whole number of times.
    """
    with torch.device("meta"):
        one, other = (provider.create_layer(d_model, width, 0.0, activation) for width in (d_ff, 2 * d_ff))
    assert isinstance(one, nn.Module)
    assert isinstance(other, nn.Module)
    wide = dict(other.named_parameters())
    axes = {}
    for name, parameter in one.named_parameters():
        pairs = zip(parameter.shape, wide[name].shape, strict=True)
        grown = [axis for axis, (small, large) in enumerate(pairs) if large == 2 * small and small % d_ff == 0]
        if len(grown) == 1:
            axes[name] = grown[0]
    return axes


def check_units(provider: FFNProvider, axes: Mapping[str, int]) -> None:
    """Raise `OptionsError` where a layer has no hidden units that could be split or drawn anew."""
    if not axes:
        what = f"no parameter of ffn.{provider.get_name()} has d_ff hidden units, to be split or drawn anew"
        hint = "granularity: 1 and redraw: 0, or another expert"
        raise OptionsError("ffn", "moe", [Fault("ffn.moe.expert", what, hint)])


def units_first(tensor: Tensor, axis: int, d_ff: int) -> Tensor:
    """A view of `tensor` as [d_ff, runs, ...]: all that belongs to hidden unit u stands at [u]."""
    runs: Tensor = tensor.movedim(axis, 0).unflatten(0, (-1, d_ff))  # type: ignore[no-untyped-call]
    return runs.movedim(1, 0)


def slice_units(tensor: Tensor, axis: int, d_ff: int, part: int, parts: int) -> Tensor:
    """The `part`-th of `parts` equal slices of a parameter's hidden units, in the shape of a narrower layer's."""
    runs = tensor.unflatten(axis, (-1, d_ff))  # type: ignore[no-untyped-call]
    width = d_ff // parts
    return runs.narrow(axis + 1, part * width, width).flatten(axis, axis + 1)
