"""The command line as its users meet it: what it prints, its exit codes, and that nothing ends in a traceback."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from apt.cli import build_parser, main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def trained(profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    code, _, _ = run(capsys, "train", "-p", profile_file, "--out", tmp_path / "run")
    assert code == 0
    return tmp_path / "run"


def test_training_ends_with_loss_providers_sample_and_folder(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "train", "-p", profile_file, "--out", tmp_path / "run", "--set", "monitoring.plot=true")
    assert code == 0
    assert "bits per byte" in out
    assert "model.attention  attention.sdpa" in out
    assert "sample:\ndef " in out
    assert f"run:  {tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "loss.png").is_file()
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("def ")


def test_a_run_writes_and_is_scored(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    code, out, _ = run(capsys, "generate", trained, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 1)
    assert (code, out[:4]) == (0, "def ")
    assert run(capsys, "generate", trained, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 1)[1] == out
    code, out, _ = run(capsys, "evaluate", trained, "--split", "test")
    assert code == 0
    assert out.startswith("test: ")
    code, out, _ = run(capsys, "plot", trained, "--out", trained / "p.svg")
    assert code == 0
    assert "<svg" in (trained / "p.svg").read_text()


def test_the_newest_run_is_runs_latest_and_the_line_that_comes_next_can_be_pasted(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "apt-core")])
    for name in ("first", "second"):
        code, out, _ = run(capsys, "train", "-p", profile_file, "--out", f"runs/{name}")
        assert code == 0
        assert Path("runs/latest").resolve() == tmp_path / "runs" / name
    program, *words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert program == sys.argv[0]
    code, out, _ = run(capsys, *words, "--max-new-tokens", 5)
    assert (code, out[:4]) == (0, "def ")
    longer = ("--set", "training.max_epochs=3", "--resume", "runs/latest")
    assert run(capsys, "train", "-p", profile_file, *longer)[0] == 0
    assert Path("runs/latest").resolve() == tmp_path / "runs" / "second"


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "plot", "providers", "check", "doctor", "test"])
def test_help_says_what_a_command_does_and_what_each_option_means(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (subparsers,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    parser = subparsers.choices[command]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    assert run(capsys, command, "--help")[0] == 0


def test_a_checkpoint_that_is_gone_or_damaged_is_named(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    assert run(capsys, "generate", trained / "nope", "--prompt", "x")[0] == 2
    assert "is a file; give a run's folder" in run(capsys, "generate", trained / "latest", "--prompt", "x")[2]
    weights = trained / "step-000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    code, out, err = run(capsys, "generate", trained, "--prompt", "x")
    assert (code, out) == (2, "")
    assert "damaged (model.safetensors); use the one before" in err


def test_a_file_is_no_folder_for_a_run(capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    code, _, err = run(capsys, "train", "-p", profile_file, "--out", taken)
    assert (code, err) == (2, f"error: {taken}: is a file; give a folder as --out\n")
    assert taken.read_text() == "mine"


def test_what_a_model_writes_is_shown_by_a_terminal_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: object, tokens: Sequence[int]) -> str:
        return "a\x1b[2J\x07\tb\n" * len(tokens)

    monkeypatch.setattr("apt.builtin.tokenizer.ByteTokenizer.decode", decode)
    words = ("generate", trained, "--prompt", "def ", "--max-new-tokens", 2)
    assert run(capsys, *words)[1] == "def " + 2 * "a\x1b[2J\x07\tb\n" + "\n", "a pipe is given the text itself"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(capsys, *words)[1] == "def " + 2 * "a\\x1b[2J\\x07\tb\n" + "\n"
    assert run(capsys, *words, "--prompt", "x")[1].endswith("x" + 2 * "a\\x1b[2J\\x07\tb\n" + "\n")


def test_a_terminal_that_knows_few_characters_gets_the_others_by_number(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    assert main(["generate", str(trained), "--prompt", "é", "--max-new-tokens", "5"]) == 0
    assert ascii_only.buffer.getvalue().startswith(rb"\xe9")  # type: ignore[attr-defined]


def test_going_on_needs_to_know_with_which_run(capsys: pytest.CaptureFixture[str], profile_file: Path) -> None:
    code, out, err = run(capsys, "train", "-p", profile_file, "--resume", "auto")
    assert (code, out) == (2, "")
    assert "--resume auto: says not which run to go on with; give its folder as --out" in err


def test_what_is_refused_prints_nothing_else(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    code, out, err = run(capsys, "generate", trained, "--prompt", "x", "--temperature", -1)
    assert (code, out) == (2, "")
    assert "temperature: -1.0 is not allowed; 0 or more" in err


def test_providers_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "providers", "ffn")
    assert code == 0
    assert "default" in out
    assert "swiglu" in out
    code, out, _ = run(capsys, "providers", "show", "attention.sdpa")
    assert code == 0
    assert "num_kv_heads integer >= 1 or none" in " ".join(out.split())
    for words in (("rooter",), ("show", "nope.x"), ("show", "sdpa"), ("a", "b")):
        assert run(capsys, "providers", *words)[0] == 2
    assert (
        "did you mean 'router'?" in run(capsys, "providers", "rooter")[2]
        or "kinds: " in run(capsys, "providers", "rooter")[2]
    )


def test_check_tells_size_and_cost(capsys: pytest.CaptureFixture[str], profile_file: Path) -> None:
    code, out, _ = run(capsys, "check", profile_file)
    assert code == 0
    assert f"{profile_file}: good" in out
    assert "memory of training, batches of 2 x 16" in out
    code, _, err = run(capsys, "check", profile_file, "--set", "model.d_modl=3", "--set", "training.batch_size=0")
    assert code == 2
    assert err.count("error: --set") == 2


def test_profiles_are_made_shown_and_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, profile_file: Path
) -> None:
    new = tmp_path / "new.yaml"
    assert run(capsys, "profile", "new", new)[0] == 0
    assert run(capsys, "check", new)[0] == 0
    assert run(capsys, "profile", "new", new)[0] == 2
    code, out, _ = run(capsys, "profile", "show", profile_file, "--set", "model.d_ff=48")
    assert code == 0
    assert "d_ff: 48" in out
    assert "# --set model.d_ff=48" in out
    assert "# default" in out
    shown = tmp_path / "shown.yaml"
    shown.write_text(out)
    assert run(capsys, "check", shown)[0] == 0
    code, out, _ = run(capsys, "profile", "diff", profile_file, shown)
    assert "model.d_ff:\n  - 32" in out
    assert out.endswith("1 values differ\n")
    assert run(capsys, "profile", "diff", shown, shown)[1] == "the same once resolved\n"


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    attention = json.loads(out)["properties"]["model"]["properties"]["attention"]
    assert attention == {"anyOf": [{"$ref": "#/$defs/attention"}, {"type": "null"}]}


def test_a_schedule_is_drawn(capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "schedule", "plot", profile_file)
    assert code == 2
    assert "schedules nothing" in err


def test_a_provider_is_held_to_its_checks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "test", "ffn.default", "--set", "bias=true")
    assert code == 0
    assert "ffn.default: " in out
    assert "failed" not in out
    assert run(capsys, "test", "ffn")[0] == 2
    assert run(capsys, "test", "ffn.nope")[0] == 2


@pytest.mark.parametrize("words", [(), ("trian",), ("train",), ("train", "-p"), ("generate",), ("--nope",)])
def test_a_slip_of_the_pen_exits_with_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "error: " in err


def test_a_mistyped_command_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'train'?" in run(capsys, "trian")[2]


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "apt", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:9]) == (0, "apt-core ")


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["providers"], ["schema"], ["doctor"], ["profile", "--help"]]
)
def test_looking_never_loads_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom apt.cli import build_parser, main\n"
        f"try: code = main({words!r})\nexcept SystemExit as stop: code = stop.code\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fault_of_ours_exits_with_1_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, profile_file: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("apt.core.estimate.estimate", broken)
    assert main(["check", str(profile_file)]) == 1
    assert "this is a fault of apt-core, not of your input" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["raise KeyError('mine')", "raise SystemExit(0)"])
def test_a_fault_of_a_provider_names_its_package_or_file(
    capsys: pytest.CaptureFixture[str], profile_file: Path, how: str
) -> None:
    code = f"""
from apt.builtin.ffn import MLP


class Mine(MLP):
    "Fails."

    def get_flops_estimate(self, seq_len, d_model, d_ff):
        {how}
"""
    (profile_file.parent / "mine.py").write_text(code)
    assert main(["check", str(profile_file), "--set", "model.ffn=./mine.py:Mine"]) == 1
    told = capsys.readouterr().err
    assert f"this is a fault of provider code ({profile_file.parent}/mine.py:9), not of your input" in told


def test_what_a_run_says_comes_next_can_be_called_though_its_code_is_in_a_file_and_its_folder_has_a_space(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path
) -> None:
    (profile_file.parent / "mine.py").write_text("from apt.builtin.ffn import MLP\n\n\nclass Mine(MLP):\n    'One.'\n")
    sets = ("--set", "model.ffn=./mine.py:Mine")
    code, out, err = run(capsys, "train", "-p", profile_file, *sets, "--out", tmp_path / "a run")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("next: "))
    words = shlex.split(line)
    assert run(capsys, *words[words.index("generate") :], "--max-new-tokens", "1")[0] == 0


def test_a_layer_that_does_not_take_what_it_is_called_with_is_its_provider_s_fault(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path
) -> None:
    code = """
from torch import nn

from apt.builtin.ffn import MLP


class Layer(nn.Module):
    "Knows no mask."

    def forward(self, x):
        return x


class Mine(MLP):
    "Makes it."

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        return Layer()
"""
    (profile_file.parent / "mine.py").write_text(code)
    words = ["train", "-p", str(profile_file), "--out", str(tmp_path / "run"), "--set", "model.ffn=./mine.py:Mine"]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert "unexpected keyword argument 'mask'" in told
    assert "this is a fault of provider code (calling Layer), not of your input" in told


def test_a_provider_that_does_not_learn_is_no_fault_of_the_user(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path
) -> None:
    code = """
from torch import nn

from apt.builtin.ffn import MLP


class Mine(MLP):
    "Makes a layer with a map that nothing uses."

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        layer = super().create_layer(d_model, d_ff, dropout, activation)
        layer.idle_map = nn.Linear(2, 2)
        return layer
"""
    (profile_file.parent / "mine.py").write_text(code)
    words = ["train", "-p", str(profile_file), "--out", str(tmp_path / "run"), "--set", "model.ffn=./mine.py:Mine"]
    assert main(words) == 1
    assert "blocks.0.ffn: its parameter idle_map.weight got no gradient" in capsys.readouterr().err


def test_a_method_that_does_not_take_what_it_is_called_with_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], profile_file: Path
) -> None:
    code = """
from apt.builtin.ffn import MLP


class Mine(MLP):
    "Forgets the activation."

    def create_layer(self, width, hidden, dropout=0.0):
        raise NotImplementedError
"""
    (profile_file.parent / "mine.py").write_text(code)
    assert main(["check", str(profile_file), "--set", "model.ffn=./mine.py:Mine"]) == 2
    told = capsys.readouterr().err
    assert "its create_layer does not take (d_model, d_ff, dropout, activation): too many positional arguments" in told


@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        ("torch", 2, "error: this command needs PyTorch, which is not installed: pip install torch\n"),
        ("rarely", 1, "error: rarely is not installed, which apt-core or a provider needs\n"),
    ],
)
def test_a_module_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    profile_file: Path,
    missing: str,
    code: int,
    message: str,
) -> None:
    def absent(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("apt.core.estimate.estimate", absent)
    assert main(["check", str(profile_file)]) == code
    assert capsys.readouterr().err.endswith(message)


def test_a_pipe_that_closes_is_no_error(profile_file: Path) -> None:
    command = f"{sys.executable} -m apt profile show {profile_file} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout.split(":")[0], done.stderr) == ("name", "")


@pytest.mark.parametrize(("unbuffered", "is_read"), [("", True), ("1", False)], ids=["stdout", "stderr too"])
def test_a_run_goes_on_quietly_where_nobody_reads_what_it_prints(
    profile_file: Path, tmp_path: Path, unbuffered: str, is_read: bool
) -> None:
    profile_file.write_text(profile_file.read_text().replace("ffn: {provider: default}", "ffn_name: default"))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "apt", "train", "-p", str(profile_file), "--out", str(tmp_path / "run")],
        stdout=writing,
        stderr=subprocess.PIPE if is_read else writing,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(writing)
    told = b"deprecated: model.ffn_name is now model.ffn.provider\n" if is_read else None
    assert (done.returncode, done.stderr) == (0, told)
    assert {"step-000008", "README.md", "sample.txt"} <= {each.name for each in (tmp_path / "run").iterdir()}


def test_a_reader_that_goes_is_no_fault_where_rich_prints(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = (
        "import rich; from apt.cli import enter, profiles; profiles.print = rich.print; "
        "import sys; sys.argv[1:] = ['schema']; enter()"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(errno.EROFS, 2), (errno.ENOSPC, 2), (errno.EIO, 1)])
def test_what_the_file_system_refuses_is_told_and_whose_fault_it_is(
    capsys: pytest.CaptureFixture[str], profile_file: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    make = Path.mkdir

    def refuse(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self == Path("runs/x"):
            raise OSError(number, os.strerror(number), str(self))
        make(self, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(capsys, "train", "-p", profile_file, "--out", "runs/x")[::2] == (
        code,
        f"error: runs/x: {os.strerror(number)}\n",
    )
