"""What converting a trained model to Tri-Vein Attention costs, at several ranks: the table of docs/attention.md.

    python benchmarks/convert_tva.py RUN --ranks 32 24 16 8

RUN is a run with apt-core's attention, trained or imported. Its components are taken once; each rank is scored on the same
held-out batches. As a control each rank is also given random orthonormal projectors, with the same maps for the values.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from apt.core.resolve import resolve_config
from apt.runs import load_run, open_text, score_run
from apt_attention_tva.converting import attention_layers, convert_model, converted_config, read_moments
from apt_attention_tva.functional import orthonormal
from apt_attention_tva.provider import TVA
from apt_attention_tva.tva import TriVeinAttention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--batches", type=int, default=16, help="of training text")
    parser.add_argument("--eval-batches", type=int, default=16, help="of held-out text")
    parser.add_argument("--random", action="store_true", help="the control too")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    run = load_run(arguments.run)
    text = open_text(run, console)
    before = score_run(run, text, console, max_batches=arguments.eval_batches)
    print(f"{before.num_tokens:,} held-out tokens, {before.loss:.4f} nats a token as it is\n", flush=True)
    print("| rank | cache | energy kept, queries and keys | of outputs | loss | change | random projectors |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    moments = read_moments(run, text, console, arguments.batches)
    originals, width = attention_layers(run), attention_layers(run)[0].shape.width
    for rank in arguments.ranks:
        provider = resolve_config(converted_config(run, rank)).providers["attention"]
        assert isinstance(provider, TVA)
        scores, outputs = convert_model(run, provider, moments)
        after = score_run(run, text, console, max_batches=arguments.eval_batches)
        control = ""
        if arguments.random:
            torch.manual_seed(0)
            for block in run.model.blocks:
                draw(block.get_submodule("attention"))
            control = f"{score_run(run, text, console, max_batches=arguments.eval_batches).loss - before.loss:+.4f}"
        change = f"{after.loss:.4f} | {after.loss - before.loss:+.4f}"
        print(f"| {rank} | {rank / width:.0%} | {scores:.1%} | {outputs:.1%} | {change} | {control} |", flush=True)
        for block, layer in zip(run.model.blocks, originals, strict=True):
            block.attention = layer


@torch.no_grad()
def draw(layer: torch.nn.Module) -> None:
    """Random projectors; what they read of the values, and write, stays the same."""
    assert isinstance(layer, TriVeinAttention)
    new = orthonormal(*layer.down.shape)
    heads, kv_heads, d = layer.shape.num_heads, layer.shape.num_kv_heads, layer.d_head
    values = layer.qkv.weight[(heads + kv_heads) * d :]
    values.copy_((new.mT @ layer.down @ values.view(kv_heads, d, -1)).flatten(0, 1))
    layer.down.copy_(new)
    outward = layer.out.weight.view(-1, kv_heads, heads // kv_heads, d) @ layer.up @ new
    layer.out.weight.copy_(outward.flatten(1))
    layer.up.copy_(new.mT)


if __name__ == "__main__":
    main()
