"""What happens between the steps: the model is scored on held-out text, writes samples, and is saved, where it is time to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.resolve import Resolved
from apt.data.batches import send, windows
from apt.errors import AptError, NotFiniteError
from apt.hookspecs import RunState
from apt.training.assembly import Assembly
from apt.training.card import write_samples
from apt.training.evaluate import Score, evaluate, untouched
from apt.training.guard import find_makers
from apt.training.journal import Journal
from apt.training.randoms import RandomState, same_randoms
from apt.training.ranks import Ranks
from apt.training.record import read_metrics
from apt.training.sample import draw_sample
from apt.training.saver import Saver
from apt.training.snapshot import take_snapshot


class Between:
    """Evaluates and saves the run in `out`. `kept` is what each checkpoint keeps beside what changes from step to step.

    No random state and no weight is changed by any of it.
    """

    def __init__(
        self,
        config: APTConfig,
        resolved: Resolved,
        parts: Assembly,
        *,
        hooks: HookRunner,
        ranks: Ranks,
        saver: Saver,
        journal: Journal,
        out: Path,
        kept: Mapping[str, object],
    ) -> None:
        self.config, self.resolved, self.parts, self.hooks, self.ranks = config, resolved, parts, hooks, ranks
        self.saver, self.journal, self.out, self.kept = saver, journal, out, kept
        self.scored, self._scored_at = Score(math.nan, math.nan, 0), -1
        self.saved, self._saved_when = (-1, 0), time.monotonic()
        """The step of the checkpoint that was written last, and what was left out before it."""

    def look_after(self, state: RunState, left_out: int) -> None:
        """After the step that led to `state`. `left_out`: steps' worth of text that was read and not trained on."""
        last, better = state.step == state.max_steps, False
        if last or state.step % (self.config.evaluation.eval_every or self.parts.steps_per_epoch) == 0:
            self.evaluate(state)
            better = self.saver.is_better(self.scored.loss)
        if self._is_time_to_save(state) or last or better:
            self.save(state, left_out)

    def end_again(self, state: RunState) -> None:
        """After the last step of a run that was killed between its last checkpoint and its card: score it, told once."""
        events = read_metrics(self.out) if self.ranks.is_main else []
        told = any(each["event"] == "evaluation" and each.get("step") == state.step for each in events)
        self.evaluate(state, told=self.ranks.any(told))

    def evaluate(self, state: RunState, *, told: bool = False) -> None:
        """Score the model, and let it write; where that is `told` already, no event is written."""
        with self.journal.paused(), same_randoms():  # parts, plugins and loggers may draw
            hook, model, extra = self.hooks.hook, self.parts.model, dict[str, float]()
            hook.apt_evaluation_start(state=state, model=model)
            scored, seen = evaluate(
                model,
                self.parts.validation,
                seq_len=self.config.max_seq_len,
                batch_size=self.config.training.batch_size,
                max_batches=self.config.evaluation.max_batches,
                device=self.parts.device,
                ranks=self.ranks,
            )
            hook.apt_evaluation_end(state=state, model=model, metrics=extra)
            if not math.isfinite(scored.loss) and self.config.training.on_nonfinite != "skip":
                raise NotFiniteError(
                    f"step {state.step}: the held-out loss is {scored.loss}, though training's was finite: the weights of "
                    "the last steps are broken"
                )
            self.scored, self._scored_at = scored, state.step
            if told:
                return
            self.journal.evaluated(state, scored, seen, extra, self._whose)
            if self.config.evaluation.samples and self.ranks.is_main:
                self._sample(state)

    def _whose(self, metric: str) -> str:
        """Which parts give a metric of the model, in words."""
        batches = windows(self.parts.validation, self.config.max_seq_len, self.config.training.batch_size, 1)
        batch = next(iter(batches)).map(lambda each: send(each, self.parts.device))
        return find_makers(self.parts.model, batch, metric)

    def save(self, state: RunState, left_out: int) -> None:
        """Write a checkpoint, or hand it to the thread that does. All ranks call it."""
        told = self.journal.save()
        with self.journal.paused():
            randoms = self.ranks.gather(RandomState.now())
            with same_randoms():
                hooks = self.hooks.save_state(state)
            is_best = self._scored_at == state.step and self.saver.is_better(self.scored.loss)
            if is_best:
                self.saver.best = self.scored.loss
            # Where each rank has all of the model, one of them saves it.
            if self.ranks.is_main or self.parts.is_split:
                snapshot = take_snapshot(
                    config=self.config,
                    resolved=self.resolved,
                    model=self.parts.model,
                    optimizer=self.parts.optimizer,
                    tokenizer=self.parts.tokenizer,
                    state=state,
                    hooks=hooks,
                    corpus_digest=self.parts.corpus.digest,
                    progress={
                        **self.kept,
                        "left_out": left_out,
                        "proven": [*self.parts.proof.proven],
                        "best": self.saver.best,
                        "is_best": is_best,
                        "metrics": self.journal.metrics.length,
                        **told,
                    },
                    randoms=randoms,
                    copy=self.saver.copies,
                )
                self.saver.save(snapshot, is_best=is_best)
            self.ranks.wait()
            self.saved, self._saved_when = (state.step, left_out), time.monotonic()

    def _is_time_to_save(self, state: RunState) -> bool:
        every = self.config.training.save_every
        if isinstance(every, str):
            # The main rank's clock is everybody's.
            late = time.monotonic() - self._saved_when >= 60 * float(every.removesuffix("min"))
            return self.ranks.any(late and self.ranks.is_main)
        return state.step % (every or self.parts.steps_per_epoch) == 0

    def _sample(self, state: RunState) -> None:
        """Let the model write, the same way each time."""
        if self.parts.is_split:
            self.journal.line("no sample is drawn: the model is split over the ranks")
            return
        with untouched(self.parts.model):  # plugins may draw
            try:
                text = draw_sample(self.config, self.resolved, self.parts.model, self.parts.tokenizer, state)
            except AptError as error:  # such as a plugin's that asks for what only `generate` is given
                self.journal.line(f"no sample is drawn: {error}")
                return
        self.journal.sampled(state, text)
        write_samples(self.out)
