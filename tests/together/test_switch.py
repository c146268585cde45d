"""Every switch in mid-run has a certificate, and what a provider declares arrives or stops the run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from apt.cli import main
from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.errors import ProofOfUseError, SwitchError
from apt.hookspecs import Batch, RunState
from apt.modeling.compose import ModelBuilder
from apt.training.checkpoint import list_checkpoints
from apt.training.journal import Journal
from apt.training.loss import LossStep
from apt.training.phases import Certificate
from apt.training.record import read_metrics
from apt.training.trainer import Trainer
from apt_align.plugin import AlignPlugin
from apt_moe.routers import TopK

TRUNK = """\
name: trunk
model:
  {{d_model: 16, num_heads: 2, num_layers: 1, d_ff: 24, max_seq_len: 16, dropout: 0.0, attention_dropout: 0.0, norm: rmsnorm,
   attention: sdpa, ffn: swiglu}}
training: {{max_steps: 5, steps_per_epoch: 5, batch_size: 2, warmup_steps: 0, learning_rate: 1e-2}}
data: {{source: files, path: "{text}"}}
evaluation: {{max_batches: 1, sample_tokens: 0}}
monitoring: {{plot: false}}
"""
STATE = RunState(3, 1, 9, 9, ("align",))


def changed(config: APTConfig, section: str, **values: object) -> APTConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def with_ffn(config: APTConfig, **options: object) -> APTConfig:
    return config.model_copy(update={"options": {**config.options, "ffn": {**config.options["ffn"], **options}}})


def train(config: APTConfig, out: Path) -> str:
    output = io.StringIO()
    Trainer(config, out, console=Console(file=output, width=300)).fit()
    return output.getvalue()


def switches(out: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(out) if event["event"] == "switch"]


def test_each_switch_is_measured_shown_and_recorded(tiny: APTConfig, tmp_path: Path) -> None:
    said = train(with_ffn(tiny, capacity=1.0), tmp_path / "run")
    moe, align = switches(tmp_path / "run")
    assert (moe["plugin"], moe["step"], align["plugin"], align["step"]) == ("moe", 5, "align", 10)
    for event in (moe, align):
        assert event["change"] == event["loss_after"] - event["loss_before"]
        assert abs(event["change"]) < 1e-5
        assert event["holds"]
        assert event["tolerance"] == 1e-4
    # In training some tokens are dropped, and that costs something; alignment drops nothing new.
    assert 0 < moe["moe_dropped"] < 0.5
    assert moe["change_in_training"] != 0
    assert "moe_dropped" not in align
    assert "moe on; loss of a fixed held-out batch" in said
    assert f"moe_dropped {moe['moe_dropped']:.4f}" in said


def test_experts_that_are_on_from_the_first_step_of_an_imported_model_grow_out_of_its_dense_layers(
    tiny: APTConfig, text: Path, tmp_path: Path
) -> None:
    trunk, run = tmp_path / "trunk", tmp_path / "run"
    profile = tmp_path / "trunk.yaml"
    profile.write_text(TRUNK.format(text=text))
    assert main(["train", "-p", str(profile), "--out", str(trunk)]) == 0
    assert main(["export", "hf", str(trunk), str(tmp_path / "hf")]) == 0
    data = f"data={{source: files, path: '{text}'}}"
    assert main(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "imported"), "--set", data]) == 0
    sets = ["model.ffn={provider: moe, experts: 2, expert: swiglu}", "training={max_steps: 1, steps_per_epoch: 1}"]
    words = [word for each in (*sets, "evaluation={max_batches: 1, sample_tokens: 0}") for word in ("--set", each)]
    assert main(["branch", str(tmp_path / "imported"), "--plugins", "moe", *words, "--out", str(run)]) == 0
    (switch,) = switches(run)
    assert (switch["plugin"], switch["step"]) == ("moe", 0)
    assert abs(switch["change"]) < 1e-5


def test_micro_batches_are_one_large_batch_with_experts_that_drop_nothing(tiny: APTConfig, tmp_path: Path) -> None:
    # What is of the micro-batch by its nature is off: a capacity, and the load in the load-balance loss.
    config = with_ffn(tiny, capacity=None, router={"provider": "topk_default", "top_k": 2, "balance_loss": 0.0})
    train(config, tmp_path / "large")
    train(changed(config, "training", batch_size=2, accumulate=2), tmp_path / "small")
    one, other = (
        [(each["loss"], each["gradient_norm"]) for each in read_metrics(tmp_path / name) if each["event"] == "train"]
        for name in ("large", "small")
    )
    assert len(one) == 20
    assert other == [pytest.approx(each, rel=1e-5, abs=1e-6) for each in one]


@pytest.mark.parametrize(
    "align",
    [{"provider": "rdrop"}, {"provider": "mean_teacher"}, *({"state": state} for state in ("dropout", "ema", "layer"))],
    ids=str,
)
def test_micro_batches_of_unequally_many_targets_are_one_large_batch_with_alignment(
    tiny: APTConfig, align: dict[str, object]
) -> None:
    tokens = torch.randint(3, 256, (8, 17), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([16, 1, 12, 3, 8, 8, 0, 0]).unsqueeze(1)  # the last micro-batch has none
    large = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(16) < counts)
    config = tiny.model_copy(
        update={
            "align_name": str(align.get("provider", "bistate_default")),
            "ffn_name": "swiglu",
            "dropout": 0.1,  # refused without, and out of force below
            "attention_dropout": 0.0,
            "plugins": ("align",),
            "schedules": {},
            "options": {**tiny.options, "ffn": {}, "align": {k: v for k, v in align.items() if k != "provider"}},
        }
    )

    def gradient(parts: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = ModelBuilder(config).build_model()
        plugin = AlignPlugin()
        plugin.apt_training_start(STATE, model, torch.optim.SGD(model.parameters()))
        passes: list[object] = []
        # In place of dropout, whose draws are others in smaller batches: the second pass differs.
        model.norm.register_forward_hook(lambda *given: given[-1] * (1 + 0.1 * len(passes)))
        model.register_forward_hook(lambda *_: passes.append(None))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        step = LossStep(model, HookRunner({"align": plugin}), "fp32")
        for piece in zip(*(each.chunk(parts) for each in (large.tokens, large.targets, large.mask)), strict=True):
            passes.clear()
            share = int(piece[2].sum()) / int(counts.sum())
            torch.autograd.backward(step(STATE, Batch(*piece), weight=share, extra_weight=1 / parts)[0])
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    one, many = gradient(1), gradient(4)
    assert one.keys() == many.keys()
    for name, grad in one.items():
        torch.testing.assert_close(many[name], grad, rtol=0, atol=1e-6)


def test_measuring_a_switch_changes_no_bit(tiny: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = {"provider": "sigmoid_bias", "top_k": 2}
    config = with_ffn(tiny, router=bias).model_copy(update={"dropout": 0.1, "schedules": {**tiny.schedules}})
    schedules = {key: value for key, value in config.schedules.items() if key != "route_temp"}
    config = config.model_copy(update={"schedules": schedules})
    weights = []
    for name in ("measured", "unmeasured"):
        if name == "unmeasured":
            monkeypatch.setattr(Trainer, "_measure", lambda self, training: (0.0, {}))
        result = Trainer(config, tmp_path / name, console=Console(file=io.StringIO())).fit()
        weights.append(result.model.state_dict())
    assert not [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]


def test_a_switch_is_not_blamed_for_weights_that_were_broken_before(tiny: APTConfig, tmp_path: Path) -> None:
    # The step before the switch moves the weights out of all numbers, which no loss of training has seen yet.
    broken = tiny.model_copy(update={"base_lr": 1e30, "warmup_steps": 5, "schedules": {"enable_moe_at_step": 1}})
    with pytest.raises(
        SwitchError, match=r"step 1: the loss .* was (nan|inf) before 'moe' was switched on.*learning_rate"
    ):
        train(broken, tmp_path / "run")


def test_a_switch_that_changes_too_much_stops_the_run_and_is_recorded(tiny: APTConfig, tmp_path: Path) -> None:
    redrawn = changed(with_ffn(tiny, redraw=0.5), "training", switch_tolerance=2e-4)
    with pytest.raises(
        SwitchError, match=r"step 5: switching 'moe' on changed the loss .* by [+-].*switch_tolerance allows 2e-04"
    ):
        train(redrawn, tmp_path / "run")
    (moe,) = switches(tmp_path / "run")
    assert not moe["holds"]
    assert abs(moe["change"]) > 2e-4
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-000005"]
    train(changed(redrawn, "training", switch_tolerance=None), tmp_path / "meant")
    assert switches(tmp_path / "meant")[0]["holds"]
    with pytest.raises(SwitchError, match="'moe'"):
        train(changed(redrawn, "training", switch_tolerance=1e-3 * abs(moe["change"])), tmp_path / "tight")


def test_a_declared_loss_that_never_arrives_stops_the_run(
    tiny: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(AlignPlugin, "losses", {**AlignPlugin.losses, "promise": ""})
        with pytest.raises(ProofOfUseError, match=r"step 10: .*\n.*plugins.align: declares the loss 'promise', which"):
            train(tiny, tmp_path / "plugin")
    monkeypatch.setattr(TopK, "losses", {**TopK.losses, "promise": "balance_loss"})
    with pytest.raises(
        ProofOfUseError, match=r"step 5: .*\n.*router.topk_default .*blocks.0.ffn.router: declares the loss 'promise'"
    ):
        train(tiny, tmp_path / "part")


def test_a_loss_that_weighs_nothing_is_not_waited_for(
    tiny: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopK, "losses", {"promise": "balance_loss"})
    router = {"provider": "topk_default", "top_k": 2, "balance_loss": 0.0, "z_loss": 0.0}
    train(with_ffn(tiny, router=router), tmp_path / "run")
    # Alignment is on from step 10, and its weight is 0 until a schedule lifts it.
    late = {**tiny.schedules, "align_weight": {"start": 0.0, "end": 0.1, "by": "step", "warmup": 18}}
    train(with_ffn(tiny, router=router).model_copy(update={"schedules": late}), tmp_path / "late")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_experts_inherit_what_the_optimizer_remembers(
    tiny: APTConfig, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    switched = Journal.switched

    def look(journal: Journal, certificate: Certificate, state: RunState) -> None:
        switched(journal, certificate, state)
        if certificate.plugin == "moe":
            ffn = trainer.model.blocks[0].ffn
            for name, dense in ffn.dense.named_parameters():
                stack = ffn.experts.layer.get_parameter(name)
                memory = [
                    {key: value.clone() for key, value in trainer.parts.optimizer.state[each].items()}
                    for each in (dense, stack)
                ]
                seen[name] = (dense.detach().clone(), stack.detach().clone(), *memory)

    monkeypatch.setattr(Journal, "switched", look)
    output = io.StringIO()
    config = changed(tiny, "training", optimizer=optimizer)
    trainer: Any = Trainer(config, tmp_path / "run", console=Console(file=output, width=300))
    trainer.fit()
    assert seen
    for dense, stack, before, after in seen.values():
        assert all(torch.equal(expert, dense) for expert in stack)
        assert after.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert after["step"] == 5
        momentum = before.get("exp_avg", before.get("momentum_buffer"))
        assert momentum.abs().sum() > 0
        assert all(torch.equal(expert, momentum) for expert in after["exp_avg"])
        assert bool((after["exp_avg_sq"] > 0).any())
    said = "muon trains" in output.getvalue()
    assert said is (optimizer == "muon")
    if said:
        assert "stacks of matrices, such as experts, which muon cannot take" in output.getvalue()
