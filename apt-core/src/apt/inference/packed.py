"""Linear layers whose weights are packed for a product of PyTorch's that compiled code cannot hold: it holds their number."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_packed: dict[int, Any] = {}
_numbers = itertools.count()


def get_packed(number: Tensor) -> Any:
    """The weights of the layer that has this number."""
    return _packed[int(number)]


class PackedLinear(nn.Module, ABC):
    """y = W x + b for inference on the CPU, made of a trained `nn.Linear`."""

    kind: str
    """What the weights are held in."""
    bias: nn.Parameter | None
    _number: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @staticmethod
    @abstractmethod
    def pack(*what: Tensor) -> Any:
        """What the product takes."""

    @staticmethod
    @abstractmethod
    def unpack(packed: Any) -> Sequence[Tensor]:
        """The inverse of `pack`: the tensors that a copy of the layer is made of."""

    @property
    @abstractmethod
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights as they are now: for layers that use them otherwise than by calling this one."""

    def hold(self, *what: Tensor) -> None:
        """Pack these weights under a number of this layer's own."""
        number = next(_numbers)
        _packed[number] = self.pack(*what)
        weakref.finalize(self, _packed.pop, number)
        # A tensor, so that one compiled block serves all blocks.
        self.register_buffer("_number", torch.tensor(number), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which outlive this layer: the weights themselves in place of their number."""
        # Python's own method, where torch has none, gives the layer's dictionary itself.
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[no-untyped-call]
        state["_buffers"] = {name: each for name, each in state["_buffers"].items() if name != "_number"}
        return {**state, "_weights": tuple(self.unpack(get_packed(self._number)))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the weights under a new number."""
        weights = state.pop("_weights")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.hold(*weights)

    def extra_repr(self) -> str:
        """Its sizes, as `nn.Linear` says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"
