"""A profile's schedules as a picture, before any training: every value and every switch over the whole run.

What is drawn is what runs: a value by epoch stands still within an epoch, and the last epoch does not reach its end value.
Values by epoch and by step share an axis of steps. Where nobody knows how many steps an epoch has, the axis is of epochs, and
what goes by steps is named as not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.schedules import Schedule, Unit, run_length
from apt.errors import UserError

SAMPLES = 400
WIDTH, HEIGHT = 66, 6
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = " " * 12
_INK = "#222222"
_COLOURS = ("#b3541e", "#2a7f62", "#7a3e9d", "#b0204f", "#5b6f00", "#1a56b0")


@dataclass(frozen=True)
class Line:
    """A value over a run: where it was looked at, and what it was; `stands` where it moves in jumps."""

    positions: tuple[int, ...]
    values: tuple[float, ...]
    stands: bool


@dataclass(frozen=True)
class Course:
    """What a schedule does over a run of `length` units: values, where plugins are switched on, and what is not drawn."""

    unit: Unit
    length: int
    lines: dict[str, Line]
    switches: dict[str, int]
    left_out: tuple[str, ...] = ()


def trace_schedules(config: APTConfig, steps_per_epoch: int | None = None) -> Course:
    """Every scheduled value and switch of a profile. Raises `UserError` where there is nothing to draw.

    `steps_per_epoch` is the profile's own where it is not given here.
    """
    schedule = Schedule(config)
    if not schedule.params and not schedule.switches:
        raise UserError("schedules: this profile schedules nothing, so there is nothing to draw")
    steps_per_epoch = steps_per_epoch or config.training.steps_per_epoch
    if steps_per_epoch is None:
        return _by_epoch(config, schedule)
    length, epochs = run_length(config.training, steps_per_epoch)
    lines: dict[str, Line] = {}
    for name, entry in schedule.params.items():
        jumps = entry.by == "epoch"
        positions = tuple(range(0, length, steps_per_epoch)) if jumps else (*_evenly(length), length - 1)
        if len(positions) > 10 * SAMPLES:
            positions = (*_evenly(length), length - 1)
        values = (schedule.get_param(name, at // steps_per_epoch, at, epochs, length) for at in positions)
        lines[name] = Line(positions, tuple(values), jumps)
    switches = {
        plugin: start * steps_per_epoch if unit == "epoch" else start
        for plugin, (unit, start) in schedule.switches.items()
    }
    return Course("step", length, lines, switches)


def plot_schedules(config: APTConfig, steps_per_epoch: int | None = None, path: Path | None = None) -> Path | str:
    """Draw a profile's schedules as PNG or SVG, by the ending of `path`; without one, return a drawing in text."""
    course = trace_schedules(config, steps_per_epoch)
    return _text(course) if path is None else _picture(config.name, course, path)


def _by_epoch(config: APTConfig, schedule: Schedule) -> Course:
    """The course on an axis of epochs, without what goes by steps."""
    epochs = config.training.max_epochs
    if epochs is None:
        raise UserError(
            "training.steps_per_epoch: must be given to draw this profile's schedules: max_steps alone does not say "
            "where an epoch begins"
        )
    lines = {
        name: Line(
            tuple(range(epochs)), tuple(schedule.get_param(name, epoch, None, epochs) for epoch in range(epochs)), True
        )
        for name, entry in schedule.params.items()
        if entry.by == "epoch"
    }
    switches = {plugin: start for plugin, (unit, start) in schedule.switches.items() if unit == "epoch"}
    left_out = (
        *(name for name in schedule.params if name not in lines),
        *(f"enable_{plugin}_at_step" for plugin in schedule.switches if plugin not in switches),
    )
    return Course("epoch", epochs, lines, switches, left_out)


def _evenly(length: int) -> tuple[int, ...]:
    return tuple(sorted({index * length // SAMPLES for index in range(SAMPLES)}))


def _notes(course: Course) -> list[str]:
    """What a reader of the drawing has to know beside it."""
    late = [plugin for plugin, start in course.switches.items() if start >= course.length]
    notes = [f"{plugin} is never on: the run ends before {course.unit} {course.switches[plugin]:,}" for plugin in late]
    if course.left_out:
        what = ", ".join(course.left_out)
        notes.append(f"not drawn, for want of training.steps_per_epoch: {what}")
    return notes


def _picture(name: str, course: Course, path: Path) -> Path:
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a picture is .png or .svg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((start, plugin) for plugin, start in course.switches.items() if start < course.length)
    # Late ones have their names at the left; the latest stands highest, so that no line runs through a name.
    left = [each for each in shown if each[0] >= 0.8 * course.length]
    shown = [*reversed(left), *(each for each in shown if each not in left)]
    # A row for the names of the switches, one below the other, so that near ones do not cover each other.
    heights = [max(0.2, 0.2 * len(shown)), *[1.0] * max(1, len(course.lines))]
    figure = Figure(figsize=(8, 0.9 + 1.3 * sum(heights)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    names, *axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for each, (value, line), colour in zip(axes, course.lines.items(), _COLOURS * len(heights), strict=False):
        # The last value holds to the end of the run.
        each.plot(
            (*line.positions, course.length),
            (*line.values, line.values[-1]),
            color=colour,
            linewidth=1.6,
            drawstyle="steps-post" if line.stands else "default",
        )
        each.set_ylabel(value, rotation=0, ha="right", va="center", fontsize=9)
        each.annotate(
            f"{line.values[-1]:.4g}",
            (1, line.values[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    for each in axes:
        for start, _ in shown:
            each.axvline(start, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", linewidth=0.3)
        each.margins(y=0.15)
    names.axis("off")
    for row, (start, plugin) in enumerate(shown):
        y = 1 - (row + 0.5) / len(shown)
        names.plot((start, start), (y, 0), color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        right = (start, plugin) not in left
        names.annotate(
            f"{plugin} on from {course.unit} {start:,}",
            (start, y),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    names.set_ylim(0, 1)
    if not course.lines:
        axes[0].set_yticks([])
    axes[-1].set_xlabel("\n".join((course.unit, *_notes(course))))
    axes[-1].set_xlim(0, course.length)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels(axes)
    figure.suptitle(f"{name}: schedules", x=0.01, ha="left", fontsize=10, color=_INK)
    # The same profile gives the same bytes.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _text(course: Course) -> str:
    lines: list[str] = []
    for name, line in course.lines.items():
        low, high = min(line.values), max(line.values)
        if low == high:
            lines += [f"{name}: {low:.4g} throughout", ""]
            continue
        head = f"{name}: {line.values[0]:.4g} to {line.values[-1]:.4g} in the last {course.unit}"
        lines += [head, *_bars(_columns(course.length, line), low, high), ""]
    for start, plugin in sorted((start, plugin) for plugin, start in course.switches.items() if start < course.length):
        column = start * WIDTH // course.length
        said = f"{plugin} on from {course.unit} {start:,}"
        fits = column + 2 + len(said) <= WIDTH
        lines.append(_MARGIN + (f"{'':{column}}│ {said}" if fits else f"{said + ' │':>{column + 1}}"))
    end = f"{course.length:,}"
    lines += [
        f"{_MARGIN[:-1]}└{'─' * WIDTH}",
        f"{_MARGIN}0{f'{course.unit}s':^{WIDTH - 1 - len(end)}}{end}",
        *_notes(course),
    ]
    return "\n".join(each.rstrip() for each in lines)


def _columns(length: int, line: Line) -> list[float]:
    """The value at the middle of each column."""
    columns: list[float] = []
    index = 0
    for column in range(WIDTH):
        middle = (column + 0.5) / WIDTH * length
        while index + 1 < len(line.positions) and line.positions[index + 1] <= middle:
            index += 1
        columns.append(line.values[index])
    return columns


def _bars(columns: Sequence[float], low: float, high: float) -> list[str]:
    """Rows of blocks, the highest first, with the range at the left."""
    span = high - low
    filled = [round((value - low) / span * (8 * HEIGHT - 1)) + 1 for value in columns]
    rows: list[str] = []
    for row in reversed(range(HEIGHT)):
        label = f"{high:.4g}" if row == HEIGHT - 1 else f"{low:.4g}" if row == 0 else ""
        bars = "".join(_BLOCKS[max(0, min(8, level - 8 * row))] for level in filled)
        rows.append(f"{label:>{len(_MARGIN) - 2}} │{bars}")
    return rows
