"""What the tests of all packages together share: the repository's profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt.core.config import APTConfig
from apt.core.profile import load_profile

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"


@pytest.fixture
def tiny(text: Path) -> APTConfig:
    """tiny_debug.yaml on the small text: 20 steps in 4 epochs, experts on at step 5, alignment at step 10."""
    return load_profile(
        PROFILES / "tiny_debug.yaml",
        sets=[f"data={{source: files, path: '{text}'}}", "monitoring.plot=false", "evaluation.sample_tokens=5"],
    ).config
