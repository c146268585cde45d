from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apt.core import registry
from apt.core.providers import FFNProvider, RouterProvider
from apt.errors import OptionsError
from apt_moe.expert_choice import ExpertChoice
from apt_moe.provider import MoE, TopK
from apt_moe.router import LinearRouter
from apt_moe.routers import Switch


def routed(provider: TopK, experts: int = 5, seed: int = 0, train: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    indices, weights, _ = provider.route(provider.create_router(8, experts), 10 * torch.randn(2, 7, 8), train)
    return indices, weights


@given(st.integers(1, 5), st.booleans(), st.floats(0.1, 10), st.integers(0, 99))
def test_a_token_goes_to_k_different_experts_with_weights_that_sum_to_1(
    top_k: int, train: bool, temperature: float, seed: int
) -> None:
    provider = TopK(top_k=top_k, renormalise=top_k > 1, temperature=temperature)
    indices, weights = routed(provider, seed=seed, train=train)
    assert indices.shape == weights.shape == (2, 7, top_k)
    assert ((indices >= 0) & (indices < 5)).all()
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert (weights >= 0).all()
    assert weights.dtype == torch.float32
    if provider.renormalise:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))


def test_renormalised_weights_are_the_softmax_of_the_chosen_scores() -> None:
    provider = TopK(top_k=3)
    router = provider.create_router(8, 6)
    x = torch.randn(1, 4, 8)
    indices, weights, _ = provider.route(router, x, False)
    torch.testing.assert_close(weights, router(x).gather(-1, indices).softmax(-1))


def test_raw_weights_are_the_probabilities() -> None:
    provider = TopK(top_k=1, renormalise=False)
    router = provider.create_router(8, 6)
    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(provider.route(router, x, False)[1], router(x).softmax(-1).max(-1, keepdim=True).values)


@pytest.mark.parametrize(("temperature", "highest"), [(1e-4, 1.0), (1e6, 0.5)])
def test_a_cold_router_takes_the_best_alone_and_a_hot_one_does_not_prefer(temperature: float, highest: float) -> None:
    _, weights = routed(TopK(temperature=temperature, init_std=1.0))
    torch.testing.assert_close(weights.max(-1).values, torch.full((2, 7), highest), rtol=0, atol=1e-3)


def test_routing_is_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    provider = TopK()
    router = provider.create_router(8, 4)
    x = torch.randn(1, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x).equal(router(x))
        assert router(x).dtype == torch.float32
        inside = router(x)
    assert inside.equal(router(x))
    assert router.bfloat16()(x.bfloat16()).dtype == torch.float32


def test_jitter_acts_in_training_only() -> None:
    provider = TopK(jitter=0.5)
    router = provider.create_router(8, 4)
    x = torch.randn(1, 5, 8)
    assert not provider.route(router, x, True)[1].equal(provider.route(router, x, True)[1])
    assert provider.route(router, x, False)[1].equal(provider.route(router, x, False)[1])


def test_losses_are_multiplied_by_their_weights_and_reach_the_router() -> None:
    x = torch.randn(3, 9, 8)
    provider = TopK(balance_loss=0.5, z_loss=0.25)
    router = provider.create_router(8, 4)
    losses = provider.route(router, x)[2]
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, router.weight, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    scores = router(x).flatten(0, 1)
    torch.testing.assert_close(losses["z_loss"], 0.25 * scores.logsumexp(-1).square().mean())
    sent = torch.zeros_like(scores).scatter_(1, scores.topk(2).indices, 1.0)
    torch.testing.assert_close(losses["balance_loss"], 0.5 * provider.compute_load_balance_loss(scores, sent))
    assert "z_loss" not in TopK(z_loss=0.0).route(router, x)[2]


@pytest.mark.parametrize("provider", [TopK(), MoE()])
def test_scheduled_values_are_zero_dimensional_float32_buffers_that_are_saved(provider: TopK | MoE) -> None:
    part: nn.Module = provider.create_router(8, 4) if isinstance(provider, TopK) else provider.create_layer(8, 16)
    assert part.apt_provider is provider
    for buffer in provider.scheduled.values():
        value = part.get_buffer(buffer)
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert buffer in part.state_dict()


def test_the_scheduled_weight_of_the_balance_loss_is_the_one_in_use() -> None:
    provider = TopK(balance_loss=0.01)
    router = provider.create_router(8, 4)
    x = torch.randn(1, 5, 8)
    before = provider.route(router, x)[2]["balance_loss"]
    router.balance_weight.fill_(0.02)
    torch.testing.assert_close(provider.route(router, x)[2]["balance_loss"], 2 * before)


def test_a_top_1_router_without_gradient_is_refused() -> None:
    with pytest.raises(ValidationError, match="gets no gradient; set renormalise: false"):
        TopK(top_k=1)
    with pytest.raises(OptionsError, match="gets no gradient"):
        TopK().create_router(8, 4, top_k=1)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k: int) -> None:
    with pytest.raises(OptionsError, match=f"{top_k} of 4 experts"):
        TopK().create_router(8, 4, top_k)


def test_a_mixture_refuses_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="top_k is 3, but there are only 2 experts"):
        MoE(experts=2, router=TopK(top_k=3))
    with pytest.raises(ValidationError, match="an expert is always on"):
        MoE(expert=MoE())
    for wrong in ({"experts": 1}, {"capacity": 0}, {"capacity": float("inf")}, {"expertz": 4}):
        assert not MoE.validate_config(wrong)


def test_nested_options_are_the_nested_providers_own() -> None:
    provider = MoE.model_validate({"router": {"provider": "topk_default", "top_k": 3}, "expert": "swiglu"})
    assert provider.router.top_k == 3
    assert provider.supports_gating()
    assert not MoE().supports_gating()


def test_both_come_through_the_entry_points() -> None:
    assert type(registry.get("ffn", "moe", fallback=False)) is MoE
    assert type(registry.get("router", "topk_default", {"top_k": 4}, fallback=False)) is TopK


SIZES = [(16, 24), (32, 128), (64, 48)]


@pytest.mark.parametrize("expert", ["default", "swiglu"])
@pytest.mark.parametrize("upcycle", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_parameter_count_is_exact(expert: str, upcycle: bool, sizes: tuple[int, int]) -> None:
    provider = MoE(experts=5, expert=expert, upcycle=upcycle)
    layer = provider.create_layer(*sizes)
    assert sum(p.numel() for p in layer.parameters()) == provider.get_parameter_count(*sizes)
    assert sum(p.numel() for p in layer.parameters() if p.dim() > 2) == provider.get_stacked_parameter_count(*sizes)
    router = provider.router.create_router(sizes[0], 5)
    assert sum(p.numel() for p in router.parameters()) == provider.router.get_parameter_count(sizes[0], 5)


@pytest.mark.parametrize("expert", ["default", "swiglu"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (16, 3)])
def test_the_estimates_are_within_a_tenth_of_what_is_measured(
    expert: str, sizes: tuple[int, int], experts: int, top_k: int
) -> None:
    provider = MoE(experts=experts, expert=expert, router=TopK(top_k=top_k))
    layer = provider.create_layer(*sizes)
    x = torch.randn(2, 64, sizes[0])
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == pytest.approx(2 * provider.get_flops_estimate(64, *sizes), rel=0.1)
    with saved(layer) as memory:
        layer(x)
    assert sum(memory.values()) == pytest.approx(provider.get_memory_estimate(64, *sizes, batch_size=2), rel=0.1)


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(4, 2, 1), (16, 3, 1), (8, 2, 2)])
def test_what_experts_that_choose_their_tokens_keep_is_estimated(
    backend: Literal["loop", "bmm", "grouped_mm"], experts: int, top_k: int, granularity: int
) -> None:
    router = ExpertChoice(top_k=top_k, allow_noncausal=True)
    provider = MoE(experts=experts, expert="swiglu", router=router, granularity=granularity, backend=backend)
    layer = provider.create_layer(32, 64)
    with saved(layer) as memory:
        layer(torch.randn(2, 64, 32, requires_grad=True))
    assert sum(memory.values()) == pytest.approx(provider.get_memory_estimate(64, 32, 64, batch_size=2), rel=0.15)


@pytest.mark.parametrize("experts", [2, 4])
def test_what_padding_to_the_busiest_expert_keeps_is_estimated_where_all_are_as_busy(experts: int) -> None:
    provider = MoE(experts=experts, router=TopK(top_k=experts), backend="bmm")
    layer = provider.create_layer(32, 64)
    with saved(layer) as memory, FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 64, 32, requires_grad=True))
    assert counter.get_total_flops() == pytest.approx(2 * provider.get_flops_estimate(64, 32, 64), rel=0.1)
    assert sum(memory.values()) == pytest.approx(provider.get_memory_estimate(64, 32, 64, batch_size=2), rel=0.1)


@contextmanager
def saved(layer: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, those of the layer's own parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    memory: dict[int, int] = defaultdict(int)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            memory[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield memory


def test_the_interfaces_are_complete() -> None:
    assert isinstance(MoE(), FFNProvider)
    assert isinstance(TopK(), RouterProvider)
    assert TopK().get_capacity(2, 8, 4, 2) == max(2, int(2 * 8 * 2 / 4 * 1.25))
    assert TopK().supports_dynamic_capacity()
    assert not TopK().supports_expert_choice()


def test_fine_grained_experts_are_refused_with_a_router_to_one_before_anything_is_built() -> None:
    with pytest.raises(ValidationError, match="switch sends each token to one expert, and granularity: 2"):
        MoE(granularity=2, router=Switch())


@pytest.mark.parametrize("router", ["hash", "random", "noisy_topk"])
def test_slices_of_a_dense_layer_are_refused_with_a_router_that_parts_them(router: str) -> None:
    with pytest.raises(
        ValidationError, match=f"{router} sends a token to some slices .* granularity: 1, or upcycle: false"
    ):
        MoE.model_validate({"granularity": 2, "router": router})
    assert MoE.model_validate({"granularity": 2, "router": router, "upcycle": False}).create_layer(8, 16).dense is None
    assert MoE.model_validate({"router": router}).create_layer(8, 16).dense is not None


class Turned(TopK):
    """Its matrix has a column for each expert."""

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> LinearRouter:
        router = super().create_router(d_model, num_experts, top_k)
        router.weight = nn.Parameter(router.weight.detach().T.contiguous())
        return router


def test_slices_of_a_dense_layer_are_refused_with_a_router_that_has_no_rows_to_share() -> None:
    with pytest.raises(OptionsError, match="has no parameter with a row for each expert"):
        MoE(granularity=2, router=Turned()).create_layer(8, 16)
    assert MoE(granularity=2, router=Turned(), upcycle=False).create_layer(8, 16).dense is None
