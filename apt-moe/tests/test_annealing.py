from __future__ import annotations

from pathlib import Path

import pytest

from apt.core.profile import load_profile
from apt.errors import ProfileError

PROFILE = """\
name: annealed
plugins: [moe, routing]
model:
  {d_model: 16, num_heads: 2, num_layers: 1, d_ff: 32, max_seq_len: 16, attention: {provider: sdpa},
   ffn: {provider: moe, experts: 2}}
training: {max_epochs: 4}
data: {source: stdlib}
"""


def load(tmp_path: Path, schedules: str, *sets: str) -> None:
    path = tmp_path / "annealed.yaml"
    path.write_text(f"{PROFILE}schedules: {{{schedules}}}\n")
    load_profile(path, sets=list(sets))


@pytest.mark.parametrize("name", ["route_temp", "moe_capacity"])
def test_a_profile_that_schedules_either_value_is_good(tmp_path: Path, name: str) -> None:
    load(tmp_path, f"{name}: {{start: 1.5, end: 1.1, by: epoch}}")


def test_a_profile_that_anneals_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"'routing' anneals nothing.*schedule route_temp or moe_capacity"):
        load(tmp_path, "enable_moe_at_epoch: 1")


def test_without_a_router_there_is_nothing_to_anneal(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="'routing' has nothing to anneal: the ffn is 'default'"):
        load(tmp_path, "", "model.ffn=default", "plugins=[routing]")


def test_a_late_switch_is_refused_and_a_warm_up_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"enable_routing_at_epoch.*annealing has no switch.*warmup"):
        load(tmp_path, "enable_routing_at_epoch: 2, route_temp: {start: 1.5, end: 0.8, by: epoch}")
