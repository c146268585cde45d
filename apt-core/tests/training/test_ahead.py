"""The update that is asked for before the numbers are read, as on a GPU: the same bits, and nothing where they are not finite.

The processor's fused AdamW leaves a step out as the GPU's does, so all of it runs here.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor

from apt.core.discovery import discover
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.core.registry import Registry
from apt.errors import AptError
from apt.hookspecs import RunState, hookimpl
from apt.training import step as stepping
from apt.training.record import read_metrics
from apt.training.trainer import RunResult, Trainer


class Spoiler(Plugin):
    """At step 3 a loss, or the gradient of one weight, is not finite, once; it notes its hooks, and the weights."""

    api_level: ClassVar[int] = 1

    spoils: ClassVar[str] = ""
    number: ClassVar[float] = float("nan")
    seen: ClassVar[list[str]]

    @hookimpl
    def apt_training_start(self, model: Any, optimizer: Any) -> None:
        self.seen.append("start")
        if self.spoils == "gradient":
            model.blocks[1].ffn.up.weight.register_hook(self._spoil)
        if self.spoils == "hook":
            optimizer.register_step_pre_hook(lambda *_: self.seen.append("hook"))

    def _spoil(self, grad: Tensor) -> Tensor:
        if self.seen[-1] != "step 3":
            return grad
        grad = grad.clone()
        grad[0, 0] = self.number
        return grad

    @hookimpl
    def apt_step_start(self, state: RunState) -> None:
        again = f"step {state.step}" in self.seen
        self.seen.append(f"step {state.step}{' again' if again else ''}")

    @hookimpl
    def apt_loss_extra(self, output: Any) -> dict[str, Any]:
        spoilt = self.spoils == "loss" and self.seen[-1] == "step 3"
        return {"spoilt": output.logits.float().square().mean() * (self.number if spoilt else 1e-3)}

    @hookimpl
    def apt_step_end(self, model: Any) -> None:
        self.seen.append(f"weights {sum(float(each.detach().double().sum()) for each in model.parameters())!r}")


class Looker(Spoiler):
    """Looks at gradients too."""

    @hookimpl
    def apt_gradients_ready(self, model: Any) -> None:
        norms = [each.grad.detach().norm() for each in model.parameters() if each.grad is not None]
        self.seen.append(f"gradient of {float(torch.stack(norms).norm()):.6f}")


def train(profile: Path, out: Path, *sets: str, kind: type[Spoiler] = Spoiler, **facts: Any) -> tuple[RunResult, Any]:
    registry, seen = Registry(discover), list[str]()
    registry.register("plugin", "spoiler", type("Here", (kind,), {"__doc__": "", "seen": seen, **facts}))
    words = ["plugins=[spoiler]", "training.max_steps=6", "training.save_every=2", "training.keep_last=9", *sets]
    loaded = load_profile(profile, sets=words, registry=registry)
    how = {"resume": "auto"} if out.exists() else {}
    trainer = Trainer(loaded.config, out, resolved=loaded.resolved, console=Console(file=io.StringIO()), **how)
    return trainer.fit(), seen


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU from now on; tells how often it was so."""
    monkeypatch.setattr(stepping, "BESIDE", ("cpu",))
    taken: list[int] = []
    whole = stepping.Step._update_unless_broken

    def counted(step: stepping.Step, *given: Any) -> None:
        taken.append(1)
        whole(step, *given)

    monkeypatch.setattr(stepping.Step, "_update_unless_broken", counted)
    return taken


def losses(out: Path) -> list[object]:
    return [(each.get("loss"), each.get("gradient_norm")) for each in read_metrics(out) if each["event"] == "train"]


def files(out: Path) -> dict[str, bytes]:
    """What the last checkpoint holds of numbers."""
    (newest,) = [each for each in out.iterdir() if each.name == "step-000006"]
    return {each.name: each.read_bytes() for each in newest.iterdir() if each.suffix == ".safetensors"}


@pytest.mark.parametrize(
    ("spoils", "number", "action"),
    [
        ("", 0.0, "skip"),
        ("loss", float("nan"), "skip"),
        ("loss", float("inf"), "rewind"),
        ("gradient", float("nan"), "rewind"),
        ("gradient", float("inf"), "skip"),
    ],
)
def test_it_is_the_same_run_to_the_last_bit_and_in_its_hooks(
    profile_file: Path, tmp_path: Path, request: pytest.FixtureRequest, spoils: str, number: float, action: str
) -> None:
    sets = [f"training.on_nonfinite={action}", "training.accumulate=2", "monitoring.log_every=1"]
    _, plain = train(profile_file, tmp_path / "plain", *sets, spoils=spoils, number=number)
    taken = request.getfixturevalue("ahead")
    _, seen = train(profile_file, tmp_path / "ahead", *sets, spoils=spoils, number=number)
    # All but the first, in which the parts are proven.
    assert len(taken) == (7 if action == "rewind" else 5)
    assert seen == plain
    assert losses(tmp_path / "ahead") == losses(tmp_path / "plain")
    assert files(tmp_path / "ahead") == files(tmp_path / "plain")
    assert files(tmp_path / "ahead")


@pytest.mark.parametrize("spoils", ["loss", "gradient"])
def test_what_was_not_finite_is_named_alike(
    profile_file: Path, tmp_path: Path, request: pytest.FixtureRequest, spoils: str
) -> None:
    with pytest.raises(AptError, match="step 3: the loss or its gradient is not finite") as plain:
        train(profile_file, tmp_path / "plain", spoils=spoils)
    request.getfixturevalue("ahead")
    with pytest.raises(AptError) as told:
        train(profile_file, tmp_path / "ahead", spoils=spoils)
    assert str(told.value) == str(plain.value)
    assert {"loss": "'spoilt'", "gradient": "in the gradients of blocks.1.ffn.up.weight, "}[spoils] in str(told.value)


def test_a_resumed_run_has_the_same_bits(profile_file: Path, tmp_path: Path, ahead: list[int]) -> None:
    steady = "training.lr_schedule=constant"
    train(profile_file, tmp_path / "whole", steady)
    train(profile_file, tmp_path / "parts", steady, "training.max_steps=4")
    train(profile_file, tmp_path / "parts", steady)
    assert len(ahead) == 5 + 3 + 2
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "facts"), [(Looker, {}), (Spoiler, {"spoils": "hook"})])
def test_who_looks_on_between_gradient_and_update_sees_no_step_that_may_be_none(
    profile_file: Path, tmp_path: Path, ahead: list[int], kind: type[Spoiler], facts: dict[str, str]
) -> None:
    train(profile_file, tmp_path / "run", kind=kind, **facts)
    assert not ahead


def test_no_text_is_read_that_no_step_trains_on(
    profile_file: Path, tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    load = stepping.Step._load

    def noted(step: stepping.Step, index: int) -> Any:
        read.append(index)
        return load(step, index)

    monkeypatch.setattr(stepping.Step, "_load", noted)
    train(profile_file, tmp_path / "run", "training.accumulate=2")
    assert ahead
    assert read == [*range(12)]


def test_muon_waits(profile_file: Path, tmp_path: Path, ahead: list[int]) -> None:
    train(profile_file, tmp_path / "run", "training.optimizer=muon")
    assert not ahead
