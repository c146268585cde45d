"""Two processes train what one does, go on where the other left off, and do not outlive one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from apt.core.config import APTConfig
from apt.core.profile import dump_profile
from apt.training.checkpoint import list_checkpoints, load_run
from apt.training.record import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def profile(tiny: APTConfig, tmp_path: Path) -> Path:
    """Fifty-two steps: experts on at step 13, alignment at step 26; what is drawn would differ between ranks, so nothing is."""
    training = tiny.training.model_copy(update={"steps_per_epoch": 13, "save_every": 13, "keep_last": 10})
    hardware = tiny.hardware.model_copy(update={"parallel": "ddp"})
    path = tmp_path / "profile.yaml"
    path.write_text(dump_profile(tiny.model_copy(update={"training": training, "hardware": hardware})))
    return path


def command(ranks: int, profile: Path, out: Path, *words: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "apt", "train", "-p", str(profile), "--out", str(out), *words]


def train(ranks: int, profile: Path, out: Path, *words: str) -> str:
    done = subprocess.run(
        command(ranks, profile, out, *words), capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curve(out: Path) -> list[tuple[int, float]]:
    return [(int(each["step"]), float(each["loss"])) for each in read_metrics(out) if each["event"] == "train"]  # type: ignore[call-overload,arg-type]


def test_two_ranks_train_what_one_does_over_both_switches(profile: Path, tmp_path: Path) -> None:
    train(1, profile, tmp_path / "one")
    said = train(2, profile, tmp_path / "two")
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 53))
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-5
    held_out = [
        [each["loss"] for each in read_metrics(out) if each["event"] == "evaluation"]
        for out in (tmp_path / "one", tmp_path / "two")
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    assert said.count("held-out loss:") == 1


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(profile: Path, tmp_path: Path, first: int, then: int) -> None:
    train(first, profile, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "step-000026"
    train(then, profile, tmp_path / "rest", "--resume", str(checkpoint))
    whole, rest = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "rest"))
    for name, tensor in whole.items():
        if first == then:
            assert torch.equal(rest[name], tensor)
        else:
            torch.testing.assert_close(rest[name], tensor, atol=1e-4, rtol=1e-3)


def test_micro_batches_of_two_ranks_are_one_large_batch(profile: Path, tmp_path: Path) -> None:
    words = ["--set", "training.accumulate=2", "--set", "training.max_steps=20"]
    train(1, profile, tmp_path / "one", *words)
    train(2, profile, tmp_path / "two", *words)
    pairs = zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


def start(profile: Path, out: Path) -> subprocess.Popen[str]:
    long = command(2, profile, out, "--set", "training.steps_per_epoch=3000", "--set", "training.save_every=20")
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not list_checkpoints(out):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


def test_a_rank_that_dies_ends_the_run_with_its_name(profile: Path, tmp_path: Path) -> None:
    process = start(profile, tmp_path / "run")
    workers = [each for each in psutil.Process(process.pid).children() if "apt" in each.cmdline()]
    victim = next(each for each in workers if each.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    assert "rank      : 1" in output
    assert f"Signal {signal.SIGKILL.value} (SIGKILL) received by PID {victim.pid}" in output


def test_all_ranks_stop_at_the_same_step_and_save(profile: Path, tmp_path: Path) -> None:
    process = start(profile, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    run = load_run(tmp_path / "run")
    assert 20 < run.state.step < 12_000


def test_a_start_that_does_not_go_with_the_profile_is_refused(profile: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--set", "hardware.parallel=none"], "hardware.parallel: none, but torchrun started 2 processes; set ddp"),
        (["--set", "training.batch_size=3"], "training.batch_size: 3 is not a multiple of the 2 processes"),
    ):
        done = subprocess.run(
            command(2, profile, tmp_path / "run", *words), capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        assert done.returncode != 0
        assert message in done.stderr
    assert not (tmp_path / "run").exists()
