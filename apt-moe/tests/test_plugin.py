"""The switch in mid-run, on a real model with a real optimizer."""

import json
import re

import pytest
import torch
from torch import nn

from apt.core.config import APTConfig
from apt.core.resolve import resolve_config
from apt.errors import ProfileError
from apt.hookspecs import Batch, RunState
from apt.layers import Output
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt_moe.layer import MixtureOfExperts
from apt_moe.plugin import MoEPlugin

CONFIG = APTConfig(
    vocab_size=300,
    d_model=32,
    d_ff=24,
    num_heads=2,
    num_layers=2,
    dropout=0.0,
    attention_dropout=0.0,
    max_seq_len=32,
    attention_name="sdpa",
    ffn_name="moe",
    align_name="none",
    options={"ffn": {"experts": 4, "capacity": 1.25}},
    plugins=("moe",),
)
STATE = RunState(step=10, epoch=1, max_steps=20, max_epochs=2, plugins_on=("moe",))


def step(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    tokens = torch.randint(300, (16, 33))
    output = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (loss + sum(output.losses.values())).backward()
    optimizer.step()


@torch.no_grad()
def evaluation_loss(model: Decoder) -> float:
    model.eval()
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(1))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    model.train()
    return loss.item()


@pytest.fixture
def run() -> tuple[Decoder, torch.optim.AdamW]:
    """A model whose experts are off, after five steps."""
    torch.manual_seed(0)
    model = ModelBuilder(CONFIG).build_model()
    set_active(model, "moe", False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        step(model, optimizer)
    return model, optimizer


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def test_before_the_switch_the_experts_are_left_alone(run: tuple[Decoder, torch.optim.AdamW]) -> None:
    model, optimizer = run
    for layer in mixtures(model):
        for parameter in (*layer.experts.parameters(), *layer.router.parameters()):
            assert parameter.grad is None
            assert parameter not in optimizer.state


def test_the_switch_keeps_the_evaluation_loss_and_copies_the_moments(run: tuple[Decoder, torch.optim.AdamW]) -> None:
    model, optimizer = run
    before = evaluation_loss(model)
    set_active(model, "moe", True)
    MoEPlugin().apt_phase_changed(STATE, "moe", model, optimizer)
    assert len(mixtures(model)) == 2
    assert evaluation_loss(model) == pytest.approx(before, abs=1e-5)
    for layer in mixtures(model):
        assert layer.dense is not None
        for name, dense in layer.dense.named_parameters():
            stack = layer.experts.layer.get_parameter(name)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[dense][moment].abs().sum() > 0
                for expert in optimizer.state[stack][moment]:
                    assert expert.equal(optimizer.state[dense][moment])
            assert optimizer.state[stack]["step"] == optimizer.state[dense]["step"] == 5


def test_after_the_switch_every_expert_gets_tokens_and_gradient_and_they_part_ways(
    run: tuple[Decoder, torch.optim.AdamW],
) -> None:
    model, optimizer = run
    set_active(model, "moe", True)
    MoEPlugin().apt_phase_changed(STATE, "moe", model, optimizer)
    loads = model(torch.randint(300, (16, 32))).metrics["moe_load"]
    assert (loads > 0).all()
    step(model, optimizer)
    for layer in mixtures(model):
        assert (layer.router.weight.grad.abs().sum(1) > 0).all()
        for stack in layer.experts.parameters():
            assert all(gradient.abs().sum() > 0 for gradient in stack.grad)
            assert not stack[0].equal(stack[1])


def test_the_same_names_and_shapes_are_saved_in_every_phase(run: tuple[Decoder, torch.optim.AdamW]) -> None:
    model, optimizer = run
    before = {name: value.shape for name, value in model.state_dict().items()}
    set_active(model, "moe", True)
    MoEPlugin().apt_phase_changed(STATE, "moe", model, optimizer)
    step(model, optimizer)
    assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_a_late_switch_without_a_dense_layer_is_refused() -> None:
    options = {"ffn": {"upcycle": False}}
    early = CONFIG.model_copy(update={"options": options, "schedules": {"enable_moe_at_epoch": 0}})
    MoEPlugin().apt_config_resolved(early)
    late = early.model_copy(update={"schedules": {"enable_moe_at_step": 5}})
    with pytest.raises(ProfileError, match=r"model\.ffn\.upcycle: false, but schedules\.enable_moe_at_step needs"):
        MoEPlugin().apt_config_resolved(late)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"redraw": 0.5}, "model.ffn.redraw: 0.5 draws hidden units anew"),
        ({"router": {"provider": "switch"}}, "model.ffn.router: switch weighs a token's experts by numbers"),
        (
            {"router": {"provider": "sigmoid_bias", "route_scale": 2.5}},
            "model.ffn.router: sigmoid_bias weighs a token's experts by numbers",
        ),
        (
            {"router": {"provider": "topk_default", "renormalise": False}},
            "model.ffn.router: topk_default weighs a token's experts by numbers",
        ),
        (
            {"router": {"provider": "expert_choice", "renormalise": True, "allow_noncausal": True}},
            "model.ffn.router: expert_choice weighs a token's experts by numbers",
        ),
    ],
)
def test_what_changes_the_function_at_a_late_switch_is_refused_unless_the_profile_says_that_it_may(
    options: dict[str, object], why: str
) -> None:
    config = CONFIG.model_copy(update={"options": {"ffn": options}})
    MoEPlugin().apt_config_resolved(config)
    late = config.model_copy(update={"schedules": {"enable_moe_at_step": 5}})
    with pytest.raises(ProfileError, match=rf"training\.switch_tolerance: 0\.0001, but {re.escape(why)}"):
        MoEPlugin().apt_config_resolved(late)
    for tolerance in (None, 0.5):
        training = late.training.model_copy(update={"switch_tolerance": tolerance})
        MoEPlugin().apt_config_resolved(late.model_copy(update={"training": training}))


def test_the_plugin_without_a_mixture_is_refused() -> None:
    dense = CONFIG.model_copy(update={"ffn_name": "default", "options": {}})
    with pytest.raises(ProfileError, match="plugins: 'moe' has nothing to switch: the ffn is 'default'"):
        MoEPlugin().apt_config_resolved(dense)


def test_a_router_that_the_plugin_balances_is_refused_without_it() -> None:
    options = {"upcycle": False, "router": "sigmoid_bias"}
    alone = CONFIG.model_copy(update={"plugins": (), "options": {"ffn": options}, "schedules": {}})
    with pytest.raises(ProfileError, match=r"model.ffn.router: router.sigmoid_bias works through the plugin 'moe'"):
        resolve_config(alone)
    resolve_config(alone.model_copy(update={"plugins": ("moe",)}))


def drop(share: float, *plugins: MoEPlugin, tokens: int = 1) -> None:
    batch = Batch(*torch.zeros(2, 1, tokens + 3, dtype=torch.long), torch.arange(tokens + 3)[None] < tokens)
    for plugin in plugins:
        output = Output(torch.zeros(1), torch.zeros(1), {}, {"moe_dropped": torch.tensor(share)})
        plugin.apt_loss_extra(batch, output)


def test_what_training_dropped_is_told_at_the_next_evaluation_and_then_forgotten() -> None:
    plugin = MoEPlugin()
    drop(0.5, plugin, tokens=10)
    drop(0.1, plugin, tokens=30)
    metrics: dict[str, float] = {}
    plugin.apt_evaluation_end(metrics)
    assert metrics == {"moe_dropped_in_training": pytest.approx(0.2)}
    again: dict[str, float] = {}
    plugin.apt_evaluation_end(again)
    assert not again
    drop(0.5, plugin)
    plugin.apt_model_built()  # of another run, with the same plugin
    plugin.apt_evaluation_end(again)
    assert not again


def test_what_training_dropped_before_a_resume_is_told_too() -> None:
    whole, first, rest = MoEPlugin(), MoEPlugin(), MoEPlugin()
    for share in (0.1, 0.3):
        drop(share, whole, first)
    rest.apt_checkpoint_load(json.loads(json.dumps(first.apt_checkpoint_save())))
    drop(0.35, whole, rest)
    drop(0.9, first)  # of a course that is left
    first.apt_checkpoint_load(MoEPlugin().apt_checkpoint_save())
    drop(0.5, first)
    told: list[dict[str, float]] = [{}, {}, {}]
    for plugin, metrics in zip((whole, rest, first), told, strict=True):
        plugin.apt_evaluation_end(metrics)
    assert told[0] == told[1] == {"moe_dropped_in_training": pytest.approx(0.25)}
    assert told[2] == {"moe_dropped_in_training": 0.5}
