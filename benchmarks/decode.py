"""Writing a token at a time beside Hugging Face transformers: 124 M parameters of Llama's shape, batch 1.

    python benchmarks/decode.py --peer OTHER/bin/python [--rounds 5] [--tokens 16] [--only "ours int8" "HF fp32 dynamic"]
        [--threads 1] [--device cuda]

`OTHER/bin/python` is an interpreter with `pip install torch transformers`; this one has apt-core. Each contender is a process of
its own that stays; they are measured in turn, round after round, so that a busy machine is busy for all. Both sides run their own
`generate`, greedy, and note when each token comes. Printed are the median and the fastest tenth of the times between tokens, and
the same of the time to the first token of a prompt of 1,024. On a machine that others use too the fastest tenth says more, and
with `--threads 1` the time is the processor's, which waits for nobody else. On a GPU it is the clock's when a token has come to
the processor, which is when all that it took is done; there `generate` of transformers compiles what has a static cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SHAPE = {"vocab": 50304, "d_model": 768, "d_ff": 2048, "layers": 12, "heads": 12, "context": 2048}
SHORT, LONG = 32, 1024
DEVICE = "cpu"
OURS = {
    f"ours {bits}{' compiled' * compiled}": (dtype, quantize, compiled)
    for bits, dtype, quantize in (("fp32", "fp32", None), ("bf16", "bf16", None), ("int8", "fp32", "int8"))
    for compiled in (False, True)
}
THEIRS = {
    "HF fp32 dynamic": ("float32", None),
    "HF fp32 static": ("float32", "static"),
    "HF bf16 dynamic": ("bfloat16", None),
    "HF bf16 static": ("bfloat16", "static"),
}


def clock() -> float:
    """Seconds: of the processor where one thread of it works, else of the clock."""
    alone = os.environ.get("OMP_NUM_THREADS") == "1" and DEVICE == "cpu"
    return time.process_time() if alone else time.perf_counter()


def ours(name: str):
    """A function (prompt length, new tokens) that writes with apt-core and says when each token came."""
    import torch

    from apt.core.config import APTConfig
    from apt.core.special import SpecialIds
    from apt.inference.generate import generate
    from apt.inference.prepare import prepare
    from apt.modeling.compose import ModelBuilder

    class Ids:
        vocab_size = SHAPE["vocab"]

        def encode(self, text):
            return [int(word) for word in text.split()]

        def decode(self, ids):
            return "".join(f"{each} " for each in ids)

    torch.manual_seed(0)
    config = APTConfig(
        vocab_size=SHAPE["vocab"],
        d_model=SHAPE["d_model"],
        d_ff=SHAPE["d_ff"],
        num_heads=SHAPE["heads"],
        num_layers=SHAPE["layers"],
        max_seq_len=SHAPE["context"],
        norm="rmsnorm",
        attention_name="sdpa",
        ffn_name="swiglu",
    )
    model = ModelBuilder(config).build_model().to(DEVICE)
    dtype, quantize, compiled = OURS[name]
    prepare(model, dtype=dtype, quantize=quantize, compiled=compiled)
    nothing = SpecialIds(start=None, stop=frozenset())

    def write(length: int, count: int) -> list[float]:
        prompt = " ".join(str(each % 1000 + 3) for each in range(length))
        times: list[float] = []
        result = generate(
            model,
            Ids(),
            prompt,
            max_new_tokens=count,
            temperature=0,
            special=nothing,
            show=lambda _: times.append(clock()),
        )
        assert len(result.tokens) == len(times) == count
        return times

    return write


def theirs(name: str):
    """The same with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation import BaseStreamer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        max_position_embeddings=SHAPE["context"],
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    dtype, cache = THEIRS[name]
    model = LlamaForCausalLM(config).eval().to(DEVICE, getattr(torch, dtype))
    more = {} if cache is None else {"cache_implementation": cache}

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value) -> None:
            self.times.append(clock())

        def end(self) -> None:
            pass

    def write(length: int, count: int) -> list[float]:
        ids = torch.tensor([[each % 1000 + 3 for each in range(length)]], device=DEVICE)
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=clock,
                **more,
            )
        assert out.shape[1] == length + count
        return clock.times[1:]  # the prompt is put first

    return write


def work(name: str, tokens: int) -> None:
    """Answer `length count` lines with the seconds from the start to each token."""
    write = ours(name) if name in OURS else theirs(name)
    # On a GPU kernels are loaded, compiled and recorded at the first uses of each size.
    for _ in range(1 if DEVICE == "cpu" else 3):
        write(SHORT, 4 if DEVICE == "cpu" else tokens)
    print("ready", flush=True)
    for line in sys.stdin:
        length, count = map(int, line.split())
        start = clock()
        print(json.dumps([each - start for each in write(length, count)]), flush=True)


def best(times: dict[str, list[float]], words: str) -> float:
    """The median of the fastest contender whose name starts so."""
    return min(
        (statistics.median(each) for name, each in times.items() if name.startswith(words)), default=float("nan")
    )


def fast(times: list[float]) -> float:
    """The fastest tenth ends here."""
    return sorted(times)[len(times) // 10]


def table(title: str, unit: str, names: list[str], times: dict[str, list[float]]) -> None:
    """Each contender's milliseconds, and how many times as fast as the fastest of HF's it is, by medians and fastest tenths."""
    quick = {name: [fast(each)] for name, each in times.items() if each}
    print(f"{title:26}{unit:>10}{'x HF fp32':>11}{'x HF bf16':>11}{'fastest':>12}{'x HF fp32':>11}{'x HF bf16':>11}")
    for name in names:
        row, digits = f"{name:26}", 1 if DEVICE == "cpu" else 2
        for kind in (times, quick):
            middle = statistics.median(kind[name])
            row += f"{1e3 * middle:10.{digits}f}{best(kind, 'HF fp32') / middle:11.2f}{best(kind, 'HF bf16') / middle:11.2f}  "
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with torch and transformers; none: ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--first", type=int, help="rounds of the long prompt; none: as many as --rounds")
    parser.add_argument("--only", nargs="*", help="these contenders")
    parser.add_argument("--threads", type=int, help="of each contender")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="*", metavar="KEY=N", default=[], help="other sizes, such as layers=2")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global DEVICE
    DEVICE = arguments.device
    SHAPE.update({key: int(value) for key, value in (each.split("=") for each in arguments.shape)})
    if arguments.work:
        work(arguments.work, arguments.tokens + 1)
        return
    names = [*OURS, *(THEIRS if arguments.peer else ())]
    if DEVICE != "cpu":
        names = [name for name in names if "int8" not in name]  # of the CPU alone
    names = [name for name in names if not arguments.only or name in arguments.only]
    workers = {}
    more = {} if arguments.threads is None else {"OMP_NUM_THREADS": str(arguments.threads)}
    more |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"} if DEVICE == "cuda" else {}
    said = {name: tempfile.TemporaryFile("w+") for name in names}  # noqa: SIM115
    for name in names:
        python = sys.executable if name in OURS else arguments.peer
        workers[name] = subprocess.Popen(
            [
                *(python, "-W", "ignore", __file__, "--work", name),
                *("--tokens", str(arguments.tokens), "--device", DEVICE, "--shape", *arguments.shape),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said[name],
            text=True,
            env={**os.environ, **more},
        )
    for name, worker in workers.items():
        if worker.stdout.readline().strip() != "ready":
            said[name].seek(0)
            raise SystemExit(f"{name} cannot be run by {worker.args[0]}: {said[name].read()[-2000:]}")

    def seconds(name: str, length: int, count: int) -> list[float]:
        worker = workers[name]
        print(length, count, file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    tokens: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[float]] = {name: [] for name in names}
    rounds = arguments.rounds if arguments.first is None else arguments.first
    for _ in range(arguments.rounds):
        for name in names:
            times = seconds(name, SHORT, arguments.tokens + 1)
            tokens[name] += [after - before for before, after in itertools.pairwise(times)]
    # Afterwards, since a static cache stays as long as the longest text was; the first round takes the memory.
    for number in range(rounds + 1 if rounds else 0):
        for name in names:
            times = seconds(name, LONG, 1)
            first[name] += times if number else []
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    if arguments.rounds:
        table("a token", "ms", names, tokens)
    if rounds:
        table(f"first token of {LONG:,}", "ms", names, first)


if __name__ == "__main__":
    main()
