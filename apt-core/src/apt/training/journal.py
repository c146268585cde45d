"""What a run says of itself while it goes: `metrics.jsonl`, the loggers, and the lines and the bar on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from apt.core.config import APTConfig
from apt.core.hooks import two_metrics
from apt.core.resolve import Resolved
from apt.hookspecs import RunState
from apt.training.evaluate import Score
from apt.training.peak import Utilisation
from apt.training.phases import Certificate
from apt.training.progress import Report
from apt.training.ranks import Ranks
from apt.training.record import NOT_FINITE, Metrics
from apt.training.step import Done
from apt.training.watch import SpikeDetector, Stopwatch

ALWAYS = ("event", "step", "epoch")
"""What every event has."""


class Journal:
    """Notes each event of a run. Its clock runs from when it is made, and says how fast training is.

    `saved` is what `save` said at the checkpoint that the run goes on from; `gave` says which plugin gave a metric.
    """

    def __init__(
        self,
        config: APTConfig,
        resolved: Resolved,
        metrics: Metrics,
        report: Report,
        utilisation: Utilisation,
        ranks: Ranks,
        saved: Mapping[str, Any],
        gave: Mapping[object, str],
    ) -> None:
        self.resolved, self.gave = resolved, gave
        self.metrics, self.report, self.utilisation, self.ranks = metrics, report, utilisation, ranks
        self.every = config.monitoring.log_every
        self._unsound: set[str] = set()
        """Metrics whose bounds were left, which is told once."""
        self._deviations = config.monitoring.spike
        self.go_on(saved)

    def line(self, text: str) -> None:
        """Print a line."""
        self.report.line(text)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What happens in here is not training time."""
        return self._watch.paused()

    def save(self) -> dict[str, Any]:
        """What later steps are told with, as JSON values: what was summed since the last line, and what losses are held against,
        None where nobody watches for spikes. All ranks call it.
        """
        spikes = None if self._spikes is None else self._spikes.save()
        return {"line": self._watch.save(self.ranks.sum), "spikes": spikes}

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """From where `save` said this; what was summed since then belongs to a course that is left."""
        self._watch = Stopwatch(saved.get("line"), whole=self.ranks.is_main)
        self._spikes = None
        if self._deviations is not None:
            self._spikes = SpikeDetector(self._deviations, saved=saved.get("spikes"))

    def stepped(self, done: Done) -> None:
        """A step was taken: it is counted, and told where it is time to. All ranks call it."""
        for name, loss in done.losses.items():
            self._watch.add(name if name == "loss" else f"loss_{name}", loss)
        self._watch.done(done.tokens)
        step = done.state.step
        if self._spikes is not None:
            total = self.ranks.sum({"": done.losses["loss"]})[""].item()
            if self._spikes.is_spike(total):
                self._note("spike", done.state, loss=total)
                self.line(f"step {step}: the loss spikes to {total:.3f}")
        if step % self.every == 0 or step in (1, done.state.max_steps):
            self._tell(done)

    def not_finite(self, state: RunState, action: str, what: str) -> None:
        """A step's numbers were not finite."""
        self._note(NOT_FINITE, state, action=action, what=what)

    def switched(self, certificate: Certificate, state: RunState) -> None:
        """What a switch changed."""
        facts: dict[str, object] = {
            "plugin": certificate.plugin,
            "loss_before": certificate.loss_before,
            "loss_after": certificate.loss_after,
            "change": certificate.change,
            "change_in_training": certificate.training,
            "tolerance": certificate.tolerance,
            "holds": certificate.holds,
        }
        _join(facts, (certificate.metrics, lambda _: f"a part that {certificate.plugin} switches on"))
        self._note("switch", state, **facts)
        self.line(str(certificate))

    def evaluated(
        self,
        state: RunState,
        scored: Score,
        seen: Mapping[str, Tensor],
        extra: Mapping[str, float],
        whose: Callable[[str], str],
    ) -> None:
        """The held-out loss, with the model's metrics, of which `whose` says whose one is, and the plugins'."""
        facts = {
            "split": "validation",
            "loss": scored.loss,
            "bits_per_byte": scored.bits_per_byte,
            "values": dict(state.values),
            "plugins_on": list(state.plugins_on),
        }
        _join(facts, ({name: metric.tolist() for name, metric in seen.items()}, whose), (extra, self._plugin_of))
        self._note("evaluation", state, **facts)
        self.line(
            f"step {state.step}: held-out loss {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits a byte"
        )
        self._warn_of_unsound(seen)

    def _warn_of_unsound(self, seen: Mapping[str, Tensor]) -> None:
        """Say, once a run, which metric is outside of the bounds that its provider gives."""
        for where, provider in self.resolved.parts():
            for name, (low, high, meaning) in provider.sound.items():
                if name not in seen or name in self._unsound or low <= seen[name].item() <= high:
                    continue
                self._unsound.add(name)
                bounds = f"between {low:g} and {high:g}"
                self.line(f"warning: {where}: {name} is {seen[name].item():.3g}, not {bounds}: {meaning}")

    def sampled(self, state: RunState, text: str) -> None:
        """What the model wrote."""
        self._note("sample", state, text=text)

    def _plugin_of(self, metric: str) -> str:
        return self.gave.get(metric, "a plugin")

    def _note(self, event: str, state: RunState, /, **facts: object) -> None:
        """An event, and where the run stood."""
        self.metrics.write(event, step=state.step, epoch=state.epoch, **facts)

    def _tell(self, done: Done) -> None:
        sums, speed = self._watch.read()
        seen = {name: value.item() for name, value in self.ranks.sum(sums).items()}
        state = done.state
        used = self.utilisation.of(speed, state)
        facts: dict[str, object] = {
            "split": "train",
            **seen,
            "learning_rate": done.rate,
            "gradient_norm": done.norm,
            "tokens_per_second": round(speed, 1),
            **({} if used is None else {"mfu": used}),
            "values": dict(state.values),
            "plugins_on": list(state.plugins_on),
        }
        _join(facts, (done.metrics, self._plugin_of))
        self._note("train", state, **facts)
        self.report.step(state, seen["loss"], speed, used, done.rate)


def _join(facts: dict[str, object], *given: tuple[Mapping[str, object], Callable[[str], str]]) -> None:
    """Add metrics to the facts of an event, each lot with who says whose one of them is.

    Raises `PluginError` for two of one name: what one says would be lost.
    """
    owners: dict[str, Callable[[str], str]] = dict.fromkeys((*ALWAYS, *facts), lambda _: "the trainer")
    for metrics, whose in given:
        for name, value in metrics.items():
            if name in owners:
                raise two_metrics(name, owners[name](name), whose(name))
            owners[name], facts[name] = whose, value
