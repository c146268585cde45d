"""What is kept of a run's checkpoints goes by the steps that they hold, not by what their folders are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from apt.errors import CheckpointError
from apt.training.checkpoint import find_checkpoint, list_checkpoints, list_damaged, verify
from apt.training.saver import Saver
from apt.training.snapshot import Snapshot, clear_unfinished, point, write_snapshot


class Silent:
    """A tokenizer that has nothing to save."""

    def save(self, folder: Path) -> None:
        pass


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"state.json": json.dumps({"step": step})}, {}, Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_older_ones_go_even_where_names_sort_otherwise(tmp_path: Path, asynchronous: bool) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_best=False, asynchronous=asynchronous)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        saver.save(snapshot(step))
    saver.wait()
    assert [each.name for each in list_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]
    assert (tmp_path / "latest").read_text() == "step-1000001\n"


def test_what_is_offered_for_a_damaged_one_is_the_one_before_by_its_step(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=3, keep_best=False, asynchronous=False)
    for step in (999_999, 1_000_000, 1_000_001):
        saver.save(snapshot(step))
    shutil.move(tmp_path / "step-999999", tmp_path / "zero")
    state = tmp_path / "step-1000000" / "state.json"
    state.write_text(state.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"step-1000000: damaged \(state.json\); use the one before, .*zero$"):
        verify(tmp_path / "step-1000000")


def test_what_a_thread_could_not_write_is_told_at_the_next_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1, keep_best=False, asynchronous=True)
    (tmp_path / "step-000001").write_text("in the way")
    saver.save(snapshot(1))
    with pytest.raises(CheckpointError, match=r"step-000001: cannot be written: Not a directory"):
        saver.save(snapshot(2))


def test_a_checkpoint_of_a_step_that_has_one_is_whole_and_pointed_to_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path, snapshot(4))
    seen: list[list[str]] = []

    def pointed(run: Path, pointer: str, folder: Path) -> None:
        point(run, pointer, folder)
        seen.append(sorted(each.name for each in list_checkpoints(run)))

    monkeypatch.setattr("apt.training.snapshot.point", pointed)
    write_snapshot(tmp_path, snapshot(4))
    assert seen == [["step-000004", "step-000004.2"]]
    assert [each.name for each in list_checkpoints(tmp_path)] == ["step-000004.2"]
    assert find_checkpoint(tmp_path).name == "step-000004.2"
    write_snapshot(tmp_path, snapshot(4))
    assert [each.name for each in list_checkpoints(tmp_path)] == ["step-000004"]


@pytest.mark.parametrize(("step", "kept"), [(4, "step-000004.2"), (8, "step-000008")], ids=["replaced", "older"])
def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, kept: str
) -> None:
    saver = Saver(tmp_path, keep_last=1, keep_best=False, asynchronous=False)
    saver.save(snapshot(4))

    def killed(folder: Path, *, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "manifest.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            saver.save(snapshot(step))
    assert [each.name for each in list_checkpoints(tmp_path)] == [kept]
    assert not list_damaged(tmp_path)
    clear_unfinished(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", kept]
