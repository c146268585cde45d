"""The plugins of one run, called at its moments. One pluggy manager for each run, never a global.

A hook that does not exist, or asks for arguments that it does not have, is refused when the plugin is registered. An error in
a hook names plugin, distribution, version, hook and step. With ``APT_TRACE=1`` every call is logged with its time.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import TYPE_CHECKING, cast

import pluggy

from apt.core.providers import Plugin
from apt.core.registry import record_of
from apt.errors import PluginError, UserError, nearest
from apt.hookspecs import PROJECT, Hooks, RunState

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

SPECIFIED = {name: inspect.signature(value) for name, value in vars(Hooks).items() if name.startswith("apt_")}
MARK = f"{PROJECT}_impl"
WHILE_ON = frozenset(
    {
        *("apt_epoch_start", "apt_epoch_end", "apt_step_start", "apt_batch_prepare", "apt_loss_extra"),
        *("apt_gradients_ready", "apt_step_end", "apt_evaluation_start", "apt_evaluation_end"),
    }
)
"""Hooks that a plugin gets only while it is on."""


class HookRunner:
    """Calls the hooks of `plugins`, in the order of the mapping unless ``tryfirst`` or ``trylast`` says else."""

    def __init__(self, plugins: Mapping[str, Plugin] | None = None) -> None:
        self.plugins = dict(plugins or {})
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(Hooks)
        self.gave: dict[object, str] = {}
        """Which plugin gave a metric last, in words, by the metric's name."""
        self._trace = os.environ.get("APT_TRACE") == "1"
        # pluggy calls the one registered last first.
        for name, plugin in reversed(self.plugins.items()):
            self.manager.register(self._guarded(name, plugin), name)
        self.hook = self.manager.hook

    def uses(self, hook: str) -> bool:
        """Whether any plugin implements this hook."""
        return bool(getattr(self.hook, hook).get_hookimpls())

    def phase_changed(self, plugin: str, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Tell the plugin that was switched on, and no other."""
        others = [each for name, each in self.manager.list_name_plugin() if name != plugin]
        caller = self.manager.subset_hook_caller("apt_phase_changed", others)
        caller(state=state, plugin=plugin, model=model, optimizer=optimizer)

    def save_state(self, state: RunState) -> dict[str, Mapping[str, object]]:
        """What each plugin wants to find again, by plugin."""
        saved: dict[str, Mapping[str, object]] = {}
        for name in self.plugins:
            for result in self._only(name, "apt_checkpoint_save")(state=state):
                if not isinstance(result, Mapping):
                    what = f"apt_checkpoint_save returned a {type(result).__name__}, not a mapping"
                    raise PluginError(f"{_origin(name, self.plugins[name])}: {what}")
                saved[name] = {**saved.get(name, {}), **result}
        return saved

    def load_state(self, state: RunState, saved: Mapping[str, Mapping[str, object]]) -> None:
        """Give each plugin what it had saved."""
        for name in self.plugins:
            if name in saved:
                self._only(name, "apt_checkpoint_load")(state=state, saved=saved[name])

    def _only(self, plugin: str, hook: str) -> pluggy.HookCaller:
        others = [each for name, each in self.manager.list_name_plugin() if name != plugin]
        return self.manager.subset_hook_caller(hook, others)

    def _guarded(self, name: str, plugin: Plugin) -> object:
        """An object with the plugin's hooks, whose errors say where they come from."""
        origin = _origin(name, plugin)
        guarded = _Guarded()
        for attribute, function in _own_attributes(plugin).items():
            # A class method or static method may be marked inside or outside.
            options = getattr(function, MARK, None) or getattr(getattr(function, "__func__", None), MARK, None)
            if options is None:
                if attribute.startswith(f"{PROJECT}_") and callable(getattr(plugin, attribute)):
                    raise PluginError(f"{origin}: {attribute} is not marked; put @hookimpl above it")
                continue
            hook = options.get("specname") or attribute
            if hook not in SPECIFIED and options.get("optionalhook"):
                continue  # of another version of apt-core
            bound = getattr(plugin, attribute)
            check_hook(origin, hook, bound, options)
            guard = _Guard(name, origin, hook, bound, self._trace, self.gave)
            wrapped = guard.around() if options.get("wrapper") else guard.call()
            setattr(wrapped, MARK, options)
            setattr(guarded, attribute, wrapped)
        return guarded


def _own_attributes(plugin: Plugin) -> dict[str, object]:
    """What the classes of a plugin define beyond `Plugin` itself, which has no hooks; the nearest class counts."""
    own = [base for base in type(plugin).__mro__ if base not in Plugin.__mro__]
    return {name: value for base in reversed(own) for name, value in vars(base).items()}


def _origin(name: str, plugin: Plugin) -> str:
    record = record_of(plugin)
    return f"plugin {name!r} ({record.distribution} {record.version})"


def check_hook(origin: str, hook: str, bound: Callable[..., object], options: Mapping[str, object]) -> None:
    """Hold one hook of a plugin against its specification. Raises `PluginError`."""
    if hook not in SPECIFIED:
        hint = nearest(hook, SPECIFIED) or "apt/hookspecs.py lists them"
        raise PluginError(f"{origin}: there is no hook {hook!r}; {hint}")
    known = [each for each in SPECIFIED[hook].parameters if each != "self"]
    for argument, parameter in inspect.signature(bound).parameters.items():
        if argument in known and parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(f"{origin}: {argument} of {hook} is not a plain argument; take away the * or / beside it")
        if argument not in known:
            hint = nearest(argument, known)
            parts = [f"{origin}: the hook {hook} has no argument {argument!r}", hint, f"it has: {', '.join(known)}"]
            raise PluginError("; ".join(filter(None, parts)))
    if inspect.iscoroutinefunction(bound) or inspect.isasyncgenfunction(bound):
        raise PluginError(f"{origin}: {hook} is asynchronous, and nobody would wait for it; take `async` away")
    if options.get("hookwrapper"):
        raise PluginError(f"{origin}: {hook} is a wrapper of pluggy's old kind; mark it @hookimpl(wrapper=True)")
    if bool(options.get("wrapper")) != inspect.isgeneratorfunction(bound):
        what = "is marked as a wrapper, but does not yield" if options.get("wrapper") else "yields, but is no wrapper"
        raise PluginError(f"{origin}: {hook} {what}; a wrapper is marked @hookimpl(wrapper=True) and yields once")


def two_metrics(name: object, one: str, other: str) -> PluginError:
    """Of two metrics of one name: what one says would be lost."""
    both = f"that of {one} and that of {other}"
    return PluginError(
        f"two metrics of one event are called {name!r}, {both}; give what a part or plugin adds a name of its own"
    )


@functools.cache
def _compiled(hook: str, arguments: str, body: str) -> CodeType:
    """The definition of a function; there are few, and compiling costs more than all the rest of a guard."""
    return compile(f"def {hook}({arguments}):\n    {body.format(arguments)}", f"<{hook}>", "exec")


class Losses(dict[object, object]):
    """What a plugin returned as losses by name, and `by` which it was."""

    def __init__(self, losses: Mapping[object, object], by: str) -> None:
        super().__init__(losses)
        self.by = by


class _Guarded:
    """Holds guarded hooks for pluggy."""


class _Guard:
    """One hook of one plugin: silent while the plugin is off, and its errors say where they come from."""

    def __init__(
        self,
        plugin: str,
        origin: str,
        hook: str,
        bound: Callable[..., object],
        trace: bool,
        gave: dict[object, str],
    ) -> None:
        self.plugin, self.origin, self.hook, self.bound, self.trace = plugin, origin, hook, bound, trace
        self.gave = gave
        self.wanted = list(inspect.signature(bound).parameters)
        self.note = f"said by {origin} in {hook}"
        # The state is asked for even where the plugin does not: it says what is on, and which step it is.
        state = ["state"] if "state" in SPECIFIED[hook].parameters else []
        self.given = [*state, *(name for name in self.wanted if name != "state")]

    def call(self) -> Callable[..., object]:
        """For a hook that is called."""

        def call(*values: object) -> object:
            arguments = dict(zip(self.given, values, strict=True))
            if self._is_off(arguments):
                return None
            metrics = arguments.get("metrics")
            if isinstance(metrics, dict):  # each plugin fills one of its own, so that it is known whose a metric is
                arguments["metrics"] = {}
            with self._watched(arguments):
                result = self.bound(*(arguments[name] for name in self.wanted))
                if self.hook == "apt_loss_extra" and result is not None:
                    if not isinstance(result, Mapping):
                        raise TypeError(f"returned a {type(result).__name__}, not losses by name")
                    result = Losses(result, self.origin)
            if isinstance(metrics, dict):
                self._add(metrics, arguments["metrics"])
            return result

        return self._named(call, "return run({})")

    def around(self) -> Callable[..., object]:
        """For a generator around the other hooks; only its own errors are named, those of the others pass."""

        def around(*values: object) -> object:
            arguments = dict(zip(self.given, values, strict=True))
            if self._is_off(arguments):
                return (yield)
            generator = cast("Generator[object, object, object]", self.bound(*(arguments[n] for n in self.wanted)))
            with self._watched(arguments, " before the others"):
                next(generator)
            try:
                result = yield
            except BaseException as inner:
                with self._watched(arguments, " after an error of theirs", passed=inner):
                    try:
                        generator.throw(inner)
                    except StopIteration as stop:
                        return stop.value
                raise
            with self._watched(arguments, " after the others"):
                try:
                    generator.send(result)
                except StopIteration as stop:
                    return stop.value
            raise PluginError(f"{self.origin}: the wrapper {self.hook} yields more than once")

        return self._named(around, "return (yield from run({}))")

    def _add(self, metrics: dict[object, object], own: object) -> None:
        """Add the plugin's own metrics to those of the others."""
        assert isinstance(own, dict)
        for name, value in own.items():
            if name in metrics:
                raise two_metrics(name, self.gave.get(name, "the trainer"), self.origin)
            metrics[name], self.gave[name] = value, self.origin

    def _named(self, run: Callable[..., object], body: str) -> Callable[..., object]:
        """`run` as a function of named arguments, which is what pluggy reads from a function's code."""
        namespace: dict[str, Callable[..., object]] = {"run": run}
        exec(_compiled(self.hook, ", ".join(self.given), body), namespace)
        return namespace[self.hook]

    @contextmanager
    def _watched(
        self, arguments: Mapping[str, object], part: str = "", passed: BaseException | None = None
    ) -> Generator[None]:
        """Name the plugin in what goes wrong, but for the error `passed`, which is another's; log the time if asked to."""
        start = time.perf_counter()
        try:
            yield
        except UserError as error:
            if error is not passed:
                error.add_note(self.note)
            raise
        except (Exception, SystemExit) as error:
            if error is passed:
                raise
            raise self._failure(arguments, error) from error
        finally:
            if self.trace:
                milliseconds = 1000 * (time.perf_counter() - start)
                logger.warning("%s %s%s took %.3f ms", self.origin, self.hook, part, milliseconds)

    def _is_off(self, arguments: Mapping[str, object]) -> bool:
        state = arguments.get("state")
        return self.hook in WHILE_ON and isinstance(state, RunState) and self.plugin not in state.plugins_on

    def _failure(self, arguments: Mapping[str, object], error: BaseException) -> PluginError:
        state = arguments.get("state")
        at = f" at step {state.step}" if isinstance(state, RunState) else ""
        return PluginError(f"{self.origin} failed in {self.hook}{at}: {type(error).__name__}: {error}")
