"""Proof of use: what is on has run and got finite gradients, or is named."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.core.profile import load_profile
from apt.errors import ProofOfUseError
from apt.hookspecs import RunState
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import BoundPart
from apt.training.proof import ProofOfUse
from apt.training.trainer import Trainer

STATE = RunState(0, 0, 8, 2)


@pytest.fixture
def model(profile_file: Path) -> Decoder:
    profile = load_profile(profile_file)
    return ModelBuilder(profile.config, resolved=profile.resolved).build_model()


def prove(model: Decoder, *, run: bool = True, spoil: float | None = None) -> ProofOfUse:
    proof = ProofOfUse(model)
    due = proof.due(STATE)
    assert len(due) == 4
    proof.watch(due)
    loss = model(torch.randint(3, 259, (2, 8))).logits.square().mean() if run else model.embedding.weight.sum()
    loss.backward()
    if spoil is not None:
        grad = model.blocks[1].ffn.up.weight.grad
        assert grad is not None
        grad[0, 0] = spoil
    proof.check(due, STATE, ["loss"])
    return proof


def test_what_ran_and_learns_is_not_asked_again(model: Decoder) -> None:
    assert prove(model).due(STATE) == []


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(model: Decoder, spoil: float) -> None:
    with pytest.raises(
        ProofOfUseError,
        match=r"ffn.default \(apt-core .*\), blocks.1.ffn: the gradient of its parameter up.weight is not finite",
    ):
        prove(model, spoil=spoil)


def test_every_part_that_did_not_run_is_named(model: Decoder) -> None:
    with pytest.raises(ProofOfUseError) as caught:
        prove(model, run=False)
    assert [line.split()[3] for line in str(caught.value).splitlines()[1:]] == [
        *("blocks.0.attention:", "blocks.0.ffn:", "blocks.1.attention:", "blocks.1.ffn:"),
    ]
    assert str(caught.value).count("its module did not run") == 4


@pytest.mark.parametrize("later", [replace(STATE, values={"gain": 0.1}), replace(STATE, epoch=1, values={"gain": 0.0})])
def test_a_part_that_begins_when_a_value_is_0_no_longer_is_watched_then(model: Decoder, later: RunState) -> None:
    # Else it would be at the next switch, or where the run is resumed: in another step than in a run that was not stopped.
    ffn, state = model.blocks[1].ffn, replace(STATE, values={"gain": 0.0})
    ffn.idle = lambda: [ffn]
    proof = ProofOfUse(model)
    due = proof.due(state)
    assert len(due) == 3
    proof.watch(due)
    model(torch.randint(3, 259, (2, 8))).logits.square().mean().backward()
    proof.check(due, state, ["loss"])
    assert not proof.due(replace(state, step=1))
    ffn.idle = lambda: []
    assert [each.path for each in proof.due(later)] == ["blocks.1.ffn"]


def test_a_run_that_goes_on_does_not_watch_again_what_has_proven_itself(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step that is watched runs eagerly, and so to other bits than the compiled one of the run that was not stopped.
    watched: list[int] = []
    watch = ProofOfUse.watch

    def counted(self: ProofOfUse, parts: list[BoundPart]) -> None:
        watched.append(len(parts))
        watch(self, parts)

    monkeypatch.setattr(ProofOfUse, "watch", counted)
    loaded = load_profile(profile_file, sets=["training.max_steps=3", "training.save_every=1", "training.keep_last=9"])
    for out, resume in (("whole", "never"), ("rest", str(tmp_path / "whole" / "step-000001"))):
        quiet = Console(file=io.StringIO())
        Trainer(loaded.config, tmp_path / out, resolved=loaded.resolved, console=quiet, resume=resume).fit()
    assert watched == [4, 0, 0, 0, 0]
    # So does a branch, whose bits are the trunk's too, but for one of another model.
    for out, change in (("branch", "training.learning_rate=1e-3"), ("changed", "model.dropout=0.5")):
        watched.clear()
        other = load_profile(profile_file, sets=["training.max_steps=2", change])
        whole = tmp_path / "whole" / "step-000001"
        Trainer(other.config, tmp_path / out, resolved=other.resolved, console=quiet, branch=whole).fit()
        assert watched == [0 if out == "branch" else 4]
    # What other code has proven is not taken over.
    saved = tmp_path / "rest" / "step-000002" / "state.json"
    monkeypatch.setattr(
        "apt.training.takeover.check_lock", lambda *args, **kwargs: ["ffn.default is of another version"]
    )
    watched.clear()
    assert saved.is_file()
    Trainer(loaded.config, tmp_path / "other", resolved=loaded.resolved, console=quiet, resume=str(saved.parent)).fit()
    assert watched == [4]
