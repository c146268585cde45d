"""Checks of feed-forward networks, mixtures of experts among them: each token by itself, padding without a trace."""

from __future__ import annotations

import torch

import apt.testing.modules  # noqa: F401  its checks are the feed-forward networks' too
from apt.core.providers import FFNProvider
from apt.layers import as_part
from apt.testing.kit import NotApplicable, Subject, check, demand
from apt.testing.measure import demand_close
from apt.testing.modules import D_FF, D_MODEL, ENOUGH, SEQ, Bench, output, states


@check("ffn")
def tokens_are_independent(subject: Subject) -> None:
    """What a token becomes depends on no other token."""
    layer, x = Bench(subject).layer(), states(1, SEQ)
    right = output(layer(x))
    for t in (0, 5, SEQ - 1):
        changed = x.clone()
        changed[:, t] = 1e3 * states(1, 1, seed=9)[:, 0]
        others = [s for s in range(SEQ) if s != t]
        demand_close(output(layer(changed))[:, others], right[:, others], f"token {t} was changed, and others moved")


@check("ffn")
def causal_in_training(subject: Subject) -> None:
    """In training too, later tokens leave the outputs of earlier ones as they were."""
    layer = Bench(subject).layer().train()
    x = states(1, ENOUGH)
    torch.manual_seed(0)  # whatever noise it draws, it is the same
    right = output(layer(x))
    for t in (1, ENOUGH // 2, ENOUGH - 1):
        # All later tokens alike: where room is short, they would push earlier ones out.
        changed = torch.cat((x[:, :t], x[:, :1].expand(-1, ENOUGH - t, -1)), 1)
        torch.manual_seed(0)
        demand_close(output(layer(changed))[:, :t], right[:, :t], f"tokens from {t} on were changed", 1e-5)


@check("ffn")
def padding_leaves_no_trace(subject: Subject) -> None:
    """Tokens that the mask leaves out change neither the other outputs nor losses nor metrics."""
    layer, x = Bench(subject).layer(), states(2, SEQ)
    mask = torch.ones(2, SEQ, dtype=torch.bool)
    mask[:, -4:] = False
    padded, alone = as_part(layer(x, mask=mask)), as_part(layer(x[:, :-4]))
    demand_close(padded.output[:, :-4], alone.output, "tokens beside padding")
    for name, right in alone.metrics.items():
        demand_close(padded.metrics[name].float(), right.float(), f"the metric {name} counts padding")
    layer.train()
    padded, alone, again = as_part(layer(x, mask=mask)), as_part(layer(x[:, :-4])), as_part(layer(x[:, :-4]))
    for name, right in alone.losses.items():
        if torch.equal(right, again.losses[name]):  # else it draws noise, another for every shape
            demand_close(padded.losses[name], right, f"the loss {name} counts padding")


@check("ffn")
def losses_are_scalars(subject: Subject) -> None:
    """Losses are finite scalars with a gradient; metrics have none."""
    part = as_part(Bench(subject).layer().train()(states(2, ENOUGH)))
    if not part.losses and not part.metrics:
        raise NotApplicable("it returns no losses and no metrics")
    for name, loss in part.losses.items():
        demand(loss.dim() == 0 and loss.isfinite(), f"the loss {name} is not a finite scalar")
        demand(loss.requires_grad, f"the loss {name} is detached: it can teach nothing")
    for name, metric in part.metrics.items():
        demand(not metric.requires_grad, f"the metric {name} holds on to the graph; detach it")


@check("ffn")
def active_parameters(subject: Subject) -> None:
    """A token meets no more parameters than there are."""
    assert isinstance(subject.provider, FFNProvider)
    active = subject.provider.get_active_parameter_count(D_MODEL, D_FF)
    total = subject.provider.get_parameter_count(D_MODEL, D_FF)
    demand(0 < active <= total, f"{active} active of {total} parameters")
