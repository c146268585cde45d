"""Training speed and peak memory: apt's trainer beside nanoGPT, transformers' Llama and LitGPT, at equal shape.

    python benchmarks/train.py --nanogpt PATH --transformers PYTHON --litgpt PYTHON --results FILE [--case a] [--only WORD ...]
    python benchmarks/train.py --device cuda ...
    python benchmarks/train.py --table FILE

PATH is a clone of github.com/karpathy/nanoGPT; each PYTHON is an interpreter with that library (`pip install transformers`,
`pip install litgpt`; the two need environments of their own) and the same PyTorch as here. What is not given is left out.

Every contestant is a process of its own that waits while another one trains. They train a few steps each by turns, and each
turn is held against that of nanoGPT, uncompiled, in the same round; printed are the medians of these ratios, so what disturbs the
machine for a while disturbs them alike. nanoGPT is therefore in every field, however small: on a machine that is quiet for two
minutes at a time a few contestants are measured at a time, results are appended to FILE, and the table is made of all of them.
The others, and apt's own with strict, multiply by PyTorch's defaults.

On a GPU all of them work in bfloat16 as their own loops do it: weights, optimizer and residual stream in float32, products in
bfloat16 (autocast; Fabric's bf16-mixed). They start beside one another, since compiling takes the time, and then train by
turns as elsewhere; who waits holds its weights and no more. Memory is PyTorch's own count of its peak after the start.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

WORKER = Path(__file__).with_name("train_worker.py")
CASES = {
    "a": {"layers": 4, "heads": 4, "width": 128, "block": 64, "batch": 12, "vocab": 259, "warm": 8},
    "b": {"layers": 6, "heads": 6, "width": 384, "block": 256, "batch": 8, "vocab": 259, "warm": 3},
    "c": {"layers": 12, "heads": 12, "width": 768, "block": 1024, "batch": 8, "vocab": 50304, "warm": 3},
}
"""(c) has GPT-2's shape and is for a GPU."""
TURN = 0.7
"""Seconds of a contestant's turn, about."""
SEATS = 4
"""How many may warm up on a GPU at once: its memory has to hold them."""
LETTERS = 26**3
"""A token of a large vocabulary is three letters."""


@dataclass
class Contestant:
    """A process that trains when it is told to."""

    name: str
    python: str
    case: dict[str, object]
    process: subprocess.Popen[str] | None = None
    said: IO[str] = field(default_factory=lambda: tempfile.TemporaryFile("w+"))  # noqa: SIM115
    steps: int = 1
    parameters: int = 0
    speeds: list[float] = field(default_factory=list)
    peak: float = 0.0

    def launch(self) -> None:
        """Start it; it warms up by itself."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.case["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        if self.case["device"] == "cuda":
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        self.process = subprocess.Popen(
            [self.python, str(WORKER), json.dumps(self.case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )

    def settle(self) -> None:
        """Start it where that was not done, wait until it is warm, and see how many steps fill a turn."""
        if self.process is None:
            self.launch()
        self.parameters = int(self._hear()["ready"])
        self.steps = max(1, round(TURN / self._train(2)))
        self.speeds.clear()

    def turn(self) -> None:
        """Train a turn."""
        self._train(self.steps)

    def end(self) -> None:
        """Let it go, and ask what it took."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.peak = self._hear()["peak_mb"]
        self.process.wait()

    def _train(self, steps: int) -> float:
        """Seconds a step."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds = self._hear()["seconds"] / steps
        self.speeds.append(int(str(self.case["batch"])) * int(str(self.case["block"])) / seconds)
        return seconds

    def _hear(self) -> dict[str, float]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise SystemExit(f"{self.name} has died: {self.said.read()[-2000:]}")
        heard: dict[str, float] = json.loads(line)
        return heard


def main() -> int:
    """Measure the cases that are asked for, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="PATH", help="a clone of nanoGPT")
    parser.add_argument("--transformers", metavar="PYTHON", help="an interpreter that has transformers")
    parser.add_argument("--litgpt", metavar="PYTHON", help="an interpreter that has litgpt")
    parser.add_argument("--case", nargs="+", choices=list(CASES), help="a and b on a CPU, b and c on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of all; fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--shape", nargs="+", metavar="KEY=N", default=[], help="other sizes, such as batch=2")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contestants by their names, or beginnings of names with a *"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more rounds after so long, start included")
    parser.add_argument("--threads", type=int, help="of each; all on a CPU, 2 beside a GPU")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append what is measured, a line a contestant")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, print a table of these results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print_tables([json.loads(line) for line in arguments.table.read_text().splitlines()])
        return 0
    if arguments.nanogpt is None:
        parser.error("--nanogpt PATH is what all others are held against")
    on_gpu = arguments.device == "cuda"
    arguments.threads = arguments.threads or (2 if on_gpu else os.cpu_count() or 1)
    arguments.precision = arguments.precision or ("bf16" if on_gpu else "fp32")
    for name in arguments.case or (["b", "c"] if on_gpu else ["a", "b"]):
        with tempfile.TemporaryDirectory() as place:
            field = contestants(name, arguments, Path(place))
            results = measure(name, field, arguments.rounds, arguments.seconds)
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    file.writelines(json.dumps(each) + "\n" for each in results)
            print_tables(results)
    return 0


def contestants(name: str, arguments: argparse.Namespace, place: Path) -> list[Contestant]:
    """All of a case, nanoGPT first; what they read is written to `place`."""
    shape = {**CASES[name], **{key: int(value) for key, value in (each.split("=") for each in arguments.shape)}}
    width = shape["width"]
    write_text(place, shape["vocab"])
    common: dict[str, object] = {
        **shape,
        "threads": arguments.threads,
        "device": arguments.device,
        "precision": arguments.precision,
        "seats": [str(place / f"seat{number}") for number in range(SEATS)] if arguments.device == "cuda" else [],
        "data": str(place / "tokens.bin"),
        # A gated network with as many weights as one of two matrices that is four times as wide as the model.
        "d_ff": 8 * width // 3 // 8 * 8,
        "compile": False,
    }
    found: list[Contestant] = []
    for kind, python, label, more in (
        ("nanogpt", sys.executable, "nanoGPT", {"path": arguments.nanogpt}),
        ("llama", arguments.transformers, "transformers Llama", {}),
        ("litgpt", arguments.litgpt, "LitGPT (Llama)", {}),
    ):
        if arguments.nanogpt if kind == "nanogpt" else python:
            for compiled in (False, True):
                case = {**common, **more, "kind": kind, "compile": compiled}
                found.append(Contestant(f"{label}{', compiled' if compiled else ''}", python, case))
    ways = [*itertools.product(("strict", "auto"), (arguments.precision,), (False, True))]
    if arguments.device == "cpu" and arguments.precision == "fp32":
        ways.extend((("auto", "bf16", False), ("auto", "bf16", True)))
    for form in ("GPT", "Llama"):
        for matmul, precision, compiled in ways:
            # On a GPU products have one route.
            if matmul == "auto" and arguments.device == "cuda":
                continue
            other = f", {precision}" if precision != arguments.precision else ""
            label = f"apt {form}, {matmul}{other}{', compiled' if compiled else ''}"
            profile = apt_profile(form, common, place, matmul=matmul, precision=precision, compiled=compiled)
            found.append(Contestant(label, sys.executable, {**common, "kind": "apt", "profile": profile}))
    names = ["nanoGPT", *(["*"] if arguments.only is None else arguments.only)]
    return [each for each in found if any(fnmatch.fnmatchcase(each.name, name) for name in names)]


def write_text(place: Path, vocab: int) -> None:
    """Random letters in `text.txt`, for apt, and their tokens in `tokens.bin`, for the others: letters, or threes of them."""
    letters = np.random.default_rng(0).integers(0, 26, 1_500_000 if vocab > LETTERS else 500_000).astype(np.uint32)
    (place / "text.txt").write_bytes((letters + ord("a")).astype(np.uint8).tobytes())
    tokens = letters + ord("a") + 3
    if vocab > LETTERS:
        first, second, third = letters.reshape(-1, 3).T
        tokens = ((first * 26 + second) * 26 + third) * (vocab // LETTERS) + 3
    tokens.astype(np.uint16).tofile(place / "tokens.bin")


def apt_profile(
    form: str, common: dict[str, object], place: Path, *, matmul: str, precision: str, compiled: bool
) -> dict[str, object]:
    """A profile of nanoGPT's form (LayerNorm, GELU, learned positions) or of Llama's (RMSNorm, SwiGLU, rotary positions)."""
    gpt = form == "GPT"
    return {
        "name": "bench",
        "plugins": ["paced"],
        "model": {
            "d_model": common["width"],
            "num_heads": common["heads"],
            "num_layers": common["layers"],
            "d_ff": 4 * int(str(common["width"])) if gpt else common["d_ff"],
            "vocab_size": common["vocab"],
            "max_seq_len": common["block"],
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "norm": "layernorm" if gpt else "rmsnorm",
            "attention": {"provider": "sdpa", "positions": "learned" if gpt else "rope"},
            "ffn": {"provider": "default" if gpt else "swiglu"},
        },
        "training": {
            "max_steps": 1_000_000,
            "steps_per_epoch": 1_000_000,
            "batch_size": common["batch"],
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "gradient_clip": 1.0,
            "betas": [0.9, 0.99],
            "precision": precision,
            "compile": compiled,
        },
        "hardware": {"device": common["device"], "threads": common["threads"], "matmul": matmul},
        "data": {
            "source": "files",
            "path": str(place / "text.txt"),
            "cache": str(place / f"cache-{form}-{matmul}-{precision}-{compiled}"),
            "tokenizer": "threes" if int(str(common["vocab"])) > LETTERS else "byte",
        },
        "monitoring": {"plot": False},
    }


def measure(name: str, field: list[Contestant], rounds: int, seconds: float) -> list[dict[str, object]]:
    """Let all of them train by turns; what each of them did in each round."""
    end = time.monotonic() + seconds
    if field[0].case["device"] == "cuda":
        # Those first that take longest.
        for each in sorted(field, key=lambda each: "compiled" not in each.name):
            each.launch()
    for each in field:
        each.settle()
        print(f"({name}) {each.name}: {each.steps} steps a turn", file=sys.stderr, flush=True)
    for number in range(rounds):
        if time.monotonic() > end:
            break
        # In another order each time, so that nobody always follows the same one.
        for each in random.Random(number).sample(field, len(field)):
            each.turn()
    for each in field:
        each.end()
    case = field[0].case
    machine = f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {case['threads']} threads"
    if case["device"] == "cuda":
        machine = f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}, {case['precision']}"
    return [
        {
            "case": name,
            "machine": machine,
            "shape": {key: case[key] for key in CASES[name] if key != "warm"},
            "name": each.name,
            "speeds": each.speeds,
            "ratios": [own / other for own, other in zip(each.speeds, field[0].speeds, strict=True)],
            "peak_mb": each.peak,
            "parameters": each.parameters,
        }
        for each in field
    ]


def print_tables(results: list[dict[str, Any]]) -> None:
    """A table a case; contestants that were measured several times have all of their rounds together."""
    for case in dict.fromkeys(each["case"] for each in results):
        of_case = [each for each in results if each["case"] == case]
        sizes = of_case[0].get("shape", CASES[case])
        shape = ", ".join(f"{key} {value}" for key, value in sizes.items() if key != "warm")
        print(f"\n({case}) {shape}; {', '.join(dict.fromkeys(each['machine'] for each in of_case))}\n")
        print("| | tokens/s | of nanoGPT | middle half | rounds | peak MB | parameters |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in dict.fromkeys(each["name"] for each in of_case):
            mine = [each for each in of_case if each["name"] == name]
            speeds, ratios = ([value for each in mine for value in each[key]] for key in ("speeds", "ratios"))
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            print(
                f"| {name} | {statistics.median(speeds):,.0f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {len(ratios)} "
                f"| {max(each['peak_mb'] for each in mine):.0f} | {mine[0]['parameters']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
