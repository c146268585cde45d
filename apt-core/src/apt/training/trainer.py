"""The loop: a profile becomes a trained model, and every switch, value and moment of it is where the profile says.

A run is steps (`apt.training.step`) between the moments that belong to them: the phase is entered, with its values and switches
(`apt.training.phases`); the step is taken and told (`apt.training.journal`); the model is evaluated and saved where it is time to
(`apt.training.between`). Nothing of a step depends on how often the run was evaluated, interrupted or killed.
"""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.lock import make_lock
from apt.core.profile import dump_resolved, to_profile
from apt.core.providers import Tokenizer
from apt.core.resolve import Resolved, resolve_config
from apt.core.schedules import list_unfinished
from apt.data.batches import windows
from apt.errors import AptError, CheckpointError, NotFiniteError, UserError
from apt.hookspecs import RunState
from apt.modeling.compiler import check_compiler
from apt.modeling.model import Decoder
from apt.training.assembly import assemble, pick_device
from apt.training.between import Between
from apt.training.calibration import settle
from apt.training.card import list_results, write_card
from apt.training.checkpoint import (
    PROFILE,
    find_checkpoint,
    list_checkpoints,
    load_model,
    read_saved,
    restore,
    restore_random,
    verify,
)
from apt.training.durable import write_at_once
from apt.training.evaluate import Score, score, untouched
from apt.training.guard import explain_memory
from apt.training.holding import hold
from apt.training.journal import Journal
from apt.training.loggers import Loggers
from apt.training.loss import LossStep
from apt.training.optim import MuonWithAdamW
from apt.training.parallel import Parallel
from apt.training.peak import Utilisation
from apt.training.phases import Phases
from apt.training.plot import plot_run
from apt.training.progress import Lasting, Report
from apt.training.randoms import repeatable
from apt.training.ranks import ALONE, Ranks, join_ranks, list_unshared
from apt.training.record import CARD, RECORD, Metrics, record_resume, write_record
from apt.training.saver import Saver
from apt.training.snapshot import local_code
from apt.training.start import Start
from apt.training.step import Step
from apt.training.takeover import Taken, take_over
from apt.training.watch import stop_signals

MAX_TROUBLES = 10
"""How often steps may be skipped or gone back from, without getting further, before a run is given up."""
GRAPHS = 64
"""What blocks may be compiled to: they share one code, and each kind of block, each phase and shape, training, evaluation and a
teacher's pass have graphs of their own."""
ADVICE = "lower training.learning_rate or training.gradient_clip; the last checkpoint is untouched"


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
    `again` is the command that goes on with the run, for whoever stopped it; by default one that needs the run's folder alone.
    Where no `console` is given, one is taken that a reader may leave, as `head` does, without ending the run.
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
        again: str | None = None,
    ) -> None:
        self.config, self.out, self.resume, self.branch = config, Path(out), resume, branch
        self.strict_lock, self.given, self.again = strict_lock, given, again
        self.resolved = resolve_config(config) if resolved is None else resolved
        self.console = Lasting() if console is None else console
        self.hooks = HookRunner(self.resolved.plugins)
        self._asked = self._stop = self._began = False
        """Whether this process was asked to stop; whether all ranks do; whether training began."""
        self.troubles = 0
        """How often numbers were not finite since the run last came further than where they were."""
        self.trouble_at = -1
        self._first: dict[str, Mapping[str, object]] = {}
        """How plugins were before the first step, of which the checkpoint that the run began with knows nothing."""

    def fit(self) -> RunResult:
        """Train to the end, or until Ctrl-C or SIGTERM, which finish the step and save.

        Raises `UserError` and its kin before anything is written where the run cannot be.
        """
        try:
            with self._explain_disk(), join_ranks(self.config) as ranks:
                return self._fit(ranks)
        except AptError as error:
            if self._began and list_checkpoints(self.out):
                error.add_note(f"what was saved is untouched; go on with: {self._command()}")
            raise
        except KeyboardInterrupt:
            if self._began:
                self._warn(f"left at once; what was saved is untouched; go on with: {self._command()}")
            raise

    @contextlib.contextmanager
    def _explain_disk(self) -> Iterator[None]:
        """What the disk refuses in mid-run, outside of a checkpoint, is told as what it is."""
        try:
            yield
        except OSError as error:
            if not self._began or isinstance(error, ConnectionError):
                raise
            raise AptError(f"{error.filename or self.out}: {error.strerror or error}") from error

    def _fit(self, ranks: Ranks) -> RunResult:
        self.ranks = ranks
        self.out = ranks.gather(self.out)[0]
        if not ranks.is_main:
            self.console = Console(quiet=True)
        ranks.check_equal("the providers (their lock)", make_lock(self.resolved).digest)
        with hold(self.out, ranks, self._warn):
            return self._fit_alone()

    def _fit_alone(self) -> RunResult:
        """While no other run has the folder."""
        ranks = self.ranks
        self.start = Start.find(self.config, self.out, self.resume, self.branch)
        self.parent = self.start.parent
        ranks.wait()
        with explain_memory(), self._repeatable():
            self._prepare()
        metrics = self._open_folder()
        try:
            with (
                Report(self.console, self._name(), self.state.step, self.state.max_steps) as report,
                stop_signals(lambda signal: self._stop_soon(signal, report)),
            ):
                self._tell_start(report)
                utilisation = Utilisation(self.config, self.resolved, self.parts.device, ranks.size)
                saved, gave = self.taken.journal, self.hooks.gave
                self.journal = Journal(self.config, self.resolved, metrics, report, utilisation, ranks, saved, gave)
                self.between = Between(
                    self.config,
                    self.resolved,
                    self.parts,
                    hooks=self.hooks,
                    ranks=ranks,
                    saver=self.saver,
                    journal=self.journal,
                    out=self.out,
                    kept={
                        "parent": self.parent,
                        "calibration": self.calibration.to_dict(),
                        "steps_per_epoch": self.parts.steps_per_epoch,
                    },
                )
                with explain_memory(), self.calibration.applied(), self._repeatable():
                    self._run()
                self.saver.wait()
        except Exception:
            with contextlib.suppress(CheckpointError):  # the first error is the one to tell
                self.saver.wait()
            raise
        finally:
            metrics.close()
        return self._finish()

    def _repeatable(self) -> contextlib.AbstractContextManager[None]:
        """Around all that computes, what is measured before the first step too: a GPU is told before its first product."""
        hardware = self.config.hardware
        return repeatable(hardware.deterministic and pick_device(hardware.device, "hardware.device").type == "cuda")

    # Before the first step

    def _open_folder(self) -> Metrics:
        """The run's folder, which says what the run is."""
        if not self.ranks.is_main:
            return Metrics(None, 0)
        for line in self.start.take_up(self.out):
            self._warn(line)
        (self.out / CARD).unlink(missing_ok=True)  # of an end that is none any more
        resumed_at = None if self.start.is_new else self.state.step
        if self.start.is_new or not (self.out / RECORD).is_file():
            write_record(
                self.out,
                self.config,
                self.resolved,
                self.parts.corpus,
                self.parameters,
                self.calibration.to_dict(),
                self.parent,
                self.given,
            )
        else:
            record_resume(self.out, self.resolved, self.state.step)
        for name, code in local_code(self.resolved).items():
            write_at_once(self.out / name, code)
        write_at_once(self.out / PROFILE, dump_resolved(self.config, self.resolved))
        loggers = Loggers(self.resolved.loggers, self.out, to_profile(self.config), resumed_at, self._warn)
        return Metrics(self.out, self.taken.metrics, loggers)

    def _name(self) -> str:
        ranks = f", {self.ranks.size} ranks" if self.ranks.size > 1 else ""
        return f"{self.config.name} ({self.parameters / 1e6:.2f} M{ranks})"

    def _tell_start(self, report: Report) -> None:
        if self.start.checkpoint is not None:
            verb = "branched" if self.start.is_branch else "resumed"
            report.line(f"{verb} from {self.start.checkpoint} at step {self.state.step}")
        if isinstance(self.parts.optimizer, MuonWithAdamW):
            report.line(str(self.parts.optimizer))

    def _prepare(self) -> None:
        config, ranks = self.config, self.ranks
        self.parts = parts = assemble(config, self.resolved, self.hooks, ranks, self.start.checkpoint, self.console)
        self.model, self.parameters = parts.model, sum(each.numel() for each in parts.model.parameters())
        self.state = RunState(0, 0, parts.max_steps, parts.max_epochs)
        self.saver = Saver(
            self.out,
            keep_last=config.training.keep_last,
            keep_best=config.training.keep_best,
            asynchronous=config.training.async_save,
            ranks=ranks if parts.is_split else ALONE,
        )
        self.phases = Phases(
            *(config, self.hooks, parts.model, parts.optimizer, parts.buffers),
            self._measure,
            certified=lambda certificate, state: self.journal.switched(certificate, state),
            begins_anew=self.start.checkpoint is None,
        )
        unreached = self.phases.schedule.list_unreached(parts.max_steps, parts.steps_per_epoch, parts.max_epochs)
        for line in (*unreached, *list_unfinished(config, parts.max_steps), *list_unshared(config, ranks)):
            self._warn(line)
        self.taken = Taken() if self.start.checkpoint is None else self._go_on(self.start.checkpoint)
        self.left_out, self.saver.best = self.taken.left_out, self.taken.best
        self.calibration = settle(
            *(parts.model, lambda: ranks.share(parts.batches.get(0).tokens).to(parts.device), config),
            *(self.taken.calibration, ranks, self.console),
        )
        if config.training.compile:
            if parts.device.type == "cpu":
                check_compiler("training.compile")
            # Above PyTorch's own limit of 8 blocks would run uncompiled, with a line in its log.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
            for block in parts.model.all_blocks():
                block.compile(fullgraph=False)
        self.step = Step(
            config,
            hooks=self.hooks,
            model=parts.model,
            optimizer=parts.optimizer,
            parallel=Parallel(
                LossStep(parts.model, self.hooks, config.training.precision, compiled=config.training.compile),
                config,
                ranks,
            ),
            batches=parts.batches,
            rate=parts.rate,
            proof=parts.proof,
            ranks=ranks,
            device=parts.device,
        )

    def _go_on(self, folder: Path) -> Taken:
        """Take over a checkpoint, this run's or its parent's."""
        taken = take_over(
            *(folder, self.start, self.config, self.resolved, self.parts), strict_lock=self.strict_lock, warn=self._warn
        )
        fresh = self._restore(folder, taken.names)
        if fresh:
            what = f"{len(fresh)} of {len(list(self.model.parameters()))} parameters, such as {fresh[0]}"
            self._warn(f"{folder.name} holds no memory of the optimizer for {what}; it begins anew for them")
        return taken

    def _restore(
        self,
        folder: Path,
        names: dict[str, str] | None = None,
        first: Mapping[str, Mapping[str, object]] | None = None,
    ) -> list[str]:
        """Be what a checkpoint holds, and plugins that saved nothing there what `first` says; see `restore`."""
        state, hooks, fresh = restore(folder, self.model, self.parts.optimizer, names)
        self.state = replace(
            self.state, step=state.step, epoch=state.epoch, plugins_on=state.plugins_on, values=state.values
        )
        self.phases.restore(self.state, is_branch=self.start.is_branch and folder == self.start.checkpoint)
        self.hooks.load_state(self.state, {**_copy(first or {}), **hooks})
        return fresh

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    # The steps

    def _run(self) -> None:
        self._began = True
        hook, model, optimizer = self.hooks.hook, self.model.train(), self.parts.optimizer
        hook.apt_training_start(state=self.state, model=model, optimizer=optimizer)
        origin = self.start.checkpoint
        if origin is not None and self.config.training.on_nonfinite == "rewind":
            known, now = read_saved(origin)["hooks"], self.hooks.save_state(self.state)
            self._first = _copy({name: saved for name, saved in now.items() if name not in known})
        if origin is not None and not restore_random(origin, self.ranks.rank):
            self._warn(f"{origin.name} was saved by fewer ranks; rank {self.ranks.rank} draws anew")
        try:
            if self.state.step == self.state.max_steps:
                self.between.end_again(self.state)
            while self.state.step < self.state.max_steps and not self._stop:
                self._take_step()
                # Agreed on here and nowhere else, so that no rank is a step ahead of another.
                self._stop = self.ranks.any(self._asked)
            # While plugins have what they are asked for: at the end they may let go of it.
            if self._stop and self.between.saved != (self.state.step, self.left_out):
                self.between.save(self.state, self.left_out)
        finally:
            hook.apt_training_end(state=self.state, model=model)

    def _take_step(self) -> None:
        """A step, and what follows it; or, where a number was not finite, what the profile says."""
        within = self.state.step % self.parts.steps_per_epoch
        self.state = self.phases.enter(self.state, first_of_epoch=within == 0)
        try:
            done = self.step.take(self.state, self.parts.first_batch(self.state.step + self.left_out))
        except NotFiniteError as error:
            if not self._is_skipped(error, read=self.state.step + 1):
                return
            self.state = replace(self.state, step=self.state.step + 1)
        else:
            self.state = done.state
            self.journal.stepped(done)
        if self.state.step > self.trouble_at + 1:
            self.troubles = 0
        if within + 1 == self.parts.steps_per_epoch:
            self.state = replace(self.state, epoch=self.state.epoch + 1)
            self.hooks.hook.apt_epoch_end(state=self.state)
        try:
            self.between.look_after(self.state, self.left_out)
        except NotFiniteError as error:
            self._is_skipped(error, read=self.state.step)  # it goes back or stops: skipping lets a held-out loss pass

    def _is_skipped(self, error: NotFiniteError, *, read: int) -> bool:
        """Whether the step is skipped; else the run has gone back. Raises `AptError` where it is to stop."""
        action = self.config.training.on_nonfinite
        self.troubles, self.trouble_at = self.troubles + 1, max(self.trouble_at, self.state.step)
        if action == "stop":
            raise AptError(f"{error}; {ADVICE}") from error
        if self.troubles > MAX_TROUBLES:
            raise AptError(f"{error}; this is the {self.troubles}th time without getting further; {ADVICE}") from error
        if action == "skip":
            self.journal.not_finite(self.state, action, str(error))
            self.journal.line(f"{error}; the step is skipped")
            return True
        self._go_back(error, read=read)
        return False

    def _go_back(self, error: NotFiniteError, *, read: int) -> None:
        """To the checkpoint that this process wrote last, or began with. The text of the `read` steps so far is left out."""
        at = self.state
        self.saver.wait()
        written = self.ranks.gather(self.saver.last)[0]
        folder = self.start.checkpoint if written is None else written
        if folder is None:
            raise AptError(f"{error}; there is no checkpoint to go back to; {ADVICE}") from error
        verify(folder)
        if written is None:
            self._restore(folder, self.taken.names, self._first)
        else:
            self._restore(folder)
        restore_random(folder, self.ranks.rank)
        self.left_out += read - self.state.step
        # What it began with may be of another run, whose metrics are not here.
        metrics, told = self.journal.metrics.kept, self.taken.journal
        if written is not None:
            told = read_saved(folder)["progress"]
            metrics = told["metrics"]
        self.journal.metrics.go_back(metrics, self.state.step)
        self.journal.go_on(told)
        self.journal.not_finite(at, "rewind", str(error))
        self.journal.line(f"{error}; back to step {self.state.step}, what was read since is left out")

    # Switches

    def _measure(self, training: bool) -> tuple[float, dict[str, Tensor]]:
        """Loss and metrics of the one batch that every switch of the run is measured on."""
        batches = windows(self.parts.validation, self.config.max_seq_len, self.config.training.batch_size, 1)
        with untouched(self.model), self.journal.paused():
            scored, seen = score(
                self.model, batches, bytes_per_token=1.0, device=self.parts.device, ranks=self.ranks, training=training
            )
        return scored.loss, seen

    # The end

    def _command(self) -> str:
        """What goes on with this run."""
        if self.again is not None:
            return self.again
        leave = ["--allow-local-code"] if local_code(self.resolved) else []
        words = ["apt-core", "train", "-p", str(self.out / PROFILE), *leave]
        return shlex.join([*words, "--resume", "auto", "--out", str(self.out)])

    def _stop_soon(self, signal: str, report: Report) -> None:
        self._asked = True
        with contextlib.suppress(RuntimeError):  # a stream that is just being written to takes nothing in between
            report.line(f"{signal}: finishing this step, then saving (again to leave at once)")

    def _finish(self) -> RunResult:
        interrupted = self._stop and self.state.step < self.state.max_steps
        if interrupted:
            self.journal.line(f"stopped at step {self.state.step}; saved in {self.out}; go on with: {self._command()}")
        picture, scored = None, self.between.scored
        if self.ranks.is_main:
            if self.config.monitoring.plot:
                try:
                    picture = plot_run(self.out)
                except UserError as error:  # such as of a run that was stopped before it had told anything
                    self.journal.line(f"no picture is drawn: {error}")
            results = list_results(self.state.step, scored, self.parent)
            write_card(self.out, self.config, self.resolved, self.parts.corpus, results)
        model = self.model.eval()
        if self.parts.is_split and self.ranks.is_main:  # what is split only runs on all ranks together
            model = load_model(find_checkpoint(self.out), self.config, self.resolved, self.state.plugins_on)
        return RunResult(self.out, self.state, self.resolved, scored, model, self.parts.tokenizer, picture, interrupted)


def _copy(saved: Mapping[str, Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """What plugins have saved, which they may go on changing."""
    return {
        plugin: {
            key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in values.items()
        }
        for plugin, values in saved.items()
    }
