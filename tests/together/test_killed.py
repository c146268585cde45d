"""A run that is killed at any moment, in mid-write too, goes on to the same bits as one that never was."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.core.config import APTConfig
from apt.errors import CheckpointError
from apt.training import durable, snapshot
from apt.training.checkpoint import list_checkpoints, load_run, verify
from apt.training.trainer import Trainer

pytestmark = pytest.mark.timeout(900)  # a busy machine is no fault of the code
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["apt.training.trainer", "apt_moe.upcycling", "apt_moe.plugin", "apt_align.aligner", "apt_align.plugin", __name__]
)


@pytest.fixture
def config(tiny: APTConfig) -> APTConfig:
    """Forty steps, a checkpoint every third, the experts on at step 10, alignment with a second pass at step 20."""
    training = tiny.training.model_copy(update={"steps_per_epoch": 10, "save_every": 3})
    align = {**tiny.options["align"], "state": "dropout"}
    options = {**tiny.options, "align": align}
    return tiny.model_copy(update={"training": training, "options": options, "dropout": 0.1})


def train(config: APTConfig, out: Path) -> None:
    torch.set_num_threads(1)
    Trainer(config, out, resume="auto", console=Console(file=io.StringIO())).fit()


def train_and_die(config: APTConfig, out: Path, fatal: int) -> None:
    """Train, and be killed at the `fatal`-th time that something is about to happen on the disk."""
    calls = itertools.count(1)

    def deadly(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (snapshot, "write_whole"),
        (snapshot, "point"),
        (snapshot, "flush"),
        (durable, "flush"),
        (snapshot.shutil, "rmtree"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "mkdir"),
    ):
        setattr(module, name, deadly(getattr(module, name)))
    train(config, out)


def run(function: Callable[..., None], *arguments: object, kill_after: float | None = None) -> int:
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def bits(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_run(out).model.state_dict())


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.thorough)])
def test_killed_at_random_moments(config: APTConfig, tmp_path: Path, times: int) -> None:
    started = time.monotonic()
    assert run(train, config, tmp_path / "whole") == 0
    length = time.monotonic() - started
    generator = random.Random(7)
    kills = 0
    out = tmp_path / "run"
    while kills < times:
        if run(train, config, out, kill_after=generator.uniform(0, length)) == 0:
            # It was done before it could be killed: begin again.
            assert_same_bits(bits(tmp_path / "whole"), bits(out))
            out = tmp_path / f"run-{kills}"
        else:
            kills += 1
            for folder in list_checkpoints(out) if out.is_dir() else []:
                verify(folder)
    assert run(train, config, out) in (0, 1)
    with contextlib.suppress(CheckpointError):  # where the last kill came after the end
        train(config, out)
    assert_same_bits(bits(tmp_path / "whole"), bits(out))


@pytest.mark.parametrize("stride", [61, pytest.param(3, marks=pytest.mark.thorough)])
def test_killed_when_the_disk_is_touched(config: APTConfig, tmp_path: Path, stride: int) -> None:
    short = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 6})})
    assert run(train, short, tmp_path / "whole") == 0
    expected = bits(tmp_path / "whole")
    for fatal in itertools.count(1, stride):
        out = tmp_path / f"at-{fatal}"
        died = run(train_and_die, short, out, fatal) != 0
        if died:
            with contextlib.suppress(CheckpointError):  # the run was over, but for what comes after the last checkpoint
                train(short, out)
        assert_same_bits(expected, bits(out))
        if not died:
            break
    assert fatal > 40


def fill_the_disk(config: APTConfig, out: Path) -> None:
    """No file may grow beyond a few kilobytes after the first checkpoint: writing fails in the middle of a file."""
    training = config.training.model_copy(update={"max_steps": 3})
    train(config.model_copy(update={"training": training}), out)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(config, out)
    os._exit(42)


def test_a_disk_that_is_full_costs_nothing_that_was_saved(config: APTConfig, tmp_path: Path) -> None:
    assert run(train, config, tmp_path / "whole") == 0
    assert run(fill_the_disk, config, tmp_path / "run") == 42
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-000003"]
    verify(tmp_path / "run" / "step-000003")
    train(config, tmp_path / "run")
    assert_same_bits(bits(tmp_path / "whole"), bits(tmp_path / "run"))


def test_too_little_room_is_told_before_anything_is_written(
    config: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        CheckpointError, match=r"step-000003: needs \d\.\d\d MiB, and 0\.00 MiB are free; make room and go on"
    ):
        train(config, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_an_error_of_the_disk_is_told_in_its_own_words(
    config: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "write_whole", full)
    with pytest.raises(CheckpointError, match="step-000003: cannot be written: No space left on device"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".step*"))
