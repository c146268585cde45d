import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_moe import dispatch


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Indices [tokens, k] of distinct experts, and the number of experts; often badly balanced."""
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 40))
    skew = draw(st.floats(0, 20))
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return (scores + skew * torch.arange(experts)).topk(top_k).indices, experts


limits = st.integers(1, 30).map(torch.tensor)


@given(routings())
def test_rows_stand_in_the_order_of_the_experts_and_every_assignment_has_one(routing: tuple[Tensor, int]) -> None:
    indices, experts = routing
    plan = dispatch.plan(indices, experts)
    assert plan.order.sort().values.equal(torch.arange(indices.numel()))
    assert plan.order[plan.inverse].equal(torch.arange(indices.numel()))
    assert plan.experts.equal(indices.flatten()[plan.order])
    assert plan.experts.equal(plan.experts.sort().values)
    assert plan.offsets.equal(torch.bincount(indices.flatten(), minlength=experts).cumsum(0).int())
    assert plan.kept is None


@given(routings(), limits)
def test_what_is_sent_and_what_is_dropped_is_all_there_was(routing: tuple[Tensor, int], limit: Tensor) -> None:
    indices, experts = routing
    plan = dispatch.plan(indices, experts, limit=limit)
    assert plan.kept is not None
    sent = plan.offsets.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert sent.max() <= limit
    assert sent.sum() == plan.offsets[-1] == plan.kept.sum()
    assert plan.kept.sum() + (~plan.kept).sum() == indices.numel()
    assert sent.equal(torch.bincount(indices.flatten(), minlength=experts).clamp(max=limit.item()).int())
    assert plan.kept[plan.order].equal(torch.arange(indices.numel()) < plan.offsets[-1])


@given(routings(), limits)
def test_an_expert_serves_tokens_in_the_order_of_their_positions(routing: tuple[Tensor, int], limit: Tensor) -> None:
    indices, experts = routing
    kept = dispatch.plan(indices, experts, limit=limit).kept
    assert kept is not None
    served = [0] * experts
    for assignment, expert in enumerate(indices.flatten().tolist()):
        assert kept[assignment].item() == (served[expert] < limit.item())
        served[expert] += 1


@given(routings(), limits, st.integers(0, 999))
def test_padding_takes_only_the_room_that_is_left(routing: tuple[Tensor, int], limit: Tensor, seed: int) -> None:
    indices, experts = routing
    counted = torch.rand(len(indices), generator=torch.Generator().manual_seed(seed)) < 0.6
    kept = dispatch.plan(indices, experts, limit=limit, counted=counted).kept
    alone = dispatch.plan(indices[counted], experts, limit=limit).kept
    assert kept is not None
    assert alone is not None
    assert kept.view_as(indices)[counted].flatten().equal(alone)


@given(routings())
def test_dispatch_and_combine_with_weights_that_sum_to_1_change_nothing(routing: tuple[Tensor, int]) -> None:
    indices, experts = routing
    plan = dispatch.plan(indices, experts)
    tokens = torch.randn(len(indices), 3)
    weights = torch.rand(indices.shape).softmax(-1)
    torch.testing.assert_close(dispatch.combine(dispatch.dispatch(tokens, plan), weights, plan), tokens)


@given(routings(), limits)
def test_a_dropped_assignment_adds_nothing_even_where_its_row_is_large(
    routing: tuple[Tensor, int], limit: Tensor
) -> None:
    indices, experts = routing
    plan = dispatch.plan(indices, experts, limit=limit)
    assert plan.kept is not None
    rows = torch.ones(indices.numel(), 2)
    rows[plan.offsets[-1] :] = 1e30
    combined = dispatch.combine(rows, torch.ones(indices.shape), plan)
    assert combined[:, 0].equal(plan.kept.view_as(indices).sum(1).float())


@given(routings(), limits)
def test_gradients_are_those_of_plain_indexing(routing: tuple[Tensor, int], limit: Tensor) -> None:
    indices, experts = routing
    plan = dispatch.plan(indices, experts, limit=limit)
    assert plan.kept is not None
    tokens = torch.randn(len(indices), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(indices.shape, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1, experts + 1, dtype=torch.float64)[plan.experts].unsqueeze(1)
    probe = torch.randn(len(indices), 3, dtype=torch.float64)
    ours = dispatch.combine(dispatch.dispatch(tokens, plan) * scale, weights, plan)
    plain = torch.stack(
        [
            sum((w * k * (e + 1) * token for w, k, e in zip(ws, ks, es, strict=True)), torch.zeros(3))
            for token, ws, ks, es in zip(tokens, weights, plan.kept.view_as(indices), indices, strict=True)
        ]
    )
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad((ours * probe).sum(), (tokens, weights)),
        torch.autograd.grad((plain * probe).sum(), (tokens, weights)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
