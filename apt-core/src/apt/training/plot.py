"""The picture of a run: losses above, scheduled values and the learning rate below, switches marked in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apt.training.record import PLOT, read_metrics

_INK, _FAINT = "#222222", "#9aa0a6"


def plot_run(folder: Path, target: Path | None = None) -> Path:
    """Draw a run's `metrics.jsonl` as PNG or SVG (by the target's ending); returns the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_metrics(folder)
    train = [event for event in events if event["event"] == "train"]
    held_out = [event for event in events if event["event"] == "evaluation"]
    switches = [event for event in events if event["event"] == "switch"]
    figure = Figure(figsize=(8, 5.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    above.plot(_column(train, "step"), _column(train, "loss"), color=_FAINT, linewidth=0.9, label="training")
    above.plot(
        _column(held_out, "step"),
        _column(held_out, "loss"),
        color="#1a56b0",
        linewidth=1.8,
        marker="o",
        markersize=4,
        label="held out",
    )
    above.set_ylabel("loss (nats a token)")
    if held_out:
        last = held_out[-1]
        above.annotate(
            f"{last['loss']:.3f} nats\n{last['bits_per_byte']:.3f} bits a byte",
            (last["step"], last["loss"]),
            xytext=(-6, 26),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#1a56b0",
        )
    names = sorted({name for event in train for name in _values(event)})
    peak = max((float(str(event["learning_rate"])) for event in train), default=1.0)
    below.plot(
        _column(train, "step"),
        [float(str(e["learning_rate"])) / peak for e in train],
        color=_FAINT,
        linewidth=1.2,
        label=f"learning rate / {peak:.0e}",
    )
    for name, color in zip(names, ("#b3541e", "#2a7f62", "#7a3e9d", "#b0204f", "#5b6f00") * 4, strict=False):
        points = [(event["step"], _values(event)[name]) for event in train if name in _values(event)]
        below.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=name, drawstyle="steps-pre")
    below.set_xlabel("step")
    below.set_ylabel("scheduled")
    for axes in (above, below):
        for event in switches:
            axes.axvline(float(str(event["step"])), color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.3)
    above.legend(frameon=False, fontsize=8, loc="upper right")
    below.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    top = above.get_ylim()[1]
    for event in switches:
        above.annotate(
            f"{event['plugin']} on",
            (float(str(event["step"])), top),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    above.set_title(folder.name, loc="left", fontsize=10, color=_INK)
    path = folder / PLOT if target is None else target
    figure.savefig(path)
    return path


def _column(events: Sequence[dict[str, object]], name: str) -> list[float]:
    return [float("nan") if event[name] is None else float(str(event[name])) for event in events]


def _values(event: dict[str, object]) -> dict[str, float]:
    values = event.get("values")
    return values if isinstance(values, dict) else {}
