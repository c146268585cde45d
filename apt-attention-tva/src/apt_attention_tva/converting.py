"""A trained model's attention becomes Tri-Vein Attention of a smaller rank, and the model a run of its own.

Queries and keys get one projector P for each key-value head, and meet behind it as they did before: normed and turned first,
scores over sqrt(d). Values and outputs have no use for P of their own: whatever map A of rank r is best for them, W_v
becomes P^T A W_v, so that P reads A v from it, and W_o likewise. At rank d nothing changes but by rounding.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from apt.core.config import APTConfig
from apt.core.providers import HeadsProvider
from apt.core.resolve import resolve_config
from apt.errors import UserError
from apt.layers.heads import Heads
from apt.runs import LoadedRun, Prepared, derive_run, load_run, open_text, score_run, to_new_folder
from apt_attention_tva.components import Moments, score_projector, value_maps, watch
from apt_attention_tva.provider import TVA
from apt_attention_tva.tva import TriVeinAttention

CONVERTIBLE = ("sdpa", "flex", "flash_v2")
"""The attentions whose weights are understood: apt-core's own, which have the same under the same names."""
KEPT = ("num_kv_heads", "positions", "rope_theta", "rope_scaling", "window", "head_width", "qk_norm", "bias")
"""Their options that mean the same here."""


def convert_run(
    folder: Path,
    rank: int,
    out: Path | None,
    *,
    batches: int = 16,
    eval_batches: int | None = None,
    allow_local_code: bool = False,
    console: Console | None = None,
) -> Path:
    """Convert a run to Tri-Vein Attention of this rank, and print its loss before and after; returns the new checkpoint.

    Raises `UserError` and its kin where the run's attention cannot be converted, or `out` is not empty.
    """
    console = Console(highlight=False) if console is None else console
    run = load_run(folder, allow_local_code=allow_local_code)
    place = run.folder.parent
    out = to_new_folder(place.with_name(f"{place.name}-tva-{rank}") if out is None else out)
    if batches < 1:
        raise UserError(f"--batches {batches}: principal components are of at least one batch")
    config = converted_config(run, rank)
    resolved = resolve_config(config)
    provider = resolved.providers["attention"]
    assert isinstance(provider, TVA)
    text = open_text(run, console)
    limit = config.evaluation.max_batches if eval_batches is None else eval_batches
    before = score_run(run, text, console, max_batches=limit, what="scoring it as it is")
    moments = read_moments(run, text, console, batches)
    scores_kept, outputs_kept = convert_model(run, provider, moments)
    after = score_run(run, text, console, max_batches=limit, what="scoring the converted model")
    old = run.resolved.providers["attention"]
    assert isinstance(old, HeadsProvider)
    cache = [each.get_cache_size(config.d_model, config.num_heads) * config.num_blocks for each in (old, provider)]
    change = f"model.attention: {old.get_name()} -> tva_default, rank {rank} by principal components"
    results = {
        "held-out loss (nats a token)": f"{after.loss:.4f}",
        "held-out bits a byte": f"{after.bits_per_byte:.4f}",
        "held-out loss before conversion": f"{before.loss:.4f}",
    }
    checkpoint = derive_run(
        run, out, config=config, resolved=resolved, text=text, scored=after, changes=[change], results=results
    )
    console.print(f"held-out loss, {before.num_tokens:,} tokens:")
    console.print(f"  before  {before.loss:.4f} nats a token, {before.bits_per_byte:.4f} bits per byte")
    console.print(f"  after   {after.loss:.4f} nats a token, {after.bits_per_byte:.4f} bits per byte")
    console.print(f"  change  {after.loss - before.loss:+.4f} nats a token")
    console.print(f"cache:    {cache[0]:,} numbers a token before, {cache[1]:,} after ({cache[1] / cache[0]:.0%})")
    console.print(f"energy kept: {scores_kept:.1%} of queries and keys, {outputs_kept:.1%} of outputs")
    console.print(f"run:  {out}", soft_wrap=True)
    words = ["branch", str(out), *(["--allow-local-code"] if allow_local_code else [])]
    console.print(
        f"next: apt-core {shlex.join(words)} --set training.max_steps=... to win part of it back",
        soft_wrap=True,
        markup=False,
    )
    return checkpoint


def converted_config(run: LoadedRun, rank: int) -> APTConfig:
    """The run's configuration with Tri-Vein Attention in place of its own. Raises `UserError` where that cannot be."""
    provider, config = run.resolved.providers["attention"], run.config
    if config.architecture != "decoder":
        raise UserError(f"{run.folder}: is an {config.architecture}; a decoder can be converted")
    if provider.get_name() not in CONVERTIBLE or not isinstance(provider, HeadsProvider):
        raise UserError(
            f"{run.folder}: its attention is {provider.get_name()}; those that can be converted: {', '.join(CONVERTIBLE)}"
        )
    options = provider.model_dump(mode="json", exclude_defaults=True)
    lost = sorted(set(options) - set(KEPT) - {"compiled"})
    if lost:
        raise UserError(f"{run.folder}: tva_default has no {', '.join(lost)}, which the model's attention has")
    options = {name: options[name] for name in KEPT if name in options}
    # Without turns and norms P meets W_q and W_k directly, and folds into them.
    late = provider.positions == "rope" or bool(options.get("qk_norm"))
    options |= {"rank": rank, "per_head": True, "scale": "head", "project": "last" if late else "first"}
    values = config.to_dict()
    values["attention_name"] = "tva_default"
    values["options"] = {**config.options, "attention": options}
    values["fallback"] = {kind: list(names) for kind, names in config.fallback.items() if kind != "attention"}
    return APTConfig.from_dict(values, str(run.folder))


def attention_layers(run: LoadedRun) -> list[Heads]:
    """The attention of each block."""
    layers = [block.get_submodule("attention") for block in run.model.blocks]
    return [layer for layer in layers if isinstance(layer, Heads)]


def read_moments(run: LoadedRun, text: Prepared, console: Console, batches: int) -> list[Moments]:
    """What each layer's components are taken of, from so many batches spread over the training text."""
    with ExitStack() as stack:
        moments = [stack.enter_context(watch(layer)) for layer in attention_layers(run)]
        score_run(run, text, console, split="train", max_batches=batches, what="reading the training text")
    return moments


def convert_model(run: LoadedRun, provider: TVA, moments: Sequence[Moments]) -> tuple[float, float]:
    """Put converted attention in place of the model's; returns the shares of energy kept, averaged over the layers."""
    config, kept = run.config, []
    for block, layer, seen in zip(run.model.blocks, attention_layers(run), moments, strict=True):
        made = provider.create_layer(config.d_model, config.num_heads, config.attention_dropout)
        kept.append(convert_layer(layer, made, seen))
        block.attention = made.to(next(layer.parameters()).device).eval()
    scores, outputs = (sum(each) / len(kept) for each in zip(*kept, strict=True))
    return scores, outputs


@torch.no_grad()
def convert_layer(layer: Heads, made: nn.Module, moments: Moments) -> tuple[float, float]:
    """Fill the layer `made` so that it does what `layer` does, as nearly as its rank allows.

    Returns the shares of energy that are kept, of queries and keys and of outputs.
    """
    assert isinstance(made, TriVeinAttention)
    shape, rank = layer.shape, made.rank
    heads, kv_heads, d = shape.num_heads, shape.num_kv_heads, shape.width
    down, scores_kept = score_projector(moments.q, moments.k, rank)
    qkv, out = layer.get_submodule("qkv"), layer.get_submodule("out")
    assert isinstance(qkv, nn.Linear)
    assert isinstance(out, nn.Linear)
    outward = out.weight.cpu().view(-1, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3)  # [kv_heads, group, D, d]
    inner, outer, outputs_kept = value_maps(moments.v, outward, rank)
    made.down.copy_(down)
    made.up.copy_(down.mT)
    turned = (heads + kv_heads) * d

    def map_values(weight: Tensor) -> Tensor:
        """P^T A W_v for the rows of the values; those of queries and keys stay."""
        weight = weight.cpu()  # where the moments are
        values = weight[turned:].double().view(kv_heads, d, -1)
        return torch.cat((weight[:turned], (down.mT @ inner @ values).flatten(0, 1).to(weight.dtype)))

    made.qkv.weight.copy_(map_values(qkv.weight))
    mapped = outward.double() @ (outer @ down).unsqueeze(1)  # W_o B P
    made.out.weight.copy_(mapped.permute(2, 0, 1, 3).flatten(1))
    if qkv.bias is not None:
        made.qkv.bias.copy_(map_values(qkv.bias.unsqueeze(1)).squeeze(1))
    if out.bias is not None:
        made.out.bias.copy_(out.bias)
    for name in ("q_norm", "k_norm"):
        norm, own = getattr(layer, name, None), getattr(made, name)
        if isinstance(norm, nn.Module) and isinstance(own, nn.Module):
            own.load_state_dict(norm.state_dict())
    return scores_kept, outputs_kept
