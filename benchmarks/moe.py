"""The mixture of experts beside Hugging Face's Mixtral block and the dense layer of equal active arithmetic.

``python benchmarks/moe.py time [--peers PYTHON] [--dtype D ...] [--tokens N ...] [--experts E ...] [--kinds K ...]`` prints
forward + backward times as multiples of the dense SwiGLU layer (width k d_ff), one thread, interleaved, medians: 2048 and 256
tokens, 8 and 64 experts, float32 and bfloat16; and one token forward in evaluation. PYTHON is an interpreter with
`transformers` (an environment of its own: ``python -m venv peers; peers/bin/pip install transformers torch``); without it only
our own rows are printed. The options choose cases and rows, so that a quiet machine is needed for minutes only.
``python benchmarks/moe.py kernels`` compares the products alone, on which the choice in `apt_moe.grouped` stands. ``apt inert``
is a mixture that is not switched on yet, to be held against ``dense, width d_ff``.

``python benchmarks/moe.py gpu [--torchtitan PATH] [--seconds S]`` does it on one GPU, at the width of DeepSeek-MoE-16B (d 2048,
64 experts of 1408, 6 of them for a token, SwiGLU): forward + backward at 16,384 tokens in bfloat16, with bfloat16 weights and
with float32 weights under autocast, eager and compiled; at 256 tokens; in float32; and one token in evaluation. Beside them
stand transformers' Mixtral block, in this interpreter, and torchtitan's layer from PATH, a checkout of
github.com/pytorch/torchtitan at v0.2.2 (its folders `models/moe` and `tools`, which need a GPU and Triton and nothing else);
``torchtitan unpadded`` is that without padding each expert's rows to multiples of 8, as later versions do. All have the same
router's weights, so the same load. Rows that would start after S seconds are left out. ``python benchmarks/moe.py ways
[--seconds S]`` compares our own ways there: the choice in `apt_moe.experts.choose_backend`. On a GPU time is the clock's around
some calls and a wait for the device. With ``--device cpu --tiny`` both can be tried without one, and without torchtitan.

Each case of `time` runs in a process of its own that holds one layer, since the memory that others free would flatter it;
rounds of all processes alternate. Time is the CPU's, of one thread, so that what else runs does not count. Ours includes the
router's losses and load; theirs has none.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer."""

    d_model: int
    d_ff: int
    experts: int
    top_k: int


D_MODEL, D_FF, TOP_K = 256, 512, 2
FINE = Shape(d_model=2048, d_ff=1408, experts=64, top_k=6)
TITAN = "torchtitan"


def make(kind: str, shape: Shape, dtype: str):  # type: ignore[no-untyped-def]
    """A layer as a function of [1, tokens, d_model], and the module."""
    import torch

    torch.manual_seed(0)
    if kind.startswith("hf"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = kind.removeprefix("hf ")
        layer = MixtralSparseMoeBlock(config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return layer.to(getattr(torch, dtype)), lambda x: layer(x)
    if kind.startswith(TITAN):
        layer = make_titan(shape, padded=kind == TITAN).to(getattr(torch, dtype))
        return layer, layer
    from apt_moe.provider import MoE

    if kind.startswith("dense"):
        width = shape.d_ff if kind == "dense, width d_ff" else shape.top_k * shape.d_ff
        dense = MoE(expert="swiglu").expert.create_layer(shape.d_model, width)
        return dense.to(getattr(torch, dtype)), dense
    if kind == "apt inert":
        made = MoE(experts=shape.experts, expert="swiglu").create_layer(shape.d_model, shape.d_ff)
        inert = made.to(getattr(torch, dtype))
        inert.active = False
        return inert, inert
    backend = kind.removeprefix("apt ")
    options = {"experts": shape.experts, "expert": "swiglu", "upcycle": False, "backend": backend}
    if backend == "capacity 1.25":
        options |= {"backend": "auto", "capacity": 1.25}
    options["router"] = {"provider": "topk_default", "top_k": shape.top_k}
    layer = MoE.model_validate(options).create_layer(shape.d_model, shape.d_ff)
    torch.nn.init.normal_(layer.router.weight, std=0.05)
    return layer.to(getattr(torch, dtype)), layer


def find_titan(checkout: Path) -> None:
    """Make torchtitan's layer importable from `checkout` without the rest of torchtitan, whose imports are many."""
    import torch

    package, models, utils = (
        types.ModuleType(name) for name in ("torchtitan", "torchtitan.models", "torchtitan.models.utils")
    )
    package.__path__ = [str(checkout / "torchtitan")]
    models.__path__ = [str(checkout / "torchtitan" / "models")]
    utils.trunc_normal_ = torch.nn.init.trunc_normal_  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (package, models, utils)}
    importlib.import_module("torchtitan.models.moe.moe")


def make_titan(shape: Shape, *, padded: bool):  # type: ignore[no-untyped-def]
    """torchtitan's layer with the routing of ours: softmax, top-k, weights that sum to 1, no balancing bias."""
    import torch

    moe = sys.modules["torchtitan.models.moe.moe"]
    utils = sys.modules["torchtitan.models.moe.utils"]
    moe.indices_padding_wrapper = utils.indices_padding_wrapper if padded else (lambda run: run)  # type: ignore[attr-defined]
    options = moe.MoEArgs(
        num_experts=shape.experts,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        top_k=shape.top_k,
        load_balance_coeff=None,
        use_grouped_mm=True,
    )
    layer = moe.MoE(options, shape.d_model, shape.d_ff)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    layer.tokens_per_expert.zero_()
    return layer


def forward_and_backward(layer, call, x, probe, context) -> None:  # type: ignore[no-untyped-def]
    """One training step without an optimizer, losses of the router included where there are any."""
    import torch

    for parameter in layer.parameters():
        parameter.grad = None
    x.grad = None
    with context:
        result = call(x)
        output, losses = (result[0], result[1]) if isinstance(result, tuple) else (result, {})
        total = (output * probe).sum() + sum(losses.values())
    torch.autograd.backward(total)


def serve() -> None:
    """In a process of its own: one layer; for each line that comes in, one round of measurements goes out."""
    import torch

    torch.set_num_threads(1)
    case = json.loads(sys.argv[2])
    layer, call = make(case["kind"], Shape(D_MODEL, D_FF, case["experts"], TOP_K), case["dtype"])
    x = torch.randn(1, case["tokens"], D_MODEL, dtype=getattr(torch, case["dtype"]), requires_grad=True)
    probe = torch.randn_like(x)

    def train() -> None:
        forward_and_backward(layer, call, x, probe, nullcontext())

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
    print("rows an expert | x W^T | W x^T | gradient to W, recycled | grouped_mm's")
    for rows in (1, 4, 8, 16, 32, 64):
        x, grad = torch.randn(64 * rows, 256), torch.randn(64 * rows, 1024)
        offsets = (torch.arange(1, 65) * rows).to(torch.int32)

        def timed(few: int, x=x, offsets=offsets) -> float:  # type: ignore[no-untyped-def]
            grouped.FEW = few
            return _median(lambda: grouped._multiply(x, weight, offsets, "loop", True, False))

        columns = (
            timed(0),
            timed(1 << 30),
            _median(lambda x=x, g=grad, o=offsets: grouped._outer(g, x, o, "loop")),
            _median(lambda x=x, g=grad, o=offsets: grouped._outer(g, x, o, "grouped_mm")),
        )
        print(f"{rows:4} | " + " | ".join(f"{1e3 * each:6.1f}" for each in columns), flush=True)


@dataclass(frozen=True)
class Row:
    """One measurement on a GPU."""

    kind: str
    tokens: int
    dtype: str
    """Of the weights; ``autocast``: float32 weights, products in bfloat16."""
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.dtype:9} {self.tokens:6} tokens  {self.kind + (', compiled' if self.compiled else ''):32}"


class OnDevice:
    """Layers one after another on `device`, until `seconds` have passed."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds, self.start = device, seconds, time.perf_counter()

    def wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, row: Row, shape: Shape) -> tuple[float, float] | None:
        """Median seconds of a call, and the most GiB that were allocated during calls, weights and gradients included.

        None where there was no time left, or no memory.
        """
        import torch

        if time.perf_counter() - self.start > self.seconds:
            return None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        try:
            return self._measure(row, shape)
        except torch.OutOfMemoryError:
            return None

    def _measure(self, row: Row, shape: Shape) -> tuple[float, float]:
        import torch

        dtype = "float32" if row.dtype == "autocast" else row.dtype
        with torch.device(self.device):
            layer, call = make(row.kind, shape, dtype)
            scores = torch.randn(shape.experts, shape.d_model, generator=torch.Generator(self.device).manual_seed(1))
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if parameter.shape == scores.shape and ("gate" in name or "router" in name):
                        parameter.copy_(0.02 * scores)
            x = torch.randn(1, row.tokens, shape.d_model, generator=torch.Generator(self.device).manual_seed(2))
            x = x.to(torch.bfloat16 if row.dtype == "bfloat16" else torch.float32).requires_grad_()
            probe = torch.randn_like(x)
        if row.compiled:
            torch._dynamo.reset()
            call = torch.compile(call)
        context = torch.autocast(self.device, torch.bfloat16, enabled=row.dtype == "autocast")

        def train() -> None:
            forward_and_backward(layer, call, x, probe, context)

        def decode() -> None:
            with torch.no_grad(), context:
                call(x)

        run = train
        if row.tokens == 1:
            layer.eval()
            run = decode
        for _ in range(3):
            run()
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        number = max(1, min(50, int(0.02 / (time.perf_counter() - start))))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 11 and (len(times) < 3 or time.perf_counter() - began < 0.5):
            start = time.perf_counter()
            for _ in range(number):
                run()
            self.wait()
            times.append((time.perf_counter() - start) / number)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0
        return statistics.median(times), peak


def gpu(arguments: argparse.Namespace) -> None:
    """Ours beside the others', the rows that matter most first."""
    shape, many, some, few = FINE, 16384, 2048, 256
    if arguments.tiny:
        shape, many, some, few = Shape(64, 32, 8, 2), 256, 64, 16
    others = ["hf grouped_mm"]
    if arguments.torchtitan is not None:
        find_titan(arguments.torchtitan)
        others += [TITAN, f"{TITAN} unpadded"]
    if arguments.no_hf:
        others.remove("hf grouped_mm")
    hf = [] if arguments.no_hf else ["hf eager"]
    writing = [] if arguments.no_hf else ["hf batched_mm", "hf eager"]
    rows = [Row(kind, many, "bfloat16") for kind in ("dense", "apt auto", *others, *hf, "apt capacity 1.25")]
    rows += [Row(kind, 1, "bfloat16") for kind in ("dense", "apt auto", "apt grouped_mm", *others, *writing)]
    rows += [Row(kind, many, "autocast") for kind in ("dense", "apt auto", *others)]
    rows.append(Row("dense", many, "bfloat16"))  # again: what the order did
    compiled = ["dense", "apt auto", *[kind for kind in others if kind != TITAN]]
    rows += [Row(kind, many, dtype, compiled=True) for dtype in ("bfloat16", "autocast") for kind in compiled]
    rows += [Row(kind, few, "bfloat16") for kind in ("dense", "apt auto", "apt bmm", *others, *hf)]
    exact = [kind for kind in others if kind.startswith("hf")]  # torchtitan's products are in bfloat16 always
    for tokens in (some, few):
        rows += [Row(kind, tokens, "float32") for kind in ("dense", "apt auto", "apt bmm", "apt loop", *exact, *hf)]
    rows += [Row(kind, 1, "float32") for kind in ("dense", "apt auto", *exact, *writing)]
    if arguments.kinds is not None:
        rows = [row for row in rows if row.kind in ("dense", *arguments.kinds)]
    clock = OnDevice(arguments.device, arguments.seconds)
    _say(arguments.device, shape)
    print(f"load at {many} tokens, busiest / mean: {_imbalance(arguments.device, shape, many):.2f}", flush=True)
    lines, dense = [], {}
    for row in rows:
        try:
            seen, why = clock.measure(row, shape), "left out: no time, or no memory"
        except Exception as error:  # noqa: BLE001  the other rows are wanted
            seen, why = None, f"failed: {error!r:.300}"
        if seen is None:
            line = f"{row} {why}"
        else:
            if row.kind == "dense" and not row.compiled:
                dense.setdefault((row.tokens, row.dtype), seen[0])
            ratio = seen[0] / dense.get((row.tokens, row.dtype), float("nan"))
            line = f"{row} {1e3 * seen[0]:9.3f} ms {ratio:7.2f} of dense {seen[1]:6.2f} GiB"
        lines.append(line)
        print(f"{line}   [{time.perf_counter() - clock.start:.0f} s]", flush=True)
    print("\n" + "\n".join(lines))


def ways(arguments: argparse.Namespace) -> None:
    """Our own ways on one device: milliseconds of each, forward and backward."""
    shapes = itertools.product(("bfloat16", "float32"), (256, 2048, 16384), (8, 64), (512, 2048))
    d_model = 1024
    if arguments.tiny:
        shapes, d_model = itertools.product(("bfloat16", "float32"), (16,), (2, 8), (16,)), 32
    clock = OnDevice(arguments.device, arguments.seconds)
    base = Shape(d_model, 1, 1, 2)
    _say(arguments.device, base)
    names = ("grouped_mm", "loop", "bmm", "naive")
    print("dtype, tokens, experts, d_ff: ms of " + ", ".join(names) + " | the fastest", flush=True)
    for dtype, tokens, experts, d_ff in shapes:
        shape = replace(base, d_ff=d_ff, experts=experts)
        seen = {}
        for name in names:
            if name == "naive" and tokens * experts > 1 << 17:
                continue
            told = clock.measure(Row(f"apt {name}", tokens, dtype), shape)
            if told is not None:
                seen[name] = 1e3 * told[0]
        if not seen:
            print("the rest is left out: no time")
            return
        cells = " ".join(f"{seen[name]:9.3f}" if name in seen else "        -" for name in names)
        print(f"{dtype:8} {tokens:6} {experts:3} {d_ff:5} {cells} | {min(seen, key=seen.__getitem__)}", flush=True)
    print(f"{time.perf_counter() - clock.start:.0f} s")


def _say(device: str, shape: Shape) -> None:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {shape}", flush=True)


def _imbalance(device: str, shape: Shape, tokens: int) -> float:
    """The busiest expert's rows over the mean, for the router's weights and the tokens that everybody gets."""
    import torch

    with torch.device(device):
        scores = 0.02 * torch.randn(shape.experts, shape.d_model, generator=torch.Generator(device).manual_seed(1))
        x = torch.randn(1, tokens, shape.d_model, generator=torch.Generator(device).manual_seed(2))
        chosen = (x[0] @ scores.t()).topk(shape.top_k).indices.flatten()
        load = torch.bincount(chosen, minlength=shape.experts).float()
    return (load.max() / load.mean()).item()


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
    beside = commands.add_parser("gpu")
    beside.add_argument("--torchtitan", type=Path, metavar="PATH", help="a checkout of torchtitan, v0.2.2")
    beside.add_argument("--no-hf", action="store_true", help="without transformers")
    beside.add_argument("--kinds", nargs="+", metavar="K", help="such as 'apt auto' and 'hf grouped_mm'; none: all")
    among = commands.add_parser("ways")
    for command, seconds in ((beside, 75.0), (among, 30.0)):
        command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
        command.add_argument("--seconds", type=float, default=seconds, help="after which no row begins")
        command.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    arguments = parser.parse_args()
    if arguments.command in ("gpu", "ways"):
        (gpu if arguments.command == "gpu" else ways)(arguments)
        return
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
