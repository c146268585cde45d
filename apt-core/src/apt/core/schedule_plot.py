"""A profile's schedules as a picture, before any training: every value and every switch over the whole run.

What is drawn is what runs: a value by epoch stands still within an epoch, and the last epoch does not reach its end value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.schedules import Schedule, run_length
from apt.errors import UserError

SAMPLES = 400
WIDTH, HEIGHT = 64, 6
_BLOCKS = " ▁▂▃▄▅▆▇█"
_INK = "#222222"
_COLOURS = ("#b3541e", "#2a7f62", "#7a3e9d", "#b0204f", "#5b6f00", "#1a56b0")


@dataclass(frozen=True)
class Course:
    """What a schedule does over a run of `length` steps: positions and values, and the steps where plugins are switched on."""

    length: int
    values: dict[str, tuple[list[int], list[float]]]
    switches: dict[str, int]


def trace_schedules(config: APTConfig, steps_per_epoch: int) -> Course:
    """Every scheduled value and switch of a profile. Raises `UserError` where it schedules nothing."""
    schedule = Schedule(config)
    if not schedule.params and not schedule.switches:
        raise UserError("schedules: this profile schedules nothing, so there is nothing to draw")
    length, epochs = run_length(config.training, steps_per_epoch)
    even = {round((length - 1) * index / (SAMPLES - 1)) for index in range(SAMPLES)}
    # A value that moves by epoch jumps: it is looked at on both sides of each edge.
    edges = {step for edge in range(0, length, steps_per_epoch) for step in (edge - 1, edge) if step >= 0}
    positions = sorted(even | edges)
    values = {
        name: (
            positions,
            [schedule.get_param(name, step // steps_per_epoch, step, epochs, length) for step in positions],
        )
        for name in schedule.params
    }
    switches = {
        plugin: start * steps_per_epoch if unit == "epoch" else start
        for plugin, (unit, start) in schedule.switches.items()
    }
    return Course(length, values, switches)


def plot_schedules(config: APTConfig, steps_per_epoch: int, path: Path | None = None) -> Path | str:
    """Draw a profile's schedules as PNG or SVG, by the ending of `path`; without one, return a drawing in text."""
    course = trace_schedules(config, steps_per_epoch)
    return _text(course) if path is None else _picture(config.name, course, path)


def _picture(name: str, course: Course, path: Path) -> Path:
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a picture is .png or .svg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, len(course.values))
    figure = Figure(figsize=(8, 0.9 + 1.3 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for each, (value, points), colour in zip(axes, course.values.items(), _COLOURS * rows, strict=False):
        each.plot(*points, color=colour, linewidth=1.6)
        each.set_ylabel(value, rotation=0, ha="right", va="center", fontsize=9)
    for each in axes:
        for start in course.switches.values():
            each.axvline(start, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", linewidth=0.3)
        each.margins(y=0.15)
    for plugin, start in course.switches.items():
        axes[0].annotate(
            f"{plugin} on",
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    axes[-1].set_xlabel("step")
    axes[-1].set_xlim(0, course.length)
    axes[0].set_title(f"{name}: schedules", loc="left", fontsize=10, color=_INK, pad=14)
    figure.savefig(path)
    return path


def _text(course: Course) -> str:
    lines: list[str] = []
    for name, (positions, values) in course.values.items():
        columns = _columns(course.length, positions, values)
        low, high = min(values), max(values)
        lines += [f"{name}: {values[0]:.4g} -> {values[-1]:.4g}", *_bars(columns, low, high), ""]
    marks = [" "] * (WIDTH + 1)
    for start in course.switches.values():
        marks[min(WIDTH, int(start / course.length * WIDTH))] = "|"
    if course.switches:
        said = ", ".join(f"{plugin} from step {start:,}" for plugin, start in course.switches.items())
        lines += [" " * 11 + "".join(marks).rstrip(), f"on: {said}"]
    lines.append(f"{'':10} 0{'step':^{WIDTH - 2}}{course.length:,}")
    return "\n".join(lines)


def _columns(length: int, positions: Sequence[int], values: Sequence[float]) -> list[float]:
    """The value at the middle of each column."""
    columns: list[float] = []
    index = 0
    for column in range(WIDTH):
        middle = (column + 0.5) / WIDTH * length
        while index + 1 < len(positions) and positions[index + 1] <= middle:
            index += 1
        columns.append(values[index])
    return columns


def _bars(columns: Sequence[float], low: float, high: float) -> list[str]:
    """Rows of blocks, the highest first, with the range at the left."""
    span = (high - low) or 1.0
    filled = [round((value - low) / span * (8 * HEIGHT - 1)) + 1 for value in columns]
    rows = []
    for row in reversed(range(HEIGHT)):
        label = f"{high:10.4g}" if row == HEIGHT - 1 else f"{low:10.4g}" if row == 0 else " " * 10
        rows.append(label + " " + "".join(_BLOCKS[max(0, min(8, level - 8 * row))] for level in filled))
    return rows
