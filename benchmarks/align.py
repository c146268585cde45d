"""What consistency losses are worth where text repeats: one tiny model, 12 kB of text, 34 passes, trained six ways.

``python benchmarks/align.py run TEXT --out DIR [--seeds 0 1 2] [--arms plain rdrop] [--size BYTES]`` trains what is not there
yet, from any text of at least 42 kB in UTF-8; ``python benchmarks/align.py table --out DIR`` prints the table of docs/align.md.
It goes on where it was stopped; a run of `plain` takes a minute of one thread, all of them together 25.

The first BYTES are trained on, the next 30 kB are held out. Each arm has the same steps, the same batches in the same order, the
same dropout and learning rate. `plain` also averages its weights (`mean_teacher` at weight 0), which changes nothing else: one
run gives the baseline and the averaged weights. `doubled` is R-Drop's own control: a batch of twice the size, which costs
what R-Drop's second pass costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import config_of
from rich.console import Console

from apt.core.config import APTConfig
from apt.core.resolve import resolve_config
from apt.data.corpus import split_of
from apt.data.prepare import prepare
from apt.training.checkpoint import load_run
from apt.training.evaluate import evaluate
from apt.training.record import read_metrics
from apt.training.trainer import Trainer
from apt.training.weights import list_weights, use_weights

STEPS, EVALUATIONS, BATCH, CONTEXT = 800, 10, 8, 64
LEARNT, HELD_OUT, PIECE = 12_000, 30_000, 1_500
"""Bytes that are trained on, bytes behind them that are held out, and characters of a document."""
PROFILE = """
name: align
plugins: [align]
model:
  {{d_model: 96, num_heads: 4, num_layers: 3, d_ff: 384, max_seq_len: {context}, dropout: 0.1, attention_dropout: 0.0,
    attention: sdpa, ffn: default, align: {align}}}
training:
  {{max_steps: {steps}, batch_size: {batch}, learning_rate: 3.0e-3, warmup_steps: 50, weight_decay: 0.1, gradient_clip: 1.0,
    min_lr_ratio: 0.1, seed: {seed}, save_every: {steps}, keep_last: 1}}
data: {{source: files, path: {text}}}
evaluation: {{eval_every: {every}, sample_tokens: 0}}
monitoring: {{plot: false, log_every: 50}}
hardware: {{threads: 1}}
"""
AVERAGED = "{provider: mean_teacher, decay: 0.99, weight: 0.0}"
ARMS = {
    "plain": (AVERAGED, BATCH),
    "doubled": (AVERAGED, 2 * BATCH),
    "rdrop": ("{provider: rdrop, weight: 1.0}", BATCH),
    "mean_teacher": ("{provider: mean_teacher, decay: 0.99, weight: 1.0}", BATCH),
    "layer": ("{provider: bistate_default, state: layer}", BATCH),
    "evidence": ("{provider: bistate_default, state: evidence}", BATCH),
}


def cut(text: Path, folder: Path, size: int) -> None:
    """Write the text as documents, whose names say to APT which of them are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    read = text.read_bytes()[: size + HELD_OUT].decode(errors="ignore")
    if len(read.encode()) < size + HELD_OUT - 4:
        raise SystemExit(f"{text}: has {len(read.encode()):,} bytes; {size + HELD_OUT:,} are needed")
    number = 0
    for start in range(0, len(read), PIECE):
        wanted = "train" if start < size else "validation"
        while split_of(f"{number:04}.txt") != wanted:
            number += 1
        (folder / f"{number:04}.txt").write_text(read[start : start + PIECE])
        number += 1


def config(arm: str, seed: int, text: Path) -> APTConfig:
    """The profile of one run."""
    align, batch = ARMS[arm]
    filled = PROFILE.format(
        align=align, batch=batch, seed=seed, steps=STEPS, every=STEPS // EVALUATIONS, context=CONTEXT, text=text
    )
    return config_of(filled)


def run(text: Path, out: Path, seeds: list[int], arms: list[str], size: int) -> None:
    """Train what is not there yet; a line for each run."""
    torch.set_num_threads(1)
    pieces = out / "text"
    if not pieces.is_dir():
        cut(text, pieces, size)
    for seed in seeds:
        for arm in arms:
            folder = out / f"{arm}-{seed}"
            if (folder / "result.json").exists():
                continue
            start = time.process_time()
            Trainer(config(arm, seed, pieces), folder, resume="auto", console=Console(quiet=True)).fit()
            seconds = time.process_time() - start
            losses = [float(str(e["loss"])) for e in read_metrics(folder) if e["event"] == "evaluation"]
            told = {"seconds": seconds, "best": min(losses), "curve": losses, "losses": score(folder)}
            (folder / "result.json").write_text(json.dumps(told))
            print(f"{arm:13} seed {seed}: {told['losses']}, best {min(losses):.4f}, {seconds:.0f} s", flush=True)


def score(folder: Path) -> dict[str, float]:
    """The held-out loss of each set of weights that the last checkpoint holds."""
    losses = {}
    for name in list_weights(load_run(folder).folder):
        loaded = load_run(folder)
        use_weights(loaded.folder, loaded.model, name)
        split = prepare(loaded.config, resolve_config(loaded.config), Console(quiet=True), loaded.folder)
        held_out = split.splits["validation"]
        losses[name] = evaluate(loaded.model, held_out, seq_len=CONTEXT, batch_size=BATCH)[0].loss
    return losses


def table(out: Path) -> None:
    """Means over the seeds, their spread, and the difference to `plain` of the same seed."""
    results = {
        arm: {
            int(f.parent.name.rpartition("-")[2]): json.loads(f.read_text())
            for f in sorted(out.glob(f"{arm}-*/result.json"))
        }
        for arm in ARMS
    }
    plain = results["plain"]
    print(
        "| arm | weights | seeds | loss at the end | to plain | best of the run | CPU time |\n| - | - | - | - | - | - | - |"
    )
    for arm, runs in results.items():
        for weights in sorted({name for each in runs.values() for name in each["losses"]}, reverse=True):
            ends = {seed: each["losses"][weights] for seed, each in runs.items()}
            gaps = [end - plain[seed]["losses"]["trained"] for seed, end in ends.items() if seed in plain]
            times = [each["seconds"] / plain[seed]["seconds"] for seed, each in runs.items() if seed in plain]
            best = f"{statistics.mean(each['best'] for each in runs.values()):.3f}" if weights == "trained" else ""
            print(
                f"| {arm} | {weights} | {len(ends)} | {spread(list(ends.values()))} | {spread(gaps, sign='+')} | {best} "
                f"| {statistics.median(times):.2f} |"
            )


def spread(values: list[float], sign: str = "") -> str:
    """The mean, and the standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.3f} ± {deviation:.3f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run")
    train.add_argument("text", type=Path)
    train.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    train.add_argument("--size", type=int, default=LEARNT, metavar="BYTES", help="trained on; one size a DIR")
    train.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    show = commands.add_parser("table")
    for each in (train, show):
        each.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.text, arguments.out, arguments.seeds, arguments.arms, arguments.size)
    else:
        table(arguments.out)


if __name__ == "__main__":
    main()
