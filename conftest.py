"""Tests keep their tokens in a folder of their own, not in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of all runs of a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
