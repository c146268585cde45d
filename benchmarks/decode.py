"""Writing a token at a time beside Hugging Face transformers: 124 M parameters of Llama's shape, batch 1, on the CPU.

    python benchmarks/decode.py --peer OTHER/bin/python [--rounds 5] [--tokens 48]

`OTHER/bin/python` is an interpreter with `pip install torch transformers`; this one has apt-core. Each contender is a process of
its own that stays; they are measured in turn, round after round, and medians are printed, so that a busy machine is busy for all.
Both sides run their own `generate`, greedy. A token's time is (N + 1 tokens - 1 token) / N; the first token's is that of a prompt
of 1,024.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

SHAPE = {"vocab": 50304, "d_model": 768, "d_ff": 2048, "layers": 12, "heads": 12, "context": 2048}
SHORT, LONG = 32, 1024
OURS = {"ours fp32": ("fp32", None), "ours bf16": ("bf16", None), "ours int8": ("fp32", "int8")}
THEIRS = {
    "HF fp32 dynamic": ("float32", None),
    "HF fp32 static": ("float32", "static"),
    "HF bf16 dynamic": ("bfloat16", None),
    "HF bf16 static": ("bfloat16", "static"),
}


def ours(name: str):
    """A function (prompt length, new tokens) that writes with apt-core."""
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
            return " ".join(map(str, ids))

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
    model = ModelBuilder(config).build_model()
    dtype, quantize = OURS[name]
    prepare(model, dtype=dtype, quantize=quantize)
    nothing = SpecialIds(start=None, stop=frozenset())

    def write(length: int, count: int) -> None:
        prompt = " ".join(str(each % 1000 + 3) for each in range(length))
        result = generate(model, Ids(), prompt, max_new_tokens=count, temperature=0, special=nothing)
        assert len(result.tokens) == count

    return write


def theirs(name: str):
    """The same with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    model = LlamaForCausalLM(config).eval().to(getattr(torch, dtype))
    more = {} if cache is None else {"cache_implementation": cache}

    def write(length: int, count: int) -> None:
        ids = torch.tensor([[each % 1000 + 3 for each in range(length)]])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                **more,
            )
        assert out.shape[1] == length + count

    return write


def work(name: str) -> None:
    """Answer `length count` lines with seconds."""
    write = ours(name) if name in OURS else theirs(name)
    write(SHORT, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        length, count = map(int, line.split())
        start = time.perf_counter()
        write(length, count)
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with torch and transformers; none: ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="*", help="these contenders")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    names = [*OURS, *(THEIRS if arguments.peer else ())]
    names = [name for name in names if not arguments.only or name in arguments.only]
    workers = {}
    for name in names:
        python = sys.executable if name in OURS else arguments.peer
        workers[name] = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    for name, worker in workers.items():
        if worker.stdout.readline().strip() != "ready":
            raise SystemExit(f"{name} cannot be run by {worker.args[0]}")

    def seconds(name: str, length: int, count: int) -> float:
        worker = workers[name]
        print(length, count, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    tokens: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            one = seconds(name, SHORT, 1)
            tokens[name].append((seconds(name, SHORT, arguments.tokens + 1) - one) / arguments.tokens)
        for name in names:
            first[name].append(seconds(name, LONG, 1))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    def best(times: dict[str, list[float]], words: str) -> float:
        return min(
            (statistics.median(each) for name, each in times.items() if name.startswith(words)), default=float("nan")
        )

    print(
        f"{'':18}{'tokens/s':>10}{'x HF fp32':>11}{'x HF bf16':>11}{'first token, ms':>18}{'x HF fp32':>11}{'x HF bf16':>11}"
    )
    for name in names:
        token, start = statistics.median(tokens[name]), statistics.median(first[name])
        spread = (max(tokens[name]) - min(tokens[name])) / token
        row = (
            f"{name:18}{1 / token:10.1f}{best(tokens, 'HF fp32') / token:11.2f}{best(tokens, 'HF bf16') / token:11.2f}"
        )
        row += f"{1e3 * start:18.0f}{best(first, 'HF fp32') / start:11.2f}{best(first, 'HF bf16') / start:11.2f}"
        print(f"{row}   (spread {spread:.0%})")


if __name__ == "__main__":
    main()
