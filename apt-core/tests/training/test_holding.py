"""One process at a time trains into a folder; who only reads it is never kept out."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from rich.console import Console

from apt.cli import main
from apt.core.profile import load_profile
from apt.errors import UserError
from apt.training.holding import HELD, hold
from apt.training.ranks import ALONE
from apt.training.trainer import RunResult, Trainer


def train(profile: Path, out: Path, *sets: str, resume: str = "auto", told: io.StringIO | None = None) -> RunResult:
    loaded = load_profile(profile, sets=sets)
    console = Console(file=io.StringIO() if told is None else told)
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=console, resume=resume).fit()


def test_a_folder_in_which_another_process_trains_is_refused(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(profile_file, out)
    before = {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()}
    assert HELD not in before
    with hold(out, ALONE, print):
        for resume in ("auto", "never"):
            with pytest.raises(
                UserError, match=r"run: another process trains there; wait for its end, or give another"
            ):
                train(profile_file, out, "training.max_epochs=3", resume=resume)
        assert main(["branch", str(out), "--out", str(out), "--set", "training.max_epochs=3"]) == 2
        assert "run: another process trains there" in capsys.readouterr().err
        assert main(["generate", str(out), "--prompt", "x", "--max-new-tokens", "1"]) == 0
        words = ["--out", str(tmp_path / "branch"), "--set", "training.max_epochs=3"]
        assert main(["branch", str(out), *words]) == 0
    assert {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()} == before
    assert train(profile_file, out, "training.max_epochs=3").state.step == 12


def test_a_process_that_is_killed_lets_go(profile_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out / HELD)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains there"):
            train(profile_file, out, resume="never")
        shutil.copytree(out, tmp_path / "copy")
        with hold(tmp_path / "copy", ALONE, print):
            pass
        os.kill(other.pid, signal.SIGKILL)
    assert [each.name for each in out.iterdir()] == [HELD]
    assert train(profile_file, out, resume="never").state.step == 8
    assert not (out / HELD).exists()


def test_a_run_that_is_refused_or_fails_lets_go_and_leaves_no_folder(profile_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    with pytest.raises(UserError):
        train(profile_file, out, resume=str(tmp_path / "nowhere"))
    assert not out.parent.exists()

    def fail() -> None:
        with hold(out, ALONE, print):
            (out / "metrics.jsonl").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [each.name for each in out.iterdir()] == ["metrics.jsonl"]


def test_where_the_file_system_has_no_locks_that_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    told = io.StringIO()
    with hold(tmp_path / "run", ALONE, lambda line: print(line, file=told)):
        pass
    assert "run: this file system has no locks; nothing keeps another process" in told.getvalue()
