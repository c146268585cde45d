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
LEAVE = "from apt.training.ranks import leave\nleave(3)\n"
ENTER = "import apt.cli\napt.cli.main = lambda: 3\napt.cli.enter()\n"


@pytest.mark.parametrize(
    ("end", "launched", "err"),
    [(LEAVE, False, ""), (ENTER, True, ""), (ENTER, False, "taken down\n")],
    ids=["leave", "torchrun", "alone"],
)
def test_a_rank_says_all_it_has_to_and_leaves_without_taking_the_interpreter_down(
    end: str, launched: bool, err: str
) -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"} if launched else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS + end], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\nat exit\n", err)
