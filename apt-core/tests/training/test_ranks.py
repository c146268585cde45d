"""How a process among several ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LAST_WORDS = """
import atexit, sys
import torch

class Late:
    def __del__(self):
        print("taken down", file=sys.stderr)

late = Late()
atexit.register(lambda: print("at exit"))
print("said")
"""
ENTER = "import apt.cli\napt.cli.main = lambda: 3\napt.cli.enter()\n"


@pytest.mark.parametrize(("launched", "err"), [(True, ""), (False, "taken down\n")], ids=["torchrun", "alone"])
def test_a_rank_says_all_it_has_to_and_leaves_without_taking_the_interpreter_down(launched: bool, err: str) -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"} if launched else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS + ENTER], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\nat exit\n", err)
