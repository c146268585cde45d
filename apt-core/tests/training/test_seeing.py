"""What a run shows and keeps: loggers of others, samples, the share of the peak, a folder that describes itself."""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console

from apt.builtin.attention import SDPA
from apt.builtin.ffn import MLP
from apt.core.discovery import discover
from apt.core.hooks import HookRunner
from apt.core.lock import make_lock
from apt.core.profile import load_profile
from apt.core.providers import LoggerProvider, Plugin
from apt.core.registry import Registry
from apt.errors import PluginError, ProfileError, UserError
from apt.hookspecs import Batch, NextToken, RunState, hookimpl
from apt.inference.generate import generate
from apt.layers import Output, Part
from apt.modeling.block import TransformerBlock
from apt.modeling.compose import ModelBuilder
from apt.training.loss import LossStep
from apt.training.peak import peak_flops, peak_of
from apt.training.progress import Report
from apt.training.record import Metrics, read_metrics
from apt.training.trainer import RunResult, Trainer

TOLD: list[dict[str, object]] = []


class Ours(LoggerProvider):
    """A logger of somebody else's."""

    api_level: ClassVar[int] = 1
    fail_at: int = 10**9

    def open(self, folder: Path, profile: Mapping[str, object], resumed_at: int | None) -> Ours:  # type: ignore[override]
        TOLD[:] = [{"profile": profile, "resumed_at": resumed_at}]
        return self

    def log(self, event: Mapping[str, object]) -> None:
        if event["event"] == "train" and int(str(event["step"])) >= self.fail_at:
            raise ConnectionError("the server is away")
        TOLD.append(dict(event))

    def close(self) -> None:
        TOLD.append({"closed": True})


def train(profile: Path, out: Path, *sets: str, resume: str = "never") -> tuple[RunResult, str]:
    registry = Registry(discover)
    registry.register("logger", "ours", Ours)
    registry.register("plugin", "shouts", Shouts)
    registry.register("ffn", "loud", Loud)
    registry.register("plugin", "clashes", Clashes)
    registry.register("plugin", "asks", Asks)
    registry.register("plugin", "draws", Draws)
    loaded = load_profile(profile, sets=sets, registry=registry)
    output = io.StringIO()
    trainer = Trainer(
        loaded.config,
        out,
        resolved=loaded.resolved,
        console=Console(file=output, width=1000),
        given=loaded.files,
        resume=resume,
    )
    return trainer.fit(), output.getvalue()


def test_a_third_partys_logger_is_told_what_the_metrics_hold(profile_file: Path, tmp_path: Path) -> None:
    result, _ = train(profile_file, tmp_path / "run", "monitoring.loggers=[ours]")
    assert TOLD[0]["resumed_at"] is None
    assert TOLD[0]["profile"]["name"] == "small"  # type: ignore[index]
    assert TOLD[-1] == {"closed": True}
    assert TOLD[1:-1] == read_metrics(result.folder)
    assert "logger" not in json.dumps(make_lock(result.resolved).to_dict())
    train(profile_file, tmp_path / "run", "monitoring.loggers=[ours]", "training.max_epochs=3", resume="auto")
    assert TOLD[0]["resumed_at"] == 8
    assert [event["step"] for event in TOLD[1:-1] if event["event"] == "train"] == [9, 10, 11, 12]


def test_a_logger_that_fails_is_named_and_left_out_and_the_run_goes_on(profile_file: Path, tmp_path: Path) -> None:
    result, output = train(profile_file, tmp_path / "run", "monitoring.loggers=[{provider: ours, fail_at: 3}]")
    assert result.state.step == 8
    assert "failed and is left out from now on: ConnectionError: the server is away; metrics.jsonl goes on" in output
    assert "logger 'ours' (" in output
    assert [event["step"] for event in TOLD if event.get("event") == "train"] == [1, 2]
    assert len([event for event in read_metrics(result.folder) if event["event"] == "train"]) == 8


def test_a_logger_that_is_not_there_is_a_fault_of_the_profile(profile_file: Path) -> None:
    with pytest.raises(ProfileError, match=r"monitoring.loggers.0: no logger provider 'wndb' .*did you mean 'wandb'"):
        load_profile(profile_file, sets=["monitoring.loggers=[wndb]"])
    registry = Registry(discover)
    registry.register("logger", "ours", Ours)
    with pytest.raises(ProfileError, match=r"monitoring.loggers.0.fail_a: no such option; did you mean 'fail_at'"):
        load_profile(profile_file, sets=["monitoring.loggers=[{provider: ours, fail_a: 3}]"], registry=registry)


def test_a_sample_ends_with_the_id_that_the_profile_says(profile_file: Path, tmp_path: Path) -> None:
    sets = ["evaluation.samples=true", "evaluation.sample_tokens=3", "training.learning_rate=1e-12"]
    plain, _ = train(profile_file, tmp_path / "plain", *sets)
    drawn = generate(plain.model, plain.tokenizer, "def ", max_new_tokens=3, temperature=0.8).tokens
    assert len(drawn) == 3
    ended, _ = train(profile_file, tmp_path / "ended", *sets, f"model.eos_token_id={drawn[0]}")
    assert {event["text"] for event in read_metrics(ended.folder) if event["event"] == "sample"} == {"def "}


def test_samples_are_drawn_at_each_evaluation_and_change_nothing(profile_file: Path, tmp_path: Path) -> None:
    plain, _ = train(profile_file, tmp_path / "plain")
    result, _ = train(profile_file, tmp_path / "run", "evaluation.samples=true")
    samples = [event for event in read_metrics(result.folder) if event["event"] == "sample"]
    assert [event["step"] for event in samples] == [4, 8]
    assert all(str(event["text"]).startswith("def ") for event in samples)
    page = (result.folder / "samples.md").read_text()
    assert page.index("## Step 4") < page.index("## Step 8")
    assert str(samples[1]["text"]) in page
    ours, theirs = (dict(each.model.state_dict()) for each in (plain, result))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Draws(Plugin):
    """Draws from every random state, in training for what is learnt, in evaluation and while a checkpoint is saved."""

    api_level: ClassVar[int] = 1

    def _draw(self) -> float:
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    @hookimpl
    def apt_loss_extra(self, output: Output) -> dict[str, torch.Tensor]:
        return {"drawn": output.logits.square().mean() * self._draw()}

    @hookimpl
    def apt_evaluation_end(self) -> None:
        self._draw()

    @hookimpl
    def apt_checkpoint_save(self) -> dict[str, object]:
        return {"drawn": self._draw()}


def test_what_is_drawn_in_evaluating_and_saving_changes_nothing_however_often_it_is_done(
    profile_file: Path, tmp_path: Path
) -> None:
    sets = ["plugins=[draws]", "model.dropout=0.1"]
    seldom, _ = train(profile_file, tmp_path / "seldom", *sets, "evaluation.eval_every=4")
    often, _ = train(profile_file, tmp_path / "often", *sets, "evaluation.eval_every=1")
    middle = str(tmp_path / "often" / "step-000004")
    resumed, _ = train(profile_file, tmp_path / "resumed", *sets, "evaluation.eval_every=1", resume=middle)
    ours, *others = (dict(each.model.state_dict()) for each in (seldom, often, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for theirs in others for name in ours)


class Shouts(Plugin):
    """Writes one letter, and draws by the way."""

    api_level: ClassVar[int] = 1

    @hookimpl
    def apt_logits_ready(self, next_token: NextToken) -> None:
        torch.rand(1)
        letter = ord("A") + 3  # the ids of bytes begin with 3
        next_token.logits = torch.where(torch.arange(next_token.logits.shape[-1]) == letter, 0.0, -torch.inf)[None]


class Asks(Plugin):
    """Cannot write without what only a command gives it."""

    api_level: ClassVar[int] = 1

    @hookimpl
    def apt_prompt_prepare(self) -> None:
        raise UserError("plugin.asks: no folder")


def test_a_sample_that_cannot_be_drawn_costs_the_run_nothing(profile_file: Path, tmp_path: Path) -> None:
    result, said = train(profile_file, tmp_path / "run", "plugins=[asks]", "evaluation.samples=true")
    assert said.count("no sample is drawn: plugin.asks: no folder") == 2
    assert not [event for event in read_metrics(result.folder) if event["event"] == "sample"]


def test_plugins_take_part_in_samples_while_they_are_on_and_change_no_weight(
    profile_file: Path, tmp_path: Path
) -> None:
    sets = ["plugins=[shouts]", "schedules={enable_shouts_at_step: 6}", "model.dropout=0.1"]
    plain, _ = train(profile_file, tmp_path / "plain", *sets)
    result, _ = train(profile_file, tmp_path / "run", *sets, "evaluation.samples=true")
    early, late = (str(event["text"]) for event in read_metrics(result.folder) if event["event"] == "sample")
    assert "AAAAA" not in early
    assert late == "def AAAAA"
    ours, theirs = (dict(each.model.state_dict()) for each in (plain, result))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Loud(MLP):
    """A feed-forward layer with a loss and a metric of its own."""

    def create_layer(self, *sizes: Any, **more: Any) -> Any:
        layer: Any = super().create_layer(*sizes, **more)
        layer.register_forward_hook(
            lambda module, given, out: Part(out, {"noise": out.square().mean()}, {"heat": out.detach().mean()})
        )
        return layer


class Clashes(Plugin):
    """Gives what nobody can take."""

    api_level: ClassVar[int] = 1
    gives: str

    @hookimpl
    def apt_loss_extra(self, output: Output) -> Mapping[str, torch.Tensor]:
        loss = output.logits.square().mean()
        given = {"a loss": loss, "a number": {"odd": 0.5}, "a vector": {"odd": loss[None]}, "the loss": {"loss": loss}}
        given["its loss"] = {"noise": loss}
        return given.get(self.gives, {})  # type: ignore[return-value]

    @hookimpl
    def apt_step_end(self, metrics: dict[str, float]) -> None:
        metrics.update({"a rate": {"learning_rate": 1.0}, "a step": {"step": 1.0}}.get(self.gives, {}))

    @hookimpl
    def apt_evaluation_end(self, metrics: dict[str, float]) -> None:
        metrics.update({"a score": {"loss": 1.0}, "theirs": {"heat": 1.0}}.get(self.gives, {}))

    @hookimpl
    def apt_checkpoint_save(self) -> Mapping[str, object]:
        return {"seen": {1, 2} if self.gives == "a set" else [1, 2]}


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ("a loss", r"plugin 'clashes' \(\(registered\) 0\) failed in apt_loss_extra at step 0: .* not losses by name"),
        ("a number", r"plugin 'clashes' \(.*\): the added loss 'odd' is a float, not a tensor of one number"),
        ("a vector", r"plugin 'clashes' \(.*\): the added loss 'odd' is of shape \[1\], not a tensor"),
        ("the loss", r"two losses are called 'loss', that of the cross entropy and that of plugin 'clashes' \("),
        ("a rate", r"called 'learning_rate', that of the trainer and that of plugin 'clashes' \("),
        ("a step", r"two metrics of one event are called 'step', that of the trainer and that of plugin 'clashes' \("),
        ("a score", r"called 'loss', that of the trainer and that of plugin 'clashes' \("),
        ("theirs", r"called 'heat', that of ffn.loud \(\(registered\) 0\) and that of plugin 'clashes' \("),
        ("its loss", r"two losses are called 'noise', that of ffn.loud \(.*\) and that of plugin 'clashes' \("),
        ("a set", "plugin 'clashes': apt_checkpoint_save returned what is neither JSON nor a tensor"),
    ],
)
def test_what_a_plugin_gives_that_nobody_can_take_is_told_in_words(
    profile_file: Path, tmp_path: Path, gives: str, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        train(profile_file, tmp_path / "run", f"plugins=[{{clashes: {{gives: {gives}}}}}]", "model.ffn.provider=loud")


class ClashesToo(Clashes):
    """Gives the same."""


@pytest.mark.parametrize("hook", ["apt_step_end", "apt_evaluation_end"])
def test_two_plugins_may_not_give_two_metrics_of_one_name(hook: str) -> None:
    gives = {"apt_step_end": "a rate", "apt_evaluation_end": "a score"}[hook]
    hooks = HookRunner({"one": Clashes(gives=gives), "other": ClashesToo(gives=gives)})
    state = RunState(3, 0, 8, 2, ("one", "other"))
    with pytest.raises(
        PluginError, match=r"are called '.*', that of plugin 'one' \(.*\) and that of plugin 'other' \("
    ):
        getattr(hooks.hook, hook)(state=state, model=None, metrics={})


@pytest.mark.parametrize("what", ["loss", "metric"])
def test_attention_and_ffn_may_not_give_two_of_one_name(what: str) -> None:
    def add(module: torch.nn.Module, given: object, out: torch.Tensor) -> Part:
        return Part(out, **{"losses" if what == "loss" else "metrics": {"heat": out.mean()}})

    attention = SDPA().create_layer(8, 2)
    attention.register_forward_hook(add)  # type: ignore[attr-defined]
    block = TransformerBlock(attention, Loud().create_layer(8, 8), *(torch.nn.LayerNorm(8) for _ in range(2)), 0.0)  # type: ignore[arg-type]
    block.ffn.register_forward_hook(lambda module, given, out: add(module, given, out.output))
    with pytest.raises(
        PluginError, match=rf"attention.sdpa \(.*\) and ffn.loud \(.*\), both return a {what} called heat"
    ):
        block(torch.ones(1, 2, 8))


def test_two_losses_of_one_name_are_refused(profile_file: Path) -> None:
    config = load_profile(profile_file).config
    twice = type("Twice", (), {"apt_loss_extra": hookimpl(lambda self, output: {"odd": output.logits.mean()})})
    hooks = HookRunner()
    for _ in range(2):
        hooks.manager.register(twice())
    step = LossStep(ModelBuilder(config).build_model(), hooks, "fp32")
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(PluginError, match="two losses are called 'odd'"):
        step(RunState(0, 0, 1, 1), Batch(tokens, tokens), weight=1.0, extra_weight=1.0)


def test_the_folder_describes_itself(profile_file: Path, tmp_path: Path) -> None:
    result, _ = train(profile_file, tmp_path / "a run", 'evaluation.sample_prompt=say "hi"')
    folder = result.folder
    assert (folder / "profile" / "small.yaml").read_text() == profile_file.read_text()
    assert json.loads((folder / "lock.json").read_text()) == make_lock(result.resolved).to_dict()
    assert any(line.startswith("torch==") for line in (folder / "environment.txt").read_text().splitlines())
    record = json.loads((folder / "record.json").read_text())
    assert record["corpus"]["documents"] == 1
    assert set(record["corpus"]["tokens"]) == {"train", "validation", "test"}
    assert record["hardware"]["cpu_count"] >= 1
    card = (folder / "README.md").read_text()
    for part in ("## Results", "## Use", "## Training data", "## Providers", "## Limitations", "## Files"):
        assert f"\n{part}\n" in card
    assert record["corpus_sha256"] in card
    (command,) = (line for line in card.splitlines() if line.startswith("$ "))
    assert shlex.split(command) == ["$", "apt-core", "generate", str(folder), "--prompt", 'say "hi"']


def test_the_share_of_the_peak_is_said_where_it_is_known(profile_file: Path, tmp_path: Path) -> None:
    result, _ = train(profile_file, tmp_path / "run", "hardware.peak_flops=1e9")
    shares = [event["mfu"] for event in read_metrics(result.folder) if event["event"] == "train"]
    speeds = [event["tokens_per_second"] for event in read_metrics(result.folder) if event["event"] == "train"]
    # Two blocks of 3,072 operations in attention and 2,048 behind it, and the head; thrice, for the backward pass.
    assert shares[3] == pytest.approx(speeds[3] * 3 * (2 * (3072 + 2048) + 2 * 259 * 16) / 1e9, rel=0.05)  # type: ignore[operator]
    plain, _ = train(profile_file, tmp_path / "plain")
    assert "mfu" not in read_metrics(plain.folder)[0]


def test_known_gpus_have_a_peak_and_others_have_none() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert peak_of("NVIDIA L4", "bf16") == 121e12
    assert peak_of("NVIDIA L40S", "bf16") == 362e12
    assert peak_of("Tesla K80", "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", None) is None
    assert peak_flops(torch.device("cpu"), "fp32", 5e11) == 5e11


def test_the_time_that_is_left_is_told_however_slow_the_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now, output = [0.0], io.StringIO()
    monkeypatch.setattr("apt.training.progress.time.monotonic", lambda: now[0])
    with Report(Console(file=output, width=200, get_time=lambda: now[0]), "slow", 0, 40) as report:
        for step in (10, 20, 30):
            now[0] += 60.0
            report.step(RunState(step, 0, 40, 1), 2.0, 9.0, None, 1e-3)
    assert output.getvalue().splitlines()[-1].endswith("60 s left")


def test_a_run_outlives_who_reads_what_it_prints(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    loaded = load_profile(profile_file)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert Trainer(loaded.config, tmp_path / "run", resolved=loaded.resolved).fit().state.step == 8
        print("and what is printed after it goes nowhere", flush=True)


def test_a_terminal_shows_the_numbers_under_the_bar() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Report(console, "small [v2] (0.01 M)", 0, 10) as report:
        report.step(RunState(3, 0, 10, 1, ("moe", "align"), {"route_temp": 1.25}), 2.5, 1234.0, 0.414, 3e-3)
        report._bar.refresh()
    seen = output.getvalue()
    for words in (
        "small [v2] (0.01 M)",
        "loss 2.500",
        "1,234 tok/s",
        "MFU 41.4%",
        "lr 3.0e-03",
        "moe+align",
        "route_temp 1.25",
        "3/10",
        "eta",
    ):
        assert words in seen


def test_vectors_are_lists_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write("evaluation", step=1, load=torch.tensor([0.25, float("nan")]), loss=float("inf"), seen=np.float32(2))
    metrics.close()
    assert read_metrics(tmp_path) == [
        {"event": "evaluation", "step": 1, "load": [0.25, None], "loss": None, "seen": 2.0}
    ]
