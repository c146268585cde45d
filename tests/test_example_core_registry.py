"""The registry's example does what it says, without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "core_registry.py"


def test_the_example_registers_gets_falls_back_excludes_and_lists_without_pytorch():
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told["reads"] == "2! 1!"
    assert told["the same instance"] == told["with other options another"] == "True"
    assert "did you mean 'start'?" in told["refused"]
    assert told["used instead"] == "countdown"
    assert "pip install 'giant-telescope>=9'" in told["warned"]
    assert "data.telescope excludes data.countdown" in told["conflict"]
    assert told["providers"] == "{'data': ['countdown', 'telescope']}"
