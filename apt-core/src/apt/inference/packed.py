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

_packed: dict[int, tuple[type[PackedLinear], Any]] = {}
"""The kind of the layer that has this number, and its weights."""
_numbers = itertools.count()

# Bare operators: what `torch.library.custom_op` adds to each call is a fifth of the product of a small matrix.
torch.library.define("apt::multiply_packed", "(Tensor rows, Tensor number, SymInt out_features) -> Tensor")
torch.library.define(
    "apt::unpack_packed", "(Tensor number, SymInt out_features, SymInt in_features, ScalarType dtype) -> Tensor"
)


@torch.library.impl("apt::multiply_packed", "CPU")
def _multiply(rows: Tensor, number: Tensor, out_features: int) -> Tensor:
    kind, packed = _packed[int(number)]
    return kind.multiply_packed(rows, packed)


@torch.library.impl("apt::multiply_packed", "Meta")
def _shape_of_product(rows: Tensor, number: Tensor, out_features: int) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], out_features))


@torch.library.impl("apt::unpack_packed", "CPU")
def _unpack(number: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    kind, packed = _packed[int(number)]
    return kind.unpack_weight(packed, in_features).to(dtype)


@torch.library.impl("apt::unpack_packed", "Meta")
def _shape_of_weight(number: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return number.new_empty((out_features, in_features), dtype=dtype)


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

    @staticmethod
    @abstractmethod
    def multiply_packed(rows: Tensor, packed: Any) -> Tensor:
        """PyTorch's own product of `rows` [..., width or more] by packed weights."""

    @staticmethod
    @abstractmethod
    def unpack_weight(packed: Any, in_features: int) -> Tensor:
        """The weights [out, in_features] as numbers of a floating-point type."""

    @property
    @abstractmethod
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights as they are now: for layers that use them otherwise than by calling this one."""

    def multiply(self, rows: Tensor) -> Tensor:
        """`multiply_packed` by this layer's weights, as one operator that compiled code keeps."""
        y: Tensor = torch.ops.apt.multiply_packed(rows, self._number, self.out_features)
        return y

    def unpack_as(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] in `dtype`, made anew."""
        weight: Tensor = torch.ops.apt.unpack_packed(self._number, self.out_features, self.in_features, dtype)
        return weight

    def hold(self, *what: Tensor) -> None:
        """Pack these weights under a number of this layer's own."""
        number = next(_numbers)
        _packed[number] = type(self), self.pack(*what)
        weakref.finalize(self, _packed.pop, number)
        # A tensor, so that one compiled block serves all blocks.
        self.register_buffer("_number", torch.tensor(number), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which outlive this layer: the weights themselves in place of their number."""
        # Python's own method, where torch has none, gives the layer's dictionary itself.
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[no-untyped-call]
        state["_buffers"] = {name: each for name, each in state["_buffers"].items() if name != "_number"}
        return {**state, "_weights": tuple(self.unpack(_packed[int(self._number)][1]))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the weights under a new number."""
        weights = state.pop("_weights")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.hold(*weights)

    def extra_repr(self) -> str:
        """Its sizes, as `nn.Linear` says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"
