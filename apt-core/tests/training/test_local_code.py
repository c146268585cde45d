"""Provider code in a file, from the first step to a text: trained, kept, locked, and run from a checkpoint with leave alone."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from apt.cli import main
from apt.errors import LockWarning
from apt.training.checkpoint import load_run
from apt.training.trainer import Trainer

SOURCE = """
from pydantic import Field

from apt.builtin.ffn import MLP


class Mine(MLP):
    "A network of one's own."

    mark: str = Field(default="", description="a file that shows it was run")

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        if self.mark:
            with open(self.mark, "a") as file:
                file.write("run\\n")
        return super().create_layer(d_model, d_ff, dropout, activation)
"""


def train(profile: Path, run: Path, *words: str) -> int:
    return main(["train", "-p", str(profile), "--out", str(run), *words])


@pytest.fixture
def trained(profile_file: Path, tmp_path: Path) -> Path:
    """A run whose network stands in a file beside the profile's base, in another folder."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.py").write_text(SOURCE)
    network = f"{{provider: ./mine.py:Mine, mark: {tmp_path / 'mark'}}}"
    base = profile_file.read_text().replace("{provider: default}", network)
    (tmp_path / "parts" / "base.yaml").write_text(base)
    (tmp_path / "top.yaml").write_text("base: parts/base.yaml\nname: top\n")
    assert train(tmp_path / "top.yaml", tmp_path / "run") == 0
    return tmp_path / "run"


def test_it_is_trained_kept_and_locked(trained: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    checkpoint = trained / "step-000008"
    lock = json.loads((checkpoint / "state.json").read_text())["lock"]["model.ffn"]
    assert (lock["name"], lock["source"]) == ("./parts/mine.py:Mine", digest)
    assert (checkpoint / "local-parts%2Fmine.py").read_text() == SOURCE
    assert f"sha256:{digest[:12]}" in (trained / "resolved.yaml").read_text()


def test_a_checkpoint_does_not_run_it_unasked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mark").unlink()
    # Neither the folder of the file, nor that of the run, is leave to run what a checkpoint names.
    for folder in (tmp_path, trained / "step-000008"):
        monkeypatch.chdir(folder)
        for words in (["generate", str(trained), "--prompt", "def "], ["evaluate", str(trained)]):
            assert main(words) == 2
            assert "code in a file is not run unasked" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_with_leave_the_kept_code_runs_whatever_has_become_of_the_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mark").unlink()
    (tmp_path / "parts" / "mine.py").write_text("raise RuntimeError('changed since')")
    words = ["generate", str(trained), "--prompt", "def ", "--max-new-tokens", "3", "--allow-local-code"]
    assert main([*words, "--strict-lock"]) == 0
    assert (tmp_path / "mark").read_text() == "run\n" * 2
    assert "warning" not in capsys.readouterr().err


def test_a_checkpoint_whose_kept_code_was_changed_is_told_by_its_lock(trained: Path) -> None:
    checkpoint = trained / "step-000008"
    kept = checkpoint / "local-parts%2Fmine.py"
    kept.write_text(SOURCE + "\n# changed\n")
    digests = json.loads((checkpoint / "manifest.json").read_text())
    digests[kept.name] = hashlib.sha256(kept.read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(digests))
    with pytest.warns(LockWarning, match=r"model\.ffn: \(file\) was sha256:"):
        load_run(trained, allow_local_code=True)


def test_a_stopped_branch_goes_on_by_the_command_that_it_prints(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts" / "mine.py").unlink()
    take, out = Trainer._take_step, tmp_path / "branch"

    def stop(self: Trainer) -> None:
        take(self)
        if self.state.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_take_step", stop)
        words = ["--set", "training.max_epochs=3", "--set", "evaluation.eval_every=4", "--allow-local-code"]
        assert main(["branch", str(trained), "--out", str(out), *words]) == 130
    assert "held-out" not in (out / "README.md").read_text().split("## Use")[0]
    said = next(line for line in capsys.readouterr().out.splitlines() if "go on with: " in line)
    command = shlex.split(said.partition("go on with: ")[2])
    again = command[command.index("train") :]
    assert again == [
        "train",
        "-p",
        str(out / "resolved.yaml"),
        "--allow-local-code",
        "--resume",
        "auto",
        "--out",
        str(out),
    ]
    assert main([word for word in again if word != "--allow-local-code"]) == 2
    assert (
        "cannot be read: No such file or directory; a copy lies here: add --allow-local-code" in capsys.readouterr().err
    )
    assert main(again) == 0
    assert load_run(out, allow_local_code=True).state.step == 12
    assert "held-out loss (nats a token)" in (out / "README.md").read_text()
