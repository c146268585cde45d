"""What the layer `sdpa` costs beside the calls of PyTorch that it consists of, and how good its choice of a way is.

    python benchmarks/sdpa.py layer [--rounds 15] [--threads 1]
    python benchmarks/sdpa.py ways [--rounds 15] [--dtype bf16]

`layer`: forward and backward of the whole layer, and of the same mathematics written down for the shape: linear, turning by a
table, scaled_dot_product_attention, linear. `ways`: for each shape of a grid the calibration of `hardware.matmul: auto` chooses
among PyTorch's kernel, padded heads and explicit products; then all of them are measured anew, and the time of the chosen one is
divided by that of the fastest. Contenders are measured in turn, round after round; times are medians, ratios those of the medians
and of the fastest fifths.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from common import by_turns
from torch import Tensor
from torch.nn import functional

from apt.builtin.attention import SDPA
from apt.core.config import APTConfig
from apt.layers.rope import apply_turn, get_turn
from apt.layers.ways import mix_by, possible_ways, shape_of
from apt.modeling.compose import ModelBuilder
from apt.training.calibration import calibrate

LAYERS = [(12, 64, 64, 4), (8, 256, 256, 4), (4, 512, 512, 8), (1, 2048, 512, 8)]
"""Batch, tokens, d_model, heads."""
GRID = [
    (12, 64, 4, 32),
    (8, 256, 6, 64),
    (16, 128, 4, 16),
    (8, 128, 8, 8),
    (4, 512, 8, 8),
    (4, 512, 4, 24),
    (2, 1024, 8, 64),
    (1, 2048, 8, 16),
    (1, 2048, 4, 8),
]
"""Batch, tokens, heads, width of a head."""


def measure(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn."""
    return {name: [1e3 * each for each in times] for name, times in by_turns(runs, rounds).items()}


def fast(times: list[float]) -> float:
    """The fastest fifth ends here."""
    return sorted(times)[len(times) // 5]


def both_ways(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    gradient = torch.randn_like(run(*leaves))

    def step() -> object:
        for leaf in leaves:
            leaf.grad = None
        return torch.autograd.backward(run(*leaves), gradient)

    return step


def layer(rounds: int) -> None:
    """The whole layer beside bare calls."""
    print(f"{'batch x tokens x d_model':28}{'layer, ms':>12}{'bare, ms':>12}{'ratio':>8}{'fastest':>9}")
    for batch, seq, d_model, heads in LAYERS:
        made = SDPA().create_layer(d_model, heads)
        width = d_model // heads
        positions = torch.arange(seq)[None]
        turn = get_turn(positions, width, 10_000.0)
        qkv, out = made.qkv.weight, made.out.weight

        def bare(x: Tensor, d=d_model, heads=heads, turn=turn, qkv=qkv, out=out) -> Tensor:
            q, k, v = functional.linear(x, qkv).split(d, -1)
            q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
            q, k = apply_turn(q, turn), apply_turn(k, turn)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return functional.linear(y.transpose(1, 2).flatten(2), out)

        x = torch.randn(batch, seq, d_model)
        torch.testing.assert_close(made(x), bare(x))
        runs = {
            "layer": both_ways(lambda x, made=made: made(x), x),
            "bare": both_ways(bare, x),
        }
        times = measure(runs, rounds)
        ours, theirs = (statistics.median(times[name]) for name in ("layer", "bare"))
        print(
            f"{f'{batch} x {seq} x {d_model}':28}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.3f}"
            f"{fast(times['layer']) / fast(times['bare']):9.3f}",
            flush=True,
        )


def ways(rounds: int, precision: str) -> None:
    """What the calibration chooses beside what is fastest."""
    print(f"{'batch x tokens x heads x width':34}{'chosen':>10}{'fastest':>10}{'ratio':>8}   milliseconds")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for batch, seq, heads, width in GRID:
        config = APTConfig(
            vocab_size=259,
            d_model=heads * width,
            d_ff=16,
            num_heads=heads,
            num_layers=1,
            max_seq_len=seq,
            attention_name="sdpa",
            attention_dropout=0.0,
            training={"precision": precision},
        )
        model = ModelBuilder(config).build_model()
        chosen = calibrate(model, torch.zeros(batch, seq, dtype=torch.long), config)
        q, k, v = (torch.randn(batch, heads, seq, width).to(dtype) for _ in range(3))
        shape = shape_of(q, k, v, causal=True, masked=False)
        way = chosen.ways.get(shape, "sdpa")
        runs = {
            each: both_ways(
                lambda q, k, v, each=each, width=width: mix_by(
                    each,
                    q,
                    k,
                    v,
                    causal=True,
                    visible=None,
                    scale=width**-0.5,
                    dropout=0.0,
                ),
                q,
                k,
                v,
            )
            for each in possible_ways(shape)
        }
        with chosen.applied():
            times = measure(runs, rounds)
        best = min(runs, key=lambda each: statistics.median(times[each]))
        ratio = statistics.median(times[way]) / statistics.median(times[best])
        quick = fast(times[way]) / min(fast(each) for each in times.values())
        said = "  ".join(f"{name} {statistics.median(each):.2f}" for name, each in times.items())
        print(
            f"{f'{batch} x {seq} x {heads} x {width}':34}{way:>10}{best:>10}{ratio:8.3f} ({quick:.3f})   {said}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "ways"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="with 1 the processor's time is measured")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "layer":
        layer(arguments.rounds)
    else:
        ways(arguments.rounds, arguments.dtype)


if __name__ == "__main__":
    main()
