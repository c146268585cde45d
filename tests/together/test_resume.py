"""A run that was stopped and resumed ends with the same bits as one that was not, in every phase."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.core.config import APTConfig
from apt.core.profile import dump_profile
from apt.errors import CheckpointError, UserError
from apt.training.checkpoint import load_run
from apt.training.record import read_metrics
from apt.training.trainer import RunResult, Trainer


def train(config: APTConfig, out: Path, resume: str = "never") -> RunResult:
    return Trainer(config, out, resume=resume, console=Console(file=io.StringIO())).fit()


def saving_often(config: APTConfig, **training: object) -> APTConfig:
    section = config.training.model_copy(update={"save_every": 1, "keep_last": 100, **training})
    return config.model_copy(update={"training": section})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_run(path).model.state_dict())


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.parametrize(
    "state",
    [pytest.param("layer", marks=pytest.mark.thorough), "dropout", pytest.param("ema", marks=pytest.mark.thorough)],
)
def test_a_run_resumed_in_any_phase_ends_with_the_same_bits(tiny: APTConfig, tmp_path: Path, state: str) -> None:
    align = {**tiny.options["align"], "state": state}
    config = saving_often(tiny).model_copy(update={"options": {**tiny.options, "align": align}, "dropout": 0.1})
    train(config, tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    # How often a run saves changes no bit either, and checkpoints take longer than these steps.
    seldom = config.model_copy(update={"training": config.training.model_copy(update={"save_every": 20})})
    for step in (3, 5, 7, 10, 13):
        out = tmp_path / f"from-{step}"
        result = train(seldom, out, resume=str(tmp_path / "whole" / f"step-{step:06d}"))
        assert result.state.step == 20
        assert_same_bits(expected, weights(out))


def test_how_often_a_run_is_evaluated_changes_no_bit(tiny: APTConfig, tmp_path: Path) -> None:
    often = tiny.model_copy(update={"evaluation": tiny.evaluation.model_copy(update={"eval_every": 1})})
    train(tiny, tmp_path / "seldom")
    train(often, tmp_path / "often")
    assert_same_bits(weights(tmp_path / "seldom"), weights(tmp_path / "often"))


def test_the_metrics_of_a_resumed_run_have_each_step_once(tiny: APTConfig, tmp_path: Path) -> None:
    config = saving_often(tiny)
    train(config, tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("step-000007\n")
    train(config, tmp_path / "run", resume="auto")
    steps = [event["step"] for event in read_metrics(tmp_path / "run") if event["event"] == "train"]
    assert steps == list(range(1, 21))


def test_a_run_that_is_over_says_so(tiny: APTConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run")
    with pytest.raises(CheckpointError, match="is the end of this profile; raise max_epochs or max_steps"):
        train(tiny, tmp_path / "run", resume="auto")


def test_a_run_does_not_write_over_another(tiny: APTConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty; give another --out"):
        train(tiny, tmp_path / "run")


def test_a_resume_on_another_text_is_refused(tiny: APTConfig, tmp_path: Path) -> None:
    train(saving_often(tiny), tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("something else " * 500)
    changed = tiny.model_copy(update={"data": tiny.data.model_copy(update={"path": str(other)})})
    with pytest.raises(CheckpointError, match="was trained on another text"):
        train(changed, tmp_path / "new", resume=str(tmp_path / "run" / "step-000005"))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_offered(tiny: APTConfig, tmp_path: Path) -> None:
    train(saving_often(tiny), tmp_path / "run")
    path = tmp_path / "run" / "step-000020" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged \(model.safetensors\); use the one before, .*step-000019"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_an_interrupted_run_saves_and_resumes_to_the_same_bits(
    tiny: APTConfig, tmp_path: Path, number: signal.Signals
) -> None:
    training = tiny.training.model_copy(update={"steps_per_epoch": 30})
    config = tiny.model_copy(update={"training": training})
    profile = tmp_path / "long.yaml"
    profile.write_text(dump_profile(config))
    train(config, tmp_path / "whole")
    command = [sys.executable, "-m", "apt", "train", "-p", str(profile), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"{number.name}: finishing this step" in output
    assert 0 < load_run(tmp_path / "run").state.step < 120
    said, *again = shlex.split(next(line for line in output.splitlines() if "go on with: " in line).split(": ")[1])
    assert [said, *again] == ["python", *command[1:-2], "--resume", "auto", *command[-2:]]
    assert subprocess.run([sys.executable, *again], env=environment, check=False).returncode == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "run"))


STUCK = """
import sys, time
from pathlib import Path
from apt.core.profile import load_profile
from apt.training.trainer import Trainer

class Stuck(Trainer):
    def _take_step(self):
        if self.state.step == 2:
            Path(sys.argv[3]).touch()
            time.sleep(60)
        super()._take_step()

Stuck(load_profile(sys.argv[1]).config, sys.argv[2]).fit()
"""

SLOW = """
import sys, time
from pathlib import Path
from apt.core.profile import load_profile
from apt.training import saver
from apt.training.trainer import Trainer

write = saver.write_snapshot

def slowly(run, snapshot, ranks):
    if snapshot.step == 3:
        Path(sys.argv[3]).touch()
        time.sleep(60)
    return write(run, snapshot, ranks)

saver.write_snapshot = slowly
Trainer(load_profile(sys.argv[1], sets=["training.async_save=true"]).config, sys.argv[2]).fit()
"""


@pytest.mark.thorough
@pytest.mark.parametrize("program", [STUCK, SLOW], ids=["in a step", "while a thread writes"])
def test_a_second_signal_leaves_at_once(tiny: APTConfig, tmp_path: Path, program: str) -> None:
    profile, script, sign = tmp_path / "profile.yaml", tmp_path / "stuck.py", tmp_path / "sign"
    profile.write_text(dump_profile(saving_often(tiny)))
    script.write_text(program)
    command = [sys.executable, str(script), str(profile), str(tmp_path / "run"), str(sign)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not sign.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert "SIGTERM: finishing this step, then saving (again to leave at once)" in output
    assert f"go on with: apt-core train -p {tmp_path / 'run' / 'resolved.yaml'} --resume auto" in output
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert load_run(tmp_path / "run").state.step == 2
