"""The loop: what it does at each step, what it refuses, and what it leaves behind."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from apt.core.config import APTConfig
from apt.core.discovery import discover
from apt.core.profile import load_profile
from apt.core.providers import FFNProvider, Plugin
from apt.core.registry import Registry, registry
from apt.core.resolve import resolve_config
from apt.errors import AptError, CheckpointError, PluginError, ProofOfUseError, UserError
from apt.hookspecs import hookimpl
from apt.training import record
from apt.training import trainer as training
from apt.training.checkpoint import list_checkpoints, load_run, read_saved
from apt.training.record import read_metrics
from apt.training.trainer import RunResult, Trainer
from apt.training.watch import LASTING, SpikeDetector, Stopwatch


class Layer(nn.Module):
    """A feed-forward layer with a branch that a plugin switches on."""

    def __init__(self, d_model: int, fault: str) -> None:
        super().__init__()
        self.active, self.fault, self.calls = True, fault, 0
        self.dense, self.branch = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.register_buffer("gain", torch.tensor(1.0))
        if fault == "an inner part does not run":
            self.inner = registry.get("ffn", "default").create_layer(d_model, d_model)

    def forward(self, x, *, mask=None):
        y = self.dense(x)
        if not self.active:
            return y
        if self.fault == "branch is not used":
            return y + 0 * x
        if self.fault == "branch is detached":
            return y + self.branch(x).detach()
        self.calls += self.training
        if self.fault == "not a number" or (self.fault == "once" and self.calls == 20):
            return y + self.branch(x) * float("nan")
        if self.fault == "bad gradient":
            return y + (self.branch(x) * 0).sqrt()
        return y + self.gain * self.branch(x)

    def idle(self):
        return [] if self.active else [self.branch]


class Switched(FFNProvider):
    """A branch beside a dense layer."""

    switched_by: ClassVar[str | None] = "watch"
    scheduled: ClassVar = {"gain": "gain"}
    fault: str = ""

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        return Layer(d_model, self.fault)

    def get_parameter_count(self, d_model, d_ff):
        return 2 * d_model * (d_model + 1)

    def get_flops_estimate(self, seq_len, d_model, d_ff):
        return 4 * seq_len * d_model**2

    def get_memory_estimate(self, seq_len, d_model, d_ff, batch_size=1):
        return 4 * batch_size * seq_len * d_model


class Watch(Plugin):
    """Writes down each hook, and the scheduled buffers at each step."""

    stumble: str = ""
    _calls: list[str] = PrivateAttr(default_factory=list)
    _gains: list[float] = PrivateAttr(default_factory=list)
    _norms: list[float] = PrivateAttr(default_factory=list)
    _rates: list[float] = PrivateAttr(default_factory=list)
    _texts: list[torch.Tensor] = PrivateAttr(default_factory=list)
    _model: Any = PrivateAttr(default=None)
    _optimizer: Any = PrivateAttr(default=None)

    def _note(self, name: str) -> None:
        self._calls.append(name)
        if name == self.stumble:
            raise RuntimeError("stumbled")

    @hookimpl
    def apt_model_built(self, model):
        self._model = model
        self._note("model_built")

    @hookimpl
    def apt_training_start(self, state, optimizer):
        self._optimizer = optimizer
        self._note("training_start")

    @hookimpl
    def apt_training_end(self, state):
        self._note("training_end")

    @hookimpl
    def apt_epoch_start(self, state):
        self._note("epoch_start")

    @hookimpl
    def apt_epoch_end(self, state):
        self._note("epoch_end")

    @hookimpl
    def apt_phase_changed(self, state, plugin):
        self._note(f"phase_changed {plugin} at {state.step}")

    @hookimpl
    def apt_step_start(self, state):
        self._note("step_start")
        self._gains += [module.gain.item() for module in self._model.modules() if isinstance(module, Layer)][:1]

    @hookimpl
    def apt_batch_prepare(self, batch):
        self._texts.append(batch.tokens.clone())

    @hookimpl
    def apt_loss_extra(self, state, output):
        self._note("loss_extra")
        return {"z": 0.1 * output.logits.square().mean()}

    @hookimpl
    def apt_gradients_ready(self, state, model):
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._norms.append(nn.utils.get_total_norm(grads).item())
        self._note("gradients_ready")

    @hookimpl
    def apt_step_end(self, state, metrics):
        self._rates += {group["lr"] for group in self._optimizer.param_groups}
        self._note("step_end")
        metrics["own"] = float(state.step)


def train(profile: Path, out: Path, *sets: str, console: Console | None = None, **options: Any) -> RunResult:
    registry = Registry(discover)
    registry.register("ffn", "switched", Switched)
    registry.register("plugin", "watch", Watch)
    loaded = load_profile(profile, sets=sets, registry=registry)
    quiet = Console(file=io.StringIO()) if console is None else console
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=quiet, **options).fit()


def load_progress(run: Path) -> dict[str, Any]:
    saved: dict[str, Any] = read_saved(list_checkpoints(run)[-1])["progress"]
    return saved


WATCHED = (
    "model.ffn={provider: switched}",
    "plugins=[watch]",
    "schedules.enable_watch_at_epoch=1",
    "training.switch_tolerance=null",
)


def test_a_run_leaves_a_folder_that_describes_itself(profile_file: Path, tmp_path: Path) -> None:
    result = train(profile_file, tmp_path / "run", "monitoring.plot=true")
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {"resolved.yaml", "record.json", "metrics.jsonl", "README.md", "latest", "loss.png", "step-000008"}
    assert (result.folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((result.folder / "record.json").read_text())
    assert {"where": "model.ffn", "kind": "ffn", "asked": "default", "used": "default", "why": ""}.items() <= (
        record["providers"][1].items()
    )
    assert (
        load_profile(result.folder / "resolved.yaml").config
        == load_profile(profile_file, sets=["monitoring.plot=true"]).config
    )
    assert math.isfinite(result.validation.loss)
    assert f"{result.validation.loss:.4f}" in (result.folder / "README.md").read_text()


def test_the_record_says_of_each_start_by_what_code_it_was(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(profile_file, out)
    first = json.loads((out / "record.json").read_text())
    assert first["resumed"] == []
    monkeypatch.setattr(record, "_git", lambda: {"commit": "another", "dirty": False})
    train(profile_file, out, "training.max_epochs=3", resume="auto")
    again = json.loads((out / "record.json").read_text())
    (resumed,) = again.pop("resumed")
    assert again == {key: value for key, value in first.items() if key != "resumed"}
    assert (resumed["step"], resumed["git"]["commit"]) == (8, "another")
    assert resumed["providers"] == first["providers"]


def test_a_compiled_run_without_a_compiler_says_what_it_needs(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_cpp_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
    with pytest.raises(UserError, match=r"training.compile: needs a C\+\+ compiler, and none is found; install one"):
        train(profile_file, tmp_path / "run", "training.compile=true")


def test_training_learns(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "run", "training.steps_per_epoch=60")
    losses = [event["loss"] for event in read_metrics(tmp_path / "run") if event["event"] == "train"]
    assert losses[-1] < losses[0] - 1


def test_the_metrics_hold_what_the_contract_says(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "run", *WATCHED, "schedules.gain={start: 1, end: 2, by: step}")
    events = read_metrics(tmp_path / "run")
    step = next(event for event in events if event["event"] == "train" and event["step"] == 5)
    assert {"epoch", "split", "loss", "loss_z", "learning_rate", "tokens_per_second", "own"} <= step.keys()
    assert step["values"] == {"gain": 1.5}
    assert step["plugins_on"] == ["watch"]
    held_out = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in held_out] == [4, 8]
    assert all(event["bits_per_byte"] > 0 for event in held_out)


def test_each_step_has_its_learning_rate_and_a_gradient_within_the_limit(profile_file: Path, tmp_path: Path) -> None:
    sets = [*WATCHED, "schedules.enable_watch_at_epoch=0", "training.gradient_clip=0.01", "training.lr_schedule=linear"]
    result = train(profile_file, tmp_path / "run", *sets, "training.min_lr_ratio=0.5")
    watch = result.resolved.plugins["watch"]
    assert watch._norms == pytest.approx([0.01] * 8, rel=1e-3)  # type: ignore[attr-defined]
    rates = [1.5e-3, 3e-3, *(3e-3 - 1.5e-3 * step / 6 for step in range(6))]
    assert watch._rates == pytest.approx(rates)  # type: ignore[attr-defined]
    told = [event for event in read_metrics(tmp_path / "run") if event["event"] == "train"]
    assert [event["learning_rate"] for event in told] == pytest.approx(rates)
    assert all(event["gradient_norm"] > 0.01 for event in told)


def test_the_seed_decides_the_weights_and_the_order_of_the_text(profile_file: Path, tmp_path: Path) -> None:
    # At this learning rate the weights stay those of the start.
    sets = (*WATCHED, "schedules.enable_watch_at_epoch=0", "training.learning_rate=1e-12", "training.max_steps=3")

    def start(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = train(profile_file, tmp_path / name, *sets, f"training.seed={seed}")
        return result.model.embedding.weight, torch.stack(result.resolved.plugins["watch"]._texts)  # type: ignore[attr-defined]

    (one, text), (same, again), (other, another) = (start(*each) for each in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(text, again)
    assert not torch.equal(text, another)


def test_hooks_come_in_order_and_a_switch_is_told_to_its_plugin(profile_file: Path, tmp_path: Path) -> None:
    result = train(profile_file, tmp_path / "run", *WATCHED)
    calls = result.resolved.plugins["watch"]._calls  # type: ignore[attr-defined]
    step = ["step_start", "loss_extra", "gradients_ready", "step_end"]
    assert calls == [
        *("model_built", "training_start", "phase_changed watch at 4"),
        *("epoch_start", *(step * 4), "epoch_end", "training_end"),
    ]


def test_scheduled_values_reach_the_module_at_every_step(profile_file: Path, tmp_path: Path) -> None:
    result = train(profile_file, tmp_path / "run", *WATCHED, "schedules.gain={start: 1, end: 2, by: step}")
    assert result.resolved.plugins["watch"]._gains == [1 + step / 8 for step in range(4, 8)]  # type: ignore[attr-defined]


def test_a_value_that_is_scheduled_no_longer_is_what_the_option_says(profile_file: Path, tmp_path: Path) -> None:
    sets = [*WATCHED, "training.max_steps=6"]
    train(profile_file, tmp_path / "run", *sets, "schedules.gain={start: 3, end: 3, by: step}")
    result = train(profile_file, tmp_path / "run", *WATCHED, resume="auto")
    values = [value for name, value in result.model.state_dict().items() if name.endswith("gain")]
    assert values
    assert {float(value) for value in values} == {1.0}


def test_what_is_off_gets_no_gradient_no_decay_and_no_step(profile_file: Path, tmp_path: Path) -> None:
    sets = [*WATCHED, "training.weight_decay=0.5", "schedules.enable_watch_at_epoch=2"]
    short = train(profile_file, tmp_path / "short", *sets, "training.max_steps=2")
    long = train(profile_file, tmp_path / "long", *sets)
    for one, other in zip(short.model.modules(), long.model.modules(), strict=True):
        if isinstance(one, Layer) and isinstance(other, Layer):
            assert torch.equal(one.branch.weight, other.branch.weight)
            assert not torch.equal(one.dense.weight, other.dense.weight)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("branch is not used", r"ffn.switched \(\(registered\).*its parameter branch.weight got no gradient"),
        ("branch is detached", r"blocks.0.ffn: its parameter branch.weight got no gradient"),
    ],
)
def test_what_is_switched_on_and_does_not_learn_stops_the_run(
    profile_file: Path, tmp_path: Path, fault: str, message: str
) -> None:
    with pytest.raises(ProofOfUseError, match=message):
        train(profile_file, tmp_path / "run", *WATCHED, f"model.ffn.fault={fault}")
    assert (tmp_path / "run" / "step-000004" / "manifest.json").is_file()


def test_a_part_within_a_part_that_never_runs_stops_the_run_at_its_first_step(
    profile_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ProofOfUseError, match=r"ffn.default \(apt-core .*\), blocks.1.ffn.inner: its module did not run"
    ):
        train(profile_file, tmp_path / "run", *WATCHED, "model.ffn.fault=an inner part does not run")


def test_a_number_that_is_not_finite_stops_with_step_batch_and_provider(profile_file: Path, tmp_path: Path) -> None:
    place = r"first in the output of ffn.switched \(\(registered\) 0\), blocks.0.ffn"
    with pytest.raises(
        AptError, match=rf"step 4: the loss or its gradient is not finite \(micro-batches 4 to 4 of seed 0\): {place}"
    ):
        train(profile_file, tmp_path / "run", *WATCHED, "model.ffn.fault=not a number")


def test_a_gradient_that_alone_is_not_finite_names_the_parameters(profile_file: Path, tmp_path: Path) -> None:
    with pytest.raises(AptError, match=r"every output is finite; in the gradients of blocks.1.ffn.branch"):
        train(profile_file, tmp_path / "run", *WATCHED, "model.ffn.fault=bad gradient")


def test_steps_that_are_not_finite_can_be_skipped(profile_file: Path, tmp_path: Path) -> None:
    sets = [*WATCHED, "model.ffn.fault=not a number", "training.on_nonfinite=skip"]
    result = train(profile_file, tmp_path / "run", *sets)
    assert result.state.step == 8
    events = [event for event in read_metrics(tmp_path / "run") if event["event"] == "nonfinite"]
    assert [(event["step"], event["action"]) for event in events] == [(step, "skip") for step in range(4, 8)]
    before = load_file(tmp_path / "run" / "step-000004" / "model.safetensors")
    after = load_file(tmp_path / "run" / "step-000008" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_run_can_go_back_and_leave_out_what_was_read_since(profile_file: Path, tmp_path: Path) -> None:
    sets = ["model.ffn={provider: switched, fault: once}", "plugins=[watch]", "training.save_every=2"]
    out = tmp_path / "run"
    result = train(profile_file, out, *sets, "training.on_nonfinite=rewind", "training.steps_per_epoch=30")
    assert result.state.step == 60
    events = [event for event in read_metrics(out) if event["event"] == "nonfinite"]
    assert [(event["step"], event["action"]) for event in events] == [(19, "rewind")]
    assert load_progress(out)["left_out"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in result.model.state_dict().values())


def test_a_run_that_never_is_finite_is_given_up(profile_file: Path, tmp_path: Path) -> None:
    sets = [*WATCHED, "model.ffn.fault=not a number", "training.on_nonfinite=rewind"]
    with pytest.raises(AptError, match="this is the 11th time without getting further"):
        train(profile_file, tmp_path / "run", *sets)
    with pytest.raises(AptError, match="there is no checkpoint to go back to"):
        train(profile_file, tmp_path / "other", *sets, "schedules.enable_watch_at_epoch=null")


def test_a_loss_that_spikes_is_reported(profile_file: Path, tmp_path: Path) -> None:
    detector = SpikeDetector(3.0, window=10)
    calm = [2.0 + 0.01 * (step % 3) for step in range(30)]
    assert not any(detector.is_spike(loss) for loss in calm)
    assert detector.is_spike(3.0)
    assert not detector.is_spike(2.01)
    # A loss that stays where it has risen to is a spike no more.
    assert sum(detector.is_spike(loss + 1.0) for loss in calm) == LASTING
    assert detector.is_spike(4.0)
    train(
        profile_file,
        tmp_path / "run",
        "monitoring.spike=0.001",
        "training.steps_per_epoch=40",
        "training.learning_rate=1e-7",
    )
    assert any(event["event"] == "spike" for event in read_metrics(tmp_path / "run"))


def test_a_resumed_run_tells_the_spikes_of_one_that_never_stopped(profile_file: Path, tmp_path: Path) -> None:
    sets = ["monitoring.spike=0.5", "training.steps_per_epoch=35", "training.learning_rate=1e-7"]
    train(profile_file, tmp_path / "whole", *sets, "training.save_every=55", "training.keep_last=9")
    train(profile_file, tmp_path / "rest", *sets, resume=str(tmp_path / "whole" / "step-000055"))
    whole, rest = (
        [event["step"] for event in read_metrics(tmp_path / name) if event["event"] == "spike"]
        for name in ("whole", "rest")
    )
    assert rest
    assert rest == [step for step in whole if int(str(step)) > 55]


def test_a_loss_that_begins_between_two_lines_of_the_log_has_its_own_mean() -> None:
    watch = Stopwatch()
    for step in range(4):
        watch.add("loss", torch.tensor(float(step)))
        if step >= 3:
            watch.add("loss_later", torch.tensor(5.0))
        watch.done(10)
    means, _ = watch.read()
    assert {name: mean.item() for name, mean in means.items()} == {"loss": 1.5, "loss_later": 5.0}
    assert watch.read()[0] == {}


def test_a_line_of_the_log_has_the_steps_before_a_resume_too(profile_file: Path, tmp_path: Path) -> None:
    sets = ["monitoring.log_every=3", "training.save_every=1", "training.keep_last=9"]
    train(profile_file, tmp_path / "run", *sets)
    resume = str(tmp_path / "run" / "step-000004")
    loaded = load_profile(profile_file, sets=sets)
    Trainer(loaded.config, tmp_path / "rest", resume=resume, console=Console(file=io.StringIO())).fit()
    whole, rest = (
        {each["step"]: each["loss"] for each in read_metrics(tmp_path / name) if each["event"] == "train"}
        for name in ("run", "rest")
    )
    assert list(whole) == [1, 3, 6, 8]
    assert rest == {6: whole[6], 8: whole[8]}


def test_what_one_rank_saved_of_a_line_is_taken_over_by_one_alone() -> None:
    watch = Stopwatch()
    watch.add("loss", torch.tensor(1.5))
    watch.done(10)
    saved = watch.save(lambda values: {name: 2 * value for name, value in values.items()})
    ranks = [Stopwatch(saved, whole=whole) for whole in (True, False)]
    for rank in ranks:
        rank.add("loss", torch.tensor(0.5))
    assert sum(rank.read()[0]["loss"].item() for rank in ranks) == (3.0 + 1.0) / 2
    assert saved["tokens"] == 10


def test_too_little_memory_says_what_to_lower(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object) -> None:
        torch.empty(10**15)

    monkeypatch.setattr(Trainer, "_take_step", greedy)
    with pytest.raises(
        UserError, match=r"out of memory \(.*\); lower training.batch_size and raise training.accumulate"
    ):
        train(profile_file, tmp_path / "run")


def test_recomputed_activations_change_nothing(profile_file: Path, tmp_path: Path) -> None:
    one = train(profile_file, tmp_path / "one", "model.dropout=0.1").model.state_dict()
    other = train(profile_file, tmp_path / "two", "model.dropout=0.1", "training.recompute=true").model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_checkpoint_and_the_last_ones_are_kept(profile_file: Path, tmp_path: Path, asynchronous: bool) -> None:
    sets = [
        "training.save_every=2",
        "training.keep_best=true",
        "evaluation.eval_every=2",
        "training.steps_per_epoch=10",
    ]
    sets += [f"training.async_save={str(asynchronous).lower()}", "training.learning_rate=0.3"]
    train(profile_file, tmp_path / "run", *sets)
    held_out = {
        event["step"]: event["loss"] for event in read_metrics(tmp_path / "run") if event["event"] == "evaluation"
    }
    best = min(held_out, key=lambda step: held_out[step])
    assert (tmp_path / "run" / "best").read_text().strip() == f"step-{best:06d}"
    kept = {folder.name for folder in list_checkpoints(tmp_path / "run")}
    assert kept == {f"step-{best:06d}", "step-000018", "step-000020"}
    load_run(tmp_path / "run" / f"step-{best:06d}")


def test_checkpoints_can_go_by_the_clock(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "often", "training.save_every=0.00001 min", "training.keep_last=100")
    train(profile_file, tmp_path / "seldom", "training.save_every=10 min")
    assert len(list_checkpoints(tmp_path / "often")) == 8
    assert len(list_checkpoints(tmp_path / "seldom")) == 1


def test_a_resume_says_what_has_changed_and_refuses_what_may_not(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "run")
    output = io.StringIO()
    console = Console(file=output, width=200)
    sets = ["training.max_epochs=3", "training.learning_rate=1e-3"]
    assert train(profile_file, tmp_path / "run", *sets, resume="auto", console=console).state.step == 12
    assert "training.max_epochs: 2 -> 3" in output.getvalue()
    assert "training.learning_rate: 0.003 -> 0.001" in output.getvalue()
    sets = ["training.max_epochs=4", "model.d_ff=48", "training.seed=1", "data.tokenizer=bpe", "model.vocab_size=5000"]
    with pytest.raises(CheckpointError) as caught:
        train(profile_file, tmp_path / "run", *sets, resume="auto")
    told = str(caught.value)
    assert "refused: model.d_ff: 32 -> 48 (the weights would not fit" in told
    assert "refused: training.seed: 0 -> 1 (the order of the text would be another)" in told
    assert "refused: data.tokenizer.provider: 'byte' -> 'bpe'" in told
    assert "allowed: training.max_epochs: 3 -> 4" in told


@pytest.mark.parametrize("later", ["epoch=2", "step=10"])
def test_a_resume_cannot_put_off_what_is_on(profile_file: Path, tmp_path: Path, later: str) -> None:
    switch = "schedules.enable_watch_at_step=4" if later.startswith("step") else WATCHED[2]
    sets = [*WATCHED[:2], WATCHED[3], "training.max_epochs=3"]
    train(profile_file, tmp_path / "run", *sets, switch, "training.max_steps=6")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"'watch' was on at step 6, and .* \(schedules.enable_watch_at_step\)"):
        train(profile_file, tmp_path / "run", *sets, f"schedules.enable_watch_at_{later}", resume="auto")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    output = io.StringIO()
    console = Console(file=output, width=200)
    result = train(
        profile_file, tmp_path / "run", *sets, "schedules.enable_watch_at_step=6", resume="auto", console=console
    )
    assert "watch on" not in output.getvalue()
    assert result.state.plugins_on == ("watch",)


def test_what_stands_in_is_written_down_everywhere(profile_file: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    sets = ["model.attention={provider: flash_v9, fallback: [sdpa]}"]
    result = train(profile_file, tmp_path / "run", *sets, console=Console(file=output))
    line = "# model.attention: attention.sdpa of apt-core"
    for folder in (result.folder, result.folder / "step-000008"):
        text = (folder / "resolved.yaml").read_text()
        assert line in text
        assert "(asked for flash_v9: no attention provider 'flash_v9' is installed" in text
    record = json.loads((result.folder / "record.json").read_text())["providers"][0]
    assert (record["asked"], record["used"]) == ("flash_v9", "sdpa")
    assert "asked for flash_v9" in (result.folder / "README.md").read_text()


def test_a_strict_lock_refuses_what_has_changed(profile_file: Path, tmp_path: Path) -> None:
    sets = ["model.ffn={provider: ./mine.py:Mine}", "training.save_every=2"]
    source = "from apt.builtin.ffn import MLP\n\nclass Mine(MLP):\n    'As it is.'\n"
    (tmp_path / "mine.py").write_text(source)
    train(profile_file, tmp_path / "run", *sets)
    (tmp_path / "mine.py").write_text(source + "# changed\n")
    checkpoint = str(tmp_path / "run" / "step-000006")
    with pytest.raises(
        CheckpointError, match=r"was made by other providers than those here:\n  model.ffn: \(file\) was sha256"
    ):
        train(profile_file, tmp_path / "new", *sets, resume=checkpoint, strict_lock=True)
    output = io.StringIO()
    train(profile_file, tmp_path / "new", *sets, resume=checkpoint, console=Console(file=output, width=300))
    assert "warning: step-000006: model.ffn: (file) was sha256" in output.getvalue()


def test_a_run_that_was_not_pointed_to_is_taken_by_its_newest_whole_checkpoint(
    profile_file: Path, tmp_path: Path
) -> None:
    train(profile_file, tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()
    assert load_run(tmp_path / "run").state.step == 8


@pytest.mark.parametrize("hook", ["model_built", "step_start", "loss_extra", "phase_changed watch at 4"])
def test_a_plugin_that_fails_is_named_with_hook_and_distribution(profile_file: Path, tmp_path: Path, hook: str) -> None:
    with pytest.raises(PluginError, match=rf"plugin 'watch' .*\(registered\).*apt_{hook.split()[0]}.*stumbled"):
        train(profile_file, tmp_path / "run", *WATCHED, f"plugins=[{{watch: {{stumble: {hook}}}}}]")


def test_accumulated_micro_batches_are_one_large_batch(profile_file: Path, tmp_path: Path) -> None:
    sets = (*WATCHED, "schedules.enable_watch_at_epoch=0")
    large = train(profile_file, tmp_path / "large", *sets, "training.batch_size=4")
    small = train(profile_file, tmp_path / "small", *sets, "training.batch_size=2", "training.accumulate=2")
    one, other = large.model.state_dict(), small.model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5)
    # AdamW does not see the size of a gradient; clipping and the record do.
    for what in ("gradient_norm", "loss", "loss_z"):
        told, again = (
            [event[what] for event in read_metrics(run.folder) if event["event"] == "train"] for run in (large, small)
        )
        assert again == pytest.approx(told, rel=1e-4)


def test_bf16_and_compiled_runs_end(profile_file: Path, tmp_path: Path) -> None:
    result = train(profile_file, tmp_path / "run", "training.precision=bf16")
    assert math.isfinite(result.validation.loss)
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())


def test_too_little_text_is_an_error_that_says_so(profile_file: Path, tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text("abc")
    with pytest.raises(UserError, match=r"the train split has .* tokens in 1 documents, fewer than"):
        train(profile_file, tmp_path / "run", f"data.path={tmp_path / 'little.txt'}")


def test_a_gpu_that_is_not_there_is_refused(profile_file: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="cuda is asked for, but PyTorch sees no GPU; use auto or cpu"):
        train(profile_file, tmp_path / "run", "hardware.device=cuda")


def test_a_gpu_is_told_to_leave_nothing_to_chance_before_it_computes_anything(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, object]] = []
    for name in ("assemble", "settle"):
        inner = getattr(training, name)

        def noted(*given: Any, inner: Any = inner, **named: Any) -> Any:
            told.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""), torch.are_deterministic_algorithms_enabled()))
            return inner(*given, **named)

        monkeypatch.setattr(training, name, noted)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(training, "pick_device", lambda *_: torch.device("cuda"))
    train(profile_file, tmp_path / "run", "hardware.deterministic=true", "hardware.matmul=auto")
    assert told == [(":4096:8", True)] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_where_there_is_no_terminal_lines_are_printed(profile_file: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    train(profile_file, tmp_path / "run", *WATCHED, console=Console(file=output))
    assert "step 4: watch on; loss of a fixed held-out batch" in output.getvalue()
    assert "step 8: held-out loss" in output.getvalue()


def test_a_config_alone_is_enough(profile_file: Path, tmp_path: Path) -> None:
    config = APTConfig.from_yaml(profile_file)
    resolved = resolve_config(config)
    assert Trainer(config, tmp_path / "run", console=Console(file=io.StringIO())).fit().state.step == 8
    assert set(resolved.providers) == {"attention", "ffn", "data", "tokenizer"}
