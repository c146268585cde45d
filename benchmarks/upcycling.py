"""What experts are worth, and growing them in mid-run: one small model, trained six ways from each seed.

``python benchmarks/upcycling.py run --out DIR`` trains those of equal tokens, ``cost --out DIR`` measures what a step costs
(on a quiet machine), ``run --longer --out DIR`` trains the dense runs of equal time, and ``draw --out DIR FILE`` prints the table
and draws the figure of docs/moe.md. About half an hour of one thread in all; it goes on where it was stopped.

All runs read Python's standard library as bytes in the same order, with the same learning rate and their own cosine
decay to the end of the run. Experts: 8 of the dense layer's size, 2 for each token, nothing dropped, from the start
(``scratch``) or from 40 % of the run on (``upcycled``, ``redrawn``: half of the hidden units drawn anew; ``fresh``: the
optimizer's moments not carried). Equal tokens: all these beside ``dense``, the same number of steps. Equal time: beside
``dense+``, dense runs that are longer by what the experts cost, so that they take the time of ``scratch`` and of
``upcycled``. What a step costs is measured beforehand, dense and sparse in turn, as CPU time of this process.
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
from apt.modeling.compose import ModelBuilder
from apt.modeling.parts import set_active
from apt.training.optim import make_optimizer
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

STEPS, SWITCH, EVALUATIONS = 1000, 0.4, 8
PROFILE = """
name: upcycling
plugins: {plugins}
model:
  {{d_model: 64, num_heads: 2, num_layers: 2, d_ff: 256, max_seq_len: 64, dropout: 0.0, attention_dropout: 0.0,
    attention: sdpa, ffn: {ffn}}}
training:
  {{max_steps: {steps}, steps_per_epoch: {steps}, max_epochs: 1, batch_size: 24, learning_rate: 3.0e-3, warmup_steps: 100,
    weight_decay: 0.1, gradient_clip: 1.0, min_lr_ratio: 0.0, seed: {seed}, save_every: {steps}, keep_last: 1,
    switch_tolerance: {tolerance}}}
schedules: {schedules}
data: {{source: stdlib}}
evaluation: {{eval_every: {every}, max_batches: 40, sample_tokens: 0}}
monitoring: {{plot: false, log_every: 20}}
hardware: {{threads: 1}}
"""
EXPERTS = "provider: moe, experts: 8, router: {provider: topk_default, top_k: 2}"
ARMS = {
    "dense": ("default", False),
    "scratch": (f"{{{EXPERTS}, upcycle: false}}", False),
    "upcycled": (f"{{{EXPERTS}}}", True),
    "redrawn": (f"{{{EXPERTS}, redraw: 0.5}}", True),
    "fresh": (f"{{{EXPERTS}, moments: fresh}}", True),
}


def config(arm: str, seed: int, steps: int) -> APTConfig:
    """The profile of one run."""
    ffn, late = ARMS[arm]
    schedules = f"{{enable_moe_at_step: {int(SWITCH * steps)}}}" if late else "{}"
    text = PROFILE.format(
        plugins="[moe]" if late else "[]",
        ffn=ffn,
        steps=steps,
        seed=seed,
        every=steps // EVALUATIONS,
        # What is drawn anew is not what it was.
        tolerance="null" if arm == "redrawn" else "1e-4",
        schedules=schedules,
    )
    return config_of(text)


def step_cost(repeats: int = 15) -> dict[str, float]:
    """CPU seconds of a training step, dense and sparse in turn: medians."""
    models = {}
    for arm in ("dense", "scratch"):
        made = config(arm, 0, STEPS)
        model = ModelBuilder(made).build_model()
        set_active(model, "moe", True)
        models[arm] = (model, make_optimizer(model, made))
    tokens = torch.randint(3, 259, (24, 65))
    seen: dict[str, list[float]] = {arm: [] for arm in models}
    for _ in range(repeats):
        for arm, (model, optimizer) in models.items():
            start = time.process_time()
            output = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
            torch.autograd.backward(loss + sum(output.losses.values()))
            optimizer.step()
            optimizer.zero_grad()
            seen[arm].append(time.process_time() - start)
    return {arm: statistics.median(each[2:]) for arm, each in seen.items()}


def run(out: Path, seeds: list[int], longer: bool) -> None:
    """Train what is not there yet: the runs of equal tokens, or the `longer` dense ones of equal time."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    lengths = dict.fromkeys(ARMS, STEPS)
    if longer:
        ratio = cost_ratio(out)
        late = SWITCH + (1 - SWITCH) * ratio
        lengths = {"dense+scratch": round(STEPS * ratio), "dense+upcycled": round(STEPS * late)}
    for seed in seeds:
        for name, steps in lengths.items():
            folder = out / f"{name}-{seed}"
            if (folder / "result.json").exists():
                continue
            start = time.process_time()
            result = Trainer(
                config(name.partition("+")[0], seed, steps - steps % EVALUATIONS),
                folder,
                resume="auto",
                console=Console(quiet=True),
            ).fit()
            seconds = time.process_time() - start
            told = {
                "loss": result.validation.loss,
                "bits_per_byte": result.validation.bits_per_byte,
                "seconds": seconds,
            }
            (folder / "result.json").write_text(json.dumps(told))
            print(f"{name:15} seed {seed}: {told['loss']:.4f} nats a byte, {seconds:.0f} s", flush=True)


def cost_ratio(out: Path) -> float:
    """What a step with experts costs, in dense steps."""
    cost = json.loads((out / "costs.json").read_text())
    return float(cost["scratch"] / cost["dense"])


def read(out: Path) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Run -> seed -> (step, held-out loss)."""
    curves: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for folder in sorted(out.glob("*/result.json")):
        name, _, seed = folder.parent.name.rpartition("-")
        events = [event for event in read_metrics(folder.parent) if event["event"] == "evaluation"]
        curves.setdefault(name, {})[int(seed)] = [(int(str(e["step"])), float(str(e["loss"]))) for e in events]
    return curves


def draw(out: Path, picture: Path) -> None:
    """The table and the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, ratio = read(out), cost_ratio(out)

    def spent(name: str, step: int, steps: int) -> float:
        """Time until a step, in dense steps."""
        if name.startswith("dense"):
            return step
        switch = 0 if name == "scratch" else int(SWITCH * steps)
        return min(step, switch) + max(0, step - switch) * ratio

    print(f"a step with experts costs {ratio:.2f} dense ones\n")
    heads = (
        "run",
        "steps",
        "time (dense steps)",
        "held-out loss",
        "max - min",
        "to dense of equal tokens",
        "of equal time",
    )
    print(f"| {' | '.join(heads)} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    last = {name: {seed: curve[-1][1] for seed, curve in runs.items()} for name, runs in curves.items()}
    for name, runs in curves.items():
        steps = next(iter(runs.values()))[-1][0]
        losses = list(last[name].values())
        rivals = ["dense", "dense+scratch" if name == "scratch" else "dense+upcycled"]
        against = []
        for rival in rivals:
            paired = [last[name][seed] - last[rival][seed] for seed in runs if seed in last.get(rival, {})]
            plain = name.startswith("dense") or not paired
            against.append(
                "" if plain else f"{statistics.mean(paired):+.4f} ({min(paired):+.4f} to {max(paired):+.4f})"
            )
        print(
            f"| {name} | {steps} | {spent(name, steps, steps):.0f} | {statistics.mean(losses):.4f} | "
            f"{max(losses) - min(losses):.4f} | {' | '.join(against)} |"
        )
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours = dict(zip(curves, pyplot.get_cmap("tab10").colors, strict=False))
    for axis, by_time in zip(axes, (False, True), strict=True):
        for name, runs in curves.items():
            if not by_time and "+" in name:
                continue
            for seed, curve in runs.items():
                steps = curve[-1][0]
                x = [spent(name, step, steps) if by_time else step for step, _ in curve]
                label = name if seed == min(runs) else None
                axis.plot(x, [loss for _, loss in curve], color=colours[name], alpha=0.7, lw=1.2, label=label)
                axis.plot(x[-1:], [curve[-1][1]], "o", color=colours[name], ms=3)
        axis.set_xlabel("CPU time, in dense steps" if by_time else "steps of 1,536 bytes")
        axis.grid(alpha=0.3)
    lowest = min(min(each.values()) for each in last.values())
    axes[0].set_ylim(lowest - 0.03, lowest + 0.6)
    axes[0].axvline(SWITCH * STEPS, color="grey", lw=0.8, ls=":")
    axes[0].set_ylabel("held-out loss, nats a byte")
    axes[0].set_title("equal tokens")
    axes[1].set_title("equal time")
    axes[1].legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    print(f"\n{picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--longer", action="store_true", help="the dense runs of equal time; needs the cost")
    costs = commands.add_parser("cost")
    costs.add_argument("--out", type=Path, required=True)
    figure = commands.add_parser("draw")
    figure.add_argument("--out", type=Path, required=True)
    figure.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.out, arguments.seeds, arguments.longer)
    elif arguments.command == "cost":
        torch.set_num_threads(1)
        (arguments.out / "costs.json").write_text(json.dumps(step_cost()))
        print(f"a step with experts costs {cost_ratio(arguments.out):.2f} dense ones")
    else:
        draw(arguments.out, arguments.picture)


if __name__ == "__main__":
    main()
