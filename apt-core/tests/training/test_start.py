"""Where a run starts: what is damaged is named, and nothing begins anew, goes back or mixes two runs without a word."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from apt.cli import main
from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.errors import CheckpointError, UserError
from apt.training import record, trainer
from apt.training.changes import BRANCH, check_changes
from apt.training.checkpoint import digest_of, load_run, verify
from apt.training.record import read_metrics
from apt.training.trainer import RunResult, Trainer


def train(profile: Path, out: Path, *sets: str, resume: str = "auto", console: Console | None = None) -> RunResult:
    loaded = load_profile(profile, sets=sets)
    quiet = Console(file=io.StringIO()) if console is None else console
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=quiet, resume=resume).fit()


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def run(profile_file: Path, tmp_path: Path) -> Path:
    """Eight steps, saved at each second."""
    train(profile_file, tmp_path / "run", "training.save_every=2", "training.keep_last=9")
    return tmp_path / "run"


def test_where_the_only_checkpoint_is_damaged_nothing_begins_anew(profile_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "one"
    train(profile_file, out, "training.keep_last=1")
    before = (out / "metrics.jsonl").read_bytes()
    for name in ("state.json", "manifest.json"):
        shutil.copytree(out, tmp_path / name)
        cut(tmp_path / name / "step-000008" / name)
        with pytest.raises(CheckpointError, match=r"step-000008: damaged \(.*; there is none before it"):
            train(profile_file, tmp_path / name)
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(out / "step-000008")
    with pytest.raises(CheckpointError, match=r"latest: names 'step-000008', which is not there; nor is another"):
        train(profile_file, out)
    (out / "latest").unlink()
    assert train(profile_file, out).state.step == 8


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "resolved.yaml"])
@pytest.mark.parametrize("pointed", [True, False])
def test_a_damaged_newest_is_named_and_the_one_before_offered(
    run: Path, profile_file: Path, name: str, pointed: bool
) -> None:
    (run / "step-000008" / name).unlink()
    if not pointed:
        (run / "latest").unlink()
    with pytest.raises(
        CheckpointError, match=rf"step-000008: damaged \({name} is missing\); use the one before, .*step-000006$"
    ):
        train(profile_file, run, "training.max_epochs=3")


@pytest.mark.parametrize("content", [b"\xf3tep-000008\n", b"", b"stfp-000008\n", b"../run/step-000008\n"])
def test_a_damaged_pointer_is_named(run: Path, profile_file: Path, content: bytes) -> None:
    (run / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest: .*give it by its path \(--resume .*step-000008\)"):
        train(profile_file, run, "training.max_epochs=3")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\xf3tep-000006", "damaged: it names no checkpoint"),
        (b"", "damaged: it names no checkpoint"),
        (b"stfp-000006\n", "names 'stfp-000006', which is not there"),
    ],
)
def test_a_damaged_pointer_to_the_best_is_named_and_the_run_goes_on(
    run: Path, profile_file: Path, content: bytes, fault: str
) -> None:
    sets = ("training.max_epochs=3", "training.save_every=2", "training.keep_best=true", "evaluation.eval_every=2")
    (run / "best").write_bytes(content)
    output = io.StringIO()
    console = Console(file=output, width=1000)
    assert train(profile_file, run, *sets, resume=str(run / "step-000006"), console=console).state.step == 12
    assert f"warning: {run / 'best'}: {fault}; the best checkpoint is chosen anew" in output.getvalue()
    assert (run / (run / "best").read_text().strip()).is_dir()


def test_a_damaged_pointer_to_the_best_keeps_nothing_from_being_saved(run: Path, profile_file: Path) -> None:
    (run / "best").write_bytes(b"\xf3tep-000006")
    assert train(profile_file, run, "training.max_epochs=3").state.step == 12
    assert (run / "latest").read_text() == "step-000012\n"


def test_a_run_begins_again_from_its_own_copy_of_the_profile(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "--resume", "auto", "--out", str(out), "-p"]
    with monkeypatch.context() as patched:
        die_at(2, patched)
        with pytest.raises(Killed):
            main([*words, str(profile_file)])
    kept = out / "profile" / "small.yaml"
    assert main([*words, str(kept)]) == 0, capsys.readouterr().err
    assert kept.read_text() == profile_file.read_text()


def test_a_run_that_was_never_pointed_to_goes_on_in_its_own_folder(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "one"
    train(profile_file, out)
    (out / "latest").unlink()
    for step in (11, 12):
        (out / f".step-0000{step}.part").mkdir()
    assert main(["train", "-p", str(profile_file), "--resume", str(out), "--set", "training.max_epochs=3"]) == 0
    assert [each.name for each in out.parent.iterdir()] == ["one"]
    assert not [*out.glob(".*")]
    assert (out / "latest").read_text() == "step-000012\n"


def test_what_changes_in_an_empty_section_is_told_by_its_values() -> None:
    empty, filled = APTConfig(), APTConfig(schedules={"enable_moe_at_step": 8})
    for before, after, line in (
        (empty, filled, "schedules.enable_moe_at_step: None -> 8"),
        (filled, empty, "schedules.enable_moe_at_step: 8 -> None"),
    ):
        assert check_changes(Path("run"), before, after, BRANCH) == [line]


def test_a_branch_names_what_is_damaged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def branch(step: int) -> str:
        words = ["--at", str(step), "--out", str(tmp_path / "no"), "--set", "training.max_steps=2"]
        assert main(["branch", str(run), *words]) == 2
        assert not (tmp_path / "no").exists()
        return capsys.readouterr().err

    capsys.readouterr()
    state, profile = run / "step-000004" / "state.json", run / "step-000004" / "resolved.yaml"
    whole = state.read_bytes()
    state.write_bytes(whole.replace(b'"format"', b'"gormat"'))
    assert "step-000004: damaged (state.json); use the one before" in branch(4)
    assert "step 6 is the end of this profile" in branch(6)
    state.write_bytes(whole.replace(b'"step": 4', b'"step": 5'))
    assert f"has no checkpoint of step 4; it has: 2, 5, 6, 8; damaged: {run / 'step-000004'}." in branch(4)
    cut(state)
    assert f"has no checkpoint of step 4; it has: 2, 6, 8; damaged: {run / 'step-000004'}." in branch(4)
    state.write_bytes(whole)
    cut(profile)
    assert "step-000004: damaged (resolved.yaml); use the one before" in branch(4)


def test_what_is_offered_for_a_damaged_one_is_never_later_nor_damaged(run: Path, profile_file: Path) -> None:
    cut(run / "step-000004" / "state.json")
    cut(run / "step-000002" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"000004: damaged \(state.json\); there is none before it; there are: \S*6, \S*8$"
    ):
        train(profile_file, run, resume=str(run / "step-000004"))
    assert len(read_metrics(run)) > 8


def test_a_run_goes_on_in_its_own_folder_or_in_a_new_one(run: Path, profile_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(profile_file, other, "training.seed=7")
    before = (other / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"other: is not empty, and is not the run of .*step-000008; give a new folder"):
        train(profile_file, other, "training.max_epochs=3", resume=str(run))
    assert (other / "metrics.jsonl").read_bytes() == before
    assert train(profile_file, tmp_path / "new", "training.max_epochs=3", resume=str(run)).state.step == 12
    names = {"record.json", "lock.json", "environment.txt", "profile"}
    assert names <= {each.name for each in (tmp_path / "new").iterdir()}
    parent = json.loads((tmp_path / "new" / "record.json").read_text())["parent"]
    assert (parent["run"], parent["checkpoint"], parent["step"]) == (str(run), "step-000008", 8)


class Killed(BaseException):
    """The process ends here, as far as the run's folder can tell."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take = trainer.Trainer._take_step

    def deadly(self: Trainer) -> None:
        take(self)
        if self.state.step == step:
            raise Killed

    monkeypatch.setattr(trainer.Trainer, "_take_step", deadly)


def test_a_run_that_goes_on_from_an_earlier_checkpoint_stays_on_that_course(
    run: Path, profile_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, sets = io.StringIO(), ("training.learning_rate=1e-4", "training.max_epochs=3", "training.save_every=4")
    (run / "best").write_text("step-000006\n")
    metrics = (run / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        die_at(3, patched)
        console = Console(file=output, width=1000)
        with pytest.raises(Killed):
            train(profile_file, run, *sets, resume=str(run / "step-000002"), console=console)
    aside = run / "set-aside"
    told = f"set aside, with its metrics, in {aside}: step-000004, step-000006, step-000008"
    assert told in output.getvalue()
    assert (run / "latest").read_text() == "step-000002\n"
    assert train(profile_file, run, *sets).state.step == 12
    rates = {event["step"]: event["learning_rate"] for event in read_metrics(run) if event["event"] == "train"}
    assert list(rates) == list(range(1, 13))
    assert max(float(str(rate)) for step, rate in rates.items() if step > 2) <= 1e-4
    # The course that was left is a run to go on with, too.
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    assert (aside / "best").read_text() == "step-000006\n"
    verify(aside / "step-000004")
    assert load_run(aside).state.step == 8


def test_a_run_that_was_killed_before_its_card_writes_what_is_missing(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, longer = tmp_path / "run", "training.max_epochs=3"
    whole = train(profile_file, out).validation
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise Killed

        patched.setattr(trainer, "write_card", die)
        with pytest.raises(Killed):
            train(profile_file, out, longer)
    assert not (out / "README.md").exists()  # that of the end at step 8 would be of another model
    told, before = (out / "metrics.jsonl").read_bytes(), digest_of(out / "step-000012" / "manifest.json")
    result = train(profile_file, out, longer, "monitoring.plot=true")
    assert result.validation.loss != whole.loss
    assert f"{result.validation.loss:.4f}" in (out / "README.md").read_text()
    assert (result.state.step, result.interrupted, result.plot) == (12, False, out / "loss.png")
    assert (out / "metrics.jsonl").read_bytes() == told
    assert digest_of(out / "step-000012" / "manifest.json") == before
    with pytest.raises(CheckpointError, match="step 12 is the end of this profile"):
        train(profile_file, out, longer)
    # Metrics that were lost are told anew.
    (out / "README.md").unlink()
    (out / "metrics.jsonl").write_bytes(b"")
    train(profile_file, out, longer)
    assert [(each["event"], each["step"], each["loss"]) for each in read_metrics(out)] == [
        ("evaluation", 12, result.validation.loss)
    ]


def test_a_branch_that_saved_nothing_does_not_begin_anew(
    run: Path, profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        die_at(9, patched)
        words = ["--set", "training.max_epochs=3", "--set", "training.save_every=4"]
        with pytest.raises(Killed):
            main(["branch", str(run), "--out", str(tmp_path / "branch"), *words])
    with pytest.raises(UserError, match=r"branch: began at .*step-000008 and was stopped before its first checkpoint"):
        train(tmp_path / "branch" / "resolved.yaml", tmp_path / "branch")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"parent": 3}', '{"parent": {}}'])
def test_where_it_cannot_be_known_whether_a_run_began_in_another_nothing_begins_anew(
    run: Path, profile_file: Path, tmp_path: Path, content: str
) -> None:
    for out in (run, tmp_path / "new"):
        out.mkdir(exist_ok=True)
        (out / "record.json").write_text(content)
    assert train(profile_file, run, "training.max_epochs=3").state.step == 12  # with checkpoints it is known
    with pytest.raises(UserError, match=r"record\.json: damaged \(.*\), so that it is not known .* give a new folder"):
        train(profile_file, tmp_path / "new")


@pytest.mark.parametrize("during", ["distributions", "_git", "make_lock"])
def test_a_branch_that_was_killed_while_its_folder_was_written_does_not_begin_anew(
    run: Path, profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    def kill(*arguments: object) -> None:
        raise Killed

    out = tmp_path / "branch"
    with monkeypatch.context() as patched:
        patched.setattr(record, during, kill)
        with pytest.raises(Killed):
            main(["branch", str(run), "--out", str(out), "--set", "training.max_epochs=3"])
    if (out / "resolved.yaml").exists() or (out / "record.json").exists():
        with pytest.raises(UserError, match=r"branch: began at .*step-000008 and was stopped before its first"):
            train(profile_file, out, "training.max_epochs=3")
    else:
        assert during != "make_lock"


def test_the_profile_that_goes_on_with_a_run_outlives_a_kill_while_it_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "resolved.yaml").read_bytes()
    write, write_text = Path.write_bytes, Path.write_text

    def half(path: Path, content: str | bytes, **how: str) -> int:
        if "resolved.yaml" not in path.name:
            return write_text(path, content, **how) if isinstance(content, str) else write(path, content)
        write(path, before[:100])
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        patched.setattr(Path, "write_text", half)
        with pytest.raises(Killed):
            train(run / "resolved.yaml", run, "training.max_epochs=3")
    assert (run / "resolved.yaml").read_bytes() == before
    assert train(run / "resolved.yaml", run, "training.max_epochs=3").state.step == 12


@pytest.mark.parametrize(("parallel", "said"), [("none", "ddp"), ("fsdp", "fsdp")])
def test_experts_are_not_shared_out_within_one_process(
    profile_file: Path, tmp_path: Path, parallel: str, said: str
) -> None:
    sets = ("hardware.expert_parallel=3", f"hardware.parallel={parallel}")
    with pytest.raises(
        UserError,
        match=rf"expert_parallel: 3, but this is one process; .*--nproc-per-node 3 .*hardware.parallel={said}",
    ):
        train(profile_file, tmp_path / "run", *sets)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_says_that_it_shares_nothing(profile_file: Path, tmp_path: Path, parallel: str) -> None:
    output = io.StringIO()
    train(profile_file, tmp_path / "run", f"hardware.parallel={parallel}", console=Console(file=output))
    warning = (
        f"warning: hardware.parallel: {parallel}, but this is one process, which trains alone; for N of them: torchrun"
    )
    assert warning in output.getvalue()


def test_the_best_of_a_course_that_was_left_is_not_held_against_the_next(run: Path, profile_file: Path) -> None:
    state = run / "step-000004" / "state.json"
    saved = json.loads(state.read_text())
    saved["progress"]["best"] = 0.0
    state.write_text(json.dumps(saved))
    manifest = run / "step-000004" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "state.json": digest_of(state)}))
    (run / "best").write_text("step-000006\n")
    sets = ("training.keep_best=true", "training.learning_rate=1e-4")
    train(profile_file, run, *sets, resume=str(run / "step-000004"))
    assert (run / "best").read_text() == "step-000008\n"
    assert (run / "set-aside" / "best").read_text() == "step-000006\n"
