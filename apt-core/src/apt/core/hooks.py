"""The plugins of one run, called at its moments. One pluggy manager for each run, never a global.

A hook that does not exist, or asks for arguments that it does not have, is refused when the plugin is registered. An error in
a hook names plugin, distribution, version, hook and step. With ``APT_TRACE=1`` every call is logged with its time.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
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
        record = record_of(plugin)
        origin = f"plugin {name!r} ({record.distribution} {record.version})"
        guarded = _Guarded()
        for attribute in dir(type(plugin)):
            function = inspect.getattr_static(type(plugin), attribute)
            options = getattr(function, MARK, None)
            if options is None:
                if attribute.startswith(f"{PROJECT}_") and callable(function):
                    raise PluginError(f"{origin}: {attribute} is not marked; put @hookimpl above it")
                continue
            hook = options.get("specname") or attribute
            self._check(origin, hook, function)
            guard = _Guard(name, origin, hook, getattr(plugin, attribute), self._trace)
            wrapped = guard.around() if options.get("wrapper") else guard.call()
            setattr(wrapped, MARK, options)
            setattr(guarded, attribute, wrapped)
        return guarded

    def _check(self, origin: str, hook: str, function: Callable[..., object]) -> None:
        if hook not in SPECIFIED:
            hint = nearest(hook, SPECIFIED) or "apt/hookspecs.py lists them"
            raise PluginError(f"{origin}: there is no hook {hook!r}; {hint}")
        known = [each for each in SPECIFIED[hook].parameters if each != "self"]
        for argument in list(inspect.signature(function).parameters)[1:]:
            if argument not in known:
                hint = nearest(argument, known)
                parts = [f"{origin}: the hook {hook} has no argument {argument!r}", hint, f"it has: {', '.join(known)}"]
                raise PluginError("; ".join(filter(None, parts)))


class _Guarded:
    """Holds guarded hooks for pluggy."""


class _Guard:
    """One hook of one plugin: silent while the plugin is off, and its errors say where they come from."""

    def __init__(self, plugin: str, origin: str, hook: str, bound: Callable[..., object], trace: bool) -> None:
        self.plugin, self.origin, self.hook, self.bound, self.trace = plugin, origin, hook, bound, trace
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
            start = time.perf_counter()
            try:
                return self.bound(*(arguments[name] for name in self.wanted))
            except UserError as error:
                error.add_note(self.note)
                raise
            except Exception as error:
                raise self._failure(arguments, error) from error
            finally:
                if self.trace:
                    logger.warning("%s %s took %.3f ms", self.origin, self.hook, 1000 * (time.perf_counter() - start))

        return self._named(call, "return run({})")

    def around(self) -> Callable[..., object]:
        """For a generator around the other hooks; only its own errors are named, those of the others pass."""

        def around(*values: object) -> object:
            arguments = dict(zip(self.given, values, strict=True))
            if self._is_off(arguments):
                return (yield)
            generator = cast("Generator[object, object, object]", self.bound(*(arguments[n] for n in self.wanted)))
            try:
                next(generator)
            except UserError as error:
                error.add_note(self.note)
                raise
            except Exception as error:
                raise self._failure(arguments, error) from error
            try:
                result = yield
            except BaseException as inner:
                try:
                    generator.throw(inner)
                except StopIteration as stop:
                    return stop.value
                raise
            try:
                generator.send(result)
            except StopIteration as stop:
                return stop.value
            except UserError as error:
                error.add_note(self.note)
                raise
            except Exception as error:
                raise self._failure(arguments, error) from error
            raise PluginError(f"{self.origin}: the wrapper {self.hook} yields more than once")

        return self._named(around, "return (yield from run({}))")

    def _named(self, run: Callable[..., object], body: str) -> Callable[..., object]:
        """`run` as a function of named arguments, which is what pluggy reads from a function's code."""
        arguments = ", ".join(self.given)
        namespace: dict[str, Callable[..., object]] = {"run": run}
        exec(f"def {self.hook}({arguments}):\n    {body.format(arguments)}", namespace)
        return namespace[self.hook]

    def _is_off(self, arguments: Mapping[str, object]) -> bool:
        state = arguments.get("state")
        return self.hook in WHILE_ON and isinstance(state, RunState) and self.plugin not in state.plugins_on

    def _failure(self, arguments: Mapping[str, object], error: Exception) -> PluginError:
        state = arguments.get("state")
        at = f" at step {state.step}" if isinstance(state, RunState) else ""
        return PluginError(f"{self.origin} failed in {self.hook}{at}: {type(error).__name__}: {error}")
