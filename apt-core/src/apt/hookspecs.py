"""The moments of a run that plugins can take part in: pluggy hook specifications, all of them on this page.

A plugin implements those that it wants, as methods marked `hookimpl`, with any subset of the arguments. What may be
changed arrives as an object that an implementation changes in place (`Batch`, `Prompt`, `NextToken`); everything else
is for reading. Implementations run in the order of the profile's `plugins` list unless `tryfirst`/`trylast` says else.
The hooks of epochs, steps, batches, losses, gradients and evaluations reach a plugin only while it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from apt.core.config import APTConfig
    from apt.layers import Output
    from apt.modeling.model import Decoder

PROJECT = "apt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class RunState:
    """Where a run stands. `step` counts optimizer steps done, `epoch` finished epochs; both from 0."""

    step: int
    epoch: int
    max_steps: int
    max_epochs: int
    plugins_on: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Batch:
    """One micro-batch: `tokens` and `targets` [batch, seq] of ids, and `mask` [batch, seq], True where a target counts.

    An encoder-decoder has the `source` [batch, source] too, padded on the right.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None
    source: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is called with."""
        return (self.tokens,) if self.source is None else (self.tokens, self.source)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Another batch, of changed tensors."""
        mask, source = (None if each is None else change(each) for each in (self.mask, self.source))
        return Batch(change(self.tokens), change(self.targets), mask, source)


@dataclass
class Prompt:
    """The prompt before it is tokenized; a plugin may rewrite `text` and say in `sources` what it added."""

    text: str
    sources: list[str] = field(default_factory=list)


@dataclass
class NextToken:
    """The moment before a token is drawn: `tokens` [batch, seq] so far, `logits` [batch, vocab] that may be replaced."""

    tokens: Tensor
    logits: Tensor


class Hooks:
    """The specifications."""

    @hookspec
    def apt_config_resolved(self, config: APTConfig) -> None:
        """The profile is validated and its providers are known; nothing is built, and PyTorch is not loaded yet.

        Raise `ProfileError` for what cannot work; `apt-core check` reports it with all other faults.
        """

    @hookspec
    def apt_model_built(self, config: APTConfig, model: Decoder) -> None:
        """The model stands, with everything that the profile will ever switch on."""

    @hookspec
    def apt_training_start(self, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Before the first step of this process (on a resumed run too)."""

    @hookspec
    def apt_training_end(self, state: RunState, model: nn.Module) -> None:
        """After the last step, also when the run was interrupted."""

    @hookspec
    def apt_epoch_start(self, state: RunState) -> None:
        """Before the first step of an epoch."""

    @hookspec
    def apt_epoch_end(self, state: RunState) -> None:
        """After the last step of an epoch."""

    @hookspec
    def apt_phase_changed(self, state: RunState, plugin: str, model: nn.Module, optimizer: Optimizer) -> None:
        """The schedule has just switched `plugin` on in mid-run; its parts are about to run for the first time.

        Only the plugin that is switched on is called. Here sparse upcycling fills the experts.
        """

    @hookspec
    def apt_step_start(self, state: RunState) -> None:
        """Before the forward pass of an optimizer step; scheduled values are already set."""

    @hookspec
    def apt_batch_prepare(self, state: RunState, batch: Batch) -> None:
        """Each micro-batch before the model sees it; change `batch` in place."""

    @hookspec
    def apt_loss_extra(
        self, state: RunState, model: nn.Module, batch: Batch, output: Output
    ) -> Mapping[str, Tensor] | None:
        """Further losses of this micro-batch by name, already weighted, which are added to the loss.

        Each is a mean over the targets that count (`batch.mask`), and 0 where none does, which `cross_entropy` is not. It has the
        micro-batch's share of them in the step's loss, so that micro-batches and ranks are one large batch.
        """

    @hookspec
    def apt_gradients_ready(self, state: RunState, model: nn.Module) -> None:
        """All gradients of the step are there and clipped; the optimizer has not stepped yet."""

    @hookspec
    def apt_step_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """After the optimizer's step. `metrics` go to the log; add your own."""

    @hookspec
    def apt_evaluation_start(self, state: RunState, model: nn.Module) -> None:
        """Before the held-out text is scored."""

    @hookspec
    def apt_evaluation_end(self, state: RunState, model: nn.Module, metrics: dict[str, float]) -> None:
        """After the held-out text is scored; add to `metrics`."""

    @hookspec
    def apt_checkpoint_save(self, state: RunState) -> Mapping[str, object] | None:
        """What this plugin wants to find again after a resume: JSON values and tensors.

        Tensors named ``weights.<name>.<parameter>`` are other weights of the model, which ``--weights <name>`` uses. They are
        split over ranks as the parameter is, and come back so.
        """

    @hookspec
    def apt_checkpoint_load(self, state: RunState, saved: Mapping[str, object]) -> None:
        """What this plugin had saved."""

    @hookspec
    def apt_prompt_prepare(self, prompt: Prompt) -> None:
        """Before the prompt is tokenized; change `prompt` in place."""

    @hookspec
    def apt_logits_ready(self, state: RunState, next_token: NextToken) -> None:
        """Before each token is drawn; change `next_token.logits`."""

    @hookspec
    def apt_generation_end(self, prompt: Prompt, text: str) -> None:
        """After the last token."""
