"""The picture of a profile's schedules: it shows what runs, in text, PNG and SVG."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core.config import APTConfig
from apt.core.schedule_plot import WIDTH, plot_schedules, trace_schedules
from apt.core.schedules import Schedule, run_length
from apt.errors import UserError

ROUTE = {"start": 1.5, "end": 0.8, "by": "epoch"}
WEIGHT = {"start": 0.0, "end": 0.3, "by": "step", "warmup": 100}
SHAPES = st.sampled_from(["linear", "exp", "cosine", "sqrt", "inverse_sqrt"])


def config(schedules: dict[str, object], **training: int) -> APTConfig:
    return APTConfig.model_validate({"name": "mine", "schedules": schedules, "training": training})


BOTH = config(
    {"enable_moe_at_epoch": 2, "enable_align_at_step": 30, "route_temp": ROUTE, "align_weight": WEIGHT},
    max_epochs=50,
    steps_per_epoch=10,
)


def test_values_and_switches_by_epoch_and_by_step_share_one_axis() -> None:
    course = trace_schedules(BOTH)
    assert (course.unit, course.length) == ("step", 500)
    assert course.switches == {"moe": 20, "align": 30}
    assert course.lines["route_temp"].positions == tuple(range(0, 500, 10))
    assert course.lines["route_temp"].values[-1] == pytest.approx(0.814)
    weight = dict(zip(course.lines["align_weight"].positions, course.lines["align_weight"].values, strict=True))
    assert weight[100] == 0.0
    assert weight[300] == pytest.approx(0.15)


@given(SHAPES, st.sampled_from(["epoch", "step"]), st.integers(1, 60), st.integers(1, 60), st.integers(1, 5000))
def test_what_is_drawn_is_what_the_schedule_says(
    shape: str, by: str, epochs: int, steps_per_epoch: int, max_steps: int
) -> None:
    drawn = config(
        {"x": {"start": 2.0, "end": 0.5, "by": by, "type": shape}},
        max_epochs=epochs,
        max_steps=max_steps,
        steps_per_epoch=steps_per_epoch,
    )
    course = trace_schedules(drawn)
    length, counted = run_length(drawn.training, steps_per_epoch)
    line, schedule = course.lines["x"], Schedule(drawn)
    assert course.length == length
    assert line.positions[-1] == (length - 1 if by == "step" else (length - 1) // steps_per_epoch * steps_per_epoch)
    for at, value in zip(line.positions, line.values, strict=True):
        assert value == schedule.get_param("x", at // steps_per_epoch, at, counted, length)


def test_the_datas_own_epoch_can_be_given() -> None:
    assert trace_schedules(config({"route_temp": ROUTE}, max_epochs=4), 25).length == 100


def test_without_the_length_of_an_epoch_the_axis_is_of_epochs_and_it_is_said() -> None:
    drawn = config({**BOTH.schedules, "enable_late_at_epoch": 70}, max_epochs=50)
    course = trace_schedules(drawn)
    assert (course.unit, course.length, list(course.lines)) == ("epoch", 50, ["route_temp"])
    text = str(plot_schedules(drawn))
    assert "route_temp: 1.5 to 0.814 in the last epoch" in text
    assert "moe on from epoch 2" in text
    assert "late is never on: the run ends before epoch 70" in text
    assert "not drawn, for want of training.steps_per_epoch: align_weight, enable_align_at_step" in text


def test_steps_alone_do_not_say_where_an_epoch_begins() -> None:
    with pytest.raises(UserError, match=r"training\.steps_per_epoch: must be given"):
        plot_schedules(config({"route_temp": ROUTE}, max_steps=50))


def test_a_profile_that_schedules_nothing_has_no_picture() -> None:
    with pytest.raises(UserError, match="schedules nothing"):
        plot_schedules(config({}, max_epochs=2, steps_per_epoch=2))


def test_the_drawing_in_text_is_80_columns_wide_and_falls_with_the_value() -> None:
    lines = str(plot_schedules(BOTH)).splitlines()
    assert max(map(len, lines)) <= 80
    head = lines.index("route_temp: 1.5 to 0.814 in the last step")
    bars = [line.split("│", 1)[1].ljust(WIDTH) for line in lines[head + 1 : head + 7]]
    heights = [sum(row[column] != " " for row in bars) for column in range(WIDTH)]
    assert heights[0] == 6
    assert heights[-1] == 1
    assert heights == sorted(heights, reverse=True)


@pytest.mark.parametrize("start", [0, 1, 250, 499])
def test_a_switch_stands_in_its_column(start: int) -> None:
    drawn = config({"enable_moe_at_step": start}, max_steps=500, steps_per_epoch=10)
    (line,) = [each for each in str(plot_schedules(drawn)).splitlines() if "moe on" in each]
    assert line.index("│") == 12 + start * WIDTH // 500
    assert len(line) <= 80


def test_a_value_that_never_moves_is_a_flat_line() -> None:
    drawn = config({"x": {"start": 1.0, "end": 1.0}}, max_epochs=3, steps_per_epoch=5)
    assert "x: 1 throughout" in str(plot_schedules(drawn))


def test_the_same_profile_gives_the_same_picture(tmp_path: Path) -> None:
    one, other = (plot_schedules(BOTH, path=tmp_path / f"{name}.svg") for name in "ab")
    assert isinstance(one, Path)
    assert isinstance(other, Path)
    assert b"<dc:date>" not in one.read_bytes()
    assert one.stat().st_size == other.stat().st_size


def test_a_picture_names_every_value_and_switch(tmp_path: Path) -> None:
    from matplotlib import rc_context

    path = tmp_path / "plot.svg"
    with rc_context({"svg.fonttype": "none"}):  # words as words, not as outlines
        assert plot_schedules(BOTH, path=path) == path
    words = re.sub(r"<[^>]+>", "", path.read_text())
    for word in (
        "mine: schedules",
        "route_temp",
        "0.814",
        "align_weight",
        "moe on from step 20",
        "align on from step 30",
    ):
        assert word in words


def test_a_picture_can_be_png_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot_schedules(BOTH, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"plot\.pdf: a picture is \.png or \.svg"):
        plot_schedules(BOTH, path=tmp_path / "plot.pdf")


def test_switches_alone_are_a_picture_too(tmp_path: Path) -> None:
    drawn = config({"enable_moe_at_epoch": 1}, max_epochs=3, steps_per_epoch=5)
    assert plot_schedules(drawn, path=tmp_path / "plot.png").stat().st_size > 1000  # type: ignore[union-attr]


def test_drawing_needs_no_torch_and_text_no_matplotlib() -> None:
    code = (
        "import sys; from apt.core.config import APTConfig; from apt.core.schedule_plot import plot_schedules\n"
        "plot_schedules(APTConfig.from_dict({'schedules': {'enable_moe_at_epoch': 1}, 'training': {'max_epochs': 2}}))\n"
        "sys.exit(' '.join({'torch', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
