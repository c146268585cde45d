"""What each attention is worth: one small model with Tri-Vein, autopoietic and its rivals' attention, from three seeds each.

``python benchmarks/attention.py run --out DIR`` trains those of equal tokens, ``cost --out DIR`` measures what a step costs
(on a quiet machine), ``run --longer --out DIR`` trains those of equal time, and ``draw --out DIR FILE`` prints the tables and
draws the figure of docs/attention.md. Everything goes on where it was stopped; results are lines of DIR/results.jsonl.

All runs read Python's standard library as bytes in the same order. The learning rate is warmed up, constant, and falls
linearly over the last fifth. The first seed is trained at both `RATES`; the one that is better for an attention serves its other
seeds, since attentions differ in the rate that they bear: a product of two weights, such as Tri-Vein has, takes larger steps.
*Equal tokens*: the same number of steps. *Equal time*: a run has as many steps as fit in the time of multi-head attention's,
by the cost of a step, and a decay of its own; since the rate is constant before it, such a run goes on from the last
checkpoint of the run of equal tokens that both have in common (`apt-core branch`). A step's cost is CPU time of one thread,
the median over rounds in which all attentions take one step each in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import config_of
from rich.console import Console
from torch import Tensor, nn

from apt.core.config import APTConfig
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.testing.measure import saved_bytes
from apt.training.optim import make_optimizer
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

MARKS = 10
"""Checkpoints in each run of equal tokens."""
RATES = (1.5e-3, 3e-3)
FIRST = 0
"""The seed that chooses between the rates."""


@dataclass(frozen=True)
class Size:
    """Of the model, its batches, and the runs of equal tokens; there are 4 heads."""

    d_model: int
    num_layers: int
    d_ff: int
    seq: int
    batch: int
    steps: int


SIZES = {"small": Size(64, 2, 256, 64, 16, 300), "quickstart": Size(128, 4, 512, 128, 8, 300)}
PROFILE = """
name: attention
model:
  {{d_model: {d_model}, num_heads: 4, num_layers: {num_layers}, d_ff: {d_ff}, max_seq_len: {seq}, dropout: 0.0,
    attention_dropout: 0.0, attention: {{{attention}}}}}
training:
  {{max_steps: {steps}, steps_per_epoch: 1000000, max_epochs: 1, batch_size: {batch}, learning_rate: {rate}, warmup_steps: 50,
    weight_decay: 0.1, gradient_clip: 1.0, lr_schedule: wsd, min_lr_ratio: 0.0, seed: {seed}, save_every: {every}, keep_last: 10}}
data: {{source: stdlib}}
evaluation: {{eval_every: {often}, max_batches: 30, sample_tokens: 0}}
monitoring: {{plot: false, log_every: 20}}
hardware: {{threads: 1}}
"""
REFERENCE = "multi-head"
ARMS = {
    REFERENCE: "provider: sdpa",
    "grouped, 2 of 4": "provider: sdpa, num_kv_heads: 2",
    "multi-query": "provider: sdpa, num_kv_heads: 1",
    "multi-query, half heads": "provider: sdpa, num_kv_heads: 1, head_width: {half}",
    "narrow d/2": "provider: sdpa, head_width: {half}",
    "narrow d/4": "provider: sdpa, head_width: {quarter}",
    "narrow d/8": "provider: sdpa, head_width: {eighth}",
    "tva d/2": "provider: tva_default, rank: {half}",
    "tva d/4": "provider: tva_default, rank: {quarter}",
    "tva d/8": "provider: tva_default, rank: {eighth}",
    "autopoietic": "provider: autopoietic",
}


def config(size: Size, arm: str, rate: float, seed: int, steps: int) -> APTConfig:
    """The profile of one run."""
    width = size.d_model // 4
    text = PROFILE.format(
        **{**asdict(size), "steps": steps},
        attention=ARMS[arm].format(half=width // 2, quarter=width // 4, eighth=width // 8),
        rate=rate,
        seed=seed,
        every=size.steps // MARKS,
        often=size.steps // 4,
    )
    return config_of(text)


def run(size: Size, out: Path, seeds: list[int], arms: list[str], longer: bool) -> None:
    """Train what is not there yet: the runs of equal tokens, or those of equal time."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    costs = read_costs(out) if longer else {}
    for seed in seeds:
        for arm in arms:
            if longer:
                steps = round(size.steps * costs[REFERENCE]["step"] / costs[arm]["step"])
                train(size, out, arm, better_rate(out, arm), seed, steps)
            else:
                for rate in RATES if seed == FIRST else [better_rate(out, arm)]:
                    train(size, out, arm, rate, seed, None)


def train(size: Size, out: Path, arm: str, rate: float, seed: int, longer: int | None) -> None:
    """One run, unless it is there: of equal tokens, or of `longer` steps, which begins with what both have in common."""
    equal, steps = ("tokens", size.steps) if longer is None else ("time", longer)
    have = {(line["arm"], line["rate"], line["seed"], line["equal"]) for line in read(out)}
    if (arm, rate, seed, equal) in have:
        return
    trunk = out / f"{arm.replace(' ', '-').replace('/', '_')}-{rate}-{seed}"
    start = time.process_time()
    folder = trunk
    if longer is None or arm != REFERENCE:
        branch = None
        if longer is not None:
            folder = trunk.with_name(f"{trunk.name}-time")
            shutil.rmtree(folder, ignore_errors=True)
            # Both are undecayed up to four fifths of the shorter one.
            every = size.steps // MARKS
            branch = trunk / f"step-{int(0.8 * min(steps, size.steps)) // every * every:06d}"
        made = config(size, arm, rate, seed, steps)
        resume = "auto" if longer is None else "never"
        if Trainer(made, folder, branch=branch, resume=resume, console=Console(quiet=True)).fit().interrupted:
            raise SystemExit(f"{arm}, seed {seed}: interrupted; the same command goes on with it")
    curve = curve_of(folder)
    line = {"arm": arm, "rate": rate, "seed": seed, "equal": equal, "steps": steps, "curve": curve}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    spent = time.process_time() - start
    print(f"{arm:24} {rate:g}, seed {seed}, {steps} steps: {curve[-1][1]:.4f} nats a byte, {spent:.0f} s", flush=True)


def better_rate(out: Path, arm: str) -> float:
    """The rate at which the first seed's run of equal tokens ended lower."""
    ends = {
        line["rate"]: line["curve"][-1][1]
        for line in read(out)
        if (line["arm"], line["seed"], line["equal"]) == (arm, FIRST, "tokens")
    }
    if set(ends) != set(RATES):
        raise SystemExit(f"{arm}: seed {FIRST} comes first, at every rate of {RATES}")
    return min(ends, key=ends.__getitem__)


def curve_of(folder: Path) -> list[tuple[int, float]]:
    """(step, held-out loss) of each evaluation."""
    events = [event for event in read_metrics(folder) if event["event"] == "evaluation"]
    return [(int(str(event["step"])), float(str(event["loss"]))) for event in events]


def read(out: Path) -> list[dict[str, Any]]:
    """All results."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_costs(out: Path) -> dict[str, dict[str, float]]:
    """Arm -> what it costs, the median over the calls of `cost`."""
    calls = [json.loads(line) for line in (out / "costs.jsonl").read_text().splitlines()]
    return {arm: {key: statistics.median(call[arm][key] for call in calls) for key in calls[0][arm]} for arm in ARMS}


def cost(size: Size, out: Path, rounds: int) -> None:
    """Measure all arms in turn, and add a line of medians."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(3, 259, (size.batch, size.seq + 1), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], None]] = {}
    fixed: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        made = config(size, arm, RATES[0], 0, size.steps)
        torch.manual_seed(0)
        model = ModelBuilder(made).build_model()
        steps[arm] = stepper(model, make_optimizer(model, made), tokens)
        fixed[arm] = {
            "parameters": sum(each.numel() for each in model.parameters()),
            "kept": saved_bytes(model, lambda model=model: model(tokens[:, :-1])) / (size.batch * size.seq),  # type: ignore[misc]
            "cache": cache_bytes(model, size.seq),
        }
    seen: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, step in steps.items():
            start = time.process_time()
            step()
            seen[arm].append(time.process_time() - start)
    line = {arm: {**fixed[arm], "step": statistics.median(times[2:])} for arm, times in seen.items()}
    with (out / "costs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for arm, each in line.items():
        print(
            f"{arm:24} {1000 * each['step']:6.1f} ms a step, {each['step'] / line[REFERENCE]['step']:.3f}", flush=True
        )


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Callable[[], None]:
    """One training step."""

    def step() -> None:
        output = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cache_bytes(model: Decoder, tokens: int) -> float:
    """Bytes of all layers' caches for each token, in float32."""
    caches = model.create_cache(1, tokens)
    tensors = [each for cache in caches for each in vars(cache).values() if isinstance(each, Tensor)]
    return sum(each.numel() * 4 for each in tensors if each.is_floating_point()) / tokens


def draw(size: Size, out: Path, picture: Path) -> None:
    """The table and the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs, rates = read_costs(out), {arm: better_rate(out, arm) for arm in ARMS}
    results = [line for line in read(out) if line["rate"] == rates[line["arm"]]]
    lines = {(line["arm"], line["seed"], line["equal"]): line for line in results}
    tokens_a_step = size.batch * size.seq
    print(
        "| attention | parameters | cache, bytes a token | kept for backward, kB a token | tokens/s | rate | loss, equal tokens",
        end="",
    )
    print(" | to multi-head | steps in equal time | loss, equal time | to multi-head |\n|" + " --- |" * 11)
    for arm in ARMS:
        each = costs[arm]
        cells = [arm, f"{each['parameters']:,.0f}", f"{each['cache']:,.0f}", f"{each['kept'] / 1000:.1f}"]
        cells += [f"{tokens_a_step / each['step']:,.0f}", f"{rates[arm]:g}"]
        for equal in ("tokens", "time"):
            if equal == "time":
                cells.append(f"{size.steps * costs[REFERENCE]['step'] / each['step']:.0f}")
            seeds = sorted(seed for one, seed, other in lines if (one, other) == (arm, equal))
            losses = [lines[arm, seed, equal]["curve"][-1][1] for seed in seeds]
            against = [
                lines[arm, seed, equal]["curve"][-1][1] - lines[REFERENCE, seed, "tokens"]["curve"][-1][1]
                for seed in seeds
                if (REFERENCE, seed, "tokens") in lines
            ]
            cells += [_spread(losses), "" if arm == REFERENCE else _spread(against, sign="+")]
        print("| " + " | ".join(cells) + " |")
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    colours = dict(zip(ARMS, pyplot.get_cmap("tab20")(range(20)), strict=False))
    marks = {"tva": "o", "narrow": "x", "multi-head": "s", "autopoietic": "^"}
    for axis, equal in zip(axes, ("tokens", "time"), strict=True):
        for number, arm in enumerate(ARMS):
            runs = [line for line in results if (line["arm"], line["equal"]) == (arm, equal)]
            if not runs:
                continue
            losses = [line["curve"][-1][1] for line in runs]
            mean = statistics.mean(losses)
            axis.errorbar(
                costs[arm]["cache"] * 2 ** ((number - len(ARMS) / 2) / 50),  # beside one another where caches are equal
                mean,
                [[mean - min(losses)], [max(losses) - mean]],
                fmt=marks.get(arm.split(" ")[0], "D"),
                color=colours[arm],
                label=arm,
                capsize=3,
            )
        axis.set_xscale("log", base=2)
        axis.set_xlabel("KV cache, bytes a token")
        axis.set_title(f"equal {equal}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, nats a byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(picture, dpi=120)
    print(f"\n{picture}")


def _spread(values: list[float], sign: str = "") -> str:
    """The mean, and the least and the greatest."""
    if not values:
        return ""
    mean, low, high = (f"{value:{sign}.4f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs, costs, figure = (commands.add_parser(name) for name in ("run", "cost", "draw"))
    for each in (runs, costs, figure):
        each.add_argument("--out", type=Path, required=True, metavar="DIR")
        each.add_argument("--size", choices=SIZES, default="quickstart", help="that of the table, or a smaller one")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    runs.add_argument("--longer", action="store_true", help="the runs of equal time; needs the cost")
    costs.add_argument("--rounds", type=int, default=15)
    figure.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.command == "run":
        run(size, arguments.out, arguments.seeds, arguments.arms, arguments.longer)
    elif arguments.command == "cost":
        cost(size, arguments.out, arguments.rounds)
    else:
        draw(size, arguments.out, arguments.picture)


if __name__ == "__main__":
    main()
