from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from apt.core.providers import AttentionProvider
from apt.core.registry import registry
from apt.errors import OptionsError
from apt_attention_tva.provider import TVA, Autopoietic


@pytest.mark.parametrize(("name", "provider"), [("tva_default", TVA), ("autopoietic", Autopoietic)])
def test_the_entry_points_give_the_providers(name: str, provider: type[AttentionProvider]) -> None:
    found = registry.get("attention", name, fallback=False)
    assert type(found) is provider
    assert found.get_name() == name


def test_importing_the_providers_and_estimating_needs_no_torch() -> None:
    code = (
        "import sys; from apt_attention_tva.provider import TVA, Autopoietic\n"
        "for p in (TVA(s=1), Autopoietic()): p.get_flops_estimate(64, 32, 2), p.get_memory_estimate(64, 32, 2)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("provider", "d_model", "num_heads", "message"),
    [
        (TVA(), 30, 4, r"model\.num_heads: 4 heads do not divide d_model 30"),
        (TVA(num_kv_heads=3), 64, 4, r"model\.attention\.num_kv_heads: 3 does not divide the model's 4 heads"),
        (TVA(rank=20), 64, 4, r"model\.attention\.rank: rank 20 exceeds the head width 16; at most 16"),
        (TVA(rank=5), 64, 4, r"model\.attention\.rank: .* 5 is odd; 6, or positions: none"),
        (TVA(rank=4, project="last"), 9, 3, r"model\.num_heads: .* heads of width 3 are odd"),
        (TVA(head_width=7, project="last"), 64, 4, r"model\.attention\.head_width: .* heads of width 7 are odd"),
        (TVA(r=1), 9, 3, r"rank 4 exceeds the head width 3; at most 2"),
        (Autopoietic(), 9, 3, r"model\.num_heads: rotary positions turn pairs, and heads of width 3 are odd"),
        (Autopoietic(num_kv_heads=3), 64, 4, "3 does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(
    provider: AttentionProvider, d_model: int, num_heads: int, message: str
) -> None:
    for refused in (
        lambda: provider.create_layer(d_model, num_heads),
        lambda: provider.get_parameter_count(d_model, num_heads),
        lambda: provider.get_flops_estimate(8, d_model, num_heads),
        lambda: provider.get_memory_estimate(8, d_model, num_heads),
        lambda: provider.get_cache_size(d_model, num_heads),
    ):
        with pytest.raises(OptionsError, match=message):
            refused()


@pytest.mark.parametrize(
    ("provider", "options"),
    [
        (TVA, {"r": 0}),
        (TVA, {"scale": "other"}),
        (TVA, {"tau": 1.5}),
        (TVA, {"s": -1}),
        (TVA, {"subspace_loss": 0}),
        (TVA, {"ranks": 4}),
        (TVA, {"project": "later"}),
        (TVA, {"positions": "none", "rope_theta": 5.0}),
        (Autopoietic, {"window": 0}),
        (Autopoietic, {"alpha": 1.1}),
        (Autopoietic, {"init_tau": 2.0}),
        (Autopoietic, {"init_tau": 0.5}),
        (Autopoietic, {"rank": 4}),
    ],
)
def test_wrong_options_are_refused(provider: type[AttentionProvider], options: dict[str, object]) -> None:
    assert not provider.validate_config(options)
    with pytest.raises(ValidationError):
        provider.model_validate(options)
