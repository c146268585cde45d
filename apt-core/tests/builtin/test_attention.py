"""Options of apt-core's attention: what they do, and what is said where they do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.builtin.attention import SDPA
from apt.core.profile import load_profile
from apt.errors import OptionsError, ProfileError
from apt.modeling.compose import ModelBuilder


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({}, (50, 4), r"model\.num_heads: 4 heads do not divide d_model 50"),
        ({"num_kv_heads": 3}, (48, 4), r"model\.attention\.num_kv_heads: 3 does not divide the model's 4 heads"),
        ({}, (12, 4), r"model\.num_heads: rotary positions turn pairs, and heads of width 3 are odd; an even width"),
        ({"head_width": 5}, (12, 4), r"model\.attention\.head_width: rotary positions turn pairs"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_place(
    options: dict[str, int], sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(OptionsError, match=message):
        SDPA(**options).create_layer(*sizes)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("{positions: none, rope_theta: 5.0}", "positions 'none' does not read rope_theta; leave them out"),
        ("{rope_scaling: {type: yarn, factor: 2}}", r"rope_scaling: type yarn needs original_max_seq_len"),
        ("{rope_scaling: {type: ntk, factr: 2}}", r"rope_scaling\.factr: no such option; did you mean 'factor'"),
        ("{window: 0}", "attention.window: 0 is not allowed"),
        ("{num_kv_heads: 3}", r": model\.attention\.num_kv_heads: 3 does not divide the model's 2 heads"),
    ],
)
def test_options_that_make_no_sense_are_faults_of_the_profile(profile_file: Path, option: str, message: str) -> None:
    profile_file.write_text(profile_file.read_text().replace("{provider: sdpa}", f"{{provider: sdpa, {option[1:]}"))
    with pytest.raises(ProfileError, match=message):
        load_profile(profile_file)


def test_learned_positions_are_a_table_of_the_model_and_decide_what_is_said(profile_file: Path) -> None:
    profile = load_profile(profile_file, sets=["model.attention.positions=learned"])
    torch.manual_seed(0)
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model().eval()
    assert model.position_table is not None
    assert model.position_table.weight.shape == (16, 16)
    tokens = torch.full((1, 4), 70)
    seen = model(tokens).logits
    assert not torch.allclose(seen[:, 1], seen[:, 2], atol=1e-4)
    cache = model.create_cache(1)
    parts = [model(each, cache=cache).logits for each in tokens.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), seen)
    code = f"from apt.cli import main; main(['check', {str(profile_file)!r}, '--set', 'model.attention.positions=learned'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "positions" in done.stdout


def test_without_positions_the_past_is_a_set_and_with_them_it_is_not() -> None:
    x = torch.randn(1, 5, 16)
    swapped = x[:, [1, 0, 2, 3, 4]]
    for positions, same in (("none", True), ("rope", False)):
        layer = SDPA(positions=positions).create_layer(16, 2).eval()
        assert torch.allclose(layer(x)[:, -1], layer(swapped)[:, -1], atol=1e-6) is same
