"""The plugin `align`: adds the alignment loss to each micro-batch, and costs nothing while its weight is 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from apt.core import registry
from apt.core.providers import AlignProvider, Plugin
from apt.errors import Fault, ProfileError
from apt.hookspecs import Batch, RunState, hookimpl
from apt_align.provider import BiState, Consistency

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from apt.core.config import APTConfig
    from apt.layers import Output, Part
    from apt_align.average import Average

MIN_TOKENS, MAX_TOKENS = 4, 1024
"""Of which the metric `align_cka` is computed."""


class AlignPlugin(Plugin):
    """Makes the further states of a batch, and the loss of them all.

    Where they come from the aligner says: further forward passes (`dropout`), a pass of the averaged weights (`ema`),
    the output of an earlier block, kept by a forward hook during the pass that the trainer makes anyway (`layer`), or
    what followed similar tokens of earlier batches (`evidence`). An aligner of another package gets the hidden states
    of two passes.

    At each evaluation the metric `align_cka` says how alike the two states of the last training batch were: the debiased
    linear CKA of their hidden states, 1 for equal ones, of at most 1,024 tokens of this process.
    """

    api_level: ClassVar[int] = 1

    _aligner: nn.Module | None = PrivateAttr(default=None)
    _earlier: Tensor | None = PrivateAttr(default=None)
    _hook: RemovableHandle | None = PrivateAttr(default=None)
    _average: Average | None = PrivateAttr(default=None)
    _saved: Mapping[str, object] | None = PrivateAttr(default=None)
    _seen: tuple[Tensor, Tensor] | None = PrivateAttr(default=None)

    @hookimpl
    def apt_config_resolved(self, config: APTConfig) -> None:
        """Refuse what cannot work."""
        provider = registry.resolve("align", config.choice("align")).provider
        if isinstance(provider, Consistency) and (faults := list(_contradictions(provider, config))):
            raise ProfileError(faults)

    @hookimpl
    def apt_training_start(self, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Get ready to keep an earlier block's output, or an average of the weights."""
        self._aligner, provider = _find_aligner(model)
        # A process may train one model after another with the same plugin.
        saved, self._saved, self._average = self._saved, None, None
        if not isinstance(provider, Consistency):
            return
        if provider.source == "layer":
            blocks = list(_bare(model).get_submodule("blocks").children())
            chosen = provider.layer if isinstance(provider, BiState) else None
            block = blocks[(len(blocks) - 1) // 2 if chosen is None else chosen]
            self._hook = block.register_forward_hook(self._keep)
        if provider.average_decay is not None:
            from apt_align.average import Average

            self._average = Average(provider.average_decay)
            if saved is not None:
                self._average.load(saved)
                self._average.to(next(model.parameters()).device)

    @hookimpl
    def apt_training_end(self, state: RunState, model: nn.Module) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._earlier = self._seen = self._aligner = self._saved = None

    @hookimpl
    def apt_step_start(self, state: RunState) -> None:
        """Follow the warm-up."""
        provider = getattr(self._aligner, "apt_provider", None)
        if isinstance(provider, Consistency) and provider.warmup is not None and self._aligner is not None:
            self._aligner.get_buffer("weight").fill_(provider.get_weight(state.epoch, state.max_epochs))

    @hookimpl
    def apt_loss_extra(
        self, state: RunState, model: nn.Module, batch: Batch, output: Output
    ) -> Mapping[str, Tensor] | None:
        """The weighted loss of this micro-batch; None, and no second pass, where its weight is 0."""
        aligner, provider = _find_aligner(model)
        earlier, self._earlier = self._earlier, None
        if not getattr(aligner, "active", True):
            return None
        if not isinstance(provider, Consistency):
            weight = state.values.get("align_weight", 1.0)
            return {"align": weight * self._foreign(aligner, provider, model, batch, output)} if weight else None
        weight = state.values.get("align_weight", provider.get_weight(state.epoch, state.max_epochs))
        if weight == 0:
            return None
        if provider.source == "dropout":
            outputs = [output, *(model(batch.tokens) for _ in range(provider.num_passes - 1))]
            losses = {"align": weight * aligner(*_states(provider, *outputs), mask=batch.mask)}
            if provider.scores_all_passes:
                losses["align_passes"] = _mean_surplus(outputs, batch)
            self._note(output.hidden, outputs[1].hidden)
            return losses
        stable, align = self._pair(aligner, provider, model, batch, output, earlier)
        return {"align": weight * aligner(stable, align, mask=batch.mask)}

    @hookimpl
    def apt_gradients_ready(self, state: RunState, model: nn.Module) -> None:
        """Let the average know what is trained."""
        if self._average is not None:
            self._average.see_gradients(_bare(model))

    @hookimpl
    def apt_step_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """Let the average follow, from the moment that the plugin is on."""
        if self._average is not None and _find_aligner(model)[0].active:
            self._average.update(_bare(model))

    @hookimpl
    def apt_evaluation_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """How alike the states of the last batch were."""
        if self._seen is not None and len(self._seen[0]) >= MIN_TOKENS:
            from apt_align.functional import cka

            alike = cka(*self._seen).item()
            if math.isfinite(alike):
                metrics["align_cka"] = alike

    @hookimpl
    def apt_checkpoint_save(self, state: RunState) -> Mapping[str, object] | None:
        """The average, where there is one."""
        return None if self._average is None else self._average.save()

    @hookimpl
    def apt_checkpoint_load(self, state: RunState, saved: Mapping[str, object]) -> None:
        """The average as it was saved; it is put in place when training starts."""
        self._saved = saved
        if self._average is not None:
            self._average.load(saved)

    def _pair(
        self,
        aligner: nn.Module,
        provider: Consistency,
        model: nn.Module,
        batch: Batch,
        output: Output,
        earlier: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The stable state and the one to align, of an aligner that needs no further pass with gradient."""
        if provider.source == "layer":
            if earlier is None:
                raise RuntimeError("the earlier block has not run in this forward pass")
            self._note(output.hidden, earlier)
            return output.hidden, earlier
        if provider.source == "ema":
            if self._average is None:
                raise RuntimeError("there is no average of the weights before training starts")
            teacher = self._average(_bare(model), batch.tokens)
            self._note(teacher.hidden, output.hidden)
            stable, align = _states(provider, teacher, output)
            return stable, align
        evidence = aligner.get_submodule("evidence")
        stable = evidence(output.hidden, output.logits)
        evidence.remember(output.hidden, batch.targets, batch.mask)  # type: ignore[operator]
        return stable, output.logits

    def _foreign(
        self, aligner: nn.Module, provider: AlignProvider, model: nn.Module, batch: Batch, output: Output
    ) -> Tensor:
        second = model(batch.tokens)
        self._note(output.hidden, second.hidden)
        return provider.compute_alignment(aligner, output.hidden, second.hidden, batch.mask)[1]

    def _note(self, one: Tensor, two: Tensor) -> None:
        """Keep some tokens of two states [batch, seq, features], evenly spread, for `align_cka`."""
        every = -(-one.shape[0] * one.shape[1] // MAX_TOKENS)
        first, second = (each.detach().flatten(0, 1)[::every] for each in (one, two))
        self._seen = first, second

    def _keep(self, block: nn.Module, arguments: tuple[object, ...], result: Tensor | Part) -> None:
        from apt.layers import as_part

        if block.training:
            self._earlier = as_part(result).output


def _states(provider: Consistency, *outputs: Output) -> tuple[Tensor, ...]:
    """What is compared: logits where the distance is kl, else hidden states."""
    return tuple(each.logits if provider.distance == "kl" else each.hidden for each in outputs)


def _mean_surplus(outputs: Sequence[Output], batch: Batch) -> Tensor:
    """What makes the first pass's cross entropy, which the trainer adds, the mean of all passes'."""
    from torch.nn.functional import cross_entropy

    targets = batch.targets if batch.mask is None else batch.targets.masked_fill(~batch.mask, -100)
    # The mean of no target is 0, where that of `cross_entropy` is no number.
    count = (targets != -100).sum().clamp(min=1)
    first, *others = (
        cross_entropy(each.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum") / count
        for each in outputs
    )
    surplus: Tensor = sum(others, start=first) / len(outputs) - first
    return surplus


def _contradictions(provider: Consistency, config: APTConfig) -> list[Fault]:
    faults = []
    if provider.warmup is not None and "align_weight" in config.schedules:
        what = "warms the weight up, and the schedule align_weight sets it too"
        faults.append(Fault("model.align.warmup", what, "keep one of them"))
    epochs = config.training.max_epochs
    if provider.warmup is not None and epochs is not None and provider.warmup >= epochs:
        what = f"{provider.warmup} epochs at weight 0 are the whole run of {epochs}"
        faults.append(Fault("model.align.warmup", what, f"at most {epochs - 1}"))
    where = "model.align.state" if isinstance(provider, BiState) else "model.align"
    if provider.source == "dropout" and config.dropout == config.attention_dropout == 0:
        named = "dropout" if isinstance(provider, BiState) else provider.get_name()
        what = f"{named}, but the model's dropout is 0, so two passes are equal"
        faults.append(Fault(where, what, "set model.dropout, or use bistate_default with state: ema or layer"))
    if not isinstance(provider, BiState):
        return faults
    if provider.state == "layer" and config.num_blocks < 2:
        faults.append(Fault("model.align.state", "layer, but a model of one block has no earlier one"))
    elif provider.layer is not None and provider.layer > config.num_blocks - 2:
        what = f"{provider.layer} is not before the last of {config.num_blocks} blocks"
        faults.append(Fault("model.align.layer", what, f"0 to {config.num_blocks - 2}"))
    return faults


def _find_aligner(model: nn.Module) -> tuple[nn.Module, AlignProvider]:
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
