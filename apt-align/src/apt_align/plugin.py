"""The plugin `align`: adds the alignment loss to each micro-batch, and costs nothing while its weight is 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from apt.core import registry
from apt.core.providers import Plugin
from apt.errors import Fault, ProfileError
from apt.hookspecs import Batch, RunState, hookimpl
from apt_align.provider import BiState

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from apt.core.config import APTConfig
    from apt.layers import Output
    from apt_align.aligner import Aligner


class AlignPlugin(Plugin):
    """Makes the second state of a batch, and the loss of the two.

    With `state: dropout` that is a second forward pass of the same batch; with `state: layer` the output of an earlier
    block, kept by a forward hook during the pass that the trainer makes anyway.
    """

    api_level: ClassVar[int] = 1

    _earlier: Tensor | None = PrivateAttr(default=None)
    _hook: RemovableHandle | None = PrivateAttr(default=None)

    @hookimpl
    def apt_config_resolved(self, config: APTConfig) -> None:
        """Refuse what cannot work."""
        provider = registry.get("align", config.align_name, config.get_provider_config("align"), fallback=False)
        if not isinstance(provider, BiState):
            return
        where = "model.align"
        faults = []
        if provider.state == "dropout" and config.dropout == 0 and config.attention_dropout == 0:
            faults.append(
                Fault(f"{where}.state", "dropout is 0, so two passes are equal", "set model.dropout, or state: layer")
            )
        if provider.layer is not None and provider.layer >= config.num_blocks - 1:
            faults.append(
                Fault(f"{where}.layer", f"{provider.layer} is not before the last block", f"0 to {config.num_blocks - 2}")
            )
        if provider.state == "layer" and config.num_blocks < 2:
            faults.append(Fault(f"{where}.state", "a model of one block has no earlier layer", "state: dropout"))
        if faults:
            raise ProfileError(faults)

    @hookimpl
    def apt_training_start(self, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Keep the earlier block's output where that is the second state."""
        provider = _aligner(model).provider
        if provider.state == "layer":
            blocks = model.get_submodule("blocks")
            middle = (len(list(blocks.children())) - 1) // 2
            block = blocks.get_submodule(str(middle if provider.layer is None else provider.layer))
            self._hook = block.register_forward_hook(self._keep)

    @hookimpl
    def apt_training_end(self, state: RunState, model: nn.Module) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._earlier = None

    @hookimpl
    def apt_loss_extra(
        self, state: RunState, model: nn.Module, batch: Batch, output: Output
    ) -> Mapping[str, Tensor] | None:
        """The weighted loss of this micro-batch; None, and no second pass, where its weight is 0."""
        aligner = _aligner(model)
        provider = aligner.provider
        earlier, self._earlier = self._earlier, None
        if not aligner.active or state.values.get("align_weight", provider.weight) == 0:
            return None
        if provider.state == "layer":
            if earlier is None:
                raise RuntimeError("the earlier block did not run in this forward pass")
            stable, align = output.hidden, earlier
        else:
            second = model(batch.tokens)
            stable, align = (
                (output.logits, second.logits) if provider.distance == "kl" else (output.hidden, second.hidden)
            )
        return {"align": aligner.weight * aligner(stable, align, batch.mask)}
