"""The plugin `align`: adds the alignment loss to each micro-batch, and costs nothing while its weight is 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from apt.core import registry
from apt.core.providers import AlignProvider, Plugin
from apt.errors import Fault, ProfileError
from apt.hookspecs import Batch, RunState, hookimpl
from apt_align.provider import BiState

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from apt.core.config import APTConfig
    from apt.layers import Output, Part
    from apt_align.average import Average


class AlignPlugin(Plugin):
    """Makes the second state of a batch, and the loss of the two.

    The second state of `bistate_default` is what its option `state` says: a second forward pass (`dropout`), a pass
    of the averaged weights (`ema`), or the output of an earlier block, kept by a forward hook during the pass that
    the trainer makes anyway (`layer`). Any other aligner gets the hidden states of two passes.
    """

    api_level: ClassVar[int] = 1
    losses: ClassVar[Mapping[str, str]] = {"align": "align_weight"}

    _earlier: Tensor | None = PrivateAttr(default=None)
    _hook: RemovableHandle | None = PrivateAttr(default=None)
    _average: Average | None = PrivateAttr(default=None)
    _saved: Mapping[str, object] | None = PrivateAttr(default=None)

    @hookimpl
    def apt_config_resolved(self, config: APTConfig) -> None:
        """Refuse what cannot work."""
        provider = registry.resolve("align", config.choice("align")).provider
        if isinstance(provider, BiState) and (faults := list(_contradictions(provider, config))):
            raise ProfileError(faults)

    @hookimpl
    def apt_training_start(self, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Get ready to keep an earlier block's output, or an average of the weights."""
        _, provider = _aligner(model)
        if not isinstance(provider, BiState):
            return
        if provider.state == "layer":
            blocks = list(_bare(model).get_submodule("blocks").children())
            block = blocks[(len(blocks) - 1) // 2 if provider.layer is None else provider.layer]
            self._hook = block.register_forward_hook(self._keep)
        if provider.state == "ema":
            from apt_align.average import Average

            self._average = Average(provider.decay)
            if self._saved is not None:
                self._average.load(self._saved)
                self._average.to(next(model.parameters()).device)

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
        aligner, provider = _aligner(model)
        earlier, self._earlier = self._earlier, None
        weight = state.values.get("align_weight", provider.weight if isinstance(provider, BiState) else 1.0)
        if weight == 0 or not getattr(aligner, "active", True):
            return None
        if isinstance(provider, BiState):
            stable, align = self._states(provider, model, batch, output, earlier)
            loss = aligner(stable, align, batch.mask)
        else:
            second = model(batch.tokens)
            _, loss = provider.compute_alignment(aligner, output.hidden, second.hidden, batch.mask)
        return {"align": weight * loss}

    @hookimpl
    def apt_gradients_ready(self, state: RunState, model: nn.Module) -> None:
        """Let the average know what is trained."""
        if self._average is not None:
            self._average.see_gradients(_bare(model))

    @hookimpl
    def apt_step_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """Let the average follow, from the moment that the plugin is on."""
        if self._average is not None and _aligner(model)[0].active:
            self._average.update(_bare(model))

    @hookimpl
    def apt_checkpoint_save(self, state: RunState) -> Mapping[str, object] | None:
        """The average, where there is one."""
        return None if self._average is None else self._average.save()

    @hookimpl
    def apt_checkpoint_load(self, state: RunState, saved: Mapping[str, object]) -> None:
        """The average as it was saved; it is put in place when training starts."""
        self._saved = saved

    def _states(
        self, provider: BiState, model: nn.Module, batch: Batch, output: Output, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stable state and the one to align: logits where their distance is kl, else hidden states."""
        if provider.state == "layer":
            if earlier is None:
                raise RuntimeError("the earlier block has not run in this forward pass")
            return output.hidden, earlier
        if provider.state == "ema":
            if self._average is None:
                raise RuntimeError("there is no average of the weights before training starts")
            stable, align = self._average(_bare(model), batch.tokens), output
        else:
            stable, align = output, model(batch.tokens)
        return (stable.logits, align.logits) if provider.distance == "kl" else (stable.hidden, align.hidden)

    def _keep(self, block: nn.Module, arguments: tuple[object, ...], result: Tensor | Part) -> None:
        from apt.layers import as_part

        if block.training:
            self._earlier = as_part(result).output


def _contradictions(provider: BiState, config: APTConfig) -> list[Fault]:
    faults = []
    if provider.state == "dropout" and config.dropout == config.attention_dropout == 0:
        what = "dropout, but the model's dropout is 0, so two passes are equal"
        faults.append(Fault("model.align.state", what, "set model.dropout, or state: ema or layer"))
    if provider.state == "ema" and config.hardware.parallel == "fsdp":
        what = "ema, but under fsdp no rank has all of the weights that are averaged"
        faults.append(Fault("model.align.state", what, "set hardware.parallel: ddp, or state: layer or dropout"))
    if provider.state == "layer" and config.num_blocks < 2:
        faults.append(Fault("model.align.state", "layer, but a model of one block has no earlier one"))
    elif provider.layer is not None and provider.layer > config.num_blocks - 2:
        what = f"{provider.layer} is not before the last of {config.num_blocks} blocks"
        faults.append(Fault("model.align.layer", what, f"0 to {config.num_blocks - 2}"))
    return faults


def _aligner(model: nn.Module) -> tuple[nn.Module, AlignProvider]:
    """The model's aligner and its provider."""
    for module in model.modules():
        provider = getattr(module, "apt_provider", None)
        if isinstance(provider, AlignProvider):
            return module, provider
    raise RuntimeError("the plugin align is on, but this model holds no aligner")


def _bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers of data parallelism and compilation, whose parameters keep their own names."""
    for wrapper in ("module", "_orig_mod"):
        inner = getattr(model, wrapper, None)
        if inner is not None and hasattr(inner, "parameters"):
            return _bare(inner)
    return model
