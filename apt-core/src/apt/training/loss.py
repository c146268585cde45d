"""The loss of a micro-batch as a module: what data parallelism wraps, so that it sees every use of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apt.core.hooks import HookRunner
from apt.errors import PluginError
from apt.hookspecs import Batch, RunState
from apt.layers import Output
from apt.modeling.model import Decoder
from apt.training.guard import find_makers


class LossStep(nn.Module):
    """(state, batch) -> the share of a micro-batch in the step's loss, and that of each loss by name, detached.

    The plugins' losses are computed in here too: they may call the model again.
    """

    def __init__(self, model: Decoder, hooks: HookRunner, precision: str, *, compiled: bool = False) -> None:
        super().__init__()
        self.compiled = compiled
        self._fused: Callable[[Tensor, Tensor], Tensor] | None = None
        self.model, self.hooks = model, hooks
        self.precision = torch.bfloat16 if precision == "bf16" else None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision that the profile asks for, as a context."""
        return torch.autocast(device.type, self.precision, enabled=self.precision is not None)

    def forward(
        self, state: RunState, batch: Batch, *, weight: float, extra_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`weight` multiplies the mean cross entropy (0: no target counts) and plugins' losses, means over the same targets;
        `extra_weight` multiplies those of parts, which do not know of targets.
        """
        with self.autocast(batch.tokens.device):
            output: Output = self.model(*batch.inputs)
            targets = batch.targets if batch.mask is None else batch.targets.masked_fill(~batch.mask, -100)
            if not weight:
                loss = output.logits.float().sum() * 0.0  # no target counts, and the mean of none is no number
            elif self.compiled and output.logits.is_cuda:
                # On a GPU a compiled run keeps no logits in float32, which would be most of its memory; nor does a step of it
                # that runs eagerly.
                with torch.compiler.set_stance("default"):
                    # Made here, since asking for it loads all of the compiler.
                    self._fused = self._fused or torch.compile(mean_loss)
                    loss = self._fused(output.logits, targets)
            else:
                loss = mean_loss(output.logits, targets)
            shares, whose = {"loss": loss * weight}, {"loss": "the cross entropy"}
            hook = self.hooks.hook.apt_loss_extra
            added = hook(state=state, model=self.model, batch=batch, output=output)
            for losses, share in ((output.losses, extra_weight), *((each, weight) for each in added)):
                who = _PARTS if losses is output.losses else getattr(losses, "by", "a plugin")
                for name, each in losses.items():
                    self._check(name, each, who, whose, batch)
                    shares[name], whose[name] = each * share, who
        first, *others = shares.values()
        return sum(others, start=first), {name: each.detach() for name, each in shares.items()}

    def _check(self, name: str, loss: object, who: str, whose: Mapping[str, str], batch: Batch) -> None:
        """Raises `PluginError` for what is no loss, and for one whose name is taken: it would stand for the other."""

        def tell(owner: str) -> str:
            return find_makers(self.model, batch, name) if owner == _PARTS else owner

        if not isinstance(loss, Tensor) or loss.dim():
            raise PluginError(f"{tell(who)}: the added loss {name!r} is {_said(loss)}, not a tensor of one number")
        if name in whose:
            both = f"that of {tell(whose[name])} and that of {tell(who)}"
            raise PluginError(
                f"two losses are called {name!r}, {both}; give what a part or plugin adds a name of its own"
            )


_PARTS = ""
"""Who returned the losses of the model's parts, until it is asked which part."""


def _said(value: object) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def mean_loss(logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """The mean cross entropy in float32, in nats; a target of -100 does not count."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
