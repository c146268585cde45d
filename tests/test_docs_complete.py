"""Nothing is left out of the docs: what a profile can say, what a schedule can move, what old names became."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path

import pytest

from apt.cli import build_parser
from apt.core.config import OF_AUTOPOIETIC, PREDECESSOR, APTConfig
from apt.core.layout import MODEL, RENAMED, TOP
from apt.core.layout import SECTIONS as OF_PROFILES
from apt.core.legacy import KINDS, SECTIONS
from apt.core.profile import OLD
from apt.core.providers import INTERFACES, Provider
from apt.core.registry import Registry, registry
from apt.core.schedules import Piecewise, Ramp, Schedule, Segment

ROOT = Path(__file__).parents[1]
OURS = ("apt-core", "apt-attention-tva", "apt-moe", "apt-align", "apt-rag")
RECORDS = [each for each in registry.records() if each.distribution in OURS and each.kind in INTERFACES]


def page(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, until the next one of its rank."""
    rank = heading.partition(" ")[0]
    assert f"\n{heading}\n" in text, f"there is no heading {heading!r}"
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{rank} ")[0]


def words(text: str) -> set[str]:
    """Every name that stands in code marks; blocks of code do not count, since they explain nothing."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"[\w.]+", code)}


@pytest.mark.parametrize("record", RECORDS, ids=lambda each: f"{each.kind}.{each.name}")
def test_a_provider_with_its_options_and_values_is_in_the_reference_and_in_its_packages_readme(record) -> None:  # type: ignore[no-untyped-def]
    provider = registry.load(record.kind, record.name)
    found = words(section(page("docs/reference.md"), f"### `{record.kind}.{record.name}`"))
    assert not {*provider.model_fields, *provider.scheduled} - found
    assert {record.name, f"{record.kind}.{record.name}"} & words(page(f"{record.distribution}/README.md"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda each: f"{each.kind}.{each.name}")
def test_every_scheduled_value_is_on_the_page_of_schedules_with_its_provider(record) -> None:  # type: ignore[no-untyped-def]
    rows = [line for line in page("docs/schedules.md").splitlines() if line.startswith("|")]
    for value in registry.load(record.kind, record.name).scheduled:
        assert any({value, f"{record.kind}.{record.name}"} <= words(row) for row in rows), value


def test_every_form_of_a_schedule_is_explained() -> None:
    found = words(page("docs/schedules.md"))
    shapes = set(inspect.get_annotations(Ramp, eval_str=True)["type"].__args__)
    assert not {*shapes, *Ramp.model_fields, *Piecewise.model_fields, *Segment.model_fields} - found


@pytest.mark.parametrize("name", OF_PROFILES)
def test_every_key_of_a_section_is_on_the_page_of_profiles(name: str) -> None:
    found = words(section(page("docs/profiles.md"), f"### `{name}`"))
    renamed = set(RENAMED) if name == "training" else set()
    assert not {*OF_PROFILES[name].model_fields, *renamed} - found


def test_every_key_of_the_model_and_of_the_data_is_on_the_page_of_profiles() -> None:
    text = page("docs/profiles.md")
    assert not {*MODEL, *KINDS} - set(OLD) - words(section(text, "### `model`"))
    assert not {"source", "tokenizer"} - words(section(text, "### `data`"))
    assert not {*TOP, *OF_PROFILES, "base", "plugins", "model", "data"} - words(section(text, "## Sections"))


@pytest.mark.parametrize("name", ["model", *OF_PROFILES])
def test_the_page_of_profiles_gives_the_true_default_of_every_key(name: str) -> None:
    text = section(page("docs/profiles.md"), f"### `{name}`")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, flags=re.MULTILINE)
    assert rows
    own = OF_PROFILES[name].model_fields if name in OF_PROFILES else {}
    for key, said in rows:
        field = own[key] if key in own else APTConfig.model_fields[RENAMED.get(key, key)]
        default = field.get_default()
        true = "none" if default is None else json.dumps(default)
        assert said.strip('`"') == true.strip('"'), f"{name}.{key}"


def test_every_old_key_is_on_the_page_of_migration() -> None:
    found = words(page("docs/migration.md"))
    names = {f"{kind}_name" for kind in (*KINDS, "router")}
    assert not {*PREDECESSOR, *OF_AUTOPOIETIC, *SECTIONS, *names, "moe", "enabled"} - {
        each.rpartition(".")[2] for each in found
    }


@pytest.mark.parametrize("owner", [Registry, Schedule], ids=lambda each: each.__name__)
def test_every_public_method_that_the_predecessor_had_is_on_the_page_of_migration(owner: type) -> None:
    old = {
        "Registry": "register get list_providers get_info check_conflicts register_init_hook clear_cache set_default",
        "Schedule": "should_enable_plugin get_param get_all_params list_enabled_plugins add_param_schedule",
    }[owner.__name__].split()
    assert all(hasattr(owner, name) for name in old)
    assert not set(old) - words(page("docs/migration.md"))


@pytest.mark.parametrize("interface", INTERFACES.values(), ids=lambda each: each.__name__)
def test_every_kind_has_an_example_to_write_from(interface: type[Provider]) -> None:
    text = page("docs/providers.md")
    assert interface.__name__ in words(text)
    assert re.search(rf"^class \w+\({interface.__name__}\):", text, flags=re.MULTILINE)


@pytest.mark.parametrize("interface", INTERFACES.values(), ids=lambda each: each.__name__)
def test_an_example_has_every_method_that_its_interface_demands(interface: type[Provider]) -> None:
    (example, *_) = re.findall(
        rf"^class \w+\({interface.__name__}\):\n((?:    .*\n|\n)+)", page("docs/providers.md"), flags=re.MULTILINE
    )
    demanded = getattr(interface, "__abstractmethods__", frozenset())
    assert not {name for name in demanded if not re.search(rf"^    (def )?{name}\b", example, flags=re.MULTILINE)}


def test_what_a_provider_says_of_itself_is_explained() -> None:
    own = {name for name in vars(Provider) if not name.startswith(("_", "model_"))}
    own |= {name for name in inspect.get_annotations(Provider) if not name.startswith(("_", "model_"))}
    assert not own - {"get_name", "get_version", "validate_config"} - words(page("docs/providers.md"))


def test_every_command_and_variable_is_on_the_page_of_the_command_line() -> None:
    text = page("docs/profiles.md") + page("docs/hooks.md") + page("docs/providers.md") + page("docs/schedules.md")
    text += page("docs/training.md") + page("README.md") + page("docs/inference.md")
    (commands,) = [each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    missing = [name for name in commands.choices if not re.search(rf"apt-core {name}\b", text)]
    assert not missing
    assert not {"APT_TRACE", "APT_ONLY_PLUGINS", "APT_DISABLE_PLUGINS"} - words(text)
