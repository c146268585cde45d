"""One optimizer step: micro-batches, loss, gradient, proof of use, clipping, update. Nothing of it is kept from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.data.batches import Batches, send
from apt.data.pairs import PairBatches
from apt.errors import AptError, NotFiniteError
from apt.hookspecs import Batch, RunState
from apt.modeling.model import Decoder
from apt.training.guard import find_source
from apt.training.optim import leaves_out
from apt.training.parallel import Parallel, alike, clip, gradient_norm
from apt.training.proof import ProofOfUse
from apt.training.ranks import Ranks

BESIDE = ("cuda",)
"""Devices that work beside the processor, so that the update is worth asking for before the numbers are read."""
ANOMALY = "returned nan values"
"""What PyTorch says where `debug.detect_anomaly` looks and finds."""


@dataclass(frozen=True)
class Done:
    """A step that was taken: the state after it, and what is to be said of it."""

    state: RunState
    tokens: int
    """Targets that counted, of all ranks."""
    losses: dict[str, Tensor]
    """This rank's share in the step's losses, by name, in the processor's memory; their sum over all ranks is the step's."""
    norm: float
    rate: float
    metrics: dict[str, float]


class Reading:
    """Numbers on their way to the processor's memory. What is asked of the device after it was made is not waited for."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> Tensor:
        """The numbers, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers


class Step:
    """Takes the steps of a run, one by one."""

    def __init__(
        self,
        config: APTConfig,
        *,
        hooks: HookRunner,
        model: Decoder,
        optimizer: Optimizer,
        parallel: Parallel,
        batches: Batches | PairBatches,
        rate: Callable[[int], float],
        proof: ProofOfUse,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.config, self.hooks, self.model, self.optimizer = config, hooks, model, optimizer
        self.parallel, self.batches, self.rate, self.proof = parallel, batches, rate, proof
        self.ranks, self.device = ranks, device
        self.groups = alike([each for each in model.parameters() if each.requires_grad])
        self._fetched: dict[int, Batch] = {}

    def take(self, state: RunState, first: int) -> Done:
        """Train on the micro-batches from number `first` on.

        Raises `NotFiniteError`, on all ranks, with nothing changed, where the loss or the gradient is not finite.
        """
        with self._all_or_nothing():
            return self._take(state, first)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where the run goes on after a step that is not taken, buffers are put back: they have counted and remembered it."""
        goes_on = self.config.training.on_nonfinite != "stop"
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if goes_on else []
        try:
            yield
        except NotFiniteError:
            with torch.no_grad():
                for buffer, was in before:
                    buffer.copy_(was)
            raise

    def _take(self, state: RunState, first: int) -> Done:
        due = self.proof.due(state)
        self.proof.watch(due)
        micro = [self._batch(state, first + index) for index in range(self.config.training.accumulate)]
        losses: dict[str, Tensor] = {}
        try:
            with torch.autograd.set_detect_anomaly(self.config.debug.detect_anomaly):
                tokens = self._backward(state, micro, losses, eager=bool(due))
        except RuntimeError as error:
            if ANOMALY not in str(error):
                raise
            self._stop_at(error, state, first, micro, losses)
        self.parallel.gather(self.groups)
        total_norm = gradient_norm(self.groups)
        # Read in one go: on a GPU each reading waits until all that was asked of it before is done.
        numbers = torch.stack([each.to(self.device) for each in (total_norm, *losses.values())])
        reading, rate = Reading(numbers), self.rate(state.step)
        ahead = not due and self._may_go_ahead(state)
        if ahead:
            self._update_unless_broken(rate, total_norm.to(self.device), numbers)
            if state.step + 1 < state.max_steps:
                self._fetch(first + len(micro))
        read = reading.wait()
        if self.ranks.any(not bool(read.isfinite().all())):
            raise NotFiniteError(self._give_up(state, first, micro, losses))
        if not ahead:
            clip(self.groups, self.config.gradient_clip, total_norm)
        self.proof.check(due, state, losses)
        if not ahead:
            self.hooks.hook.apt_gradients_ready(state=state, model=self.model)
            self._update(rate)
        self._forget_gradients()
        state = replace(state, step=state.step + 1)
        metrics: dict[str, float] = {}
        self.hooks.hook.apt_step_end(state=state, model=self.model, metrics=metrics)
        return Done(state, tokens, dict(zip(losses, read[1:], strict=True)), read[0].item(), rate, metrics)

    def _may_go_ahead(self, state: RunState) -> bool:
        """Whether the update may be asked for before it is known that the numbers are finite: nobody is to see the gradient in
        between, and the optimizer leaves a step out by itself."""
        return (
            self.device.type in BESIDE
            and self.ranks.is_alone
            and not self.hooks.uses("apt_gradients_ready")
            and not self.proof.awaits(state)
            and leaves_out(self.optimizer)
        )

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _forget_gradients(self) -> None:
        # As `zero_grad` does, which takes ten times as long, while a GPU waits for the next forward pass.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _update_unless_broken(self, rate: float, norm: Tensor, numbers: Tensor) -> None:
        """Clip and update, or, where one of the `numbers` is not finite, neither, which the device decides by itself."""
        broken = numbers.isfinite().all().logical_not()
        # A norm that is not finite would spoil the gradients, which are yet to say where it came from.
        clip(self.groups, self.config.gradient_clip, norm.masked_fill(broken, 0.0))
        # As `torch.amp.GradScaler` does it: the fused kernel then changes no weight and no moment, and counts no step.
        self.optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
        try:
            self._update(rate)
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _batch(self, state: RunState, index: int) -> Batch:
        """This rank's part of a micro-batch, as the plugins leave it."""
        batch = self._fetched.pop(index) if index in self._fetched else self._load(index)
        self.hooks.hook.apt_batch_prepare(state=state, batch=batch)
        return batch

    def _load(self, index: int) -> Batch:
        return self.batches.get(index).map(lambda each: send(self.ranks.share(each), self.device))

    def _fetch(self, first: int) -> None:
        """The micro-batches that the next step most likely wants, while the device is busy; what it does not want is left."""
        self._fetched = {index: self._load(index) for index in range(first, first + self.config.training.accumulate)}

    def _backward(self, state: RunState, micro: list[Batch], losses: dict[str, Tensor], *, eager: bool) -> int:
        """The gradient of the mean loss over all tokens of the step, of all ranks; returns how many, and adds to `losses`."""
        counts = [each.targets.numel() if each.mask is None else int(each.mask.sum()) for each in micro]
        total = max(1, int(self.ranks.sum({"": torch.tensor(sum(counts))})[""]))
        # Proofs watch modules run, which a compiled block does not show.
        stance = torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()
        for number, (batch, count) in enumerate(zip(micro, counts, strict=True), 1):
            with stance, self.parallel.micro_batch(last=number == len(micro)):
                # Gradients are averaged over the ranks.
                share, told = self.parallel.forward(
                    state, batch, weight=count * self.ranks.size / total, extra_weight=1 / len(micro)
                )
                for name, value in told.items():
                    part = value / self.ranks.size
                    losses[name] = losses[name] + part if name in losses else part
                torch.autograd.backward(share)
        return total

    def _give_up(self, state: RunState, first: int, micro: list[Batch], losses: dict[str, Tensor]) -> str:
        """Leave nothing of the step behind, and say what was not finite."""
        self.proof.abandon()
        what = self._explain(state, first, micro, losses)
        self._forget_gradients()
        return what

    def _stop_at(
        self, anomaly: RuntimeError, state: RunState, first: int, micro: list[Batch], losses: dict[str, Tensor]
    ) -> NoReturn:
        """What `debug.detect_anomaly` found. Other ranks cannot be asked within a backward pass, so the run ends there."""
        if self.ranks.size > 1:
            raise AptError(f"step {state.step}, rank {self.ranks.rank}: not finite: {anomaly}") from anomaly
        raise NotFiniteError(f"{self._give_up(state, first, micro, losses)}; {anomaly}") from anomaly

    def _explain(self, state: RunState, first: int, micro: list[Batch], losses: dict[str, Tensor]) -> str:
        """Which step, which batch, and whose modules; from the rank that saw it first."""
        source = find_source(self.model, self.parallel.step.autocast(self.device), micro, losses)
        found = self.ranks.gather(source)
        # An output, or a loss, is nearer to the cause than the gradients, which the exchange has spoilt everywhere.
        rank = min(range(len(found)), key=lambda each: found[each].where)
        who = f", rank {rank}" if self.ranks.size > 1 and found[rank].where < 2 else ""
        last = first + len(micro) - 1
        return (
            f"step {state.step}: the loss or its gradient is not finite (micro-batches {first} to {last} of seed "
            f"{self.config.training.seed}{who}): {found[rank].what}"
        )
