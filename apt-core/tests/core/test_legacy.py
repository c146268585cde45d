"""The predecessor's form: translated in one place, and what contradicts itself is refused."""

from __future__ import annotations

import pytest

from apt.core.legacy import settle, translate
from apt.core.yaml import Source, read_text


def translated(text: str, plugins: list[str] | None = None) -> tuple[Source, list[str], list[str]]:
    source, notes, faults = translate(read_text(text, "f.yaml"))
    faults += settle(source.values, plugins or [])
    return source, notes, [str(fault) for fault in faults]


OLD = """\
model:
  d_model: 64
  attention_name: tva_default
  tva: {r: 4, s: 1, tau: 0.18}
  moe: {enabled: true, experts: 64, top_k: 2, capacity: 1.25, balance_loss: 0.01}
  bistate: {alpha: 0.35, tau_align: 0.15}
"""
NEW = {
    "d_model": 64,
    "attention": {"provider": "tva_default", "r": 4, "s": 1, "tau": 0.18},
    "ffn": {
        "provider": "moe",
        "experts": 64,
        "capacity": 1.25,
        "router": {"provider": "topk_default", "top_k": 2, "balance_loss": 0.01},
    },
    "align": {"alpha": 0.35, "tau_align": 0.15},
}


def test_the_old_form_becomes_the_new_one() -> None:
    source, notes, faults = translated(OLD, ["moe", "align"])
    assert source.values == {"model": NEW}
    assert faults == []
    assert notes == [
        "model.moe is now model.ffn with provider: moe, and its router model.ffn.router",
        "model.attention_name is now model.attention.provider",
        "model.tva is now model.attention",
        "model.bistate is now model.align",
    ]


def test_every_value_keeps_its_place() -> None:
    source, _, _ = translated(OLD, ["moe"])
    assert str(source.origins[("model", "attention", "r")]) == "f.yaml:4:12"
    assert str(source.origins[("model", "ffn", "router", "top_k")]) == "f.yaml:5:44"


def test_todays_form_is_left_as_it_is() -> None:
    source, notes, faults = translated("model: {attention: sdpa, ffn: {provider: moe, experts: 4}}\n")
    assert source.values == {"model": {"attention": "sdpa", "ffn": {"provider": "moe", "experts": 4}}}
    assert (notes, faults) == ([], [])


@pytest.mark.parametrize(
    ("text", "plugins", "message"),
    [
        ("model: {attention_name: a, attention: {provider: b}}", [], "'a' contradicts model.attention.provider: 'b'"),
        ("model: {tva: {r: 4}, attention: {provider: tva_default, r: 2}}", [], "4 contradicts model.attention.r: 2"),
        ("model: {moe: {enabled: false}}", ["moe"], "false contradicts the plugin 'moe', which the profile lists"),
        ("model: {moe: {enabled: true}}", [], "the profile does not list the plugin 'moe'; add it to plugins"),
        ("model: {moe: {experts: 4}, ffn: swiglu}", ["moe"], "model.moe: contradicts model.ffn.provider: 'swiglu'"),
        ("model: {tva: 3}", [], "model.tva: 3 is not a mapping of options"),
        ("model: {moe: [1]}", ["moe"], "model.moe: [1] is not a mapping of options"),
    ],
)
def test_contradictions_are_refused(text: str, plugins: list[str], message: str) -> None:
    assert any(message in fault for fault in translated(text, plugins)[2])


def test_a_mixture_that_is_not_enabled_is_a_dense_network() -> None:
    source, _, faults = translated("model: {moe: {enabled: false, experts: 4}}")
    assert source.values == {"model": {"ffn": {"provider": "default"}}}
    assert faults == []


def test_what_is_neither_true_nor_false_enables_nothing() -> None:
    assert translated("model: {moe: {enabled: 1}}", ["moe"])[2] == [
        "model.moe.enabled: 1 is not allowed; input should be true or false"
    ]


def test_the_old_name_of_the_router_goes_where_it_routes() -> None:
    text = "model: {router_name: switch, ffn: {provider: moe}}"
    assert translated(text)[0].values == {"model": {"ffn": {"provider": "moe", "router": {"provider": "switch"}}}}


def test_the_old_fields_of_autopoietic_attention_are_its_options() -> None:
    source, notes, _ = translated("model: {attention_name: autopoietic, epsilon: 0.1, use_autopoietic: true}")
    assert source.values["model"] == {"attention": {"provider": "autopoietic", "epsilon": 0.1}, "use_autopoietic": True}
    assert notes[1:] == [
        "model.epsilon is now model.attention.epsilon",
        "model.use_autopoietic is kept, and nothing reads it",
    ]


def test_an_old_field_that_nothing_reads_is_said() -> None:
    source, notes, _ = translated("model: {attention_name: sdpa, epsilon: 0.1}")
    assert source.values["model"] == {"attention": {"provider": "sdpa"}, "epsilon": 0.1}
    assert "model.epsilon is kept, and nothing reads it" in notes
