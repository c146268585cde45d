"""Checks of attention: what may be seen, where the tokens stand, and that decoding is the same computation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import apt.testing.modules  # noqa: F401  its checks are attention's too
from apt.core.providers import AttentionProvider
from apt.layers import LayerCache, as_part
from apt.testing.kit import NotApplicable, Subject, check, demand
from apt.testing.measure import demand_close, scalar
from apt.testing.modules import D_MODEL, HEADS, SEQ, Bench, output, states

CPU = torch.device("cpu")


@check("attention")
def causality(subject: Subject) -> None:
    """Noise from token t on leaves the outputs before t as they were, for every t, in training and evaluation."""
    layer = Bench(subject).layer()
    for training in (False, True):
        layer.train(training)
        x = states(2, SEQ)
        _demand_blind(layer, x, output(layer(x)), 1e3, "changed")


def _demand_blind(layer: nn.Module, x: Tensor, right: Tensor, size: float, what: str) -> None:
    """Whether other tokens of this size, from any t on, leave the outputs before t as they were: `right`."""
    for t in range(1, SEQ):
        changed = torch.cat((x[:, :t], size * states(2, SEQ - t, seed=t)), 1)
        seen = output(layer(changed))[:, :t]
        demand_close(seen, right[:, :t], f"tokens from {t} on were {what}, and earlier outputs moved", 1e-5)


@check("attention")
def poisoned_future(subject: Subject) -> None:
    """Tokens of size 1e15 from token t on leave the outputs before t as they were, so no trace of them is mixed in.

    NaN would say more, but a kernel may multiply what is hidden by a weight of 0, as PyTorch's own do, and 0 times NaN is NaN.
    """
    layer = Bench(subject).layer()
    x = states(2, SEQ)
    _demand_blind(layer, x, output(layer(x)), 1e15, "made huge")


@check("attention", gradient=True)
def no_gradient_from_the_future(subject: Subject) -> None:
    """The Jacobian is causal: d output[t] / d token[s] is exactly 0 for every s > t."""
    x = states(1, SEQ).requires_grad_()
    mixed = output(Bench(subject).layer()(x))
    weights = states(1, SEQ, seed=3)
    for t in range(SEQ):
        (gradient,) = torch.autograd.grad((mixed[0, t] * weights[0, t]).sum(), x, retain_graph=True)
        later = [s for s in range(t + 1, SEQ) if gradient[0, s].any()]
        demand(not later, f"output {t} has a gradient from tokens {later}, which come after it")


@check("attention")
def distances_alone(subject: Subject) -> None:
    """Where the layer has positions of its own, moving all of them changes nothing: scores depend on distances."""
    provider = subject.provider
    assert isinstance(provider, AttentionProvider)
    if provider.needs_position_table():
        raise NotApplicable("positions are added to the embeddings, before the layer")
    if not provider.depends_on_distances_alone():
        raise NotApplicable("the provider says that more than distances counts")
    layer, x = Bench(subject).layer(), states(2, SEQ)
    positions = torch.arange(SEQ).unsqueeze(0)
    right = output(layer(x, positions=positions))
    demand_close(output(layer(x)), right, "positions that are not given count from 0")
    demand_close(output(layer(x, positions=positions + 100)), right, "positions moved by 100", 1e-3)
    if getattr(provider, "positions", None) == "rope":
        stretched = output(layer(x, positions=3 * positions))
        demand(
            not torch.equal(stretched, right), "distances three times as long change nothing: positions are not read"
        )


@check("attention", gradient=True)
def compiled(subject: Subject) -> None:
    """Captured by torch.compile without a graph break it gives the same outputs and gradients."""
    # PyTorch counts compilations by the code that is compiled, which other layers in this process share.
    torch.compiler.reset()
    layer, x = Bench(subject).layer().train(), states(2, SEQ)
    seen = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        part = as_part(run(x))
        torch.autograd.backward(scalar(part))
        gradients = {name: each.grad.clone() for name, each in layer.named_parameters() if each.grad is not None}
        seen.append({"the output": part.output.detach(), **gradients})
    for name, right in seen[0].items():
        what = name if name == "the output" else f"the gradient of {name}"
        demand(name in seen[1], f"{what} is missing when compiled")
        demand_close(seen[1][name], right, f"{what} when compiled")


@check("attention", gradient=True)
def sees_itself_and_the_past(subject: Subject) -> None:
    """Each output depends on its own token and on each earlier one, within the window, and on none beyond it."""
    provider = subject.provider
    assert isinstance(provider, AttentionProvider)
    window = provider.get_window()
    seq = 6 if window is None else min(window + 4, 64)
    x = states(1, seq).requires_grad_()
    mixed = output(Bench(subject).layer()(x))
    for t in range(seq):
        (gradient,) = torch.autograd.grad(mixed[0, t].sum(), x, retain_graph=True)
        first = 0 if window is None else max(0, t - window + 1)
        unseen = [s for s in range(first, t + 1) if not gradient[0, s].any()]
        demand(not unseen, f"output {t} does not depend on tokens {unseen}")
        seen = [s for s in range(first) if gradient[0, s].any()]
        demand(not seen, f"output {t} depends on tokens {seen}, and the window is {window} tokens")


@check("attention")
def mask_polarity(subject: Subject) -> None:
    """True in the mask means keep: a token that is masked out changes nothing, a kept one does."""
    _needs_masks(subject)
    layer, x = Bench(subject).layer(), states(1, SEQ)
    mask = torch.ones(1, SEQ, dtype=torch.bool)
    demand_close(output(layer(x, mask=mask)), output(layer(x)), "a mask that keeps everything")
    mask[:, 3] = False
    changed = x.clone()
    changed[:, 3] = 1e3
    kept = [t for t in range(SEQ) if t != 3]
    demand_close(
        output(layer(changed, mask=mask))[:, kept],
        output(layer(x, mask=mask))[:, kept],
        "token 3 is False in the mask, and its content still matters; True is keep",
    )
    provider = subject.provider
    assert isinstance(provider, AttentionProvider)
    mask = torch.zeros(1, SEQ, dtype=torch.bool)
    first = max(0, SEQ - (provider.get_window() or SEQ))
    mask[:, [first, SEQ - 1]] = True
    changed = x.clone()
    changed[:, first] = -x[:, first]
    moved = output(layer(changed, mask=mask))[0, -1] - output(layer(x, mask=mask))[0, -1]
    demand(moved.any(), f"token {first} is True in the mask, and does not matter; True is keep")


@check("attention")
def padding(subject: Subject) -> None:
    """Padding on either side, with the positions given, changes nothing."""
    _needs_masks(subject)
    layer, x, pad = Bench(subject).layer(), states(2, SEQ), 4
    for real in (slice(pad, None), slice(None, -pad)):
        mask = torch.zeros(2, SEQ, dtype=torch.bool)
        mask[0] = True
        mask[1, real] = True
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = x.clone()
        padded[1, ~mask[1]] = 1e3
        seen = output(layer(padded, mask=mask, positions=positions))
        side = "left" if real.start else "right"
        demand_close(seen[1:, real], output(layer(x[1:, real])), f"a sequence padded on the {side} and alone")
        demand_close(seen[:1], output(layer(x[:1])), f"its unpadded neighbour, padding on the {side}")


@check("attention")
def decoding(subject: Subject) -> None:
    """Read in portions with a cache, a sequence gives what one pass gives."""
    provider = _decoder(subject)
    layer, x = Bench(subject).layer(), states(2, SEQ)
    whole = output(layer(x))
    for portions in ([1] * SEQ, [3] * 4 + [1], [7, 6], [5, 1, 3, 1, 1, 2], [SEQ - 1, 1]):
        cache = _poisoned_cache(layer, SEQ)
        parts: list[Tensor] = []
        done = 0
        for portion in torch.split(x, portions, 1):
            demand(cache.length == done, f"the cache has read {done} tokens and says {cache.length}")
            parts.append(output(layer(portion, cache=cache)))
            done += portion.shape[1]
        demand_close(torch.cat(parts, 1), whole, f"{provider.get_name()} read in portions of {portions}")


@check("attention")
def decoding_with_padding(subject: Subject) -> None:
    """With left padding too, decoding from a cache gives what one pass gives."""
    _decoder(subject)
    _needs_masks(subject)
    layer, x = Bench(subject).layer(), states(2, SEQ)
    mask = torch.ones(2, SEQ, dtype=torch.bool)
    mask[1, :5] = False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = output(layer(x, mask=mask, positions=positions))
    cache = _poisoned_cache(layer, SEQ)
    parts = [
        output(layer(x[:, a:b], mask=mask[:, :b], positions=positions[:, a:b], cache=cache))
        for a, b in ((0, 8), (8, 9), (9, 12), (12, SEQ))
    ]
    demand_close(torch.cat(parts, 1)[mask], whole[mask], "decoding of a padded batch")


@check("attention")
def rewinding(subject: Subject) -> None:
    """A cache that forgot its last token, or changed the order of its samples, goes on as if it had always been so."""
    _decoder(subject)
    layer, x = Bench(subject).layer(), states(2, SEQ)
    whole = output(layer(x))
    cache = _poisoned_cache(layer, SEQ)
    layer(x[:, :4], cache=cache)
    layer(1e3 * x[:, 4:5], cache=cache)
    cache.crop(4)
    demand(cache.length == 4, f"the cache was cropped to 4 tokens and says {cache.length}")
    demand_close(output(layer(x[:, 4:9], cache=cache)), whole[:, 4:9], "what follows a token that was taken back")
    cache.reorder(torch.tensor([1, 0, 1]))
    seen = output(layer(x[[1, 0, 1], 9:], cache=cache))
    demand_close(seen, whole[[1, 0, 1], 9:], "decoding after the samples were put in another order")


@check("attention")
def cache_size(subject: Subject) -> None:
    """get_cache_size is the number of numbers that the cache keeps for a token."""
    provider = _decoder(subject)
    cache = Bench(subject).layer().create_cache(2, 10, torch.float32, CPU)  # type: ignore[operator]
    tensors = [each for each in vars(cache).values() if isinstance(each, Tensor) and each.is_floating_point()]
    if not any(each.numel() for each in tensors):
        raise NotApplicable("the cache allocates as it goes, or keeps its tensors elsewhere")
    tokens = min(10, provider.get_window() or 10)
    said, kept = provider.get_cache_size(D_MODEL, HEADS), sum(each.numel() for each in tensors) / (2 * tokens)
    demand(said == kept, f"the provider says {said} numbers a token, the cache has {kept:g} for each of {tokens}")


@check("attention")
def output_width(subject: Subject) -> None:
    """get_output_dim is the width of the output."""
    provider = subject.provider
    assert isinstance(provider, AttentionProvider)
    said, seen = provider.get_output_dim(D_MODEL), output(Bench(subject).layer()(states(1, 2))).shape[-1]
    demand(said == seen, f"the provider says {said}, the layer gives {seen}")


def _poisoned_cache(layer: nn.Module, tokens: int) -> LayerCache:
    """An empty cache for two samples whose room is filled with NaN: what reads an unused slot shows."""
    cache: LayerCache = layer.create_cache(2, tokens, torch.float32, CPU)  # type: ignore[operator]
    for each in vars(cache).values():
        if isinstance(each, Tensor) and each.is_floating_point():
            each.fill_(torch.nan)
    return cache


def _needs_masks(subject: Subject) -> None:
    assert isinstance(subject.provider, AttentionProvider)
    if not subject.provider.supports_masking():
        raise NotApplicable("supports_masking() is False")


def _decoder(subject: Subject) -> AttentionProvider:
    assert isinstance(subject.provider, AttentionProvider)
    if not subject.provider.supports_kv_cache():
        raise NotApplicable("supports_kv_cache() is False")
    return subject.provider
