"""The encoder-decoder of the profiles: its pairs are right, and it is trained by two processes and goes on where it was left."""

from __future__ import annotations

import datetime
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.training.checkpoint import load_run
from apt.training.record import read_metrics

PROFILES = Path(__file__).parents[2] / "profiles"
STEPS = ["training.max_steps=24", "training.warmup_steps=4", "training.save_every=8", "training.keep_last=5"]
REST = [
    "monitoring.log_every=1",
    "training.batch_size=8",
    "evaluation.eval_every=12",
    "evaluation.max_batches=2",
    "evaluation.sample_tokens=0",
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "dates.jsonl"
    runpy.run_path(str(PROFILES / "dates.py"))["write"](path, 400)
    return path


def test_each_target_is_the_day_of_its_source(pairs: Path) -> None:
    told = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(told) == 400
    ways = ("%d %B %Y", "%B %d %Y", "%A %d %b %Y", "the %d of %B %Y")
    for pair in told:
        words = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", pair["source"]).replace(",", "")
        days = {each for way in ways if (each := parse(words, way))}
        assert days == {datetime.date.fromisoformat(pair["target"])}


def parse(text: str, way: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text, way).date()
    except ValueError:
        return None


def train(ranks: int, pairs: Path, out: Path, *words: str) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    sets = [word for each in (*STEPS, *REST, f"data.path={pairs}") for word in ("--set", each)]
    command = [sys.executable, *launch, "-m", "apt", "train", "-p", str(PROFILES / "dates.yaml"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *sets, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_two_processes_train_what_one_does_and_either_goes_on_from_the_other(pairs: Path, tmp_path: Path) -> None:
    ddp = ("--set", "hardware.parallel=ddp")
    train(1, pairs, tmp_path / "one")
    train(2, pairs, tmp_path / "two", *ddp)
    curves = [
        [each["loss"] for each in read_metrics(tmp_path / name) if each["event"] == "train"] for name in ("one", "two")
    ]
    assert len(curves[0]) == 24
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0] - 1
    train(1, pairs, tmp_path / "again", "--resume", str(tmp_path / "one" / "step-000008"))
    train(1, pairs, tmp_path / "other", "--resume", str(tmp_path / "two" / "step-000016"))
    one, again, other = (load_run(tmp_path / name).model.state_dict() for name in ("one", "again", "other"))
    for name, tensor in one.items():
        assert torch.equal(again[name], tensor)
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3)
