"""Schedules: golden values, laws, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from apt.core.config import APTConfig, Training
from apt.core.schedules import Piecewise, Ramp, Schedule, list_unfinished, run_length
from apt.errors import ScheduleError

ROUTE = {"start": 1.5, "end": 0.8, "by": "epoch"}
SHAPES = st.sampled_from(["linear", "exp", "cosine", "sqrt", "inverse_sqrt"])
NUMBERS = st.floats(0.01, 100)


@pytest.mark.parametrize(("shape", "value"), [("linear", 1.36), ("cosine", 1.4331), ("exp", 1.3228)])
def test_the_golden_values(shape: str, value: float) -> None:
    schedule = Schedule({"route_temp": {**ROUTE, "type": shape}})
    assert schedule.get_param("route_temp", epoch=10, max_epochs=50) == pytest.approx(value, abs=1e-4)


def test_the_golden_switch() -> None:
    schedule = Schedule({"enable_moe_at_epoch": 2})
    assert [schedule.should_enable_plugin("moe", epoch=epoch) for epoch in (0, 1, 2, 5)] == [False, False, True, True]
    assert schedule.should_enable_plugin("another", epoch=0)


def test_the_last_epoch_does_not_reach_the_end_value() -> None:
    assert Schedule({"x": ROUTE}).get_param("x", epoch=49, max_epochs=50) == pytest.approx(0.814)


@given(NUMBERS, NUMBERS, SHAPES, st.integers(1, 300), st.integers(0, 40), st.integers(0, 40))
def test_a_ramp_stays_between_its_ends_and_never_turns(
    start: float, end: float, shape: str, total: int, warmup: int, cooldown: int
) -> None:
    assume(warmup + cooldown < total)
    ramp = Ramp(start=start, end=end, type=shape, warmup=warmup, cooldown=cooldown)  # type: ignore[arg-type]
    course = [ramp.at(position, total) for position in range(total + 1)]
    low, high = sorted((start, end))
    assert all(low - 1e-9 * high <= value <= high + 1e-9 * high for value in course)
    steps = [b - a for a, b in pairwise(course)]
    assert all(step * (end - start) >= -1e-9 * high * abs(end - start) for step in steps)
    assert course[: warmup + 1] == [start] * (warmup + 1)
    assert course[total - cooldown :] == [end] * (cooldown + 1)


@given(st.integers(2, 50), st.integers(1, 20))
def test_by_epoch_a_value_stands_still_within_an_epoch(epochs: int, steps: int) -> None:
    schedule = Schedule({"x": ROUTE})
    at_start = [schedule.get_param("x", epoch=epoch, step=epoch * steps, max_epochs=epochs) for epoch in range(epochs)]
    at_end = [
        schedule.get_param("x", epoch=epoch, step=(epoch + 1) * steps - 1, max_epochs=epochs) for epoch in range(epochs)
    ]
    assert at_start == at_end


def test_segments_follow_one_another() -> None:
    pieces = Piecewise.model_validate(
        {
            "by": "step",
            "segments": [
                {"until": 10, "start": 0, "end": 1},
                {"until": 20, "start": 1, "end": 1},
                {"start": 1, "end": 3},
            ],
        }
    )
    assert [pieces.at(step, 40) for step in (0, 5, 10, 19, 20, 30, 40)] == [0, 0.5, 1, 1, 1, 2, 3]


def test_a_list_is_a_schedule_of_segments_by_epoch() -> None:
    schedule = Schedule({"x": [{"until": 2, "start": 0, "end": 2}, {"start": 5, "end": 5}]})
    assert [schedule.get_param("x", epoch=epoch, max_epochs=4) for epoch in range(4)] == [0, 1, 5, 5]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"start": 1.0, "end": 0.0, "type": "exp"}, "exp needs start and end of one sign, neither of them 0"),
        ({"start": -1.0, "end": 1.0, "type": "exp"}, "exp needs start and end of one sign"),
        ({"start": 1.0}, "x.end: must be given"),
        ({"start": 1.0, "end": 2.0, "by": "day"}, "x.by: 'day' is not allowed; input should be 'epoch' or 'step'"),
        ({"start": 1.0, "end": 2.0, "typ": "exp"}, "x.typ: no such option; did you mean 'type'?"),
        ({"start": 1.0, "end": 2.0, "warmup": -1}, "warmup"),
        ({"start": float("nan"), "end": 2.0}, "start"),
        ({"start": True, "end": 2.0}, "x.start: True is not allowed; input should be a number"),
        ({"start": "1", "end": 2.0, "by": 3}, "x.start: '1' is not allowed; input should be a number"),
        (3, r"schedules.x: 3 is no schedule; give {start: 1.5, end: 0.8, by: epoch}, or a list of segments"),
        ([], "schedules.x: .* is not allowed"),
        ([{"start": 0, "end": 1, "typ": "exp"}], r"schedules.x.0.typ: no such option; did you mean 'type'\?"),
        ({"segments": [{"end": 1}]}, "schedules.x.segments.0.start: must be given"),
        ([{"start": 0, "end": 1}, {"start": 1, "end": 2}], "only the last segment may go on"),
        ([{"until": 5, "start": 0, "end": 1}, {"until": 3, "start": 1, "end": 2}], "`until` must rise"),
    ],
)
def test_what_is_not_well_formed_is_refused(entry: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule({"x": entry})


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_a_switch_is_a_count(value: object) -> None:
    with pytest.raises(ScheduleError, match="is not a number of epochs; give 0, 1, 2"):
        Schedule({"enable_moe_at_epoch": value})


@pytest.mark.parametrize(
    ("switch", "length", "never"),
    [
        ({"enable_moe_at_epoch": 5}, (None, None, 5), True),
        ({"enable_moe_at_epoch": 4}, (None, None, 5), False),
        ({"enable_moe_at_epoch": 2}, (20, 10, 5), True),
        ({"enable_moe_at_epoch": 2}, (21, 10, 5), False),
        ({"enable_moe_at_epoch": 2}, (20, None, None), False),
        ({"enable_moe_at_step": 20}, (20, None, None), True),
        ({"enable_moe_at_step": 19}, (20, 10, 1), False),
        ({"enable_moe_at_step": 999}, (None, None, 5), False),
    ],
)
def test_a_switch_beyond_the_end_of_the_run_is_told(
    switch: dict[str, object], length: tuple[int | None, int | None, int | None], never: bool
) -> None:
    lines = Schedule(switch).list_unreached(*length)
    ((key, start),) = switch.items()
    assert lines == ([f"schedules.{key}: {start} is not reached; moe is never switched on"] if never else [])


def test_a_run_that_a_limit_of_steps_cuts_short_brings_its_values_to_their_ends_all_the_same() -> None:
    ramps = Schedule({"a": {"start": 1.0, "end": 0.0, "by": "epoch"}, "b": {"start": 1.0, "end": 0.0, "by": "step"}})
    steps, epochs = run_length(Training(max_epochs=50, max_steps=100), 10)
    last = ramps.get_all_params(epoch=epochs - 1, step=steps - 1, max_epochs=epochs, max_steps=steps)
    assert (steps, epochs) == (100, 10)
    assert last == pytest.approx({"a": 0.1, "b": 0.01})


@pytest.mark.parametrize(
    ("entry", "length", "told"),
    [
        ({"start": 0, "end": 1, "by": "step", "warmup": 30}, (30, 10, 5), "its warmup of 30 is not over before"),
        ({"start": 0, "end": 1, "by": "step", "warmup": 29}, (30, 10, 5), ""),
        ({"start": 1, "end": 1, "by": "step", "warmup": 99}, (30, 10, 5), ""),
        ({"start": 0, "end": 1, "by": "step", "warmup": 99}, (None, None, 5), ""),
        ({"start": 0, "end": 1, "by": "epoch", "warmup": 3}, (30, 10, 5), "the run has 3 epochs"),
        ({"start": 0, "end": 1, "warmup": 2, "cooldown": 1}, (None, None, 3), "leave no unit between them"),
        (
            [{"until": 3, "start": 0, "end": 1}, {"start": 1, "end": 2}],
            (None, None, 3),
            "begins at 3, and what follows",
        ),
        ([{"until": 2, "start": 0, "end": 1}, {"start": 1, "end": 2}], (None, None, 3), ""),
    ],
)
def test_a_value_that_the_run_ends_before_is_told(
    entry: object, length: tuple[int | None, int | None, int | None], told: str
) -> None:
    lines = Schedule({"x": entry}).list_unreached(*length)
    assert len(lines) == bool(told)
    assert told in "".join(lines)


def test_a_warm_up_that_the_run_ends_before_is_told() -> None:
    config = APTConfig(warmup_steps=300)
    assert list_unfinished(config, None) == list_unfinished(config, 300) == []
    (line,) = list_unfinished(config, 299)
    assert line.startswith("training.warmup_steps: 300 steps, and the run ends after 299")


def test_two_lines_for_one_switch_contradict() -> None:
    with pytest.raises(ScheduleError, match="another line switches 'moe' on as well; keep one"):
        Schedule({"enable_moe_at_epoch": 1, "enable_moe_at_step": 3})


def test_a_missing_schedule_is_an_error_and_not_zero() -> None:
    with pytest.raises(ScheduleError, match=r"route_tmp: there is no such schedule; did you mean 'route_temp'"):
        Schedule({"route_temp": ROUTE}).get_param("route_tmp", epoch=0, max_epochs=2)


def test_the_unit_that_is_counted_in_must_be_given() -> None:
    schedule = Schedule({"x": ROUTE, "enable_moe_at_step": 3})
    with pytest.raises(ScheduleError, match="goes by epoch: give epoch= and max_epochs="):
        schedule.get_param("x", step=1, max_steps=2)
    with pytest.raises(ScheduleError, match="give step= to know whether 'moe' is on"):
        schedule.should_enable_plugin("moe", epoch=1)


def test_all_params_and_plugins_at_once() -> None:
    config = APTConfig(schedules={"a": ROUTE, "b": {"start": 0, "end": 1, "by": "step"}, "enable_moe_at_epoch": 1})
    schedule = Schedule(config)
    assert schedule.get_all_params(0, 5, 2, 10) == {"a": 1.5, "b": 0.5}
    assert schedule.list_enabled_plugins(["moe", "align"], epoch=0) == ["align"]
    assert schedule.list_enabled_plugins(epoch=1) == ["moe"]
    schedule.add_param_schedule("c", {"start": 1, "end": 1})
    assert schedule.get_param("c", epoch=0, max_epochs=1) == 1


@pytest.mark.parametrize(
    ("training", "length"),
    [
        ({"max_epochs": 3}, (30, 3)),
        ({"max_steps": 25}, (25, 3)),
        ({"max_epochs": 3, "max_steps": 12}, (12, 2)),
        ({"max_epochs": 1, "max_steps": 12}, (10, 1)),
    ],
)
def test_whichever_limit_comes_first_ends_the_run(training: dict[str, int], length: tuple[int, int]) -> None:
    assert run_length(Training(**training), 10) == length
