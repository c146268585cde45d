"""Schedules: from a step to named values and switches.

A value moves by epoch or by step; a value by epoch changes only when an epoch begins, and p counts finished epochs, so the
last of n epochs runs at p = (n - 1) / n and not at the end value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apt.core.config import APTConfig, Training
from apt.core.options import below, explain, mistyped
from apt.errors import Fault, ScheduleError, nearest

Unit = Literal["epoch", "step"]
Shape = Literal["linear", "exp", "cosine", "sqrt", "inverse_sqrt"]
SWITCH = re.compile(r"enable_(?P<plugin>.+)_at_(?P<unit>epoch|step)")


class Ramp(BaseModel):
    """A value from `start` to `end` over the run; before `warmup` it is `start`, in the last `cooldown` units `end`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    start: float
    end: float
    by: Unit = "epoch"
    type: Shape = "linear"
    warmup: int = Field(default=0, ge=0, description="units at `start` before it moves")
    cooldown: int = Field(default=0, ge=0, description="units at `end` before the run is over")

    @model_validator(mode="after")
    def _exp_has_a_ratio(self) -> Ramp:
        if self.type == "exp" and (0 in (self.start, self.end) or (self.start > 0) != (self.end > 0)):
            raise ValueError(f"exp needs start and end of one sign, neither of them 0, not {self.start} and {self.end}")
        return self

    def at(self, position: int, total: int) -> float:
        """The value after `position` of `total` units."""
        if position >= total - self.cooldown and (self.cooldown or position >= total):
            return self.end
        if position <= self.warmup:
            return self.start
        length = total - self.warmup - self.cooldown
        return self._shaped(min(1.0, (position - self.warmup) / length), length)

    def unreached(self, total: int) -> str:
        """What a run of `total` units leaves out of it, in words; nothing where it comes to its end."""
        if self.start == self.end or self.warmup + self.cooldown < total:
            return ""
        if self.cooldown:
            return f"warmup {self.warmup} and cooldown {self.cooldown} leave no unit between them; it jumps to its end"
        return f"its warmup of {self.warmup} is not over before, and it stays at {self.start:g}"

    def _shaped(self, p: float, length: int) -> float:
        start, end = self.start, self.end
        if self.type == "exp":
            return math.copysign(abs(start) ** (1 - p) * abs(end) ** p, start)
        if self.type == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
        if self.type == "sqrt":
            return start + (end - start) * math.sqrt(p)
        if self.type == "inverse_sqrt":
            # Falls as 1/sqrt(1 + units), and is moved and stretched to reach `end` at p = 1.
            fallen = (1 - 1 / math.sqrt(1 + p * length)) / (1 - 1 / math.sqrt(1 + length))
            return start + (end - start) * fallen
        return start + (end - start) * p


class Segment(BaseModel):
    """One piece of a piecewise schedule: until unit `until` (none: the end of the run) the value goes to `end`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    until: int | None = Field(default=None, ge=1, description="the unit where the segment ends; none: the run's end")
    start: float
    end: float
    type: Shape = "linear"


class Piecewise(BaseModel):
    """Segments one after another, in the order of their `until`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    by: Unit = "epoch"
    segments: tuple[Segment, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Piecewise:
        ends = [segment.until for segment in self.segments[:-1]]
        if None in ends:
            raise ValueError("only the last segment may go on to the end of the run; give the others `until`")
        marks = [each for each in (*ends, self.segments[-1].until) if each is not None]
        if any(later <= earlier for earlier, later in pairwise(marks)):
            raise ValueError(f"`until` must rise from segment to segment, not {marks}")
        for segment in self.segments:
            Ramp(start=segment.start, end=segment.end, type=segment.type)
        return self

    def at(self, position: int, total: int) -> float:
        """The value after `position` of `total` units; after the last segment it stays."""
        begin = 0
        for segment in self.segments:
            end = total if segment.until is None else segment.until
            if position < end:
                ramp = Ramp(start=segment.start, end=segment.end, type=segment.type)
                return ramp.at(position - begin, max(1, end - begin))
            begin = end
        return self.segments[-1].end

    def unreached(self, total: int) -> str:
        """The segments that a run of `total` units does not come to, in words; nothing where it comes to all."""
        begins = [each.until for each in self.segments[:-1] if each.until is not None]
        late = [begin for begin in begins if begin >= total]
        return f"the segment that begins at {late[0]}, and what follows, is not reached" if late else ""


def run_length(training: Training, steps_per_epoch: int) -> tuple[int, int]:
    """Steps and epochs of a run, the last epoch perhaps not whole: whichever limit comes first ends it.

    What is scheduled by epoch goes over these epochs, so it comes to its end in a run that `max_steps` cuts short, as
    what is scheduled by step does.
    """
    by_epochs = math.inf if training.max_epochs is None else training.max_epochs * steps_per_epoch
    max_steps = int(min(by_epochs, math.inf if training.max_steps is None else training.max_steps))
    return max_steps, math.ceil(max_steps / steps_per_epoch)


def list_unfinished(config: APTConfig, max_steps: int | None) -> list[str]:
    """A line where a run of so many steps ends before its learning rate is up, as far as its length is known."""
    if max_steps is None or config.warmup_steps <= max_steps:
        return []
    what = (
        f"{config.warmup_steps} steps, and the run ends after {max_steps}; the learning rate never reaches its height"
    )
    return [f"training.warmup_steps: {what}"]


def parse_entry(name: str, value: object) -> Ramp | Piecewise:
    """The schedule of one value. Raises `ScheduleError` with every fault of it."""
    given = {"segments": value} if isinstance(value, list | tuple) else value
    where = f"schedules.{name}"
    if not isinstance(given, Mapping):
        hint = "give {start: 1.5, end: 0.8, by: epoch}, or a list of segments"
        raise ScheduleError([Fault(where, f"{value!r} is no schedule", hint)])
    form: type[Ramp | Piecewise] = Piecewise if "segments" in given else Ramp
    faults = {fault.where: fault for fault in mistyped(form, given)}
    try:
        entry = form.model_validate(given)
    except ValidationError as error:
        faults = {fault.where: fault for fault in explain(error, form, given)} | faults
    if faults:
        # A list of segments is written without the word.
        bare = given is not value
        raise ScheduleError([below(where, _without_word(fault) if bare else fault) for fault in faults.values()])
    return entry


def _without_word(fault: Fault) -> Fault:
    return Fault(fault.where.removeprefix("segments").removeprefix("."), fault.what, fault.hint)


class Schedule:
    """The schedules of a profile, or of a plain mapping such as a profile's `schedules` section."""

    def __init__(self, config: APTConfig | Mapping[str, object]) -> None:
        entries: Mapping[str, object] = config.schedules if isinstance(config, APTConfig) else config
        self._switches: dict[str, tuple[Unit, int]] = {}
        self._params: dict[str, Ramp | Piecewise] = {}
        for key, value in entries.items():
            if match := SWITCH.fullmatch(key):
                self._add_switch(key, match["plugin"], "epoch" if match["unit"] == "epoch" else "step", value)
            else:
                self.add_param_schedule(key, value)

    @property
    def params(self) -> Mapping[str, Ramp | Piecewise]:
        """The scheduled values."""
        return self._params

    @property
    def switches(self) -> Mapping[str, tuple[Unit, int]]:
        """Plugin -> the unit, and from which epoch or step on it is on."""
        return self._switches

    def add_param_schedule(self, name: str, schedule: object) -> None:
        """Add a value, or replace its schedule. Raises `ScheduleError` where it is not well formed."""
        self._params[name] = parse_entry(name, schedule)

    def should_enable_plugin(self, name: str, epoch: int | None = None, step: int | None = None) -> bool:
        """Whether the plugin is on: from its epoch or step on; always where no schedule names it.

        Raises `ScheduleError` where the unit that its schedule counts in is not given.
        """
        if name not in self._switches:
            return True
        unit, start = self._switches[name]
        position = epoch if unit == "epoch" else step
        if position is None:
            what = f"give {unit}= to know whether {name!r} is on"
            raise ScheduleError([Fault(f"schedules.enable_{name}_at_{unit}", what)])
        return position >= start

    def list_enabled_plugins(
        self, plugins: Iterable[str] | None = None, epoch: int | None = None, step: int | None = None
    ) -> list[str]:
        """Those of `plugins` (by default, those that a schedule names) which are on."""
        names = self._switches if plugins is None else plugins
        return [name for name in names if self.should_enable_plugin(name, epoch, step)]

    def list_unreached(self, max_steps: int | None, steps_per_epoch: int | None, max_epochs: int | None) -> list[str]:
        """A line for each switch, value and segment that a run of this length ends before, as far as it is known."""
        lines = []
        if max_steps is not None and steps_per_epoch is not None:
            max_epochs = min(max_epochs or max_steps, math.ceil(max_steps / steps_per_epoch))
        for plugin, (unit, start) in self._switches.items():
            never = unit == "epoch" and max_epochs is not None and start >= max_epochs
            if max_steps is not None and (unit == "step" or steps_per_epoch is not None):
                never |= start * (1 if unit == "step" else steps_per_epoch or 1) >= max_steps
            if never:
                lines.append(
                    f"schedules.enable_{plugin}_at_{unit}: {start} is not reached; {plugin} is never switched on"
                )
        for name, entry in self._params.items():
            total = max_epochs if entry.by == "epoch" else max_steps
            if total is not None and (what := entry.unreached(total)):
                lines.append(f"schedules.{name}: the run has {total} {entry.by}s: {what}")
        return lines

    def get_param(
        self,
        name: str,
        epoch: int | None = None,
        step: int | None = None,
        max_epochs: int | None = None,
        max_steps: int | None = None,
    ) -> float:
        """The value now. Raises `ScheduleError` where it has no schedule, or its unit is not given."""
        if name not in self._params:
            hint = nearest(name, self._params) or f"scheduled: {', '.join(self._params) or 'nothing'}"
            raise ScheduleError([Fault(f"schedules.{name}", "there is no such schedule", hint)])
        entry = self._params[name]
        position, total = (epoch, max_epochs) if entry.by == "epoch" else (step, max_steps)
        if position is None or total is None:
            what = f"goes by {entry.by}: give {entry.by}= and max_{entry.by}s="
            raise ScheduleError([Fault(f"schedules.{name}", what)])
        return entry.at(position, total)

    def get_all_params(
        self,
        epoch: int | None = None,
        step: int | None = None,
        max_epochs: int | None = None,
        max_steps: int | None = None,
    ) -> dict[str, float]:
        """Every scheduled value now."""
        return {name: self.get_param(name, epoch, step, max_epochs, max_steps) for name in self._params}

    def _add_switch(self, key: str, plugin: str, unit: Unit, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ScheduleError(
                [Fault(f"schedules.{key}", f"{value!r} is not a number of {unit}s", "give 0, 1, 2, ...")]
            )
        if plugin in self._switches:
            raise ScheduleError([Fault(f"schedules.{key}", f"another line switches {plugin!r} on as well", "keep one")])
        self._switches[plugin] = (unit, value)
