"""How fast Tri-Vein Attention is beside full heads: the layer, the step inside it, and decoding. On a quiet machine.

    python benchmarks/attention_speed.py layer [--seq 2048]
    python benchmarks/attention_speed.py decode [--context 2048] [--batch 1]

``layer``: forward and backward, float32, width 512 in heads of 64, causal. The attention step is softmax(q k^T) v alone, on
tensors that are ready; the layer has the products in and out, composing P and U, and the turning too. ``decode``: one token at a
time through a model of GPT-2's shape (12 layers, width 768, 12 heads) with random weights whose cache holds `context`
tokens, as `generate` does it, attention folded. All in turn, medians of rounds; ratios are to multi-head attention. With one
thread it is CPU time that is measured, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from common import by_turns
from torch import Tensor

from apt.core.config import APTConfig
from apt.core.registry import get_provider
from apt.inference.prepare import prepare
from apt.layers.heads import Heads, Shape
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

D_MODEL, HEADS, WIDTH = 512, 8, 64
LAYERS: dict[str, tuple[str, dict[str, object]]] = {
    "multi-head": ("sdpa", {}),
    "grouped, 2 of 8": ("sdpa", {"num_kv_heads": 2}),
    "narrow d/4": ("sdpa", {"head_width": 16}),
    "tva d/2": ("tva_default", {"r": 2}),
    "tva d/4": ("tva_default", {"r": 4}),
    "tva d/8": ("tva_default", {"r": 8}),
    "autopoietic": ("autopoietic", {}),
}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "multi-head": ("sdpa", {}),
    "grouped, 3 of 12": ("sdpa", {"num_kv_heads": 3}),
    "narrow d/4": ("sdpa", {"head_width": 16}),
    "tva d/2": ("tva_default", {"r": 2}),
    "tva d/4": ("tva_default", {"r": 4}),
    "tva d/4, projected last": ("tva_default", {"r": 4, "project": "last", "per_head": True}),
}


def compare(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, all in turn."""
    return {name: statistics.median(times) for name, times in by_turns(runs, rounds).items()}


def show(title: str, times: Mapping[str, float], unit: str = "ms") -> None:
    """A table of times, and how many times as fast as the first each is."""
    first = next(iter(times.values()))
    print(f"{title}\n")
    for name, each in times.items():
        print(f"  {name:26} {1000 * each:9.2f} {unit}   {first / each:5.2f} times as fast")
    print(flush=True)


def both_ways(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""

    def step() -> object:
        y = run()
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return step


def layer(seq: int, rounds: int, only: list[str]) -> None:
    """The whole layer, and the attention step inside it."""
    x = torch.randn(1, seq, D_MODEL, requires_grad=True)
    whole: dict[str, Callable[[], object]] = {}
    inside: dict[str, Callable[[], object]] = {}
    for name, (provider, options) in LAYERS.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        made = get_provider("attention", provider, options).create_layer(D_MODEL, HEADS)
        assert isinstance(made, Heads)
        whole[name] = both_ways(lambda made=made: made(x), [x, *made.parameters()])  # type: ignore[misc]
        shape: Shape = made.shape
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        qkv = [torch.randn(1, each, seq, shape.width, requires_grad=True) for each in heads]
        inside[name] = both_ways(lambda made=made, qkv=qkv: step(made, *qkv), qkv)  # type: ignore[misc]
    show(f"the whole layer, {seq} tokens", compare(whole, rounds))
    show(f"the attention step, {seq} tokens", compare(inside, rounds))


def step(made: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What every query and key take part in."""
    return made.attend(q, k, v, causal=True, mask=None, window=None)


@torch.inference_mode()
def decode(context: int, batch: int, rounds: int, only: list[str]) -> None:
    """One token after `context` others."""
    runs: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for name, (provider, options) in MODELS.items():
        if only and name not in only:
            continue
        model = make(provider, options, context)
        cache = model.create_cache(batch, context + 8)
        tensors = [each for one in cache for each in vars(one).values() if isinstance(each, Tensor)]
        for each in tensors:
            each.normal_()
        sizes[name] = (sum(each.nbytes for each in tensors) / 2**20, sum(p.nbytes for p in model.parameters()) / 2**20)
        token = torch.randint(0, 50000, (batch, 1))

        def one(model: Decoder = model, cache: list = cache, token: Tensor = token) -> object:  # type: ignore[type-arg]
            for each in cache:
                each.length = context
            return model(token, cache=cache, last=1)

        runs[name] = one
    show(f"a token after {context} others, batch {batch}", compare(runs, rounds))
    for name, (cached, weights) in sizes.items():
        print(f"  {name:26} cache {cached:8.1f} MiB, weights {weights:6.1f} MiB")


def make(provider: str, options: dict[str, object], context: int) -> Decoder:
    """A model of GPT-2's shape, ready to write."""
    config = APTConfig(
        vocab_size=50257,
        d_model=768,
        num_heads=12,
        num_layers=12,
        d_ff=3072,
        max_seq_len=context + 8,
        dropout=0.0,
        attention_dropout=0.0,
        attention_name=provider,
        options={"attention": options},  # type: ignore[dict-item]
    )
    torch.manual_seed(0)
    model = ModelBuilder(config).build_model()
    prepare(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "decode"))
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    if arguments.what == "layer":
        layer(arguments.seq, arguments.rounds, arguments.only)
    else:
        decode(arguments.context, arguments.batch, arguments.rounds, arguments.only)


if __name__ == "__main__":
    main()
