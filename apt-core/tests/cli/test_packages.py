"""Commands that packages bring: known by metadata, imported when they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt.cli import main
from apt.core.discovery import Discovery
from apt.core.registry import Registry


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: one with a command, one whose command breaks, one whose command is none."""
    for name, source in (
        ("diary", "import sys\n\ndef main(words):\n    print('diary:', *words)\n    return 7\n"),
        ("broken", "1/0\n"),
        ("odd", "main = 3\n"),
        ("check", "def main(words):\n    print('stolen')\n"),
    ):
        (tmp_path / f"apt_{name}.py").write_text(source)
        info = tmp_path / f"apt_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apt-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[apt.providers]\ncommand.{name} = apt_{name}:main\n")
    return tmp_path


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-m", "apt", *words], capture_output=True, text=True, env=environment, check=False
    )


def test_a_packages_command_gets_the_words_after_its_name(site: Path) -> None:
    done = run(site, "diary", "--date", "today")
    assert (done.returncode, done.stdout) == (7, "diary: --date today\n")


def test_commands_are_listed_without_being_imported(site: Path) -> None:
    done = run(site, "--help")
    assert done.returncode == 0
    listed = " ".join(done.stdout.split()).partition("Commands of installed packages: ")[2].rstrip(".").split(", ")
    assert {"broken", "check", "diary", "odd"} <= set(listed)


def test_a_command_that_breaks_costs_itself_alone(site: Path) -> None:
    done = run(site, "broken")
    assert done.returncode == 2
    assert "command.broken of apt-broken 1.0: importing apt_broken:main failed: ZeroDivisionError" in done.stderr
    assert "command.odd is a int, which cannot be called" in run(site, "odd").stderr
    assert run(site, "providers").returncode == 0


def test_a_known_command_that_is_not_installed_is_told_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apt.cli.packages.registry", Registry(Discovery))
    assert main(["moe", "inspect", "run"]) == 2
    assert (
        capsys.readouterr().err == "error: no command 'moe' is installed; it comes with apt-moe: pip install apt-moe\n"
    )


def test_an_interrupt_that_an_import_swallows_is_still_one(site: Path) -> None:
    swallowed = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    (site / "half.py").write_text(swallowed + "else:\n    whole = 1\n")
    (site / "apt_diary.py").write_text("def main(words):\n    import half\n\n    return half.whole\n")
    done = run(site, "diary")
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_the_doctor_tries_commands_too(site: Path) -> None:
    done = run(site, "doctor")
    assert done.returncode == 1
    assert "command.broken" in done.stdout
    assert "apt-core has a command of this name, so this one cannot be called" in done.stdout


def test_no_package_takes_a_command_of_apt_core(site: Path) -> None:
    done = run(site, "check", "nothing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing.yaml: cannot be read" in done.stderr


def test_the_doctor_runs_where_a_variable_is_wrong(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "nobody")
    done = run(site, "doctor")
    assert done.returncode == 1
    assert "APT_DISABLE_PLUGINS: 'nobody' matches nothing that is installed" in done.stdout
    assert run(site, "--help").returncode == 0
    assert run(site, "providers").returncode == 2
