"""The picture of a run, or of several side by side: losses, learning rate, scheduled values, expert load, switches marked in all.

Lines carry their names and last values at their ends; the colours are those of Okabe and Ito (2008), which nearly everybody can
tell apart, and cividis (Nunez, Anderton and Renslow 2018, arXiv:1712.01662).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from apt.core.local import real_path
from apt.errors import UserError
from apt.training.record import METRICS, PLOT, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON = "comparison.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _FAINT = "#222222", "#8a9099"
LABEL = 28
"""Characters of a run's name that the picture has room for."""
_SMOOTHED = 100
"""Points of the training loss from which on a mean is drawn over them."""
TABLES = 4
"""Heat maps of single blocks that a picture has of one metric at most, evenly spread; the mean over all blocks is drawn too."""
_OF_EVERY_EVALUATION = frozenset({"event", "step", "epoch", "split", "loss", "bits_per_byte", "values", "plugins_on"})

Points = list[tuple[float, float]]


@dataclass
class Course:
    """What `metrics.jsonl` of one run has to draw: points (step, value), and tables (step, values of the vector)."""

    name: str
    colour: str
    train: Points = field(default_factory=list)
    held_out: Points = field(default_factory=list)
    bits_per_byte: float = math.nan
    rate: Points = field(default_factory=list)
    values: dict[str, Points] = field(default_factory=dict)
    measured: dict[str, Points] = field(default_factory=dict)
    tables: dict[str, list[tuple[float, list[float]]]] = field(default_factory=dict)
    switches: list[tuple[float, str]] = field(default_factory=list)
    last: float = 0


def plot_run(folder: Path, target: Path | None = None) -> Path:
    """Draw one run, into ``loss.png`` in its folder where no other file is named."""
    return plot_runs([folder], target)


def plot_runs(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Draw runs as PNG or SVG (by the target's ending); returns the file.

    Several go to ``comparison.png`` in the working directory where no other file is named. Raises `UserError` where a folder
    holds no metrics, or none of training yet.
    """
    path = target or (folders[0] / PLOT if len(folders) == 1 else Path(COMPARISON))
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a picture is .png or .svg")
    if len(folders) > len(COLOURS):
        raise UserError(f"{len(folders)} runs are too many for one picture; {len(COLOURS)} can be told apart")
    names = _names(folders)
    courses = [_read(folder, name, colour) for folder, name, colour in zip(folders, names, COLOURS, strict=False)]
    _draw(courses).savefig(path)
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with those above where two have the same, cut at the left where they are too long for a label."""
    whole = [real_path(folder) for folder in folders]
    own = [path.name for path in whole]
    names = [path.name if own.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in whole]
    return [name if len(name) <= LABEL else f"…{name[1 - LABEL :]}" for name in names]


def _read(folder: Path, name: str, colour: str) -> Course:
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: holds no {METRICS}; give the folder of a run")
    course = Course(name, colour)
    for event in read_metrics(folder):
        with contextlib.suppress(KeyError, ValueError):  # an event that is damaged is left out
            _add(event, course)
    if not course.train:
        raise UserError(f"{folder}: has no step of training in its {METRICS} yet")
    return course


def _add(event: Mapping[str, object], course: Course) -> None:
    """Put what there is to draw of one event into the course. Raises `KeyError` or `ValueError` for one that is damaged."""
    step = float(str(event.get("step", 0)))
    if event["event"] == "train":
        loss, rate, values = _number(event["loss"]), _number(event["learning_rate"]), event["values"]
        course.last = max(course.last, step)
        course.train.append((step, loss))
        course.rate.append((step, rate))
        for key, value in values.items() if isinstance(values, dict) else ():
            course.values.setdefault(key, []).append((step, _number(value)))
    elif event["event"] == "evaluation":
        loss, course.bits_per_byte = _number(event["loss"]), _number(event["bits_per_byte"])
        course.held_out.append((step, loss))
        for key in sorted(set(event) - _OF_EVERY_EVALUATION):
            value = event[key]
            if isinstance(value, list) and value and not isinstance(value[0], list):
                course.tables.setdefault(key, []).append((step, [_number(each) for each in value]))
            elif isinstance(value, int | float):
                course.measured.setdefault(key, []).append((step, _number(value)))
    elif event["event"] == "switch":
        course.switches.append((step, str(event["plugin"])))


def _number(value: object) -> float:
    return math.nan if value is None else float(str(value))


def _draw(courses: Sequence[Course]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = sorted({name for course in courses for name in course.values})
    measured = sorted({name for course in courses for name in course.measured})
    tables = [(course, name) for course in courses for name in _chosen(course.tables, alone=len(courses) == 1)]
    switches = [(step, plugin, course) for course in courses for step, plugin in course.switches]
    rows = [0.2 * max(1, len(switches)), 3.2, *[0.75] * (1 + len(values) + len(measured))]
    rows += [min(2.2, 0.5 + 0.12 * len(course.tables[name][-1][1])) for course, name in tables]
    figure = Figure(figsize=(9, 0.9 + 1.1 * sum(rows)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.05, hspace=0.02)  # type: ignore[union-attr,call-arg]
    head, loss, *others = figure.subplots(len(rows), 1, sharex=True, height_ratios=rows)
    last = max(course.last for course in courses)
    loss.set_xlim(0, last)
    _draw_losses(loss, courses)
    small = iter(others)
    rates = next(small)
    _draw_lines(rates, "learning rate", [(course, course.rate) for course in courses])
    for name in values:
        axes = next(small)
        lines = [(course, course.values[name]) for course in courses if name in course.values]
        _draw_lines(axes, name, lines, steps=True)
    for name in measured:
        axes = next(small)
        _draw_lines(axes, name, [(course, course.measured[name]) for course in courses if name in course.measured])
    for (course, name), axes in zip(tables, small, strict=True):
        _draw_table(figure, axes, course, name, alone=len(courses) == 1)
    _draw_switches(head, [loss, *others], switches, last, alone=len(courses) == 1)
    for axes in (loss, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, color=_FAINT)
    figure.align_ylabels(others)
    others[-1].set_xlabel("step", fontsize=9)
    others[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    title = courses[0].name if len(courses) == 1 else "held-out loss (points) and training loss of several runs"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return figure


def _chosen(tables: Collection[str], *, alone: bool) -> list[str]:
    """The vectors that are drawn: the means over blocks and, of a run that is `alone`, some of the single blocks'."""
    blocks: dict[str, list[tuple[int, str]]] = {}
    chosen = []
    for name in tables:
        metric, _, block = name.rpartition(".")
        if block.isdecimal() and metric in tables:
            blocks.setdefault(metric, []).append((int(block), name))
        else:
            chosen.append(name)
    result = []
    for metric in sorted(chosen):
        single = [name for _, name in sorted(blocks.get(metric, []))]
        few = min(len(single), TABLES)
        # One block is its own mean.
        spread = [single[round(index * (len(single) - 1) / (few - 1))] for index in range(few)] if few > 1 else []
        result += [metric, *(spread if alone else [])]
    return result


def _draw_losses(axes: Axes, courses: Sequence[Course]) -> None:
    alone = len(courses) == 1
    labels: list[tuple[float, str, str]] = []
    shown: list[float] = []
    for course in courses:
        faint = _FAINT if alone else course.colour
        steps, losses = zip(*course.train, strict=True)
        smooth = _smooth(losses) if len(losses) >= _SMOOTHED else None
        alpha = 0.35 if smooth or not alone else 0.9
        axes.plot(steps, losses, color=faint, linewidth=0.7, alpha=alpha, marker=_dot(steps))
        if smooth:
            axes.plot(steps, smooth, color=faint, linewidth=1.2, alpha=1.0 if alone else 0.6)
        finite = sorted(loss for loss in losses if math.isfinite(loss))
        shown += finite[: max(1, math.ceil(0.94 * len(finite)))]
        if alone or not course.held_out:
            end = (smooth or losses)[-1]
            labels.append((end, "training" if alone else f"{course.name}\ntraining", faint))
        if course.held_out:
            x, y = zip(*course.held_out, strict=True)
            axes.plot(x, y, color=course.colour, linewidth=1.8, marker="o", markersize=4)
            shown += y
            words = f"{y[-1]:.3f} nats a token\n{course.bits_per_byte:.3f} bits a byte"
            labels.append((y[-1], f"{'held out' if alone else course.name}\n{words}", course.colour))
    shown = [each for each in shown if math.isfinite(each)]
    if shown:
        room = 0.04 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_ylabel("loss (nats a token)", fontsize=9)
    axes.grid(axis="y", linewidth=0.3)
    _label_ends(axes, labels)


def _draw_lines(axes: Axes, name: str, lines: Sequence[tuple[Course, Points]], *, steps: bool = False) -> None:
    labels: list[tuple[float, str, str]] = []
    same = len({tuple(points) for _, points in lines}) == 1
    for course, points in lines[:1] if same else lines:
        colour = _INK if same and len(lines) > 1 else course.colour
        x, y = zip(*points, strict=True)
        style = "steps-pre" if steps else "default"
        axes.plot(x, y, color=colour, linewidth=1.4, drawstyle=style, marker=_dot(x))
        labels.append((y[-1], f"{y[-1]:.3g}", colour))
    axes.margins(y=0.2)
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axes.locator_params(axis="y", nbins=3)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.grid(axis="y", linewidth=0.3)
    _label_ends(axes, labels)


def _dot(points: Collection[object]) -> str | None:
    """A line through one point would not be seen."""
    return "." if len(points) == 1 else None


def _draw_table(figure: Figure, axes: Axes, course: Course, name: str, *, alone: bool) -> None:
    """A vector over time: each evaluation is a column that reaches back to the one before."""
    table = course.tables[name]
    length = max(len(vector) for _, vector in table)
    before = max((step for step, _ in course.held_out if step < table[0][0]), default=0.0)
    edges = [before, *(step for step, _ in table)]
    cells = [[vector[row] if row < len(vector) else math.nan for _, vector in table] for row in range(length)]
    mesh = axes.pcolormesh(edges, range(length + 1), cells, cmap="cividis", vmin=0.0, rasterized=True)
    axes.set_yticks([0.5, length - 0.5], ["0", str(length - 1)])
    axes.invert_yaxis()
    axes.set_ylabel(name if alone else f"{name}\n{course.name}", rotation=0, ha="right", va="center", fontsize=9)
    # A scale inside of the figure's own grid would make the other rows narrower.
    scale = figure.colorbar(mesh, cax=axes.inset_axes((1.012, 0.0, 0.012, 1.0)))
    scale.ax.tick_params(labelsize=7)
    scale.outline.set_visible(False)


def _draw_switches(
    head: Axes, others: Sequence[Axes], switches: Sequence[tuple[float, str, Course]], last: float, *, alone: bool
) -> None:
    """A row for each name above, so that near switches do not cover each other, and a line through all below."""
    head.axis("off")
    head.set_ylim(0, 1)
    for row, (step, plugin, course) in enumerate(sorted(switches, key=lambda each: each[:2])):
        colour = _INK if alone else course.colour
        y = 1 - (row + 0.5) / len(switches)
        head.plot((step, step), (y, 0), color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
        for axes in others:
            axes.axvline(step, color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
        right = step <= 0.75 * last
        head.annotate(
            f"{plugin} on at step {step:,.0f}" + ("" if alone else f" ({course.name})"),
            (step, y),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color=colour,
            # The lines of others pass behind it.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right, each as near to its line's end as the others leave room for."""
    labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    low, high = axes.get_ylim()
    assert axes.figure is not None
    # The height of a line of text; the axes' own is that before the layout, which differs by little.
    line = 8 * 1.3 / 72 * axes.figure.dpi / max(1.0, axes.bbox.height)
    places = [(label[0] - low) / (high - low) for label in labels]
    halves = [line * (1 + label[1].count("\n")) / 2 for label in labels]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + halves[index - 1] + halves[index])
    over = places[-1] + halves[-1] - 1.0 if places else 0.0
    if over > 0:
        # Push down from the top what was pushed up too far.
        limit = 1.0
        for index in reversed(range(len(places))):
            places[index] = min(places[index], limit - halves[index])
            limit = places[index] - halves[index]
    for place, (_, text, colour) in zip(places, labels, strict=True):
        axes.text(1.012, place, text, color=colour, fontsize=8, va="center", transform=axes.transAxes, clip_on=False)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean of a window around each point, a fortieth of all."""
    half = max(1, len(losses) // 80)
    windows = (losses[max(0, at - half) : at + half + 1] for at in range(len(losses)))
    return [sum(window) / len(window) for window in windows]
