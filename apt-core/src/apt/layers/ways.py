"""The ways to compute softmax attention, which give the same numbers to rounding, and which of them is taken.

sdpa: PyTorch's fused kernel. padded: the same on heads widened with zeros to a multiple of 16, since its CPU kernel is slow on
narrower ones. explicit: the two products and the softmax between them, which keeps a matrix of queries by keys and can be the
fastest where texts are short. Which one is fastest depends on shape, dtype and processor: `apt.training.calibration` measures
it and puts its choice in force here. A shape that nobody measured takes PyTorch's kernel as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Way = Literal["sdpa", "padded", "explicit"]
WIDTH = 16
"""What `padded` widens heads to a multiple of."""
MOST_KEYS = 1024
"""`explicit` is not considered for longer texts: it was never the fastest there, and its memory grows with their square."""


class Shape(NamedTuple):
    """What the speed of attention over a whole text depends on, apart from the batch. `masked`: by a matrix of its own."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    v_width: int
    causal: bool
    masked: bool

    def __str__(self) -> str:
        heads = (
            f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads} heads of {self.kv_heads} groups"
        )
        width = f"{self.width}" if self.width == self.v_width else f"{self.width} and {self.v_width}"
        kind = "causal attention" if self.causal else "masked attention" if self.masked else "attention"
        return f"{kind} of {self.queries} tokens, {heads}, width {width}"

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {**self._asdict(), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Shape:
        """The inverse of `to_dict`, whatever else is there."""
        values = {name: saved[name] for name in cls._fields}
        return cls(**{**values, "dtype": getattr(torch, saved["dtype"])})


_chosen: dict[Shape, Way] = {}
_seen: dict[Shape, tuple[int, int]] | None = None


@contextlib.contextmanager
def choose_ways(ways: Mapping[Shape, Way]) -> Iterator[None]:
    """Take these ways for these shapes, in the whole process, as PyTorch's own switches of kernels are."""
    before = dict(_chosen)
    _chosen.update(ways)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


@contextlib.contextmanager
def watch_shapes() -> Iterator[dict[Shape, tuple[int, int]]]:
    """Note the shapes that come by over whole texts: how often, and the largest batch."""
    global _seen
    before, _seen = _seen, {}
    try:
        yield _seen
    finally:
        _seen = before


def mix(
    q: Float[Tensor, "batch heads seq width"],
    k: Float[Tensor, "batch kv_heads kv width"],
    v: Float[Tensor, "batch kv_heads kv v_width"],
    *,
    causal: bool,
    visible: Bool[Tensor, "#batch #heads #seq kv"] | None,
    scale: float | None,
    dropout: float,
) -> Float[Tensor, "batch heads seq v_width"]:
    """softmax(scale q k^T + mask) v by the way that is best for the shape; `visible` and `causal` exclude each other.

    `causal` means as many queries as keys. A row that sees nothing gives 0. What decodes from a cache is not chosen for: it
    takes PyTorch's kernel.
    """
    way: Way = "sdpa"
    # Mostly nothing was measured and nobody watches; a shape is a microsecond or two, in every layer.
    if (_chosen or _seen is not None) and q.shape[2] == k.shape[2]:
        shape = shape_of(q, k, v, causal=causal, masked=visible is not None)
        if _seen is not None:
            count, batch = _seen.get(shape, (0, 0))
            _seen[shape] = count + 1, max(batch, q.shape[0])
        way = _chosen.get(shape, "sdpa")
    return mix_by(way, q, k, v, causal=causal, visible=visible, scale=scale, dropout=dropout)


def shape_of(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, masked: bool) -> Shape:
    """The shape; under autocast with the dtype that the products will have."""
    device = q.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else q.dtype
    return Shape(device, dtype, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], causal, masked)


def possible_ways(shape: Shape) -> list[Way]:
    """The ways that a shape has."""
    ways: list[Way] = ["sdpa"]
    if shape.width % WIDTH or shape.v_width % WIDTH:
        ways.append("padded")
    if shape.keys <= MOST_KEYS:
        ways.append("explicit")
    return ways


def mix_by(
    way: Way,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    visible: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """`mix` by a way that is given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if way == "explicit":
        return _explicit(q, k, v, causal=causal, visible=visible, scale=scale, dropout=dropout)
    v_width = v.shape[-1]
    if way == "padded":
        q, k, v = (functional.pad(each, (0, -each.shape[-1] % WIDTH)) for each in (q, k, v))
    grouped = False
    if q.shape[1] != k.shape[1]:
        # Decided here: compiled for any sizes the comparison is a symbol, which the kernel does not take.
        grouped = True
    if grouped and q.is_cuda and q.shape[2] > 1 and (visible is not None or q.dtype == torch.float32):
        # No fused kernel of PyTorch 2.11 is sure to take groups here, and without one the scores are written out.
        k, v, grouped = each_its_own(k, q.shape[1]), each_its_own(v, q.shape[1]), False
    blank: Tensor | None = None
    if visible is not None and q.is_cuda and q.shape[2] > 1:
        # Not every kernel of a GPU gives 0 for a row that sees nothing, so such a row sees everything, and is left out after.
        blank = ~visible.any(-1, keepdim=True)
        visible = visible | blank
    mixed = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=grouped,
    )
    if blank is not None:
        mixed = mixed.masked_fill(blank, 0)
    return mixed if way == "sdpa" else mixed[..., :v_width]


def each_its_own(x: Float[Tensor, "batch kv_heads kv width"], heads: int) -> Float[Tensor, "batch heads kv width"]:
    """The keys or values of groups as those of so many heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, visible: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Two batched products. The heads of a group share their keys, so they stand as more rows of one product.

    The softmax is in float32, as in the fused kernels. A key that must not be seen gets the lowest number in place of minus
    infinity: a row that sees nothing then has a gradient too, and is set to 0.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = q.reshape(batch * kv_heads, group * queries, -1)
    columns, values = k.reshape(batch * kv_heads, keys, -1), v.reshape(batch * kv_heads, keys, -1)
    lowest = torch.finfo(torch.bfloat16 if q.dtype != torch.float16 else torch.float16).min
    if visible is None and not causal:
        scores = torch.bmm(rows * scale, columns.transpose(1, 2))
    else:
        if visible is None:
            bias = torch.full((queries, keys), lowest, dtype=q.dtype, device=q.device).triu(1)
            bias = bias.repeat(group, 1) if group > 1 else bias
        else:
            hidden = ~visible.expand(batch, heads, queries, keys).reshape(rows.shape[0], group * queries, keys)
            bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, lowest)
        scores = torch.baddbmm(bias, rows, columns.transpose(1, 2), alpha=scale)
    weights = functional.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    if visible is not None:
        weights = weights * visible.expand(batch, heads, queries, keys).reshape_as(weights).any(-1, keepdim=True)
    if dropout:
        weights = functional.dropout(weights, dropout)
    return torch.bmm(weights, values).view(batch, heads, queries, -1)
