"""APT_DISABLE_PLUGINS and APT_ONLY_PLUGINS limit what may be loaded at all."""

from __future__ import annotations

import sys

import pytest

from apt.core.discovery import ProviderRecord
from apt.core.selection import select
from apt.errors import ProviderDisabledError, UserError

RECORDS = [
    ProviderRecord("attention", "sdpa", "apt-core", "1", "a:B"),
    ProviderRecord("ffn", "moe", "apt-moe", "1", "a:B"),
    ProviderRecord("plugin", "moe", "apt-moe", "1", "a:B"),
    ProviderRecord("plugin", "align", "apt-align", "1", "a:B"),
]


def left(**environment: str) -> list[str]:
    chosen = select(RECORDS, {f"APT_{name}_PLUGINS": value for name, value in environment.items()})
    return [record.key for record in chosen if not record.disabled]


def test_without_the_variables_everything_may_be_loaded():
    assert left() == left(DISABLE="", ONLY=" , ") == ["attention.sdpa", "ffn.moe", "plugin.moe", "plugin.align"]


def test_a_distribution_a_provider_or_a_plugin_can_be_disabled():
    assert left(DISABLE="apt-moe") == left(DISABLE="Apt_MoE") == ["attention.sdpa", "plugin.align"]
    assert left(DISABLE="ffn.moe,align") == ["attention.sdpa", "plugin.moe"]
    assert left(DISABLE="moe") == ["attention.sdpa", "ffn.moe", "plugin.align"]


def test_only_keeps_what_is_named_and_what_apt_core_brings():
    assert left(ONLY="apt-align") == ["attention.sdpa", "plugin.align"]
    assert left(ONLY="ffn.moe") == ["attention.sdpa", "ffn.moe"]


def test_only_a_plugin_keeps_the_parts_that_come_with_it():
    assert left(ONLY="moe") == ["attention.sdpa", "ffn.moe", "plugin.moe"]


def test_disabling_is_the_stronger():
    assert left(ONLY="moe", DISABLE="ffn.moe") == ["attention.sdpa", "plugin.moe"]


def test_every_entry_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError) as caught:
        left(DISABLE="mo", ONLY="apt-alin")
    assert "APT_DISABLE_PLUGINS: 'mo' matches nothing that is installed; did you mean 'moe'?" in str(caught.value)
    assert "APT_ONLY_PLUGINS: 'apt-alin' matches nothing that is installed; did you mean 'apt-align'?" in str(
        caught.value
    )


def test_what_is_disabled_is_never_imported_or_listed(site, monkeypatch, data_source):
    modules = {"apt_off": data_source, "apt_on": data_source}
    site.add("apt-both", {"data.off": "apt_off:Mine", "data.on": "apt_on:Mine"}, modules)
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "data.off")
    registry = site.registry()
    assert registry.list_providers() == {"data": ["on"]}
    with pytest.raises(ProviderDisabledError, match="APT_DISABLE_PLUGINS names it"):
        registry.get("data", "off", fallback=False)
    assert registry.get("data", "on", fallback=False).get_name() == "on"
    assert registry.get_info("data", "off")["disabled"]
    assert "apt_off" not in sys.modules
