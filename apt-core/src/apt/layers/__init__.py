"""What layers and the model say to one another: the protocols that provider authors write against.

Shapes: `batch`, `seq` (queries), `kv` (keys), `d_model`. A mask is boolean and True means *keep*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Part(NamedTuple):
    """What a part returns beside its output: losses (already weighted, summed over layers into the loss) and
    metrics (detached scalars or small tensors, averaged over layers). A part without either returns a plain tensor."""

    output: Tensor
    losses: Mapping[str, Tensor] = {}
    metrics: Mapping[str, Tensor] = {}


@dataclass
class Output:
    """What the model returns: `logits` [batch, seq, vocab], `hidden` [batch, seq, d_model] before the head, and the
    `losses` and `metrics` of its parts."""

    logits: Tensor
    hidden: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class LayerCache(Protocol):
    """The keys and values of one attention layer while decoding; what is in it is the layer's own affair."""

    length: int
    """Tokens that were read."""

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Raises `ValueError` where what the next token needs is no longer there."""

    def reorder(self, samples: Tensor) -> None:
        """Keep these samples [batch] of the batch, in this order; one may come twice or not at all."""


class AttentionLayer(Protocol):
    """An `nn.Module` that mixes tokens."""

    def __call__(
        self,
        x: Tensor,
        *,
        causal: bool = True,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor | Part:
        """Attend.

        `x` [batch, seq, d_model]; `mask` [batch, kv], True for keys that may be seen; `positions` [batch, seq]
        (default: counted from the cache's length); `memory` [batch, kv, d_model] makes it cross-attention (then
        `causal` is False and there are no rotary positions). With a `cache` the keys of earlier calls come first,
        `kv` counts them, and causality is bottom-right: query i sees keys up to ``kv - seq + i``. A layer that has
        `caches_memory` set to True takes an `apt.layers.cache.MemoryCache` with a `memory`, and makes its keys and values once.
        """

    def create_cache(self, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """An empty cache for at most `max_seq_len` tokens."""


class FFNLayer(Protocol):
    """An `nn.Module` that maps each token by itself.

    One that has `takes_tokens` set to True is also given the tokens' ids, ``tokens=`` [batch, seq].
    """

    def __call__(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor | Part:
        """`x` [batch, seq, d_model]; `mask` [batch, seq], True for tokens that count in losses and metrics."""


class Switchable(Protocol):
    """A part that a plugin's switch governs: inert until `active`, and then of full effect."""

    active: bool

    def idle(self) -> Iterable[nn.Module]:
        """Its modules that take no part in the forward pass as things stand; the proof of use leaves them out."""


class Shareable(Protocol):
    """A part that many ranks can hold together, such as experts: ``hardware.expert_parallel`` asks it to."""

    def share_out(self, mesh: DeviceMesh) -> list[nn.Parameter]:
        """Keep this rank's share of some parameters, as `DTensor`s over `mesh`, and return the new ones.

        The mesh has the dimensions ``replicas`` and ``experts``: equal shares along the first, different ones along the
        second. All ranks hold equal weights before. A share's gradient is to be the sum over the losses of the ranks along
        ``experts``; the trainer adds the replicas' up. Raises `UserError` where it cannot be shared out so.
        """


class Growing(Protocol):
    """A part of whose parameters some grow out of others in mid-run, such as experts out of a dense layer.

    Who keeps other weights of the model, such as averages, asks it to let those grow too.
    """

    def grow_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole, what has grown would be, had it grown out of these; both by the parameters' names in the part.

        Nothing before anything has grown, or where not all that it grew out of is given.
        """


def as_part(result: Tensor | Part) -> Part:
    """A `Part` of whatever a layer returned."""
    return result if isinstance(result, Part) else Part(result)
