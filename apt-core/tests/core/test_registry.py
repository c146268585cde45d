"""The registry's contract: lazy, one instance a configuration, never a random winner, never a silent stand-in."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from apt.core import Provider, get_provider, register_provider
from apt.core import registry as global_registry
from apt.core.config import Choice
from apt.core.provider import Slot
from apt.core.providers import DataProvider, Document
from apt.core.registry import Registry, record_of
from apt.errors import (
    OptionsError,
    ProviderBrokenError,
    ProviderCollisionError,
    ProviderFallbackWarning,
    ProviderNotFoundError,
    RequirementError,
)


class Reader(DataProvider):
    """Reads nothing."""

    size: int = Field(default=3, ge=1)
    fast: bool = False

    def read(self) -> Sequence[Document]:
        return []


class Other(Reader):
    """Reads nothing else."""

    @classmethod
    def get_priority(cls) -> int:
        return 5


class Needy(Reader):
    @classmethod
    def get_dependencies(cls) -> list[str]:
        return ["no-such-thing>=2"]


class Outer(DataProvider):
    inner: Slot[DataProvider] = "reader"

    def read(self) -> Sequence[Document]:
        return self.inner.read()


@pytest.fixture
def registry():
    made = Registry()
    made.register("data", "reader", Reader, default=True)
    made.register("data", "other", Other)
    made.register("data", "needy", Needy)
    made.register("data", "outer", Outer)
    return made


def test_a_fresh_registry_knows_what_is_registered_and_nothing_else():
    assert Registry().list_providers() == {}


def test_names_are_listed_by_priority_then_by_name(registry):
    assert registry.list_providers() == {"data": ["other", "needy", "outer", "reader"]}
    assert registry.list_providers("data") == registry.list_providers()
    assert registry.list_providers("nothing") == {}


def test_commands_are_listed_only_when_they_are_asked_for(site):
    site.add("apt-x", {"command.hello": "apt_x:hello"}, {"apt_x": "def hello(words): return 0"})
    registry = site.registry()
    assert registry.list_providers() == {}
    assert registry.list_providers("command") == {"command": ["hello"]}
    assert registry.load_object("command", "hello")([]) == 0


def test_there_is_one_instance_for_each_kind_name_and_configuration(registry):
    assert registry.get("data", "reader") is registry.get("data", "reader", {})
    assert registry.get("data", "reader", {"size": 4, "fast": True}) is registry.get(
        "data", "reader", {"fast": True, "size": 4}
    )
    assert registry.get("data", "reader", {"size": 4}).size == 4
    assert registry.get("data", "reader").size == 3
    assert registry.get("data", "other") is not registry.get("data", "reader")


@given(st.integers(1, 50), st.booleans(), st.integers(1, 50), st.booleans())
def test_instances_are_the_same_exactly_when_their_options_are(size_1, fast_1, size_2, fast_2):
    registry = Registry()
    registry.register("data", "reader", Reader)
    one = registry.get("data", "reader", {"size": size_1, "fast": fast_1})
    two = registry.get("data", "reader", {"fast": fast_2, "size": size_2})
    assert (one is two) == ((size_1, fast_1) == (size_2, fast_2))


def test_profiles_and_callers_share_instances(registry):
    assert registry.resolve("data", Choice(provider="reader")).provider is registry.get("data", "reader")


def test_without_a_name_the_default_is_taken(registry):
    assert registry.get("data").get_name() == "reader"
    registry.set_default("data", "other")
    assert registry.get("data").get_name() == "other"
    with pytest.raises(ProviderNotFoundError):
        registry.set_default("data", "none")


def test_the_only_provider_of_a_kind_is_its_default_but_one_of_two_is_not():
    registry = Registry()
    registry.register("data", "one", Reader)
    assert registry.get("data").get_name() == "one"
    registry.register("data", "two", Other)
    with pytest.raises(ProviderNotFoundError, match="there is no default data provider; name one; installed: one, two"):
        registry.get("data")


def test_a_provider_knows_its_name_and_version(site, data_source):
    site.add("apt-one", {"data.one": "apt_one:Mine"}, {"apt_one": data_source}, version="2.3")
    provider = site.registry().get("data", "one", fallback=False)
    assert (provider.get_name(), provider.get_version()) == ("one", "2.3")
    assert record_of(provider).distribution == "apt-one"


def test_nothing_is_imported_until_it_is_asked_for(site, data_source):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source})
    site.add("apt-b", {"data.b": "apt_b:Mine"}, {"apt_b": data_source})
    registry = site.registry()
    assert registry.list_providers() == {"data": ["a", "b"]}
    assert registry.get_info("data", "a")["loaded"] is False
    with pytest.raises(ProviderNotFoundError):
        registry.get("data", "aa", fallback=False)
    assert not {"apt_a", "apt_b"} & set(sys.modules)
    registry.get("data", "a", fallback=False)
    assert {"apt_a", "apt_b"} & set(sys.modules) == {"apt_a"}


def test_what_is_known_of_a_provider_grows_when_it_is_loaded(site, data_source):
    site.add("apt-one", {"data.one": "apt_one:Mine"}, {"apt_one": data_source})
    registry = site.registry()
    before = registry.get_info("data", "one")
    assert (before["distribution"], before["version"], before["entry_point"]) == ("apt-one", "1.0", "apt_one:Mine")
    assert "options" not in before
    registry.load("data", "one")
    after = registry.get_info("data", "one")
    assert after["loaded"] is True
    assert after["options"] == ["size", "shuffle"]
    assert after["description"] == "Makes nothing up."


# Errors


def test_an_unknown_name_gets_the_nearest_and_the_list(registry):
    with pytest.raises(ProviderNotFoundError) as caught:
        registry.get("data", "raeder", fallback=False)
    assert str(caught.value) == (
        "no data provider 'raeder' is installed; did you mean 'reader'? installed: needy, other, outer, reader"
    )


def test_a_known_provider_that_is_not_installed_gets_the_line_that_installs_it():
    with pytest.raises(ProviderNotFoundError) as caught:
        Registry().get("router", "topk_default", fallback=False)
    expected = "no router provider 'topk_default' is installed; it comes with apt-moe: pip install apt-moe"
    assert str(caught.value) == expected


def test_an_unknown_kind_gets_the_nearest():
    with pytest.raises(ProviderNotFoundError, match=r"no kind of provider 'atention'; did you mean 'attention'\?"):
        Registry().get("atention", "sdpa")


def test_options_that_are_refused_are_reported_together(registry):
    with pytest.raises(OptionsError) as caught:
        registry.get("data", "reader", {"size": 0, "fst": True}, fallback=False)
    assert [fault.where for fault in caught.value.faults] == ["data.reader.size", "data.reader.fst"]
    assert "data.reader.size: 0 is not allowed; input should be greater than or equal to 1" in str(caught.value)
    with pytest.raises(OptionsError, match=r"data\.reader\.size: True is not allowed; input should be a whole number"):
        registry.get("data", "reader", {"size": True}, fallback=False)
    assert "data.reader.fst: no such option; did you mean 'fast'? options: size, fast" in str(caught.value)


def test_options_that_no_json_can_be_are_refused_like_others(registry):
    circle: dict[str, object] = {}
    circle["size"] = circle
    for options in ({1: 2, "size": 3}, circle, {"size": float("nan")}, {"size": object()}):
        with pytest.raises(OptionsError):
            registry.get("data", "reader", options, fallback=False)


def test_a_missing_requirement_is_found_before_anything_is_imported(site, data_source):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source}, requires=["no-such-thing>=1.9"])
    with pytest.raises(RequirementError) as caught:
        site.registry().get("data", "a", fallback=False)
    assert str(caught.value) == (
        "data.a of apt-a 1.0 needs no-such-thing>=1.9, which is not installed: pip install 'no-such-thing>=1.9'"
    )
    assert "apt_a" not in sys.modules


def test_what_the_class_needs_is_checked_before_it_is_made_but_not_to_describe_it(registry):
    assert registry.load("data", "needy") is Needy
    with pytest.raises(RequirementError, match="needs no-such-thing>=2, which is not installed"):
        registry.get("data", "needy", fallback=False)


def test_the_extra_that_an_entry_point_names_is_needed_by_it_alone(site, data_source):
    modules = {"apt_a": data_source}
    entries = {"data.plain": "apt_a:Mine", "data.fast": "apt_a:Mine [fast]"}
    site.add("apt-a", entries, modules, requires=["no-such-thing; extra == 'fast'"], extras=["fast"])
    registry = site.registry()
    assert registry.get("data", "plain", fallback=False)
    with pytest.raises(RequirementError, match="no-such-thing"):
        registry.get("data", "fast", fallback=False)


def test_a_package_for_another_apt_core_is_refused_with_both_versions_and_not_imported(site, data_source):
    site.add("apt-core", {}, version="0.1.0")
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source}, requires=["apt-core>=7,<8"])
    with pytest.raises(
        ProviderBrokenError, match=r"built for apt-core<8,>=7; this is apt-core 0\.1\.0; install a version"
    ):
        site.registry().get("data", "a", fallback=False)
    assert "apt_a" not in sys.modules


def test_a_provider_for_another_api_level_is_refused_with_both_levels(site, data_source):
    other_level = data_source.replace("    size:", "    api_level: 'ClassVar[int]' = 7\n    size:")
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": "from typing import ClassVar\n" + other_level})
    with pytest.raises(ProviderBrokenError, match="API level 7 of apt-core; this apt-core has level 1"):
        site.registry().get("data", "a", fallback=False)


def test_a_name_that_two_distributions_claim_names_both_and_leaves_the_others_usable(site, data_source):
    site.add("apt-a", {"data.shared": "apt_a:Mine", "data.a": "apt_a:Mine"}, {"apt_a": data_source}, version="1.1")
    site.add("apt-b", {"data.shared": "apt_b:Mine", "data.b": "apt_b:Mine"}, {"apt_b": data_source}, version="2.2")
    registry = site.registry()
    registry.set_default("data", "a")
    for fallback in (True, False):
        with pytest.raises(ProviderCollisionError, match=r"data\.shared is claimed by apt-a 1\.1 and apt-b 2\.2"):
            registry.get("data", "shared", fallback=fallback)
    with pytest.raises(ProviderCollisionError):
        registry.resolve("data", Choice(provider="shared", fallback=("a",)))
    assert not {"apt_a", "apt_b"} & set(sys.modules)
    assert registry.get_info("data", "shared")["claimed_by"] == ["apt-a 1.1", "apt-b 2.2"]
    assert registry.get("data", "b", fallback=False).get_name() == "b"


def test_disabling_one_of_two_claimants_settles_a_collision(site, data_source, monkeypatch):
    site.add("apt-a", {"data.shared": "apt_a:Mine"}, {"apt_a": data_source})
    site.add("apt-b", {"data.shared": "apt_b:Mine"}, {"apt_b": data_source})
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "apt-a")
    assert record_of(site.registry().get("data", "shared", fallback=False)).distribution == "apt-b"


def test_two_versions_of_one_distribution_in_one_folder_are_a_collision(site, data_source):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source}, version="1.0")
    site.add("apt-a", {"data.a": "apt_a:Mine"}, version="2.0")
    with pytest.raises(ProviderCollisionError, match="pip install --force-reinstall apt-a"):
        site.registry().get("data", "a", fallback=False)


def test_a_failed_import_is_not_tried_again_until_the_cache_is_cleared(site, data_source):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": "raise RuntimeError('boom')"})
    registry = site.registry()
    with pytest.raises(ProviderBrokenError, match=r"data\.a of apt-a 1\.0: importing .* failed: RuntimeError: boom"):
        registry.get("data", "a", fallback=False)
    (site.folder / "apt_a.py").write_text(data_source)
    with pytest.raises(ProviderBrokenError, match="boom"):
        registry.get("data", "a", fallback=False)
    assert "boom" in registry.get_info("data", "a")["broken"]
    registry.clear_cache("data", "a")
    import importlib

    importlib.invalidate_caches()
    assert registry.get("data", "a", fallback=False)


def test_a_validator_that_raises_something_odd_is_the_providers_fault():
    class Odd(Reader):
        @model_validator(mode="after")
        def _fail(self):
            raise KeyError("odd")

    registry = Registry()
    registry.register("data", "odd", Odd)
    with pytest.raises(ProviderBrokenError, match="checking its options failed: KeyError: 'odd'"):
        registry.get("data", "odd")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("excludes = 'attention'", "its excludes is 'attention': input should be a valid tuple"),
        ("capabilities = 'noncausal'", "its capabilities is 'noncausal': input should be a valid frozenset"),
        ("scheduled = ['gain']", r"its scheduled is \['gain'\]: input should be a valid dictionary"),
        ("losses = {'a': 1}", r"its losses is {'a': 1}: input should be a valid string"),
        ("switched_by = 3", "its switched_by is 3: input should be a valid string"),
        ("api_level = '1'", "its api_level is '1': input should be a valid integer"),
        ("get_priority = classmethod(lambda cls: 'high')", "get_priority gives 'high', which is not a whole number"),
        ("get_priority = classmethod(lambda cls: 1 / 0)", "get_priority failed: ZeroDivisionError"),
        ("get_dependencies = classmethod(lambda cls: 'numpy')", "get_dependencies gives 'numpy', which is not a list"),
        ("get_dependencies = classmethod(lambda cls: exit(3))", "get_dependencies failed: SystemExit: 3"),
        ("raise_at_import = exit(3)", "importing apt_odd:Odd failed: SystemExit: 3"),
    ],
)
def test_what_a_class_says_of_itself_in_another_form_is_its_own_fault_alone(site, data_source, source, why):
    name = source.partition(" ")[0]
    known = "ClassVar" if not name.startswith(("get_", "raise_")) else ""
    line = f"    {name}: {known} = {source.partition(' = ')[2]}" if known else f"    {source}"
    odd = f"from typing import ClassVar\n{data_source}\n\nclass Odd(Mine):\n    'Odd.'\n{line}\n"
    site.add(
        "apt-odd", {"data.odd": "apt_odd:Odd", "data.even": "apt_even:Mine"}, {"apt_odd": odd, "apt_even": data_source}
    )
    registry = site.registry()
    with pytest.raises(ProviderBrokenError, match=why):
        registry.get("data", "odd", fallback=False)
    assert registry.get("data", "even").size == 3
    assert registry.list_providers("data") == {"data": ["even", "odd"]}
    assert registry.get_info("data", "odd")["broken"]


def test_a_slow_import_is_named_in_the_log_while_it_lasts(site, data_source, monkeypatch, caplog):
    monkeypatch.setattr("apt.core.loading.SLOW_IMPORT_SECONDS", 0.05)
    site.add("apt-slow", {"data.slow": "apt_slow:Mine"}, {"apt_slow": f"import time\ntime.sleep(0.4)\n{data_source}"})
    with caplog.at_level(logging.WARNING):
        site.registry().get("data", "slow", fallback=False)
    assert "data.slow of apt-slow 1.0 is still being imported" in caplog.text


# Falling back


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("raeder", {}, "no data provider 'raeder' is installed"),
        ("needy", {}, "needs no-such-thing>=2"),
        ("other", {"sise": 1}, "no such option"),
    ],
)
def test_get_falls_back_to_the_default_and_says_what_and_why(registry, name, config, why):
    with pytest.warns(ProviderFallbackWarning, match=rf"data\.{name} was asked for, data\.reader is used .*{why}"):
        assert registry.get("data", name, config) is registry.get("data", "reader")


def test_the_warning_points_at_the_caller(registry):
    with pytest.warns(ProviderFallbackWarning) as caught:
        registry.get("data", "raeder")
    assert caught[0].filename == __file__


def test_when_the_default_cannot_be_had_either_the_error_is_of_what_was_asked_for(registry):
    registry.set_default("data", "needy")
    with pytest.raises(ProviderNotFoundError) as caught:
        registry.get("data", "raeder")
    assert "needs no-such-thing>=2" in caught.value.__notes__[0]


def test_a_profile_never_falls_back_unless_it_says_so(registry):
    with pytest.raises(RequirementError):
        registry.resolve("data", Choice(provider="needy"))


def test_a_stated_fallback_is_followed_in_order_and_recorded(registry):
    found = registry.resolve(
        "data", Choice(provider="needy", fallback=("raeder", "reader", "other"), options={"size": 9, "odd": 1})
    )
    assert (found.asked, found.used, found.distribution) == ("needy", "reader", "(registered)")
    assert found.provider.size == 9
    for reason in ("no-such-thing", "'raeder' is installed", "reader has no option odd"):
        assert reason in found.why
    assert "provider" not in found.to_dict()


def test_options_that_are_refused_are_no_reason_for_a_stand_in(registry):
    with pytest.raises(OptionsError):
        registry.resolve("data", Choice(provider="reader", fallback=("other",), options={"sise": 1}))


def test_when_no_stated_fallback_can_be_had_all_reasons_are_given(registry):
    with pytest.raises(RequirementError, match=r"no-such-thing.*'gone' is installed"):
        registry.resolve("data", Choice(provider="needy", fallback=("gone",)))


# Nested providers


def test_a_nested_provider_comes_from_the_same_registry(registry):
    outer = registry.get("data", "outer", {"inner": {"provider": "reader", "size": 7}})
    assert (outer.inner.size, outer.inner.get_name()) == (7, "reader")
    assert registry.get("data", "outer", {"inner": "other"}).inner.get_name() == "other"
    given_one = Reader(size=8)
    assert registry.get("data", "outer", {"inner": given_one}).inner is given_one


def test_faults_of_nested_providers_have_their_path_and_come_with_the_others(registry):
    with pytest.raises(OptionsError) as caught:
        registry.get("data", "outer", {"inner": {"provider": "reader", "size": 0}, "more": 1}, fallback=False)
    assert {fault.where for fault in caught.value.faults} == {"data.outer.inner.size", "data.outer.more"}
    with pytest.raises(OptionsError) as caught:
        registry.get("data", "outer", {"inner": {"provider": "outer", "inner": "raeder"}}, fallback=False)
    assert [fault.where for fault in caught.value.faults] == ["data.outer.inner.inner.provider"]


@pytest.mark.parametrize("value", [3, {}, {"size": 3}, {"provider": 3}, {"provider": "reader", "fallback": [3]}, None])
def test_what_names_no_provider_is_refused(registry, value):
    with pytest.raises(
        OptionsError, match=r"data\.outer\.inner: .* is not allowed; must be the name of a provider of kind data"
    ):
        registry.get("data", "outer", {"inner": value}, fallback=False)


def test_a_nested_provider_may_have_a_stated_fallback_which_its_record_tells(registry):
    outer = registry.get("data", "outer", {"inner": {"provider": "needy", "fallback": ["reader"], "size": 5}})
    assert (outer.inner.get_name(), outer.inner.size) == ("reader", 5)
    assert record_of(outer.inner).asked == "needy"
    assert record_of(registry.get("data", "reader")).asked == ""


# Registering


def test_a_name_is_taken_once_unless_it_is_overridden(registry):
    before = registry.get("data", "reader")
    registry.register("data", "reader", Reader)  # the same once more
    with pytest.raises(ProviderCollisionError, match=r"data\.reader \(registered\) is there already"):
        registry.register("data", "reader", Other)
    assert registry.get("data", "reader") == before
    registry.register("data", "reader", Other, override=True)
    assert isinstance(registry.get("data", "reader"), Other)


def test_an_installed_name_can_be_overridden_and_is_there_again_in_a_fresh_registry(site, data_source):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source})
    registry = site.registry()
    with pytest.raises(ProviderCollisionError, match=r"apt-a 1\.0"):
        registry.register("data", "a", Reader)
    registry.register("data", "a", Reader, override=True)
    assert isinstance(registry.get("data", "a"), Reader)
    assert not isinstance(site.registry().get("data", "a"), Reader)


def test_a_class_of_another_kind_is_refused_at_once():
    with pytest.raises(ProviderBrokenError, match=r"is not a subclass of apt\.core\.providers\.router\.RouterProvider"):
        Registry().register("router", "reader", Reader)


def test_a_provider_can_be_registered_by_where_it_is_and_is_imported_later(site, data_source):
    site.add("plain", {}, {"plain_module": data_source})
    registry = Registry()
    registry.register("data", "late", "plain_module:Mine")
    assert "plain_module" not in sys.modules
    assert registry.get("data", "late").get_name() == "late"


def test_packages_may_bring_kinds_of_their_own():
    class Telescope(Provider):
        kind: ClassVar[str] = "telescope"

    registry = Registry()
    registry.register("telescope", "mine", Telescope)
    assert registry.get("telescope", "mine").get_name() == "mine"


def test_the_decorator_registers_with_the_registry_of_the_process():
    @register_provider("data", "decorated_for_a_test")
    class Decorated(Reader):
        pass

    assert isinstance(get_provider("data", "decorated_for_a_test"), Decorated)
    assert "decorated_for_a_test" in global_registry.list_providers("data")["data"]


def test_what_was_registered_by_hand_survives_a_refresh_which_finds_what_is_new(site, data_source):
    registry = site.registry()
    registry.register("data", "reader", Reader)
    assert registry.list_providers() == {"data": ["reader"]}
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": data_source})
    registry.refresh()
    assert registry.list_providers() == {"data": ["a", "reader"]}


# Hooks, conflicts, the cache, threads


def test_an_init_hook_sees_each_instance_once_after_it_is_made(registry):
    seen = []
    registry.register_init_hook("data", seen.append)
    one = registry.get("data", "reader", {"size": 5})
    registry.get("data", "reader", {"size": 5})
    assert seen == [one]
    registry.get("data", "outer")
    assert [provider.get_name() for provider in seen] == ["reader", "reader", "outer"]


def test_what_an_init_hook_raises_is_not_swallowed_and_leaves_no_instance_behind(registry):
    calls = []

    def refuse(provider: Provider) -> None:
        calls.append(provider)
        raise RuntimeError("no")

    registry.register_init_hook("data", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            registry.get("data", "reader")
    assert len(calls) == 2


def test_exclusions_are_all_reported_once_each():
    class Excluding(Reader):
        excludes: ClassVar[tuple[str, ...]] = ("data.other", "capability:odd")

    class Odd(Reader):
        capabilities: ClassVar[frozenset[str]] = frozenset({"odd"})

    registry = Registry()
    registry.register("data", "first", Excluding)
    registry.register("data", "other", Other)
    registry.register("data", "odd", Odd, excludes=["first"])
    assert registry.check_conflicts() == []
    faults = registry.check_conflicts(["data.first", "data.other", "data:odd"])
    assert [str(fault) for fault in faults] == [
        "data.first: data.first excludes data.other; one of the two has to go",
        "data.first: data.first excludes capability:odd, which data.odd has; one of the two has to go",
    ]
    for name in ("first", "odd"):
        registry.get("data", name)
    assert len(registry.check_conflicts()) == 1


@pytest.mark.parametrize("exclusion", ["", "a b", "capability:", ".x"])
def test_what_is_no_exclusion_is_refused(exclusion):
    with pytest.raises(ValueError, match="is no exclusion"):
        Registry().register("data", "reader", Reader, excludes=[exclusion])


def test_the_cache_is_cleared_by_kind_and_name(registry):
    reader, other = registry.get("data", "reader"), registry.get("data", "other")
    registry.clear_cache("data", "reader")
    assert registry.get("data", "reader") is not reader
    assert registry.get("data", "other") is other
    registry.clear_cache()
    assert registry.get("data", "other") is not other


def test_many_threads_get_one_instance_and_each_hook_is_called_once(site, data_source):
    slow = f"import time\ntime.sleep(0.05)\n{data_source}"
    site.add("apt-a", {f"data.a{i}": f"apt_a{i}:Mine" for i in range(4)}, {f"apt_a{i}": slow for i in range(4)})
    registry = site.registry()
    made, got, barrier = [], [], threading.Barrier(8)
    registry.register_init_hook("data", made.append)

    def work(index: int) -> None:
        barrier.wait()
        got.append(registry.get("data", f"a{index % 4}", fallback=False))
        registry.register("data", f"by_hand_{index}", Reader)
        registry.list_providers()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({id(provider) for provider in got}) == 4
    assert len(registry.list_providers()["data"]) == 12


def test_a_package_that_asks_the_registry_while_it_is_imported_does_not_lock_it(site, data_source, monkeypatch):
    site.add("apt-a", {"data.a": "apt_a:Mine"}, {"apt_a": f"import apt_hook\napt_hook.ask()\n{data_source}"})
    site.add("apt-b", {"data.b": "apt_b:Mine"}, {"apt_b": data_source})
    registry = site.registry()
    from types import ModuleType

    hook = ModuleType("apt_hook")

    def ask() -> None:
        time.sleep(0.05)
        registry.get("data", "b", fallback=False)

    hook.ask = ask
    monkeypatch.setitem(sys.modules, "apt_hook", hook)
    threads = [threading.Thread(target=registry.get, args=("data", name), daemon=True) for name in ("a", "b", "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)


def test_an_instance_that_became_stale_while_it_was_made_is_not_kept():
    registry = Registry()

    class Slow(Reader):
        @model_validator(mode="after")
        def _replaced_meanwhile(self):
            registry.register("data", "slow", Other, override=True)
            return self

    registry.register("data", "slow", Slow)
    assert type(registry.get("data", "slow")) is Slow
    assert type(registry.get("data", "slow")) is Other
