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
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
            bound = getattr(plugin, attribute)
            wrapped = (
                _wrapper(origin, hook, bound, options) if options.get("wrapper") else self._call(origin, hook, bound)
            )
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

    def _call(self, origin: str, hook: str, bound: Callable[..., object]) -> Callable[..., object]:
        trace = self._trace
        takes_state = "state" in inspect.signature(bound).parameters

        @functools.wraps(bound)
        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return bound(*args, **kwargs)
            except UserError as error:
                error.add_note(f"said by {origin} in {hook}")
                raise
            except Exception as error:
                state = args[_position(bound)] if takes_state else None
                raise _failure(origin, hook, state, error) from error
            finally:
                if trace:
                    logger.warning("%s %s took %.3f ms", origin, hook, 1000 * (time.perf_counter() - start))

        return call


class _Guarded:
    """Holds wrapped hooks for pluggy."""


def _position(bound: Callable[..., object]) -> int:
    return list(inspect.signature(bound).parameters).index("state")


def _failure(origin: str, hook: str, state: object, error: Exception) -> PluginError:
    at = f" at step {state.step}" if isinstance(state, RunState) else ""
    return PluginError(f"{origin} failed in {hook}{at}: {type(error).__name__}: {error}")


def _wrapper(origin: str, hook: str, bound: Callable[..., object], options: object) -> Callable[..., object]:
    """A generator hook around the others; only its own errors are named, those of the others pass."""

    @functools.wraps(bound)
    def around(*args: object, **kwargs: object) -> object:
        generator = bound(*args, **kwargs)
        try:
            next(generator)  # type: ignore[call-overload]
        except Exception as error:
            raise _failure(origin, hook, None, error) from error
        try:
            result = yield
        except BaseException as inner:
            try:
                generator.throw(inner)  # type: ignore[attr-defined]
            except StopIteration as stop:
                return stop.value
            raise
        try:
            generator.send(result)  # type: ignore[attr-defined]
        except StopIteration as stop:
            return stop.value
        except Exception as error:
            raise _failure(origin, hook, None, error) from error
        raise PluginError(f"{origin}: the wrapper {hook} yields more than once")

    return around
