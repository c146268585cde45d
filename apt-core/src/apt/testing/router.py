"""Checks of routers: every token is accounted for, weights are weights, and the router learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt.core.providers import RouterProvider
from apt.modeling.parts import find_parts
from apt.testing.kit import NotApplicable, Subject, check, demand
from apt.testing.measure import demand_close, demand_finite, demand_gradients

D_MODEL, EXPERTS = 16, 6


def _parts(subject: Subject) -> tuple[RouterProvider, nn.Module, Tensor]:
    provider = subject.provider
    assert isinstance(provider, RouterProvider)
    router = subject.build(D_MODEL, EXPERTS, min(provider.top_k, EXPERTS))
    return provider, router, torch.randn(3, 40, D_MODEL, generator=torch.Generator().manual_seed(1))


def _route(
    provider: RouterProvider, router: nn.Module, x: Tensor, train: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Route, with ids for a router that asks for them: the same for each token wherever it stands."""
    given: dict[str, Tensor] = {} if mask is None else {"mask": mask}
    if getattr(provider, "takes_tokens", False):
        given["tokens"] = (x.sum(-1) * 1e4).long()
    return provider.route(router, x, train, **given)


@check("router")
def choices(subject: Subject) -> None:
    """Each token goes to top_k different experts that exist."""
    provider, router, x = _parts(subject)
    for train in (True, False):
        indices, weights, _ = _route(provider, router, x, train)
        wanted = (3, 40, EXPERTS if provider.supports_expert_choice() else min(provider.top_k, EXPERTS))
        demand(indices.shape == wanted, f"indices are {tuple(indices.shape)}, not {wanted}")
        demand(weights.shape == wanted, f"weights are {tuple(weights.shape)}, not {wanted}")
        demand(not indices.is_floating_point(), f"indices are {indices.dtype}")
        demand(((indices >= 0) & (indices < EXPERTS)).all(), f"indices from {indices.min()} to {indices.max()}")
        distinct = (indices.sort(-1).values.diff(dim=-1) > 0).all()
        demand(distinct, "a token is sent twice to one expert")


@check("router")
def weights(subject: Subject) -> None:
    """Weights are not negative, and those of a token sum to 1 unless `keeps_scale` says no."""
    provider, router, x = _parts(subject)
    for train, when in ((True, "in training"), (False, "in evaluation")):
        _, weights, _ = _route(provider, router.train(train), x, train)
        demand((weights >= 0).all(), f"{when} a weight is negative")
        sums = weights.sum(-1)
        if provider.keeps_scale():
            what = f"{when} the weights of a token sum to {sums.min():.4f} to {sums.max():.4f}"
            demand((sums - 1).abs().max() <= 1e-4, f"{what}, not to 1: keeps_scale() is to be False")
        elif not provider.supports_expert_choice():
            demand((sums > 0).all(), f"{when} a token has no weight at all")


@check("router")
def tokens_are_independent(subject: Subject) -> None:
    """Each token is routed as if it were alone, which in writing it is, unless experts choose."""
    provider, router, x = _parts(subject)
    if provider.supports_expert_choice():
        raise NotApplicable("experts choose among all tokens of a sequence")
    router.eval()
    together = _route(provider, router, x, False)
    alone = _route(provider, router, x.flatten(0, 1).unsqueeze(1), False)
    demand(torch.equal(alone[0].view_as(together[0]), together[0]), "a token has other experts alone than in its text")
    demand_close(alone[1].view_as(together[1]), together[1], "the weights of a token alone and in its text")


@check("router")
def learns(subject: Subject) -> None:
    """The weights or a loss give every parameter of the router a gradient that is not zero."""
    provider, router, x = _parts(subject)
    if not list(router.parameters()):
        raise NotApplicable("the router has no parameters")
    router.train()
    torch.manual_seed(0)
    _, weights, losses = _route(provider, router, x, True)
    values = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    ((weights * values).sum() + sum(losses.values())).backward()  # type: ignore[no-untyped-call]
    demand_gradients(router)


@check("router")
def losses(subject: Subject) -> None:
    """Auxiliary losses are finite scalars that reach the router, and padding does not count in them, even alone."""
    provider, router, x = _parts(subject)
    _, _, right = _route(provider, router, x[:, :30], True)
    if not right:
        raise NotApplicable("the router has no auxiliary loss")
    for name, loss in right.items():
        demand(loss.dim() == 0 and loss.isfinite(), f"the loss {name} is not a finite scalar")
        demand(loss.requires_grad, f"the loss {name} is detached: it cannot balance anything")
    again = _route(provider, router, x[:, :30], True)[2]
    if any(not torch.equal(loss, again[name]) for name, loss in right.items()):
        return  # it draws noise, another for every shape
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 30:] = False
    padded = x.masked_fill(~mask.unsqueeze(-1), 30.0)
    for name, loss in _route(provider, router, padded, True, mask)[2].items():
        demand_close(loss, right[name], f"the loss {name} with padding and without")
    for name, loss in _route(provider, router, x, True, torch.zeros_like(mask))[2].items():
        demand(loss.isfinite(), f"the loss {name} of padding alone is {loss.item():.3g}")


@check("router")
def padding(subject: Subject) -> None:
    """It is told of padding, which changes no other token's experts and weights."""
    provider, router, x = _parts(subject)
    told = provider.takes_mask()
    if not told and not provider.supports_expert_choice() and not _route(provider, router, x, True)[2]:
        raise NotApplicable("it takes no mask, and has no losses in which padding would count")
    demand(told, "route takes no mask; its signature is route(router, inputs, train=True, mask=None)")
    router.eval()
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 30:] = False
    right = _route(provider, router, x[:, :30], False)
    padded = _route(provider, router, x.masked_fill(~mask.unsqueeze(-1), 30.0), False, mask)
    demand(torch.equal(padded[0][:, :30], right[0]), "padding behind a text changes its experts")
    demand_close(padded[1][:, :30], right[1], "the weights with padding and without")


@check("router")
def balance(subject: Subject) -> None:
    """compute_load_balance_loss is 1 for an even load with even probabilities, and more for a collapsed one."""
    provider, _, _ = _parts(subject)
    even = torch.eye(EXPERTS).repeat(4, 1)
    loss = provider.compute_load_balance_loss(torch.zeros(4 * EXPERTS, EXPERTS), even)
    demand_close(loss.detach(), torch.ones(()), "an even load gives E sum f P = 1", 1e-4)
    collapsed = torch.zeros(4 * EXPERTS, EXPERTS)
    collapsed[:, 0] = 1
    worse = provider.compute_load_balance_loss(10 * collapsed, collapsed)
    demand(
        worse.item() > 1.5,
        f"a load on one expert of {EXPERTS} gives {worse.item():.3f}, about {EXPERTS} would be right",
    )


@check("router")
def calm_in_evaluation(subject: Subject) -> None:
    """In evaluation routing follows the input alone, draws nothing, and takes each sample by itself."""
    provider, router, x = _parts(subject)
    router.eval()
    state = torch.get_rng_state()
    one, two = (_route(provider, router, x, False) for _ in range(2))
    demand(torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]), "two calls in evaluation differ")
    demand(torch.equal(state, torch.get_rng_state()), "evaluation draws from the global random state")
    alone = _route(provider, router, x[:1], False)
    demand(torch.equal(alone[0], one[0][:1]), "a sample is routed otherwise in a batch than alone")


@check("router")
def finite(subject: Subject) -> None:
    """Zero inputs and large ones give finite weights, losses and gradients."""
    provider, router, x = _parts(subject)
    for scale in (0.0, 1e4):
        for train in (False, True):
            torch.manual_seed(0)
            inputs = (scale * x).requires_grad_()
            _, weights, losses = _route(provider, router.train(train), inputs, train)
            demand(weights.isfinite().all(), f"weights of inputs times {scale:g} are not finite")
            for name, loss in losses.items():
                demand(loss.isfinite(), f"the loss {name} of inputs times {scale:g} is {loss.item()}")
            total = weights.sum() + sum(losses.values())
            if total.requires_grad:
                demand_finite(total, (inputs, *router.parameters()), f"a gradient of inputs times {scale:g}")


@check("router")
def state_dict(subject: Subject) -> None:
    """A state dict carries everything from one router to another."""
    provider, _, x = _parts(subject)
    one, other = (subject.build(D_MODEL, EXPERTS, min(provider.top_k, EXPERTS), seed=seed).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict(), strict=True)
    seen, again = (_route(provider, each, x, False) for each in (one, other))
    same = torch.equal(seen[0], again[0]) and torch.equal(seen[1], again[1])
    demand(same, "a loaded router chooses otherwise: some state is no parameter and no buffer")


@check("router")
def float32(subject: Subject) -> None:
    """Weights are float32, under autocast too: in bfloat16 near ties go astray."""
    provider, router, x = _parts(subject)
    for train in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            weights = _route(provider, router.train(train), x, train)[1]
        demand(weights.dtype == torch.float32, f"weights are {weights.dtype} under autocast")


@check("router")
def parameters(subject: Subject) -> None:
    """get_parameter_count is exact."""
    provider, router, _ = _parts(subject)
    said, counted = provider.get_parameter_count(D_MODEL, EXPERTS), sum(each.numel() for each in router.parameters())
    demand(said == counted, f"the provider says {said}, the router has {counted}")


@check("router")
def capacity(subject: Subject) -> None:
    """get_capacity is max(top_k, int(batch seq top_k / experts capacity_factor))."""
    provider, _, _ = _parts(subject)
    for batch, seq, experts, k, factor in ((2, 16, 4, 2, 1.25), (1, 1, 64, 2, 1.0), (3, 7, 5, 1, 1.1)):
        right = max(k, int(batch * seq * k / experts * factor))
        seen = provider.get_capacity(batch, seq, experts, k, factor)
        demand(
            seen == right, f"for {batch} x {seq} tokens, {experts} experts, k {k}, factor {factor}: {seen}, not {right}"
        )


@check("router")
def scheduled_buffers(subject: Subject) -> None:
    """Each scheduled value has its zero-dimensional float32 buffer, and routing follows it."""
    provider, router, x = _parts(subject)

    def route() -> list[Tensor]:
        seen: list[Tensor] = []
        for train in (True, False):
            torch.manual_seed(0)
            indices, weights, losses = _route(provider, router.train(train), x, train)
            seen += (indices, weights, *losses.values())
        return seen

    for part in find_parts(router):
        for value, buffer in part.provider.scheduled.items():
            found = dict(part.module.named_buffers(recurse=False)).get(buffer)
            right = found is not None and found.dim() == 0 and found.dtype == torch.float32
            demand(right, f"scheduled value {value}: the module has no zero-dimensional float32 buffer {buffer!r}")
            assert found is not None
            before = route()
            was = found.clone()
            found.copy_(3 * was + 1)
            after = route()
            found.copy_(was)
            read = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
            demand(read, f"scheduled value {value}: changing the buffer {buffer!r} changes no choice, weight or loss")
