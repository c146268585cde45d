"""A run that goes back, or is asked to stop, or is refused by the disk: where it stands afterwards, and what is kept."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from rich.console import Console

from apt.core.discovery import discover
from apt.core.profile import load_profile
from apt.core.providers import LoggerProvider, Plugin
from apt.core.registry import Registry
from apt.data.corpus import first_batch, steps_before
from apt.errors import AptError, CheckpointError
from apt.hookspecs import RunState, hookimpl
from apt.training import between, saver
from apt.training.checkpoint import find_checkpoint, list_checkpoints, read_saved
from apt.training.evaluate import Score
from apt.training.record import Metrics, read_metrics
from apt.training.snapshot import point
from apt.training.trainer import RunResult, Trainer


class Poison(Plugin):
    """A loss that is not a number at the step `at`, so many `times`."""

    api_level: ClassVar[int] = 1

    at: ClassVar[int] = -1
    times: ClassVar[int] = 1
    damages: ClassVar[Path | None] = None
    """A file that loses a bit just before."""
    _epochs: list[int] = PrivateAttr(default_factory=list)
    _done: int = PrivateAttr(default=0)

    @hookimpl
    def apt_model_built(self, model: Any) -> None:
        # As routers count, and memories remember: while a batch goes by.
        model.register_buffer("seen", torch.zeros(()), persistent=False)

        def count(module: Any, *_: object) -> None:
            module.seen += int(module.training)

        model.register_forward_hook(count)

    @hookimpl
    def apt_epoch_end(self, state: RunState) -> None:
        self._epochs.append(state.epoch)

    @hookimpl
    def apt_loss_extra(self, state: RunState, output: Any) -> dict[str, Any]:
        poisoned = state.step == self.at and self._done < self.times
        if poisoned:
            self._done += 1
            if self.damages is not None:
                content = bytearray(self.damages.read_bytes())
                content[-1] ^= 1
                self.damages.write_bytes(content)
        return {"poison": output.logits.square().mean() * (float("nan") if poisoned else 0.0)}


class Counting(Poison):
    """Counts steps in a number and in a tensor, and saves both."""

    _count: int = PrivateAttr(default=0)
    _sum: torch.Tensor = PrivateAttr(default_factory=lambda: torch.zeros(()))

    @hookimpl
    def apt_step_end(self) -> None:
        self._count += 1
        self._sum += 1

    @hookimpl
    def apt_checkpoint_save(self) -> dict[str, object]:
        return {"count": self._count, "sum": self._sum}

    @hookimpl
    def apt_checkpoint_load(self, saved: dict[str, Any]) -> None:
        self._count, self._sum = saved["count"], saved["sum"].clone()


def train(
    profile: Path,
    out: Path,
    *sets: str,
    at: int = -1,
    times: int = 1,
    damages: Path | None = None,
    kind: type[Poison] = Poison,
    console: Console | None = None,
    **how: Any,
) -> RunResult:
    registry = Registry(discover)
    here = {"at": at, "times": times, "damages": damages, "__doc__": ""}
    registry.register("logger", "forgetful", Forgetful)
    registry.register("plugin", "poison", type("PoisonHere", (kind,), here))
    words = ["plugins=[poison]", "training.on_nonfinite=rewind", "training.keep_last=9", *sets]
    loaded = load_profile(profile, sets=words, registry=registry)
    console = Console(file=io.StringIO()) if console is None else console
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=console, **how).fit()


def told(out: Path, event: str) -> list[int]:
    return [int(str(each["step"])) for each in read_metrics(out) if each["event"] == event]


def test_a_step_that_is_skipped_leaves_nothing_in_buffers(profile_file: Path, tmp_path: Path) -> None:
    result = train(profile_file, tmp_path / "run", "training.on_nonfinite=skip", "training.max_steps=6", at=3)
    assert told(tmp_path / "run", "nonfinite") == [3]
    assert int(result.model.seen) == result.state.step - 1 == 5


def test_losses_of_a_course_that_was_left_stand_in_no_mean(profile_file: Path, tmp_path: Path) -> None:
    sets, losses = ["training.save_every=4", "training.max_steps=8"], []
    for every in (1, 4):
        folder = train(profile_file, tmp_path / str(every), *sets, f"monitoring.log_every={every}", at=5).folder
        losses.append([float(str(each["loss"])) for each in read_metrics(folder) if each["event"] == "train"])
    assert losses[1][-1] == pytest.approx(sum(losses[0][-4:]) / 4, rel=1e-6)


def test_going_back_over_the_end_of_an_epoch_counts_no_epoch_and_tells_no_step_twice(
    profile_file: Path, tmp_path: Path
) -> None:
    sets = ["training.save_every=2", "training.max_epochs=3"]
    result = train(profile_file, tmp_path / "run", *sets, at=3)
    assert (result.state.step, result.state.epoch) == (12, 3)
    poison = result.resolved.plugins["poison"]
    assert isinstance(poison, Poison)
    assert poison._epochs == [1, 2, 3]
    assert told(tmp_path / "run", "train") == list(range(1, 13))
    assert told(tmp_path / "run", "nonfinite") == [3]
    saved = read_saved(find_checkpoint(tmp_path / "run"))["progress"]
    assert saved["left_out"] == 2


def test_what_tells_of_going_back_outlasts_going_back_to_the_same_step_again(
    profile_file: Path, tmp_path: Path
) -> None:
    train(profile_file, tmp_path / "run", "training.max_epochs=3", at=6, times=2)
    assert told(tmp_path / "run", "nonfinite") == [6, 6]
    assert told(tmp_path / "run", "train") == list(range(1, 13))
    assert read_saved(find_checkpoint(tmp_path / "run"))["progress"]["left_out"] == 6


def test_a_plugin_that_the_trunk_lacks_goes_back_with_the_branch_to_how_it_began(
    profile_file: Path, tmp_path: Path
) -> None:
    trunk = train(profile_file, tmp_path / "trunk", "plugins=[]", "training.max_steps=4").folder
    how: dict[str, Any] = {"at": 7, "times": 2, "kind": Counting, "branch": find_checkpoint(trunk)}
    result = train(profile_file, tmp_path / "branch", "training.max_steps=8", "training.save_every=8", **how)
    assert told(result.folder, "nonfinite") == [7, 7]
    plugin = result.resolved.plugins["poison"]
    assert isinstance(plugin, Counting)
    assert (plugin._count, plugin._sum.item()) == (4, 4)


class Forgetful(LoggerProvider):
    """Keeps events, as long as they hold."""

    api_level: ClassVar[int] = 1
    kept: ClassVar[list[tuple[object, int]]] = []

    def open(self, folder: Path, profile: object, resumed_at: int | None) -> Forgetful:  # type: ignore[override]
        self.kept.clear()
        return self

    def log(self, event: Any) -> None:
        self.kept.append((event["event"], event["step"]))

    def go_back(self, step: int) -> None:
        self.kept[:] = [each for each in self.kept if each[1] <= step]

    def close(self) -> None: ...


def test_a_logger_that_can_forget_holds_what_the_metrics_hold(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "run", "training.max_epochs=3", "monitoring.loggers=[forgetful]", at=6, times=2)
    assert Forgetful.kept == [(each["event"], each["step"]) for each in read_metrics(tmp_path / "run")]


def test_it_goes_back_to_what_it_began_with_not_to_another_course_s_checkpoint(
    profile_file: Path, tmp_path: Path
) -> None:
    out, sets = tmp_path / "run", ["training.save_every=4", "training.max_steps=12", "training.max_epochs=9"]
    train(profile_file, out, *sets)
    result = train(profile_file, out, *sets, "training.learning_rate=1e-4", at=6, resume=str(out / "step-000004"))
    assert result.state.step == 12
    assert read_saved(find_checkpoint(out))["progress"]["left_out"] == 3
    assert told(out, "train") == list(range(1, 13))
    rates = {
        each["learning_rate"] for each in read_metrics(out) if each["event"] == "train" and int(str(each["step"])) > 4
    }
    assert max(float(str(rate)) for rate in rates) <= 1e-4


def test_a_damaged_checkpoint_is_not_gone_back_to(profile_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"step-000004: damaged \(model.safetensors\)"):
        train(profile_file, out, at=5, damages=out / "step-000004" / "model.safetensors")


def test_the_best_is_known_to_its_own_checkpoint_and_is_kept_over_a_resume(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.4, 2.3, 2.2])
    monkeypatch.setattr(between, "evaluate", lambda *given, **named: (Score(next(scores), 1.0, 1), {}))
    out = tmp_path / "run"
    sets = ["training.keep_best=true", "training.keep_last=1", "training.save_every=3", "evaluation.eval_every=2"]
    train(profile_file, out, *sets)
    assert (out / "best").read_text().strip() == "step-000004"
    assert read_saved(out / "step-000004")["progress"]["best"] == 2.0
    train(profile_file, out, *sets, "training.max_epochs=3", resume="auto")
    assert [each.name for each in list_checkpoints(out)] == ["step-000004", "step-000012"]
    assert (out / "best").read_text().strip() == "step-000004"


def test_the_best_is_pointed_to_though_the_run_was_killed_just_before(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.4])
    monkeypatch.setattr(between, "evaluate", lambda *given, **named: (Score(next(scores), 1.0, 1), {}))

    def die(run: Path, pointer: str, folder: Path) -> None:
        if folder.name == "step-000004":
            raise SystemExit(9)
        point(run, pointer, folder)

    out = tmp_path / "run"
    sets = ["training.keep_best=true", "training.keep_last=1", "training.save_every=3", "evaluation.eval_every=2"]
    monkeypatch.setattr(saver, "point", die)
    with pytest.raises(SystemExit):
        train(profile_file, out, *sets)
    monkeypatch.setattr(saver, "point", point)
    assert (out / "best").read_text().strip() == "step-000002"
    train(profile_file, out, *sets, resume="auto")
    assert (out / "best").read_text().strip() == "step-000004"
    assert [each.name for each in list_checkpoints(out)] == ["step-000004", "step-000008"]


@pytest.mark.parametrize("content", [b"", b"\xf3tep-000004\n", b"step-000003\n", None])
def test_the_best_outlasts_its_pointer(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.4, 2.3, 2.2])
    monkeypatch.setattr(between, "evaluate", lambda *given, **named: (Score(next(scores), 1.0, 1), {}))
    out, output = tmp_path / "run", io.StringIO()
    sets = ["training.keep_best=true", "training.keep_last=1", "training.save_every=3", "evaluation.eval_every=2"]
    train(profile_file, out, *sets)
    if content is None:
        (out / "best").unlink()
    else:
        (out / "best").write_bytes(content)
    console = Console(file=output, width=1000)
    train(profile_file, out, *sets, "training.max_epochs=3", resume="auto", console=console)
    assert [each.name for each in list_checkpoints(out)] == ["step-000004", "step-000012"]
    assert (out / "best").read_text() == "step-000004\n"
    assert ("the best checkpoint so far is step-000004" in output.getvalue()) == (content is not None)


class Stopped(Poison):
    """Is asked to stop in the step that is poisoned."""

    @hookimpl
    def apt_step_start(self, state: RunState) -> None:
        if state.step == self.at:
            signal.raise_signal(signal.SIGTERM)


def test_the_best_is_still_pointed_to_where_its_step_is_saved_once_more(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(between, "evaluate", lambda *given, **named: (Score(2.0, 1.0, 1), {}))
    out, sets = tmp_path / "run", ["training.keep_best=true", "evaluation.eval_every=4"]
    train(profile_file, out, *sets, "training.max_steps=4")
    assert (out / "best").read_text() == "step-000004\n"
    again = train(profile_file, out, *sets, at=4, kind=Stopped, resume="auto")
    assert (again.interrupted, again.state.step) == (True, 4)
    assert [each.name for each in list_checkpoints(out)] == ["step-000004.2"]
    assert (out / "best").read_text() == "step-000004.2\n"
    train(profile_file, out, *sets, "training.keep_last=1", resume="auto")
    assert [each.name for each in list_checkpoints(out)] == ["step-000004.2", "step-000008"]


def test_a_stop_in_the_step_that_is_gone_back_from_saves_what_was_left_out(profile_file: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "run", ["training.save_every=2"]
    stopped = train(profile_file, out, *sets, at=3, kind=Stopped)
    assert (stopped.interrupted, stopped.state.step) == (True, 2)
    assert read_saved(find_checkpoint(out))["progress"]["left_out"] == 2
    again = train(profile_file, out, *sets, resume="auto").model.state_dict()
    whole = train(profile_file, tmp_path / "whole", *sets, at=3).model.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_old_checkpoints_go_and_folders_of_others_stay(profile_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(profile_file, out)
    shutil.copytree(out / "step-000004", out / "mine")
    train(profile_file, out, "training.keep_last=1", "training.max_epochs=3", resume="auto")
    assert [each.name for each in list_checkpoints(out)] == ["mine", "step-000012"]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_anomaly_detection_leaves_the_guard_at_work(profile_file: Path, tmp_path: Path, action: str) -> None:
    out, sets = tmp_path / "run", [f"training.on_nonfinite={action}", "debug.detect_anomaly=true"]
    if action == "skip":
        assert train(profile_file, out, *sets, at=2).state.step == 8
        assert told(out, "nonfinite") == [2]
        return
    with pytest.raises(AptError, match=r"step 2: .*in the added loss 'poison'.*; Function .* returned nan values"):
        train(profile_file, out, *sets, at=2)


@pytest.mark.parametrize(
    ("action", "ends"), [("stop", "step 8: the held-out loss is nan"), ("skip", ""), ("rewind", "")]
)
def test_a_held_out_loss_that_is_not_finite_is_no_end(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, ends: str
) -> None:
    scores = iter([2.0, float("nan"), 1.5])
    monkeypatch.setattr(between, "evaluate", lambda *given, **named: (Score(next(scores), 1.0, 1), {}))
    out, sets = tmp_path / "run", [f"training.on_nonfinite={action}", "training.keep_best=true"]
    if ends:
        with pytest.raises(AptError, match=ends):
            train(profile_file, out, *sets)
        return
    train(profile_file, out, *sets)
    saved = read_saved(find_checkpoint(out))["progress"]
    assert (saved["best"], saved["left_out"]) == ((2.0, 0) if action == "skip" else (1.5, 4))


def test_a_disk_that_refuses_in_mid_run_is_told_with_the_file_and_how_to_go_on(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Metrics.write

    def refuse(self: Metrics, event: str, **values: object) -> None:
        if values.get("step") == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, event, **values)

    monkeypatch.setattr(Metrics, "write", refuse)
    with pytest.raises(AptError, match=r"run: No space left on device") as caught:
        train(profile_file, tmp_path / "run")
    assert "what was saved is untouched; go on with: " in caught.value.__notes__[0]


def test_an_epoch_of_the_text_s_own_begins_with_a_pass(profile_file: Path) -> None:
    config = load_profile(profile_file, sets=["training.accumulate=2", "training.steps_per_epoch=null"]).config
    assert [first_batch(config, 5, steps) for steps in range(5)] == [0, 2, 5, 7, 10]
    assert [first_batch(config, 1, steps) for steps in range(3)] == [0, 2, 4]
    counted = load_profile(profile_file, sets=["training.accumulate=2", "training.steps_per_epoch=3"]).config
    assert [first_batch(counted, 5, steps) for steps in range(4)] == [0, 2, 4, 6]
    for each in (config, counted):
        starts = [first_batch(each, 5, steps) for steps in range(9)]
        for index in range(starts[-1] + 1):
            assert starts[steps_before(each, 5, index)] == min(start for start in starts if start >= index)


class Forgets(Plugin):
    """Is asked to stop after the first step that it sees, and lets go of what it knows at the end."""

    api_level: ClassVar[int] = 1
    _seen: list[int] = PrivateAttr(default_factory=list)

    @hookimpl
    def apt_step_end(self, state: RunState) -> None:
        self._seen.append(state.step)
        signal.raise_signal(signal.SIGTERM)

    @hookimpl
    def apt_training_end(self) -> None:
        self._seen.clear()

    @hookimpl
    def apt_checkpoint_save(self) -> dict[str, Any]:
        return {"seen": [*self._seen]}


def test_a_branch_that_is_stopped_at_once_saves_what_its_plugins_know_and_draws_nothing(
    profile_file: Path, tmp_path: Path
) -> None:
    quiet, trunk = Console(file=io.StringIO()), tmp_path / "trunk" / "step-000004"
    Trainer(load_profile(profile_file).config, tmp_path / "trunk", console=quiet).fit()
    registry = Registry(discover)
    registry.register("plugin", "forgets", Forgets)
    sets = ["plugins=[forgets]", "monitoring={plot: true, log_every: 100}"]
    loaded = load_profile(profile_file, sets=sets, registry=registry)
    result = Trainer(loaded.config, tmp_path / "run", resolved=loaded.resolved, console=quiet, branch=trunk).fit()
    assert (result.interrupted, result.state.step, result.plot) == (True, 5, None)
    assert read_saved(find_checkpoint(tmp_path / "run"))["hooks"] == {"forgets": {"seen": [5]}}
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_stop_is_agreed_on_between_the_steps_alone(profile_file: Path, tmp_path: Path) -> None:
    """Were it seen by one rank within what follows a step, that rank would save while the others went on."""
    agreed: list[tuple[int, bool]] = []

    class Asked(Trainer):
        def _take_step(self) -> None:
            super()._take_step()
            if self.state.step == 3:
                self._stop_soon("SIGTERM", self.journal.report)
            agreed.append((self.state.step, self._stop))

    loaded = load_profile(profile_file)
    result = Asked(loaded.config, tmp_path / "run", console=Console(file=io.StringIO())).fit()
    assert (result.interrupted, result.state.step) == (True, 3)
    assert agreed == [(1, False), (2, False), (3, False)]


class Interrupted(io.RawIOBase):
    """A stream in whose writing the run is asked to stop, as where its reader is slow."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if b"held-out" in bytes(data):
            signal.raise_signal(signal.SIGTERM)
        return len(data)


def test_a_stop_that_comes_while_something_is_printed_saves_too(profile_file: Path, tmp_path: Path) -> None:
    console = Console(file=io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    result = Trainer(load_profile(profile_file).config, tmp_path / "run", console=console).fit()
    assert (result.interrupted, result.state.step) == (True, 4)
    assert find_checkpoint(tmp_path / "run").name == "step-000004"
