"""The mixture of experts beside Hugging Face's Mixtral block and the dense layer of equal active arithmetic.

``python benchmarks/moe.py time [--peers PYTHON] [--dtype D ...] [--tokens N ...] [--experts E ...] [--kinds K ...]`` prints
forward + backward times as multiples of the dense SwiGLU layer (width k d_ff), one thread, interleaved, medians: 2048 and 256
tokens, 8 and 64 experts, float32 and bfloat16; and one token forward in evaluation. PYTHON is an interpreter with
`transformers` (an environment of its own: ``python -m venv peers; peers/bin/pip install transformers torch``); without it only
our own rows are printed. The options choose cases and rows, so that a quiet machine is needed for minutes only.
``python benchmarks/moe.py kernels`` compares the products alone, on which the choice in `apt_moe.grouped` stands. ``apt inert``
is a mixture that is not switched on yet, to be held against ``dense, width d_ff``.

Each case runs in a process of its own that holds one layer, since the memory that others free would flatter it; rounds of
all processes alternate. Time is the CPU's, of one thread, so that what else runs does not count. Ours includes the router's
losses and load; theirs has none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

D_MODEL, D_FF, TOP_K = 256, 512, 2


def make(kind: str, experts: int, dtype: str):  # type: ignore[no-untyped-def]
    """A layer as a function of [1, tokens, d_model], and its parameters."""
    import torch

    torch.manual_seed(0)
    if kind.startswith("hf"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=experts, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = kind.removeprefix("hf ")
        layer = MixtralSparseMoeBlock(config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return layer.to(getattr(torch, dtype)), lambda x: layer(x)
    from apt_moe.provider import MoE

    if kind.startswith("dense"):
        width = D_FF if kind == "dense, width d_ff" else TOP_K * D_FF
        dense = MoE(expert="swiglu").expert.create_layer(D_MODEL, width)
        return dense.to(getattr(torch, dtype)), dense
    if kind == "apt inert":
        inert = MoE(experts=experts, expert="swiglu").create_layer(D_MODEL, D_FF).to(getattr(torch, dtype))
        inert.active = False
        return inert, inert
    backend = kind.removeprefix("apt ")
    options = {"experts": experts, "expert": "swiglu", "upcycle": False, "backend": backend}
    layer = MoE.model_validate(options).create_layer(D_MODEL, D_FF)
    torch.nn.init.normal_(layer.router.weight, std=0.05)
    return layer.to(getattr(torch, dtype)), layer


def serve() -> None:
    """In a process of its own: one layer; for each line that comes in, one round of measurements goes out."""
    import torch

    torch.set_num_threads(1)
    case = json.loads(sys.argv[2])
    layer, call = make(case["kind"], case["experts"], case["dtype"])
    x = torch.randn(1, case["tokens"], D_MODEL, dtype=getattr(torch, case["dtype"]), requires_grad=True)
    probe = torch.randn_like(x)

    def train() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        result = call(x)
        output, losses = (result[0], result[1]) if isinstance(result, tuple) else (result, {})
        torch.autograd.backward((output * probe).sum() + sum(losses.values()))

    def decode() -> None:
        with torch.no_grad():
            call(x)

    run = train
    if case["tokens"] == 1:
        layer.eval()
        run = decode
    number = 1
    for _ in range(3):
        start = time.process_time()
        run()
        number = max(1, min(100, int(0.03 / (time.process_time() - start))))
    for _ in sys.stdin:
        times = []
        for _ in range(number):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        print(statistics.median(times), flush=True)


def measure(
    peers: str | None, tokens: int, experts: int, dtype: str, only: list[str] | None, rounds: int
) -> dict[str, float]:
    """Median seconds of each case, rounds interleaved."""
    kinds = ["dense", "apt auto", "apt loop", "apt grouped_mm", "apt bmm"]
    if tokens > 1:
        kinds += ["dense, width d_ff", "apt inert"]
    if experts == 8:
        kinds.append("apt naive")
    if peers is not None:
        kinds += ["hf grouped_mm", "hf eager"]
        if tokens <= 256:  # it copies the matrices of every assignment: 6 GB at 2048 tokens
            kinds.append("hf batched_mm")
    if only is not None:
        kinds = [kind for kind in kinds if kind == "dense" or kind in only]
    processes = {}
    for kind in kinds:
        python = peers if kind.startswith("hf") and peers is not None else sys.executable
        case = json.dumps({"kind": kind, "tokens": tokens, "experts": experts, "dtype": dtype})
        processes[kind] = subprocess.Popen(
            [python, __file__, "serve", case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            told = float(process.stdout.readline())
            if turn:
                seen[kind].append(told)
    for process in processes.values():
        process.communicate()
    return {kind: statistics.median(times) for kind, times in seen.items()}


def kernels() -> None:
    """Products alone: milliseconds for 64 experts of 1024 x 256."""
    import torch

    from apt_moe import grouped

    torch.set_num_threads(1)
    weight = torch.randn(64, 1024, 256)
    print("rows an expert | x W^T | W x^T | grouped_mm | gradient to W, recycled | grouped_mm's")
    for rows in (1, 4, 8, 16, 32, 64):
        x, grad = torch.randn(64 * rows, 256), torch.randn(64 * rows, 1024)
        offsets = (torch.arange(1, 65) * rows).to(torch.int32)

        def timed(few: int, x=x, offsets=offsets) -> float:  # type: ignore[no-untyped-def]
            grouped.FEW = few
            return _median(lambda: grouped._multiply(x, weight, offsets, "loop", True))

        columns = (
            timed(0),
            timed(1 << 30),
            _median(lambda x=x, o=offsets: grouped._multiply(x, weight, o, "grouped_mm", True)),
            _median(lambda x=x, g=grad, o=offsets: grouped._outer(g, x, o, "loop")),
            _median(lambda x=x, g=grad, o=offsets: grouped._outer(g, x, o, "grouped_mm")),
        )
        print(f"{rows:4} | " + " | ".join(f"{1e3 * each:6.1f}" for each in columns), flush=True)


def _median(run) -> float:  # type: ignore[no-untyped-def]
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time")
    timing.add_argument("--peers", metavar="PYTHON")
    timing.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    timing.add_argument("--tokens", nargs="+", type=int, default=(2048, 256, 1))
    timing.add_argument("--experts", nargs="+", type=int, default=(8, 64))
    timing.add_argument("--kinds", nargs="+", metavar="K", help="such as 'apt auto' and 'hf grouped_mm'; none: all")
    timing.add_argument("--rounds", type=int, default=5)
    commands.add_parser("kernels")
    arguments = parser.parse_args()
    if arguments.command == "kernels":
        kernels()
        return
    for dtype, tokens, experts in itertools.product(arguments.dtype, arguments.tokens, arguments.experts):
        seen = measure(arguments.peers, tokens, experts, dtype, arguments.kinds, arguments.rounds)
        print(f"{dtype}, {tokens} tokens, {experts} experts: dense {1e3 * seen['dense']:.2f} ms")
        for kind, seconds in seen.items():
            print(f"    {kind:17} {seconds / seen['dense']:7.2f}   {1e6 * seconds:10.0f} us", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    else:
        main()
