"""How a process among several ends, and what one says that has lost another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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


LOST = """
import os, sys
import torch
import torch.distributed as dist
from apt.core.hooks import HookRunner
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.errors import AptError
from apt.hookspecs import RunState, hookimpl
from apt.training.ranks import join_ranks, leave


class Sums(Plugin):
    @hookimpl
    def apt_step_start(self):
        if os.environ["RANK"] == "1":
            os._exit(0)
        dist.all_reduce(torch.ones(1))


try:
    with join_ranks(load_profile(sys.argv[1], sets=["hardware.parallel=ddp", "hardware.device=cpu"]).config):
        HookRunner({"sums": Sums()}).hook.apt_step_start(state=RunState(0, 0, 1, 1, plugins_on=("sums",)))
except AptError as error:
    print(type(error).__name__, error)
leave(0)
"""


def test_a_rank_that_is_lost_within_a_hook_is_not_told_as_the_plugins_fault(profile_file: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOST, str(profile_file)],
            stdout=subprocess.PIPE,
            text=True,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    said, _ = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert said.startswith("AptError rank 0 of 2 on ")
    assert "another rank has died or does not answer (plugin 'sums' " in said
