"""How fast Tri-Vein Attention is beside full heads: the layer, the step inside it, and decoding. On a quiet machine.

    python benchmarks/attention_speed.py layer [--seq 2048 ...] [--width 512] [--head 64] [--batch 1] [--dtype float32]
    python benchmarks/attention_speed.py decode [--context 2048] [--batch 1] [--dtype float32]
    python benchmarks/attention_speed.py layer --device cuda --dtype bfloat16 --seq 2048 8192 --batch 8

``layer``: forward and backward, width 512 in heads of 64, causal; bfloat16 is autocast's. The attention step is softmax(q k^T) v
alone, on tensors that are ready; the layer has the products in and out, composing P and U, and the turning too. ``decode``: one
token at a time through a model of GPT-2's shape (12 layers, width 768, 12 heads) with random weights whose cache holds `context`
tokens, as `generate` does it, attention folded. All in turn, medians of rounds; ratios are to multi-head attention. With one
thread it is CPU time that is measured, which other processes disturb less. On a GPU `flex` is measured too, which has no
backward pass elsewhere.
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
from apt.errors import AptError
from apt.inference.prepare import prepare
from apt.layers.heads import Heads, Shape
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

Contenders = dict[str, tuple[str, dict[str, object]]]
MOST_SCORES = 2**30
"""`autopoietic` keeps several matrices of scores; it is left out where they have more numbers than this."""


def layers(heads: int, width: int, device: str) -> Contenders:
    """By name: a provider and its options."""
    groups = max(1, heads // 4)
    found: Contenders = {
        "multi-head": ("sdpa", {}),
        f"grouped, {groups} of {heads}": ("sdpa", {"num_kv_heads": groups}),
        "narrow d/4": ("sdpa", {"head_width": width // 4}),
        "tva d/2": ("tva_default", {"r": 2}),
        "tva d/4": ("tva_default", {"r": 4}),
        "tva d/8": ("tva_default", {"r": 8}),
        "autopoietic": ("autopoietic", {}),
    }
    if device != "cpu":
        found["flex"] = ("flex", {})
        found[f"flex, grouped, {groups} of {heads}"] = ("flex", {"num_kv_heads": groups})
        found["sdpa, window 512"] = ("sdpa", {"window": 512})
        found["flex, window 512"] = ("flex", {"window": 512})
    return found


MODELS: Contenders = {
    "multi-head": ("sdpa", {}),
    "grouped, 3 of 12": ("sdpa", {"num_kv_heads": 3}),
    "narrow d/4": ("sdpa", {"head_width": 16}),
    "tva d/2": ("tva_default", {"r": 2}),
    "tva d/4": ("tva_default", {"r": 4}),
    "tva d/4, projected last": ("tva_default", {"r": 4, "project": "last", "per_head": True}),
}


def compare(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, all in turn; what cannot be run is said and left out."""
    able = {}
    for name, run in runs.items():
        try:
            run()
            able[name] = run
        except (RuntimeError, AptError) as error:
            print(f"  {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return {name: statistics.median(times) for name, times in by_turns(able, rounds).items()}


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


def layer(arguments: argparse.Namespace, seq: int) -> None:
    """The whole layer, and the attention step inside it."""
    device, dtype, batch = arguments.device, getattr(torch, arguments.dtype), arguments.batch
    heads = arguments.width // arguments.head
    x = torch.randn(batch, seq, arguments.width, device=device, requires_grad=True)
    whole: dict[str, Callable[[], object]] = {}
    inside: dict[str, Callable[[], object]] = {}
    for name, (provider, options) in layers(heads, arguments.head, device).items():
        if arguments.only and name not in arguments.only:
            continue
        if provider == "autopoietic" and batch * heads * seq**2 > MOST_SCORES:
            continue
        torch.manual_seed(0)
        made = get_provider("attention", provider, options).create_layer(arguments.width, heads).to(device)
        assert isinstance(made, Heads)

        def forward(made: Heads = made) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return made(x)  # type: ignore[no-any-return]

        whole[name] = both_ways(forward, [x, *made.parameters()])
        shape: Shape = made.shape
        counts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        qkv = [
            torch.randn(batch, seq, each, shape.width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
            for each in counts
        ]
        inside[name] = both_ways(lambda made=made, qkv=qkv: step(made, *qkv), qkv)  # type: ignore[misc]
    what = f"{seq} tokens, batch {batch}, width {arguments.width} in heads of {arguments.head}"
    show(f"the whole layer, {what}", compare(whole, arguments.rounds))
    show(f"the attention step, {what}", compare(inside, arguments.rounds))


def step(made: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What every query and key take part in."""
    return made.attend(q, k, v, causal=True, mask=None, window=None)


@torch.inference_mode()
def decode(arguments: argparse.Namespace) -> None:
    """One token after `context` others."""
    context, batch = arguments.context, arguments.batch
    runs: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for name, (provider, options) in MODELS.items():
        if arguments.only and name not in arguments.only:
            continue
        model = make(provider, options, arguments)
        cache = model.create_cache(batch, context + 8)
        tensors = [each for one in cache for each in vars(one).values() if isinstance(each, Tensor)]
        for each in tensors:
            each.normal_()
        sizes[name] = (sum(each.nbytes for each in tensors) / 2**20, sum(p.nbytes for p in model.parameters()) / 2**20)
        token = torch.randint(0, 50000, (batch, 1), device=arguments.device)

        def one(model: Decoder = model, cache: list = cache, token: Tensor = token) -> object:  # type: ignore[type-arg]
            for each in cache:
                each.length = context
            return model(token, cache=cache, last=1)

        runs[name] = one
    show(f"a token after {context} others, batch {batch}", compare(runs, arguments.rounds))
    for name, (cached, weights) in sizes.items():
        print(f"  {name:26} cache {cached:8.1f} MiB, weights {weights:6.1f} MiB")


def make(provider: str, options: dict[str, object], arguments: argparse.Namespace) -> Decoder:
    """A model of GPT-2's shape, or of so many layers, ready to write."""
    config = APTConfig(
        vocab_size=50257,
        d_model=768,
        num_heads=12,
        num_layers=arguments.layers,
        d_ff=3072,
        max_seq_len=arguments.context + 8,
        dropout=0.0,
        attention_dropout=0.0,
        attention_name=provider,
        options={"attention": options},  # type: ignore[dict-item]
    )
    torch.manual_seed(0)
    model = ModelBuilder(config).build_model().to(arguments.device)
    prepare(model, dtype="bf16" if arguments.dtype == "bfloat16" else "fp32")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "decode"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seq", type=int, nargs="+", default=[2048])
    parser.add_argument("--width", type=int, default=512, help="of the layer")
    parser.add_argument("--head", type=int, default=64, help="width of a head")
    parser.add_argument("--layers", type=int, default=12, help="of the model that decodes")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"PyTorch {torch.__version__}, {where}, {arguments.dtype}\n")
    if arguments.what == "decode":
        decode(arguments)
        return
    for seq in arguments.seq:
        layer(arguments, seq)


if __name__ == "__main__":
    main()
