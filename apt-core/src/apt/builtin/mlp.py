"""The layers behind `default` and `swiglu`."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class PlainMLP(nn.Module):
    """y = drop(W_2 act(W_1 x))."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, activation: str, bias: bool) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "*batch seq d_model"], *, mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "*batch seq d_model"]:
        """Each token by itself; `mask` changes nothing."""
        return self.dropout(self.down(self.activation(self.up(x))))


class GatedMLP(nn.Module):
    """y = drop(W_2 (silu(W_1 x) * W_3 x)); W_1 and W_3 are one matrix."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "*batch seq d_model"], *, mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "*batch seq d_model"]:
        """Each token by itself; `mask` changes nothing."""
        gate, value = self.up(x).chunk(2, -1)
        return self.dropout(self.down(nn.functional.silu(gate) * value))
