"""Tests keep their tokens in a folder of their own, not in the user's cache, and see a GPU only where they ask for it.

Those of all packages together and those on a GPU train on one small text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of all runs of a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text that a small model can learn something from in a few steps."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(300)))
    return path


def pytest_configure(config: pytest.Config) -> None:
    """Hide the machine's GPUs, which profiles would train on by themselves, but for tests named as `tests/gpu` is."""
    named = (Path(os.path.relpath(each.partition("::")[0], config.rootpath)) for each in config.args)
    if not any("gpu" in each.parts for each in named):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
