"""The loop: a profile becomes a trained model, and every switch, value and moment of it is where the profile says.

Each step: the schedule sets its buffers; the micro-batches give loss and gradient; the proof of use is made where it is due; the
gradient is clipped; the optimizer steps; the hooks are called in between. Nothing of a step depends on how often the run was
evaluated, interrupted or killed.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.profile import dump_resolved, read_resolved
from apt.core.providers import Tokenizer
from apt.core.resolve import Resolved, resolve_config
from apt.core.schedules import Schedule
from apt.data.batches import windows
from apt.errors import AptError, CheckpointError, UserError
from apt.hookspecs import Batch, RunState
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt.training.assembly import assemble
from apt.training.calibration import settle
from apt.training.changes import check_changes
from apt.training.checkpoint import (
    IMPORTED,
    PROFILE,
    RandomState,
    find_checkpoint,
    list_checkpoints,
    read_saved,
    restore,
    restore_random,
    take_snapshot,
    verify,
)
from apt.training.evaluate import Score, evaluate, score
from apt.training.guard import explain_memory, find_source
from apt.training.loss import LossStep, distribute
from apt.training.plot import plot_run
from apt.training.progress import Report
from apt.training.ranks import Ranks, join_ranks
from apt.training.record import Metrics, write_card, write_record
from apt.training.saver import Saver
from apt.training.watch import SpikeDetector, Stopwatch, stop_signals

MAX_TROUBLES = 10
"""Steps in a row that may be skipped or gone back from before a run is given up."""


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    folder: Path
    state: RunState
    resolved: Resolved
    validation: Score
    model: Decoder
    tokenizer: Tokenizer
    plot: Path | None
    interrupted: bool = False


class Trainer:
    """One run in the folder `out`: in one process, or in those that `torchrun` started.

    `resume` is ``"never"`` (the folder must be new), ``"auto"`` (go on from the folder's newest checkpoint, where it has one),
    or the path of a checkpoint, whose providers must be exactly those of now where `strict_lock` is set.
    """

    def __init__(
        self,
        config: APTConfig,
        out: Path | str,
        *,
        resolved: Resolved | None = None,
        resume: str = "never",
        strict_lock: bool = False,
        console: Console | None = None,
    ) -> None:
        self.config, self.out, self.resume, self.strict_lock = config, Path(out), resume, strict_lock
        self.resolved = resolve_config(config) if resolved is None else resolved
        self.console = Console() if console is None else console
        self.hooks = HookRunner(self.resolved.plugins)
        self.schedule = Schedule(config)
        self._stop = False
        self.scored, self.scored_at = Score(math.nan, math.nan, 0), -1
        self.saved_at, self.saved_when = -1, time.monotonic()
        self.left_out = 0
        """Steps' worth of text that was read and left out, since a number was not finite there."""
        self.troubles = 0
        """Steps in a row whose numbers were not finite."""

    def fit(self) -> RunResult:
        """Train to the end, or until Ctrl-C or SIGTERM, which finish the step and save.

        Raises `UserError` and its kin before anything is written where the run cannot be.
        """
        with join_ranks(self.config) as ranks:
            return self._fit(ranks)

    def _fit(self, ranks: Ranks) -> RunResult:
        self.ranks = ranks
        self.out = Path(str(ranks.gather(str(self.out))[0]))
        if not ranks.is_main:
            self.console = Console(quiet=True)
        ranks.check_equal("the providers (their lock)", make_lock(self.resolved).digest)
        self.checkpoint = self._find_checkpoint()
        ranks.wait()
        self._prepare()
        parameters = sum(each.numel() for each in self.model.parameters())
        if ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / PROFILE).write_text(dump_resolved(self.config, self.resolved))
            if self.checkpoint is None:
                write_record(
                    self.out, self.config, self.resolved, self.corpus.digest, parameters, self.calibration.to_dict()
                )
        self.metrics = Metrics(self.out if ranks.is_main else None, self.state.step if self.checkpoint else None)
        name = f"{self.config.name} ({parameters / 1e6:.2f} M{f', {ranks.size} ranks' if ranks.size > 1 else ''})"
        try:
            with (
                Report(self.console, name, self.state.step, self.state.max_steps) as report,
                stop_signals(self._stop_soon),
            ):
                self.report = report
                if self.checkpoint is not None:
                    report.line(f"resumed from {self.checkpoint} at step {self.state.step}")
                with explain_memory(), self.calibration.applied():
                    self._run()
        finally:
            self.saver.close()
            self.metrics.close()
        return self._finish()

    # Before the first step

    def _find_checkpoint(self) -> Path | None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; give a folder as --out")
        if self.resume == "never":
            if self.out.is_dir() and any(self.out.iterdir()):
                raise UserError(f"{self.out}: is not empty; give another --out, or --resume auto to go on there")
            return None
        if self.resume == "auto":
            if not list_checkpoints(self.out):
                return None
            folder = find_checkpoint(self.out)
        else:
            folder = find_checkpoint(Path(self.resume))
        verify(folder)
        return folder

    def _prepare(self) -> None:
        config = self.config
        if self.checkpoint is not None:
            # Before anything is built, since what may not change might not fit either.
            saved = read_resolved(self.checkpoint / PROFILE).config
            for line in check_changes(self.checkpoint, saved, config):
                self._warn(f"the profile has changed since {self.checkpoint.name}: {line}")
        parts = assemble(config, self.resolved, self.ranks, self.checkpoint, self.console)
        self.device, self.corpus, self.tokenizer = parts.device, parts.corpus, parts.tokenizer
        self.validation, self.batches, self.steps_per_epoch = parts.validation, parts.batches, parts.steps_per_epoch
        self.model, self.buffers, self.optimizer = parts.model, parts.buffers, parts.optimizer
        self.rate, self.proof = parts.rate, parts.proof
        self.state = RunState(0, 0, parts.max_steps, parts.max_epochs)
        for line in self.schedule.list_unreached(parts.max_steps, parts.steps_per_epoch, parts.max_epochs):
            self._warn(line)
        self.saver = Saver(
            self.out,
            keep_last=config.training.keep_last,
            keep_best=config.training.keep_best,
            asynchronous=config.training.async_save,
        )
        self.hooks.hook.apt_model_built(config=config, model=self.model)
        if self.checkpoint is not None:
            self._resume(self.checkpoint)
        kept = None if self.checkpoint is None else read_saved(self.checkpoint)["progress"].get("calibration")
        tokens = self.ranks.share(self.batches.get(0).tokens).to(self.device)
        self.calibration = settle(self.model, tokens, config, kept, self.ranks, self.console)
        if config.training.compile:
            for block in self.model.blocks:
                block.compile(fullgraph=False)
        self.forward = distribute(LossStep(self.model, self.hooks, config.training.precision), self.ranks)

    def _resume(self, folder: Path) -> None:
        """Go on from a checkpoint, with what a profile may change since."""
        saved = read_saved(folder)
        if saved["corpus"] not in (IMPORTED, self.corpus.digest):
            raise CheckpointError(f"{folder}: was trained on another text than data.source gives now")
        for fault in check_lock(Lock.from_dict(saved["lock"]), make_lock(self.resolved), strict=self.strict_lock):
            self._warn(f"{folder.name}: {fault}")
        if saved["step"] >= self.state.max_steps:
            step = saved["step"]
            raise CheckpointError(f"{folder}: step {step} is the end of this profile; raise max_epochs or max_steps")
        self.left_out = saved["progress"]["left_out"]
        self.saver.best = saved["progress"]["best"]
        self._restore(folder)

    def _restore(self, folder: Path) -> None:
        state, hooks = restore(folder, self.model, self.optimizer)
        self.state = replace(
            self.state, step=state.step, epoch=state.epoch, plugins_on=state.plugins_on, values=state.values
        )
        for plugin in self.config.plugins:
            set_active(self.model, plugin, plugin in state.plugins_on)
        self._set_values()
        self.hooks.load_state(self.state, hooks)

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    # The steps

    def _run(self) -> None:
        hook, model = self.hooks.hook, self.model.train()
        hook.apt_training_start(state=self.state, model=model, optimizer=self.optimizer)
        self._watch = Stopwatch()
        self._spikes = None if self.config.monitoring.spike is None else SpikeDetector(self.config.monitoring.spike)
        if self.checkpoint is not None and not restore_random(self.checkpoint, self.ranks.rank):
            self._warn(f"{self.checkpoint.name} was saved by fewer ranks; rank {self.ranks.rank} draws anew")
        try:
            while self.state.step < self.state.max_steps and not self._stop:
                within = self.state.step % self.steps_per_epoch
                self._enter_step(first_of_epoch=within == 0)
                self._step()
                if within + 1 == self.steps_per_epoch:
                    self.state = replace(self.state, epoch=self.state.epoch + 1)
                    hook.apt_epoch_end(state=self.state)
                self._stop = self.ranks.any(self._stop)
                self._look_after()
        finally:
            hook.apt_training_end(state=self.state, model=model)
        if self._stop and self.saved_at != self.state.step:
            self._save()

    def _enter_step(self, first_of_epoch: bool) -> None:
        """Set scheduled values and switches for the step that is about to run."""
        state = self.state
        values = self.schedule.get_all_params(state.epoch, state.step, state.max_epochs, state.max_steps)
        on = tuple(self.schedule.list_enabled_plugins(self.config.plugins, state.epoch, state.step))
        self.state = replace(state, values=values, plugins_on=on)
        self._set_values()
        for plugin in on:
            if plugin not in state.plugins_on:
                self._switch_on(plugin)
        if first_of_epoch:
            self.hooks.hook.apt_epoch_start(state=self.state)
        self.hooks.hook.apt_step_start(state=self.state)

    @torch.no_grad()
    def _set_values(self) -> None:
        for name, value in self.state.values.items():
            for buffer in self.buffers.get(name, ()):
                buffer.fill_(value)

    def _switch_on(self, plugin: str) -> None:
        """Switch a plugin on; in mid-run, measure one fixed batch before and after."""
        if self.state.step == 0:
            set_active(self.model, plugin, True)
            return
        before = self._fixed_loss()
        set_active(self.model, plugin, True)
        self.hooks.phase_changed(plugin, self.state, self.model, self.optimizer)
        after = self._fixed_loss()
        step = self.state.step
        self.metrics.write(
            "switch", step=step, epoch=self.state.epoch, plugin=plugin, loss_before=before, loss_after=after
        )
        self.report.line(
            f"step {step}: {plugin} on; held-out loss of one batch {before:.6f} -> {after:.6f} ({after - before:+.1e})"
        )

    def _fixed_loss(self) -> float:
        batches = windows(self.validation, self.config.max_seq_len, self.config.training.batch_size, 1)
        return score(self.model, batches, bytes_per_token=1.0, device=self.device, ranks=self.ranks)[0].loss

    def _step(self) -> None:
        config, model, hook = self.config, self.model, self.hooks.hook
        due = self.proof.due() if self.proof.pending else []
        self.proof.watch(due)
        first = (self.state.step + self.left_out) * config.training.accumulate
        micro = [self._batch(first + index) for index in range(config.training.accumulate)]
        total = self._backward(micro)
        parameters = [each for each in model.parameters() if each.grad is not None]
        total_norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        norm = total_norm.item()
        if not math.isfinite(norm):
            self.proof.abandon()
            self._not_finite(first, micro)
            return
        self.troubles = 0
        nn.utils.clip_grads_with_norm_(parameters, config.gradient_clip or math.inf, total_norm)
        self.proof.check(due, self.state.step)
        hook.apt_gradients_ready(state=self.state, model=model)
        rate = self.rate(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = replace(self.state, step=self.state.step + 1)
        metrics: dict[str, float] = {}
        hook.apt_step_end(state=self.state, model=model, metrics=metrics)
        self._watch.done(total)
        step = self.state.step
        if step % config.monitoring.log_every == 0 or step in (1, self.state.max_steps):
            self._log(rate, norm, metrics)

    def _backward(self, micro: list[Batch]) -> int:
        """The gradient of the mean loss over all tokens of the step, of all ranks; returns how many tokens that are."""
        counts = [each.targets.numel() if each.mask is None else int(each.mask.sum()) for each in micro]
        total = max(1, int(self.ranks.sum({"": torch.tensor(sum(counts))})[""]))
        # Proofs watch modules run, which a compiled block does not show.
        stance = torch.compiler.set_stance("force_eager") if self.proof.pending else contextlib.nullcontext()
        step_loss = torch.zeros((), device=self.device)
        for number, (batch, count) in enumerate(zip(micro, counts, strict=True), 1):
            # Gradients are averaged over the ranks, once a step.
            held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(self.forward, DistributedDataParallel) and number < len(micro):
                held = self.forward.no_sync()
            with stance, held:
                share, told = self.forward(
                    self.state, batch, weight=count * self.ranks.size / total, extra_weight=1 / len(micro)
                )
                torch.autograd.backward(share)
            step_loss = step_loss + told.pop("loss") * (count / total)
            for name, loss in told.items():
                self._watch.add(f"loss_{name}", loss / (len(micro) * self.ranks.size))
        self._watch.add("loss", step_loss)
        if self._spikes is not None:
            loss = self.ranks.sum({"": step_loss})[""].item()
            if self._spikes.is_spike(loss):
                self.metrics.write("spike", step=self.state.step, epoch=self.state.epoch, loss=loss)
                self.report.line(f"step {self.state.step}: the loss spikes to {loss:.3f}")
        return total

    def _batch(self, index: int) -> Batch:
        """This rank's part of a micro-batch, as the plugins leave it."""
        whole = self.batches.get(index)
        batch = Batch(*(self.ranks.share(each).to(self.device) for each in (whole.tokens, whole.targets)))
        self.hooks.hook.apt_batch_prepare(state=self.state, batch=batch)
        return batch

    def _not_finite(self, first: int, micro: list[Batch]) -> None:
        """Stop, skip the step, or go back, as the profile says."""
        step, action = self.state.step, self.config.training.on_nonfinite
        what = (
            f"step {step}: the gradient is not finite (micro-batches {first} to {first + len(micro) - 1} of seed "
            f"{self.config.training.seed}): {find_source(self.model, micro)}"
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.troubles += 1
        advice = "lower training.learning_rate or training.gradient_clip; the last checkpoint is untouched"
        if action == "stop":
            raise AptError(f"{what}; {advice}")
        if self.troubles > MAX_TROUBLES:
            raise AptError(f"{what}; this is the {self.troubles}th time in a row; {advice}")
        self.metrics.write("nonfinite", step=step, epoch=self.state.epoch, action=action, what=what)
        if action == "skip":
            self.report.line(f"{what}; the step is skipped")
            self.state = replace(self.state, step=step + 1)
            return
        self.saver.wait()
        self.ranks.wait()
        whole = list_checkpoints(self.out)
        if not whole:
            raise AptError(f"{what}; there is no checkpoint to go back to; {advice}")
        self._restore(whole[-1])
        restore_random(whole[-1], self.ranks.rank)
        self.left_out += step + 1 - self.state.step
        self.report.line(f"{what}; back to step {self.state.step}, what was read since is left out")

    # Between the steps

    def _log(self, rate: float, norm: float, metrics: dict[str, float]) -> None:
        sums, speed = self._watch.read()
        seen = {name: value.item() for name, value in self.ranks.sum(sums).items()}
        state = self.state
        self.metrics.write(
            "train",
            step=state.step,
            epoch=state.epoch,
            split="train",
            **seen,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=round(speed, 1),
            values=dict(state.values),
            plugins_on=list(state.plugins_on),
            **metrics,
        )
        self.report.step(state.step, seen["loss"], speed, rate, state.plugins_on, state.values)

    def _look_after(self) -> None:
        """Evaluate and save where it is time to."""
        step, last = self.state.step, self.state.step == self.state.max_steps
        if last or step % (self.config.evaluation.eval_every or self.steps_per_epoch) == 0:
            self._evaluate()
        if last or self._is_time_to_save():
            self._save()

    def _is_time_to_save(self) -> bool:
        every = self.config.training.save_every
        if isinstance(every, str):
            # The main rank's clock is everybody's.
            late = time.monotonic() - self.saved_when >= 60 * float(every.removesuffix("min"))
            return self.ranks.any(late and self.ranks.is_main)
        return self.state.step % (every or self.steps_per_epoch) == 0

    def _evaluate(self) -> None:
        with self._watch.paused():
            hook, state, extra = self.hooks.hook, self.state, dict[str, float]()
            hook.apt_evaluation_start(state=state, model=self.model)
            scored, seen = evaluate(
                self.model,
                self.validation,
                seq_len=self.config.max_seq_len,
                batch_size=self.config.training.batch_size,
                max_batches=self.config.evaluation.max_batches,
                device=self.device,
                ranks=self.ranks,
            )
            hook.apt_evaluation_end(state=state, model=self.model, metrics=extra)
            self.metrics.write(
                "evaluation",
                step=state.step,
                epoch=state.epoch,
                split="validation",
                loss=scored.loss,
                bits_per_byte=scored.bits_per_byte,
                values=dict(state.values),
                plugins_on=list(state.plugins_on),
                **{name: metric.tolist() for name, metric in seen.items()},
                **extra,
            )
            self.report.line(
                f"step {state.step}: held-out loss {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits a byte"
            )
            self.scored, self.scored_at = scored, self.state.step

    def _save(self) -> None:
        with self._watch.paused():
            randoms = [each for each in self.ranks.gather(RandomState.now()) if isinstance(each, RandomState)]
            hooks = self.hooks.save_state(self.state)
            if self.ranks.is_main:
                snapshot = take_snapshot(
                    config=self.config,
                    resolved=self.resolved,
                    model=self.model,
                    optimizer=self.optimizer,
                    tokenizer=self.tokenizer,
                    state=self.state,
                    hooks=hooks,
                    corpus_digest=self.corpus.digest,
                    progress={
                        "left_out": self.left_out,
                        "best": self.saver.best,
                        "calibration": self.calibration.to_dict(),
                    },
                    randoms=randoms,
                    copy=self.saver.copies,
                )
                fresh = self.scored_at == self.state.step
                self.saver.save(snapshot, self.scored.loss if fresh else None)
            self.ranks.wait()
            self.saved_at, self.saved_when = self.state.step, time.monotonic()

    def _stop_soon(self, signal: str) -> None:
        self._stop = True
        self.report.line(f"{signal}: finishing this step, then saving (again to leave at once)")

    def _finish(self) -> RunResult:
        interrupted = self._stop and self.state.step < self.state.max_steps
        if interrupted:
            again = f"go on with --resume auto --out {self.out}"
            self.report.line(f"stopped at step {self.state.step}; saved in {self.out}; {again}")
        picture = None
        if self.ranks.is_main:
            picture = plot_run(self.out) if self.config.monitoring.plot else None
            results = {
                "steps": self.state.step,
                "held-out loss (nats a token)": f"{self.scored.loss:.4f}",
                "held-out bits a byte": f"{self.scored.bits_per_byte:.4f}",
            }
            write_card(self.out, self.config, self.resolved, results)
        model = self.model.eval()
        return RunResult(self.out, self.state, self.resolved, self.scored, model, self.tokenizer, picture, interrupted)
