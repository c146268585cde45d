"""What the tests of all packages together and those on a GPU share: a small text to train on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text that a small model can learn something from in a few steps."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(300)))
    return path
