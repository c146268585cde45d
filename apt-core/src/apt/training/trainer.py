"""The loop: a profile becomes a trained model, and every switch, value and moment of it is where the profile says.

A run is steps (`apt.training.step`) between the moments that belong to them: the phase is entered, with its values and switches
(`apt.training.phases`); the step is taken; it is logged, and the model is evaluated and saved where it is time to. Nothing of a
step depends on how often the run was evaluated, interrupted or killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.profile import dump_resolved, to_profile
from apt.core.providers import Tokenizer
from apt.core.resolve import Resolved, resolve_config
from apt.core.schedules import list_unfinished
from apt.data.batches import windows
from apt.errors import AptError, CheckpointError, NotFiniteError
from apt.hookspecs import RunState
from apt.inference.generate import generate
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt.training.assembly import assemble
from apt.training.calibration import settle
from apt.training.card import write_card, write_samples
from apt.training.checkpoint import (
    IMPORTED,
    PROFILE,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    read_saved,
    read_state,
    restore,
    restore_random,
    take_snapshot,
)
from apt.training.evaluate import Score, evaluate, score, untouched
from apt.training.guard import explain_memory
from apt.training.loggers import Loggers
from apt.training.loss import LossStep
from apt.training.optim import MuonWithAdamW
from apt.training.parallel import Parallel, is_split
from apt.training.peak import Utilisation
from apt.training.phases import Certificate, Phases
from apt.training.plot import plot_run
from apt.training.progress import Report
from apt.training.randoms import RandomState
from apt.training.ranks import ALONE, Ranks, join_ranks
from apt.training.record import Metrics, write_record
from apt.training.saver import Saver
from apt.training.start import Start, check_phase, match_names
from apt.training.step import Done, Step
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
    or the path of a checkpoint, whose providers must be exactly those of now where `strict_lock` is set. `branch` is a
    checkpoint of another run to start from. `given` are the files that the profile was read from, which are kept in the folder.
    """

    def __init__(
        self,
        config: APTConfig,
        out: Path | str,
        *,
        resolved: Resolved | None = None,
        resume: str = "never",
        branch: Path | None = None,
        strict_lock: bool = False,
        console: Console | None = None,
        given: Sequence[Path] = (),
    ) -> None:
        self.config, self.out, self.resume, self.branch = config, Path(out), resume, branch
        self.strict_lock, self.given = strict_lock, given
        self.resolved = resolve_config(config) if resolved is None else resolved
        self.console = Console() if console is None else console
        self.hooks = HookRunner(self.resolved.plugins)
        self._stop = False
        self.scored, self.scored_at = Score(math.nan, math.nan, 0), -1
        self.saved_at, self.saved_when = -1, time.monotonic()
        self.left_out = 0
        """Steps' worth of text that was read and left out, since a number was not finite there."""
        self.unsound: set[str] = set()
        """Metrics whose bounds were left, which is told once."""
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
        self.out = ranks.gather(self.out)[0]
        if not ranks.is_main:
            self.console = Console(quiet=True)
        ranks.check_equal("the providers (their lock)", make_lock(self.resolved).digest)
        self.start = Start.find(self.config, self.out, self.resume, self.branch)
        self.parent = self.start.parent
        ranks.wait()
        with explain_memory():
            self._prepare()
        parameters = sum(each.numel() for each in self.model.parameters())
        is_new = self.start.checkpoint is None or self.start.is_branch
        if ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / PROFILE).write_text(dump_resolved(self.config, self.resolved), encoding="utf-8")
            if is_new:
                write_record(
                    self.out,
                    self.config,
                    self.resolved,
                    self.corpus,
                    parameters,
                    self.calibration.to_dict(),
                    self.parent,
                    self.given,
                )
        self.metrics = self._open_metrics(None if is_new else self.state.step)
        name = f"{self.config.name} ({parameters / 1e6:.2f} M{f', {ranks.size} ranks' if ranks.size > 1 else ''})"
        try:
            with (
                Report(self.console, name, self.state.step, self.state.max_steps) as report,
                stop_signals(self._stop_soon),
            ):
                self.report = report
                if self.start.checkpoint is not None:
                    verb = "branched" if self.start.is_branch else "resumed"
                    report.line(f"{verb} from {self.start.checkpoint} at step {self.state.step}")
                if isinstance(self.optimizer, MuonWithAdamW):
                    report.line(str(self.optimizer))
                with explain_memory(), self.calibration.applied():
                    self._run()
        finally:
            self.saver.close()
            self.metrics.close()
        return self._finish()

    # Before the first step

    def _open_metrics(self, resumed_at: int | None) -> Metrics:
        if not self.ranks.is_main:
            return Metrics(None, resumed_at)
        loggers = Loggers(self.resolved.loggers, self.out, to_profile(self.config), resumed_at, self._warn)
        return Metrics(self.out, resumed_at, loggers)

    def _prepare(self) -> None:
        config, ranks = self.config, self.ranks
        parts = assemble(config, self.resolved, self.hooks, ranks, self.start.checkpoint, self.console)
        self.device, self.corpus, self.tokenizer = parts.device, parts.corpus, parts.tokenizer
        self.validation, self.steps_per_epoch = parts.validation, parts.steps_per_epoch
        self.model, self.optimizer = parts.model, parts.optimizer
        self.utilisation = Utilisation(config, self.resolved, self.device, ranks.size)
        self.state = RunState(0, 0, parts.max_steps, parts.max_epochs)
        # Where each rank has all of the model, one of them saves it.
        self.sharded = is_split(config, ranks)
        self.saver = Saver(
            self.out,
            keep_last=config.training.keep_last,
            keep_best=config.training.keep_best,
            asynchronous=config.training.async_save,
            ranks=ranks if self.sharded else ALONE,
        )
        self.phases = Phases(
            config, self.hooks, self.model, self.optimizer, parts.buffers, self._measure, self._certified
        )
        unreached = self.phases.schedule.list_unreached(parts.max_steps, parts.steps_per_epoch, parts.max_epochs)
        for line in (*unreached, *list_unfinished(config, parts.max_steps)):
            self._warn(line)
        if self.start.checkpoint is not None:
            self._go_on(self.start.checkpoint)
        origin = self.start.checkpoint
        kept = None if origin is None else read_saved(origin)["progress"].get("calibration")
        tokens = ranks.share(parts.batches.get(0).tokens).to(self.device)
        self.calibration = settle(self.model, tokens, config, kept, ranks, self.console)
        if config.training.compile:
            for block in self.model.all_blocks():
                block.compile(fullgraph=False)
        parallel = Parallel(LossStep(self.model, self.hooks, config.training.precision), config, ranks)
        self.step = Step(
            config,
            hooks=self.hooks,
            model=self.model,
            optimizer=self.optimizer,
            parallel=parallel,
            batches=parts.batches,
            rate=parts.rate,
            proof=parts.proof,
            ranks=ranks,
            device=self.device,
        )

    def _go_on(self, folder: Path) -> None:
        """Take over a checkpoint, this run's or its parent's, and say what is different since."""
        for line in self.start.changes:
            self._warn(f"the profile has changed since {folder.name}: {line}")
        saved = read_saved(folder)
        if saved["corpus"] not in (IMPORTED, self.corpus.digest):
            what = f"{folder}: was trained on another text than data.source gives now"
            if not self.start.is_branch:
                raise CheckpointError(what)
            self._warn(f"{what}; what is held out now may have been learnt then")
        for fault in check_lock(Lock.from_dict(saved["lock"]), make_lock(self.resolved), strict=self.strict_lock):
            self._warn(f"{folder.name}: {fault}")
        if saved["step"] >= self.state.max_steps:
            step = saved["step"]
            raise CheckpointError(f"{folder}: step {step} is the end of this profile; raise max_epochs or max_steps")
        self.left_out = saved["progress"]["left_out"]
        names: dict[str, str] | None = None
        if self.start.is_branch:
            state = read_state(saved)
            check_phase(folder, state, self.config)
            for plugin in state.plugins_on:
                set_active(self.model, plugin, True)
            names = match_names(folder, self.model)
        else:
            self.saver.best = saved["progress"]["best"]
        fresh = self._restore(folder, names)
        if fresh:
            what = f"{len(fresh)} of {len(list(self.model.parameters()))} parameters, such as {fresh[0]}"
            self._warn(f"{folder.name} holds no memory of the optimizer for {what}; it begins anew for them")

    def _restore(self, folder: Path, names: dict[str, str] | None = None) -> list[str]:
        state, hooks, fresh = restore(folder, self.model, self.optimizer, names)
        self.state = replace(
            self.state, step=state.step, epoch=state.epoch, plugins_on=state.plugins_on, values=state.values
        )
        self.phases.restore(self.state)
        self.hooks.load_state(self.state, hooks)
        return fresh

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    # The steps

    def _run(self) -> None:
        hook, model = self.hooks.hook, self.model.train()
        hook.apt_training_start(state=self.state, model=model, optimizer=self.optimizer)
        self._watch = Stopwatch()
        self._spikes = None if self.config.monitoring.spike is None else SpikeDetector(self.config.monitoring.spike)
        origin = self.start.checkpoint
        if origin is not None and not restore_random(origin, self.ranks.rank):
            self._warn(f"{origin.name} was saved by fewer ranks; rank {self.ranks.rank} draws anew")
        try:
            while self.state.step < self.state.max_steps and not self._stop:
                within = self.state.step % self.steps_per_epoch
                self.state = self.phases.enter(self.state, first_of_epoch=within == 0)
                self._take_step()
                if within + 1 == self.steps_per_epoch:
                    self.state = replace(self.state, epoch=self.state.epoch + 1)
                    hook.apt_epoch_end(state=self.state)
                self._stop = self.ranks.any(self._stop)
                self._look_after()
        finally:
            hook.apt_training_end(state=self.state, model=model)
        if self._stop and self.saved_at != self.state.step:
            self._save()

    def _take_step(self) -> None:
        first = (self.state.step + self.left_out) * self.config.training.accumulate
        try:
            done = self.step.take(self.state, first)
        except NotFiniteError as error:
            self._not_finite(error)
            return
        self.troubles, self.state = 0, done.state
        for name, loss in done.losses.items():
            self._watch.add(name if name == "loss" else f"loss_{name}", loss)
        self._watch.done(done.tokens)
        if self._spikes is not None:
            total = self.ranks.sum({"": done.losses["loss"]})[""].item()
            if self._spikes.is_spike(total):
                self.metrics.write("spike", step=self.state.step, epoch=self.state.epoch, loss=total)
                self.report.line(f"step {self.state.step}: the loss spikes to {total:.3f}")
        step = self.state.step
        if step % self.config.monitoring.log_every == 0 or step in (1, self.state.max_steps):
            self._log(done)

    def _not_finite(self, error: NotFiniteError) -> None:
        """Stop, skip the step, or go back, as the profile says."""
        step, action = self.state.step, self.config.training.on_nonfinite
        self.troubles += 1
        advice = "lower training.learning_rate or training.gradient_clip; the last checkpoint is untouched"
        if action == "stop":
            raise AptError(f"{error}; {advice}") from error
        if self.troubles > MAX_TROUBLES:
            raise AptError(f"{error}; this is the {self.troubles}th time in a row; {advice}") from error
        self.metrics.write("nonfinite", step=step, epoch=self.state.epoch, action=action, what=str(error))
        if action == "skip":
            self.report.line(f"{error}; the step is skipped")
            self.state = replace(self.state, step=step + 1)
            return
        self.saver.wait()
        self.ranks.wait()
        whole = list_checkpoints(self.out)
        if not whole:
            raise AptError(f"{error}; there is no checkpoint to go back to; {advice}") from error
        self._restore(whole[-1])
        restore_random(whole[-1], self.ranks.rank)
        self.left_out += step + 1 - self.state.step
        self.report.line(f"{error}; back to step {self.state.step}, what was read since is left out")

    # Switches

    def _measure(self, training: bool) -> tuple[float, dict[str, Tensor]]:
        """Loss and metrics of the one batch that every switch of the run is measured on."""
        batches = windows(self.validation, self.config.max_seq_len, self.config.training.batch_size, 1)
        with untouched(self.model), self._watch.paused():
            scored, seen = score(
                self.model, batches, bytes_per_token=1.0, device=self.device, ranks=self.ranks, training=training
            )
        return scored.loss, seen

    def _certified(self, certificate: Certificate, state: RunState) -> None:
        """Record what a switch changed."""
        self.metrics.write(
            "switch",
            step=state.step,
            epoch=state.epoch,
            plugin=certificate.plugin,
            loss_before=certificate.loss_before,
            loss_after=certificate.loss_after,
            change=certificate.change,
            change_in_training=certificate.training,
            tolerance=certificate.tolerance,
            holds=certificate.holds,
            **certificate.metrics,
        )
        self.report.line(str(certificate))

    # Between the steps

    def _log(self, done: Done) -> None:
        sums, speed = self._watch.read()
        seen = {name: value.item() for name, value in self.ranks.sum(sums).items()}
        state = self.state
        used = self.utilisation.of(speed, state)
        self.metrics.write(
            "train",
            step=state.step,
            epoch=state.epoch,
            split="train",
            **seen,
            learning_rate=done.rate,
            gradient_norm=done.norm,
            tokens_per_second=round(speed, 1),
            **({} if used is None else {"mfu": used}),
            values=dict(state.values),
            plugins_on=list(state.plugins_on),
            **done.metrics,
        )
        self.report.step(state, seen["loss"], speed, used, done.rate)

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
            self._warn_of_unsound(seen)
            self.scored, self.scored_at = scored, self.state.step
            if self.config.evaluation.samples and self.ranks.is_main:
                self._sample()

    def _warn_of_unsound(self, seen: Mapping[str, Tensor]) -> None:
        """Say, once a run, which metric is outside of the bounds that its provider gives."""
        for where, provider in self.resolved.parts():
            for name, (low, high, meaning) in provider.sound.items():
                if name not in seen or name in self.unsound or low <= seen[name].item() <= high:
                    continue
                self.unsound.add(name)
                bounds = f"between {low:g} and {high:g}"
                self.report.line(f"warning: {where}: {name} is {seen[name].item():.3g}, not {bounds}: {meaning}")

    def _sample(self) -> None:
        """Let the model write, the same way each time."""
        evaluation, state = self.config.evaluation, self.state
        if self.sharded:
            self.report.line("no sample is drawn: the model is split over the ranks")
            return
        prompt = evaluation.sample_prompt
        written = generate(
            self.model, self.tokenizer, prompt, max_new_tokens=evaluation.sample_tokens, temperature=0.8, state=state
        )
        self.metrics.write("sample", step=state.step, epoch=state.epoch, text=prompt + written.text)
        write_samples(self.out)

    def _save(self) -> None:
        with self._watch.paused():
            randoms = self.ranks.gather(RandomState.now())
            hooks = self.hooks.save_state(self.state)
            if self.ranks.is_main or self.sharded:
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
                        "parent": self.parent,
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
            if self.parent is not None:
                results["branched from"] = f"{self.parent['run']}, {self.parent['checkpoint']}"
            write_card(self.out, self.config, self.resolved, self.corpus, results)
        model = self._whole_model() if self.sharded and self.ranks.is_main else self.model.eval()
        return RunResult(self.out, self.state, self.resolved, self.scored, model, self.tokenizer, picture, interrupted)

    def _whole_model(self) -> Decoder:
        """The model in one piece, from the checkpoint just written: what is split only runs on all ranks together."""
        model = ModelBuilder(self.config, resolved=self.resolved).build_model()
        load_weights(find_checkpoint(self.out), model)
        for plugin in self.config.plugins:
            set_active(model, plugin, plugin in self.state.plugins_on)
        return model.eval()
