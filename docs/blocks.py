"""Every block of code in the docs runs: Python in one namespace a page, YAML as a profile, whole or completed.

``pytest -p blocks docs README.md apt-*/README.md`` with ``docs`` on the path; `console` and `text` blocks are not run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from apt.core.profile import load_profile

ROOT = Path(__file__).parent.parent


class YAMLParser(CodeBlockParser):
    """A block that begins with a section of profiles is one, and must be a good one; what it leaves out is completed."""

    language = "yaml"

    def evaluate(self, example: Example) -> None:
        """Load it, from the repository's root."""
        text = str(example.parsed)
        if not text.startswith(("name:", "base:", "plugins:", "model:")):
            return
        if "training:" not in text and not text.startswith("base:"):
            text += "\ntraining: {max_epochs: 1}\n"
        path = ROOT / ".docs-profile.yaml"
        path.write_text(text)
        try:
            load_profile(path)
        finally:
            path.unlink()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory):
    """Pages are read in a folder of their own, where they may write."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("docs"))
    yield
    os.chdir(here)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), YAMLParser(), SkipParser()],
    patterns=["*.md"],
    path=str(ROOT),
    excludes=["template/*", "apt-*/tests/*"],
    fixtures=["workdir"],
).pytest()
