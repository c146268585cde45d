"""What the docs must hold: every hook, and what every provider of the project says of itself."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from apt.core.hooks import SPECIFIED

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("hook", SPECIFIED)
def test_a_hook_is_listed_and_shown_in_an_example(hook: str) -> None:
    page = (ROOT / "docs" / "hooks.md").read_text()
    assert f"`{hook}(" in page
    assert f"    def {hook}(" in page


def test_the_reference_says_what_the_providers_say() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "reference.md").read_text() == module.write(), "run python docs/make_reference.py"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("apt-*/README.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
