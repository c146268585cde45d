"""A profile's names become providers, and all its faults one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, model_validator

from apt.core.config import APTConfig, Choice, Data
from apt.core.local import LocalCode
from apt.core.provider import Slot
from apt.core.providers import (
    AttentionProvider,
    DataProvider,
    Document,
    FFNProvider,
    Plugin,
    RouterProvider,
    Tokenizer,
    TokenizerProvider,
)
from apt.core.registry import Registry
from apt.core.resolve import resolve_config, walk
from apt.errors import Fault, OptionsError, ProfileError
from apt.hookspecs import hookimpl


class Attention(AttentionProvider):
    r: int = 4

    def create_layer(self, d_model, num_heads, dropout=0.0):
        raise NotImplementedError

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        return 0

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        return 0

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        return 0

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        return 0


class Router(RouterProvider):
    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature"}

    def create_router(self, d_model, num_experts, top_k=2):
        raise NotImplementedError

    def route(self, router, inputs, train=True):
        raise NotImplementedError

    def compute_load_balance_loss(self, router_logits, expert_mask):
        raise NotImplementedError

    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        return 0


class ExpertChoice(Router):
    capabilities: ClassVar[frozenset[str]] = frozenset({"noncausal"})


class FFN(FFNProvider):
    experts: int = 4
    router: Slot[RouterProvider] = "topk"
    others: dict[str, Slot[RouterProvider]] = Field(default_factory=dict)

    scheduled: ClassVar[Mapping[str, str]] = {"capacity": "capacity"}
    excludes: ClassVar[tuple[str, ...]] = ("plugin.lone",)

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        raise NotImplementedError

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        return 0

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        return 0

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        return 0


class Text(DataProvider):
    path: str = ""

    def read(self) -> Sequence[Document]:
        return []


class Letters(TokenizerProvider):
    size: int = 30

    def train(self, texts: Iterable[str]) -> Tokenizer:
        raise NotImplementedError

    def load(self, folder: Path) -> Tokenizer:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return self.size


class Switch(Plugin):
    scheduled: ClassVar[Mapping[str, str]] = {"pace": ""}


class Lone(Plugin):
    pass


@pytest.fixture
def registry():
    made = Registry()
    made.register("attention", "att", Attention)
    made.register("ffn", "mix", FFN)
    made.register("router", "topk", Router)
    made.register("router", "choice", ExpertChoice)
    made.register("data", "text", Text)
    made.register("tokenizer", "letters", Letters)
    made.register("plugin", "switch", Switch)
    made.register("plugin", "lone", Lone)
    return made


def profile(**fields) -> APTConfig:
    given = {"attention_name": "att", "ffn_name": "mix"} | fields
    data = given.pop("data", {})
    return APTConfig(data=Data(**({"source": "text", "tokenizer": Choice(provider="letters")} | data)), **given)


def faults(registry: Registry, config: APTConfig) -> dict[str, str]:
    with pytest.raises(ProfileError) as caught:
        resolve_config(config, registry)
    assert len({fault.where for fault in caught.value.faults}) == len(caught.value.faults)
    return {fault.where: f"{fault.what}; {fault.hint}" for fault in caught.value.faults}


def test_all_that_the_profile_uses_is_resolved(registry):
    options = {"attention": {"r": 8}, "ffn": {"router": {"provider": "topk", "top_k": 1}}}
    found = resolve_config(profile(options=options, plugins=("switch",), data={"path": "x"}), registry)
    assert set(found.providers) == {"attention", "ffn", "data", "tokenizer"}
    assert found.providers["attention"].r == 8
    assert found.providers["data"].path == "x"
    assert list(found.plugins) == ["switch"]
    assert [where for where, _ in found.parts()] == [
        "model.attention",
        "model.ffn",
        "model.ffn.router",
        "data",
        "data.tokenizer",
        "plugins.switch",
    ]
    assert found.resolutions[2].provider.top_k == 1
    assert {value: provider.get_name() for value, provider in found.scheduled.items()} == {
        "capacity": "mix",
        "route_temp": "topk",
        "pace": "switch",
    }


def test_plugins_keep_the_order_of_the_profile(registry):
    registry.register("ffn", "plain", type("Plain", (FFN,), {"excludes": (), "__annotations__": {}}))
    config = profile(ffn_name="plain", plugins=("switch", "lone"))
    assert list(resolve_config(config, registry).plugins) == ["switch", "lone"]


def test_every_fault_is_reported_at_once_with_its_path(registry):
    options = {"attention": {"rr": 1}, "ffn": {"router": {"provider": "topk", "top_k": 0}, "expert": 1}}
    data = {"source": "texts", "tokenizer": Choice(provider="letters", options={"size": "many"})}
    found = faults(registry, profile(options=options, plugins=("swich",), data=data))
    assert set(found) == {
        "model.attention.rr",
        "model.ffn.router.top_k",
        "model.ffn.expert",
        "data.source",
        "data.tokenizer.size",
        "plugins",
    }
    assert "did you mean 'r'?" in found["model.attention.rr"]
    assert "did you mean 'experts'?" in found["model.ffn.expert"]
    assert "did you mean 'text'?" in found["data.source"]
    assert "did you mean 'switch'?" in found["plugins"]


def test_a_provider_that_is_not_installed_is_named_with_its_distribution():
    registry = Registry()
    found = faults(registry, profile(attention_name="tva_default", plugins=("align",), retrieval_name="cosine"))
    assert "pip install apt-attention-tva" in found["model.attention.provider"]
    assert "pip install apt-align" in found["model.align.provider"]
    assert "pip install apt-align" in found["plugins"]
    assert "pip install apt-rag" in found["model.retrieval.provider"]


def test_a_stated_fallback_is_in_the_resolutions(registry):
    found = resolve_config(profile(attention_name="flash", fallback={"attention": ("att",)}), registry)
    first = found.resolutions[0]
    assert (first.where, first.asked, first.used) == ("model.attention", "flash", "att")
    assert "'flash' is installed" in first.why


def test_a_fallback_inside_a_provider_is_in_the_resolutions(registry):
    router = {"provider": "gone", "fallback": ["topk"]}
    found = resolve_config(profile(options={"ffn": {"router": router}}), registry)
    assert [(each.where, each.asked, each.used) for each in found.resolutions if each.why] == [
        ("model.ffn.router", "gone", "topk")
    ]


def test_exclusions_of_the_whole_profile_are_found(registry):
    found = faults(registry, profile(plugins=("lone",)))
    assert found == {"model.ffn": "ffn.mix excludes plugin.lone, used at plugins.lone; one of the two has to go"}


def test_what_sees_later_tokens_is_refused_in_a_decoder(registry):
    options = {"ffn": {"router": "choice"}}
    found = faults(registry, profile(options=options))
    assert "a decoder may not see" in found["model.ffn.router"]
    found = faults(registry, profile(options=options, architecture="encoder_decoder"))
    assert set(found) == {"data.source"}  # it needs pairs; nothing is wrong with the router


def test_schedules_must_name_plugins_that_are_listed_and_values_that_are_read(registry):
    schedules = {
        "enable_swich_at_epoch": 1,
        "enable_switch_at_epoch": 1,
        "enable_switch_at_step": 1,
        "route_tmp": {"start": 1, "end": 2},
        "enable_switch_at_epok": 1,
        "capacity": {"start": 1, "end": 2},
        "pace": {"start": 0, "end": 2, "type": "exp"},
    }
    found = faults(registry, profile(plugins=("switch",), schedules=schedules))
    assert "exp needs start and end of one sign" in found.pop("schedules.pace")
    assert found == {
        "schedules.enable_swich_at_epoch": "the profile does not list the plugin 'swich'; did you mean 'switch'?",
        "schedules.enable_switch_at_step": "enable_switch_at_epoch switches 'switch' on as well; keep one",
        "schedules.enable_switch_at_epok": "1 is no schedule; did you mean 'enable_switch_at_epoch'?",
        "schedules.route_tmp": "this model has no such value; did you mean 'route_temp'? "
        "it has: capacity, pace, route_temp",
    }


def test_a_value_is_not_called_unknown_while_a_provider_is(registry):
    found = faults(registry, profile(attention_name="gone", schedules={"anything": {"start": 1, "end": 2}}))
    assert set(found) == {"model.attention.provider"}


def test_a_plugin_whose_hook_does_not_exist_is_refused_before_anything_runs(registry):
    class Wrong(Plugin):
        @hookimpl
        def apt_step_stat(self, state):
            """Misspelt."""

    registry.register("plugin", "wrong", Wrong)
    assert (
        "no hook 'apt_step_stat'; did you mean 'apt_step_start'?"
        in faults(registry, profile(plugins=("wrong",)))["plugins"]
    )


def test_a_plugin_is_listed_once(registry):
    assert set(faults(registry, profile(plugins=("switch", "switch")))) == {"plugins"}


def test_a_vocabulary_that_is_too_small_is_refused(registry):
    assert "has 30 ids; give at least 30" in faults(registry, profile(vocab_size=29))["model.vocab_size"]
    assert resolve_config(profile(vocab_size=30), registry)


def test_walking_finds_providers_in_containers_too():
    router = Router()
    ffn = FFN(router=router, others={"a": Router(), "b": Router()})
    assert [where for where, _ in walk(ffn, "model.ffn")] == [
        "model.ffn",
        "model.ffn.router",
        "model.ffn.others.a",
        "model.ffn.others.b",
    ]


GAIN = """
from typing import ClassVar, Mapping
from apt.core.providers import Plugin

class Mine(Plugin):
    "Has a gain."
    scheduled: ClassVar[Mapping[str, str]] = {"gain": "gain"}

class Other(Mine):
    "Has it too."
"""
RAMP = {"start": 0.0, "end": 1.0}


def test_two_distributions_that_give_one_name_to_a_value_are_named_where_a_schedule_uses_it(site):
    site.add("apt-a", {"plugin.a": "gain_a:Mine", "plugin.a2": "gain_a:Other"}, {"gain_a": GAIN}, version="1.2")
    site.add("apt-b", {"plugin.b": "gain_b:Mine"}, {"gain_b": GAIN}, version="3.4")
    used = site.registry()
    for kind, name, provider in (("attention", "att", Attention), ("data", "text", Text)):
        used.register(kind, name, provider)
    used.register("tokenizer", "letters", Letters)
    used.register("ffn", "plain", type("Plain", (FFN,), {"excludes": (), "__annotations__": {}}))
    used.register("router", "topk", Router)
    two = profile(ffn_name="plain", plugins=("b", "a"), schedules={"gain": RAMP})
    assert faults(used, two)["schedules.gain"] == (
        "two values have this name, of plugin.b of apt-b 3.4 (at plugins.b) and plugin.a of apt-a 1.2 (at plugins.a); "
        "use one of them, or leave the schedule out: each has its own option for a gain that stands still"
    )
    resolve_config(profile(ffn_name="plain", plugins=("b", "a")), used)
    shared = resolve_config(profile(ffn_name="plain", plugins=("a2", "a"), schedules={"gain": RAMP}), used)
    assert shared.scheduled["gain"].get_name() == "a2"


@pytest.mark.parametrize(
    ("count", "why"), [("1 + 'a'", "get_parameter_count failed: TypeError"), ("None", "gives None, not a whole number")]
)
def test_a_provider_that_cannot_count_is_named_with_the_other_faults(tmp_path, registry, count, why):
    source = f"""
from apt.builtin.ffn import MLP

class Mine(MLP):
    "Cannot count."

    def get_parameter_count(self, d_model, d_ff):
        return {count}
"""
    (tmp_path / "mine.py").write_text(source)
    registry.allow_local_code(LocalCode(tmp_path))
    told = faults(registry, profile(ffn_name="./mine.py:Mine", schedules={"zz": RAMP}))
    assert told["model.ffn"].startswith("ffn provider ./mine.py:Mine: ")
    assert why in told["model.ffn"]
    assert "schedules.zz" in told


@pytest.mark.parametrize(
    ("name", "given", "where"),
    [
        ("heat", {"start": 1, "end": 0}, "schedules.heat.end"),
        ("heat", [{"until": 2, "start": 1, "end": 2}, {"start": -1, "end": 2}], "schedules.heat.1.start"),
        ("heat", {"segments": [{"start": 1, "end": -1}]}, "schedules.heat.segments.0.end"),
        ("share", {"start": 0, "end": 1.5}, "schedules.share.end"),
        ("their_pace", {"start": 0.5, "end": 9}, "schedules.their_pace.end"),
    ],
)
def test_a_schedule_stays_where_its_option_may_be(registry, name, given, where):
    class Ranged(Switch):
        scheduled: ClassVar[Mapping[str, str]] = {"heat": "temperature", "share": "other", "their_pace": "buffer"}
        temperature: float = Field(default=1.0, gt=0)
        share: float = Field(default=0.5, ge=0, le=1)
        pace: int | float = Field(default=1, lt=5)

    registry.register("plugin", "ranged", Ranged)
    registry.register("ffn", "plain", type("Plain", (FFN,), {"excludes": (), "__annotations__": {}}))
    told = faults(registry, profile(ffn_name="plain", plugins=("ranged",), schedules={name: given}))
    assert list(told) == [where]
    assert "plugin.ranged takes it as its option" in told[where]
    good = {"heat": {"start": 0.1, "end": 9}, "share": {"start": 0, "end": 1}, "their_pace": {"start": -3, "end": 4}}
    resolve_config(profile(ffn_name="plain", plugins=("ranged",), schedules=good), registry)


def test_a_schedule_stays_where_its_option_may_be_beside_the_other_options(registry):
    class Bounded(Switch):
        scheduled: ClassVar[Mapping[str, str]] = {"heat": ""}
        most: int = Field(default=1, alias="max")
        heat: float = 0.0

        @model_validator(mode="after")
        def _below(self) -> Bounded:
            if self.heat > self.most:
                raise ValueError(f"more than max, which is {self.most}")
            return self

    registry.register("plugin", "bounded", Bounded)
    registry.register("ffn", "plain", type("Plain", (FFN,), {"excludes": (), "__annotations__": {}}))
    given = {"ffn_name": "plain", "plugins": ("bounded",), "options": {"plugin.bounded": {"max": 3}}}
    told = faults(registry, profile(**given, schedules={"heat": {"start": 1, "end": 4}}))
    hint = "plugin.bounded takes it as its option heat: more than max, which is 3"
    assert told == {"schedules.heat.end": f"4 is not allowed; {hint}"}
    resolve_config(profile(**given, schedules={"heat": {"start": 1, "end": 3}}), registry)


def test_a_provider_that_has_no_layer_for_a_block_says_so_with_the_other_faults(registry):
    class Uneven(FFN):
        excludes: ClassVar[tuple[str, ...]] = ()

        def at_layer(self, index, num_layers):
            if index == 4:
                raise OptionsError("ffn", "uneven", [Fault("ffn.uneven.experts", f"not in block 4 of {num_layers}")])
            return self

    registry.register("ffn", "uneven", Uneven)
    told = faults(registry, profile(ffn_name="uneven", num_layers=5, schedules={"zz": RAMP}))
    assert told["model.ffn.experts"] == "not in block 4 of 5; "
    assert "schedules.zz" in told
    resolve_config(profile(ffn_name="uneven", num_layers=4), registry)


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_an_id_that_the_vocabulary_has_not_is_refused(registry, name):
    told = faults(registry, profile(vocab_size=40, **{name: 40}))
    assert told[f"model.{name}"] == "40 is no id of a vocabulary of 40; 0 to 39"
