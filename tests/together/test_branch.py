"""A branch: a new run from a checkpoint of another. One dense trunk, many curricula."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.cli import main
from apt.core.config import APTConfig
from apt.core.profile import dump_profile
from apt.training.checkpoint import load_run, read_saved
from apt.training.record import read_metrics


@pytest.fixture
def trunk(tiny: APTConfig, tmp_path: Path) -> Path:
    """A dense run of ten steps without plugins or experts, saved at every step."""
    training = tiny.training.model_copy(update={"max_epochs": 2, "save_every": 1, "keep_last": 100})
    options = {"attention": tiny.options["attention"]}
    dense = tiny.model_copy(
        update={"plugins": (), "schedules": {}, "options": options, "ffn_name": "default", "training": training}
    )
    profile = tmp_path / "trunk.yaml"
    profile.write_text(dump_profile(dense))
    assert main(["train", "-p", str(profile), "--out", str(tmp_path / "trunk")]) == 0
    return tmp_path / "trunk"


EXPERTS = (
    *("--plugins", "moe", "--set", "model.ffn.provider=moe", "--set", "model.ffn.experts=4"),
    *("--set", "training.max_epochs=4"),
)


def branch(trunk: Path, out: Path, step: int, *words: str) -> int:
    return main(["branch", str(trunk), "--at", str(step), "--out", str(out), *words])


def test_a_branch_that_changes_nothing_ends_with_the_trunk_s_bits(trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, tmp_path / "same", 4) == 0
    one, other = (load_run(folder).model.state_dict() for folder in (trunk, tmp_path / "same"))
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert [event["step"] for event in read_metrics(tmp_path / "same") if event["event"] == "train"] == list(
        range(5, 11)
    )


def test_experts_grow_on_a_trunk_that_knew_none(trunk: Path, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    assert branch(trunk, out, 6, *EXPERTS, "--set", "schedules.enable_moe_at_step=8") == 0
    (switch,) = [event for event in read_metrics(out) if event["event"] == "switch"]
    assert (switch["step"], switch["plugin"]) == (8, "moe")
    assert abs(float(switch["change"])) < 1e-5  # type: ignore[arg-type]
    run = load_run(out)
    assert run.state.step == 20
    assert run.state.plugins_on == ("moe",)


def test_until_its_switch_a_branch_with_experts_is_the_trunk(trunk: Path, tmp_path: Path) -> None:
    out = tmp_path / "late"
    assert (
        branch(trunk, out, 6, *EXPERTS, "--set", "schedules.enable_moe_at_step=15", "--set", "training.max_steps=10")
        == 0
    )
    one, other = (load_run(folder).model.state_dict() for folder in (trunk, out))
    renamed = {name.replace(".ffn.dense.", ".ffn."): tensor for name, tensor in other.items()}
    # The learning rate of both falls to step 10, so what they have in common is equal to the bit.
    assert not [name for name in one if not torch.equal(one[name], renamed[name])]


def test_an_experiment_can_start_at_once(trunk: Path, tmp_path: Path) -> None:
    out = tmp_path / "now"
    assert branch(trunk, out, 6, *EXPERTS) == 0
    (switch,) = [event for event in read_metrics(out) if event["event"] == "switch"]
    assert switch["step"] == 6


def test_a_branch_s_options_count_where_a_schedule_could_move_them_and_a_trunk_saved_them(
    trunk: Path, tmp_path: Path
) -> None:
    experts = tmp_path / "experts"
    router = "model.ffn.router={provider: topk_default, top_k: 2, balance_loss: %s, temperature: %s}"
    words = [*EXPERTS, "--set", "schedules.enable_moe_at_step=8", "--set", "training.save_every=1"]
    assert branch(trunk, experts, 6, *words, "--set", router % (0.01, 1.0), "--set", "model.ffn.capacity=1.25") == 0
    out = tmp_path / "other"
    words = ["--set", router % (7.0, 0.5), "--set", "model.ffn.capacity=3.0", "--set", "training.max_epochs=5"]
    assert branch(experts, out, 19, *words) == 0
    values = {name: value.item() for name, value in load_run(out).model.state_dict().items() if not value.dim()}
    assert {value for name, value in values.items() if name.endswith("balance_weight")} == {7.0}
    assert {value for name, value in values.items() if name.endswith("temperature")} == {0.5}
    assert {value for name, value in values.items() if name.endswith("capacity_factor")} == {3.0}
    lost = {
        folder: [event for event in read_metrics(folder) if event["event"] == "train"][-1]["loss_balance_loss"]
        for folder in (experts, out)
    }
    assert float(lost[out]) > 100 * float(lost[experts])  # type: ignore[arg-type]


def test_the_parent_is_recorded_and_a_resumed_branch_remembers_it(trunk: Path, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    assert branch(trunk, out, 6, "--set", "training.learning_rate=1e-4", "--set", "training.max_epochs=3") == 0
    parent = json.loads((out / "record.json").read_text())["parent"]
    assert (parent["run"], parent["checkpoint"], parent["step"]) == (str(trunk), "step-000006", 6)
    assert len(parent["manifest_sha256"]) == 64
    assert any(line.startswith("training.learning_rate: 0.003 -> 0.0001") for line in parent["changes"])
    assert "step-000006" in (out / "README.md").read_text()
    profile = tmp_path / "more.yaml"
    profile.write_text((out / "resolved.yaml").read_text().replace("max_epochs: 3", "max_epochs: 4"))
    assert main(["train", "-p", str(profile), "--out", str(out), "--resume", "auto"]) == 0
    assert read_saved(out / "step-000020")["progress"]["parent"] == parent
    assert json.loads((trunk / "record.json").read_text())["parent"] is None


@pytest.mark.parametrize(
    ("step", "words", "message"),
    [
        (40, (), r"has no checkpoint of step 40; it has: 1, 2, 3"),
        (10, (), r"step 10 is the end of this profile; raise max_epochs or max_steps"),
        (6, ("--set", "model.d_model=64"), r"refused: model.d_model: 32 -> 64"),
        (6, ("--set", "model.attention.r=4"), r"its weights do not fit the profile's model"),
        (6, ("--set", "model.ffn=swiglu"), r"its weights do not fit the profile's model"),
        (6, ("--set", "training.nonsense=1"), r"training.nonsense: no such option"),
    ],
)
def test_what_cannot_be_is_refused(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, words: tuple[str, ...], message: str
) -> None:
    assert branch(trunk, tmp_path / "no", step, *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()


def test_what_was_on_cannot_be_off_in_a_branch(trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch(trunk, tmp_path / "experts", 6, *EXPERTS) == 0
    again = ["branch", str(tmp_path / "experts"), "--out", str(tmp_path / "no"), "--set", "training.max_epochs=9"]
    assert main([*again, "--set", "schedules.enable_moe_at_epoch=8"]) == 2
    assert "'moe' was on at step 20, and what is on cannot be switched off" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_not_written_to(trunk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apt", "branch", str(trunk), "--at", "6", "--out", str(trunk)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr
