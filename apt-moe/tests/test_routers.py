import pytest
import torch
from pydantic import ValidationError
from torch import nn

from apt.core import registry
from apt.core.providers import RouterProvider
from apt.errors import OptionsError
from apt.hookspecs import RunState
from apt_moe.plugin import MoEPlugin
from apt_moe.provider import MoE
from apt_moe.routers import NoisyTopK, SigmoidBias, Switch, TopK

STATE = RunState(step=1, epoch=0, max_steps=9, max_epochs=1)
PROVIDERS: list[RouterProvider] = [TopK(top_k=3), Switch(), NoisyTopK(), SigmoidBias()]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: type(provider).__name__)
def test_every_router_chooses_different_experts_counts_its_parameters_and_learns(provider: RouterProvider) -> None:
    torch.manual_seed(0)
    router = provider.create_router(8, 6, provider.top_k)
    indices, weights, _ = provider.route(router, 5 * torch.randn(2, 7, 8), True)
    assert indices.shape == weights.shape == (2, 7, provider.top_k)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert sum(p.numel() for p in router.parameters()) == provider.get_parameter_count(8, 6)
    weights.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: type(provider).__name__)
def test_every_router_is_deterministic_in_evaluation_and_has_no_losses_there(provider: RouterProvider) -> None:
    router = provider.create_router(8, 6, provider.top_k)
    x = torch.randn(2, 7, 8)
    one, two = provider.route(router, x, False), provider.route(router, x, False)
    assert one[0].equal(two[0])
    assert one[1].equal(two[1])
    assert not one[2]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: type(provider).__name__)
def test_every_router_works_in_a_mixture_and_ignores_padding_in_its_losses(provider: RouterProvider) -> None:
    torch.manual_seed(0)
    layer = MoE(experts=6, router=provider).create_layer(8, 16)
    x = torch.randn(2, 6, 8)
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [3]])
    torch.manual_seed(1)
    one = layer(x, mask=mask)
    torch.manual_seed(1)
    two = layer(torch.where(mask.unsqueeze(-1), x, 50.0), mask=mask)
    assert one.losses.keys() == two.losses.keys()
    for name, loss in one.losses.items():
        torch.testing.assert_close(two.losses[name], loss)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: type(provider).__name__)
def test_every_router_refuses_the_module_of_another(provider: RouterProvider) -> None:
    with pytest.raises(TypeError, match="routes with its own routers, not with Identity"):
        provider.route(nn.Identity(), torch.randn(1, 2, 8))


def test_switch_takes_one_expert_by_its_raw_probability_and_nothing_else() -> None:
    provider = Switch(jitter=0.0)
    router = provider.create_router(8, 4)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(provider.route(router, x)[1], router(x).softmax(-1).max(-1, keepdim=True).values)
    with pytest.raises(ValidationError):
        Switch.model_validate({"top_k": 2})
    with pytest.raises(OptionsError, match="2, but switch sends each token to one expert"):
        provider.create_router(8, 4, 2)


def test_the_noise_is_as_large_as_its_matrix_says_and_acts_in_training_only() -> None:
    provider = NoisyTopK(top_k=2)
    router = provider.create_router(8, 6)
    x = torch.ones(1, 400, 8)
    assert len(provider.route(router, x)[0].unique(dim=1).flatten()) > 2, "equal tokens part ways"
    with torch.no_grad():
        router.noise_weight.fill_(-100.0)
    assert provider.route(router, x)[1].equal(provider.route(router, x, False)[1])


def test_the_bias_chooses_but_does_not_weigh_and_has_no_gradient() -> None:
    provider = SigmoidBias(route_scale=2.5)
    router = provider.create_router(8, 6)
    x = torch.randn(1, 4, 8)
    router.bias[3] = 10.0
    router.bias[5] = 9.0
    indices, weights, losses = provider.route(router, x)
    assert indices.equal(torch.tensor([3, 5]).expand(1, 4, 2))
    gates = router(x).sigmoid()[..., [3, 5]]
    torch.testing.assert_close(weights, 2.5 * gates / gates.sum(-1, keepdim=True))
    assert not router.bias.requires_grad
    assert not losses


def test_the_bias_moves_once_a_step_by_the_load_of_all_micro_batches() -> None:
    provider = SigmoidBias(bias_rate=0.5)
    layer = MoE(experts=4, router=provider).create_layer(8, 16)
    router = layer.router
    router.count(torch.tensor([[[0, 1], [0, 2]]]), None)
    router.count(torch.tensor([[[0, 1], [3, 1]]]), torch.tensor([[True, False]]))
    assert router.load.tolist() == [3, 2, 1, 0]
    MoEPlugin().apt_step_end(STATE, layer, {})
    torch.testing.assert_close(router.bias, 0.5 * torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    assert router.load.tolist() == [0, 0, 0, 0]
    router.count(torch.tensor([[[0, 0, 0], [1, 2, 3]]]), None)
    MoEPlugin().apt_step_end(STATE, layer, {})
    assert router.bias.mean().abs() < 1e-6, "the bias stays centred"
    MoEPlugin().apt_step_end(STATE, layer, {})
    assert "bias" in router.state_dict()
    assert "load" not in router.state_dict()


def test_without_a_loss_a_skewed_stream_becomes_balanced() -> None:
    torch.manual_seed(0)
    provider = SigmoidBias(bias_rate=0.01, init_std=0.5)
    layer = MoE(experts=8, router=provider).create_layer(8, 16)
    skew = 2 * torch.randn(8)
    loads = []
    for _ in range(300):
        loads.append(layer(torch.randn(1, 256, 8) + skew).metrics["moe_load"])
        MoEPlugin().apt_step_end(STATE, layer, {})
    assert loads[0].max() / loads[0].mean() - 1 > 1
    load = torch.stack(loads[-50:]).mean(0)
    assert load.max() / load.mean() - 1 < 0.3


def test_evaluation_does_not_count() -> None:
    provider = SigmoidBias()
    router = provider.create_router(8, 4)
    provider.route(router, torch.randn(1, 3, 8), False)
    assert router.load.sum() == 0


def test_one_sigmoid_choice_is_refused() -> None:
    with pytest.raises(ValidationError, match="the router gets no gradient; use top_k: 2"):
        SigmoidBias(top_k=1)


@pytest.mark.parametrize(
    ("name", "provider"), [("switch", Switch), ("noisy_topk", NoisyTopK), ("sigmoid_bias", SigmoidBias)]
)
def test_each_comes_through_its_entry_point(name: str, provider: type[RouterProvider]) -> None:
    assert type(registry.get("router", name, fallback=False)) is provider
