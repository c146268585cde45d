"""From a profile's names to providers: every fault of the profile that providers can know of, in one report.

A profile names what it uses; nothing stands in for it unless the profile says so. Checked here: that each provider
can be had and accepts its options, nested ones too; that nothing in use excludes anything else in use; that each
plugin's hooks exist; that the schedules are well formed and name plugins that are listed and values that something
reads; that the tokenizer's ids fit the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from apt.core.config import APTConfig, Choice
from apt.core.discovery import FILE, REGISTERED
from apt.core.exclusions import find_conflicts
from apt.core.hooks import HookRunner
from apt.core.options import below, join, refused, relative
from apt.core.provider import Provider
from apt.core.providers import AttentionProvider, DataProvider, FFNProvider, LoggerProvider, Plugin, TokenizerProvider
from apt.core.registry import Registry, Resolution, record_of
from apt.core.schedules import SWITCH, Ramp, Schedule, parse_entry
from apt.errors import (
    Fault,
    FaultsError,
    OptionsError,
    PluginError,
    ProfileError,
    ProviderError,
    ScheduleError,
    UserError,
    nearest,
)

NOT_IN_A_DECODER = {"noncausal": "a decoder may not see the tokens that it is to predict"}


@dataclass(frozen=True)
class Resolved:
    """A profile's providers."""

    providers: Mapping[str, Provider]
    """By kind: attention, ffn, data, tokenizer always; align and retrieval where the profile uses them."""
    plugins: Mapping[str, Plugin]
    """By name, in the profile's order, which is the order of their hooks."""
    resolutions: tuple[Resolution, ...]
    """What was asked for and what is used, for all of them, nested ones too."""
    loggers: tuple[LoggerProvider, ...]
    """What is told every event, in the profile's order."""
    scheduled: Mapping[str, Provider]
    """The values that a schedule may move, and the first provider that offers each."""

    def parts(self) -> Iterator[tuple[str, Provider]]:
        """Every provider with its dotted path in the profile, plugins and nested ones too."""
        for resolution in self.resolutions:
            yield resolution.where, resolution.provider

    def plugins_of(self, names: Collection[str]) -> dict[str, Plugin]:
        """The plugins of these names, such as those that are on, in the profile's order."""
        return {name: plugin for name, plugin in self.plugins.items() if name in names}


def resolve_config(config: APTConfig, registry: Registry | None = None, *, whole: bool = True) -> Resolved:
    """The providers of a profile. Raises `ProfileError` with every fault.

    Where the configuration is not `whole`, since values of it were refused, nothing is said that may follow from that.
    """
    return _Resolver(config, _global() if registry is None else registry).resolve(whole)


def walk(provider: Provider, where: str = "") -> Iterator[tuple[str, Provider]]:
    """The provider and those nested in its options, each with its dotted path; outer before inner."""
    yield where, provider
    for name in type(provider).model_fields:
        yield from _nested(join(where, name), getattr(provider, name))


def _nested(where: str, value: object) -> Iterator[tuple[str, Provider]]:
    if isinstance(value, Provider):
        yield from walk(value, where)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _nested(join(where, str(key)), each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _nested(join(where, str(index)), each)


def _ends(value: str, given: object) -> dict[str, float]:
    """Where a schedule begins and ends, each segment of it too, by dotted path; nothing where it is not well formed."""
    try:
        entry = parse_entry(value, given)
    except ScheduleError:
        return {}
    if isinstance(entry, Ramp):
        return {f"schedules.{value}.{end}": getattr(entry, end) for end in ("start", "end")}
    inner = "" if isinstance(given, list) else "segments."
    return {
        f"schedules.{value}.{inner}{index}.{end}": getattr(segment, end)
        for index, segment in enumerate(entry.segments)
        for end in ("start", "end")
    }


def _source(provider: Provider) -> str:
    """Who gave the names in it their meaning: a distribution, a file, or a module whose class was registered by hand."""
    record = record_of(provider)
    if record.distribution == FILE:
        return record.path
    return type(provider).__module__ if record.distribution == REGISTERED else record.distribution


def _global() -> Registry:
    from apt.core.registry import registry

    return registry


class _Resolver:
    """One pass over one profile, that collects faults as it goes."""

    def __init__(self, config: APTConfig, registry: Registry) -> None:
        self.config, self.registry = config, registry
        self.faults: list[Fault] = []
        self.resolutions: list[Resolution] = []
        self.runners: dict[str, HookRunner] = {}
        """One for each plugin, so that what it refuses is its own."""
        self.incomplete = False
        """Some provider could not be had, so it is not known which values there are to schedule."""

    def resolve(self, whole: bool) -> Resolved:
        config = self.config
        providers: dict[str, Provider] = {}
        for kind in ("attention", "ffn"):
            self._add(providers, kind, f"model.{kind}", config.choice(kind))
        if "align" in config.plugins:
            self._add(providers, "align", "model.align", config.choice("align"))
        if config.retrieval_name != "none":
            self._add(providers, "retrieval", "model.retrieval", config.choice("retrieval"))
        self._add(providers, "data", "data", config.data.choice, key="source")
        self._add(providers, "tokenizer", "data.tokenizer", config.data.tokenizer)
        plugins = self._plugins()
        loggers = self._loggers()
        offers: dict[str, list[Resolution]] = {}
        for resolution in self.resolutions:
            for value in resolution.provider.scheduled:
                offers.setdefault(value, []).append(resolution)
        scheduled = {value: each[0].provider for value, each in offers.items()}
        if whole:
            self._check_sizes(providers)
            self._check_company()
        self._check_exclusions()
        self._check_schedules(scheduled)
        self._check_one_meaning(offers)
        self._check_ranges(offers)
        self._check_architecture(providers.get("data"))
        self._check_vocabulary(providers.get("tokenizer"), whole)
        if whole and not self.faults:
            self._ask()
        if self.faults:
            raise ProfileError(self.faults)
        return Resolved(providers, plugins, tuple(self.resolutions), loggers, scheduled)

    def _add(
        self, providers: dict[str, Provider], kind: str, where: str, choice: Choice, key: str = "provider"
    ) -> None:
        provider = self._resolve(kind, where, choice, join(where, key))
        if provider is not None:
            providers[kind] = provider

    def _resolve(self, kind: str, where: str, choice: Choice, named_at: str) -> Provider | None:
        try:
            resolution = self.registry.resolve(kind, choice)
        except OptionsError as error:
            self.incomplete = True
            self.faults += [below(where, fault) for fault in relative(error)]
            return None
        except ProviderError as error:
            self.incomplete = True
            self.faults.append(Fault(named_at, str(error)))
            return None
        for path, provider in walk(resolution.provider):
            found = Resolution.of(provider) if path else resolution
            self.resolutions.append(replace(found, where=join(where, path)))
        return resolution.provider

    def _plugins(self) -> dict[str, Plugin]:
        plugins: dict[str, Plugin] = {}
        for name in self.config.plugins:
            if name in plugins:
                self.faults.append(Fault("plugins", f"{name!r} is listed twice"))
                continue
            options = self.config.options.get(f"plugin.{name}", {})
            plugin = self._resolve("plugin", f"plugins.{name}", Choice(provider=name, options=options), "plugins")
            if not isinstance(plugin, Plugin):
                continue
            try:
                self.runners[name] = HookRunner({name: plugin})
            except PluginError as error:
                self.faults.append(Fault("plugins", str(error)))
            plugins[name] = plugin
        return plugins

    def _loggers(self) -> tuple[LoggerProvider, ...]:
        monitoring = self.config.monitoring
        asked = {f"loggers.{index}": choice for index, choice in enumerate(monitoring.loggers)}
        if monitoring.tensorboard:
            asked["tensorboard"] = Choice(provider="tensorboard")
        found = []
        for where, choice in asked.items():
            named_at = f"monitoring.{where}"
            found.append(self._resolve("logger", named_at, choice, named_at))
        return tuple(each for each in found if isinstance(each, LoggerProvider))

    def _ask(self) -> None:
        """Let each plugin refuse what it cannot work with."""
        for name, runner in self.runners.items():
            try:
                runner.hook.apt_config_resolved(config=self.config)
            except FaultsError as error:
                self.faults += error.faults
            except UserError as error:
                self.faults.append(Fault("plugins", f"{name}: {error}"))

    def _check_sizes(self, providers: Mapping[str, Provider]) -> None:
        """Whether the layers can have the model's sizes; what counts their parameters knows."""
        config = self.config
        attention, ffn = providers.get("attention"), providers.get("ffn")
        if isinstance(attention, AttentionProvider) and config.d_model % config.num_heads == 0:
            self._try("model.attention", lambda: attention.get_parameter_count(config.d_model, config.num_heads))
        if isinstance(ffn, FFNProvider):
            blocks = config.num_encoder_blocks + config.num_blocks

            def count() -> object:
                layers = {id(each): each for each in (ffn.at_layer(index, blocks) for index in range(blocks))}
                counts = [each.get_parameter_count(config.d_model, config.d_ff) for each in layers.values()]
                return next((each for each in counts if not isinstance(each, int)), 0)

            self._try("model.ffn", count)

    def _try(self, where: str, count: Callable[[], object]) -> None:
        who = record_of(next(each.provider for each in self.resolutions if each.where == where))
        try:
            number = count()
            if not isinstance(number, int):
                self.faults.append(Fault(where, f"{who}: get_parameter_count gives {number!r}, not a whole number"))
        except OptionsError as error:
            # A provider that knows where it stands in a profile may say so itself.
            self.faults += [
                fault if fault.where.startswith("model.") else below(where, fault) for fault in relative(error)
            ]
        except ValueError as error:
            self.faults.append(Fault(where, str(error)))
        except Exception as error:  # noqa: BLE001  a package can raise anything, and its name is told
            what = f"{who}: get_parameter_count failed: {type(error).__name__}: {error}"
            self.faults.append(Fault(where, what))

    def _check_company(self) -> None:
        """Whether the plugins are listed that providers do nothing without."""
        listed = self.config.plugins
        for each in self.resolutions:
            needed = each.provider.needs_plugin
            if needed is not None and needed not in listed:
                what = f"{each.kind}.{each.used} works through the plugin {needed!r}, which the profile does not list"
                self.faults.append(Fault(each.where, what, f"add it: plugins: [{', '.join((*listed, needed))}]"))

    def _check_exclusions(self) -> None:
        used = [self.registry.used(resolution.where, resolution.provider) for resolution in self.resolutions]
        ruled_out = NOT_IN_A_DECODER if self.config.architecture == "decoder" else {}
        self.faults += find_conflicts(used, ruled_out)

    def _check_schedules(self, scheduled: Mapping[str, Provider]) -> None:
        listed = self.config.plugins
        switches = [f"enable_{plugin}_at_{unit}" for plugin in listed for unit in ("epoch", "step")]
        switched: dict[str, str] = {}
        for key, value in self.config.schedules.items():
            where = f"schedules.{key}"
            try:
                Schedule({key: value})
            except ScheduleError as error:
                hint = "" if key in {*scheduled, *switches} else nearest(key, [*scheduled, *switches])
                self.faults += [replace(fault, hint=hint or fault.hint) for fault in error.faults]
                continue
            if switch := SWITCH.fullmatch(key):
                plugin = switch["plugin"]
                if plugin not in listed:
                    hint = nearest(plugin, listed) or f"add it: plugins: [{', '.join((*listed, plugin))}]"
                    self.faults.append(Fault(where, f"the profile does not list the plugin {plugin!r}", hint))
                elif plugin in switched:
                    self.faults.append(Fault(where, f"{switched[plugin]} switches {plugin!r} on as well", "keep one"))
                switched.setdefault(plugin, key)
            elif key not in scheduled and not self.incomplete:
                known = f"it has: {', '.join(sorted(scheduled))}" if scheduled else "it has none"
                hint = " ".join(filter(None, (nearest(key, scheduled), known)))
                self.faults.append(Fault(where, "this model has no such value", hint))

    def _check_one_meaning(self, offers: Mapping[str, Sequence[Resolution]]) -> None:
        """Whether each scheduled value means one thing: what one distribution offers in several parts is one value."""
        for value in self.config.schedules:
            sources = {_source(each.provider): each for each in reversed(offers.get(value, ()))}
            if len(sources) > 1:
                first, *others = reversed(sources.values())
                who = " and ".join(
                    f"{each.kind}.{each.used} of {each.distribution} {each.version} (at {each.where})"
                    for each in (first, *others)
                )
                hint = f"use one of them, or leave the schedule out: each has its own option for a {value} that stands still"
                self.faults.append(Fault(f"schedules.{value}", f"two values have this name, of {who}", hint))

    def _check_ranges(self, offers: Mapping[str, Sequence[Resolution]]) -> None:
        """Whether a schedule stays where the option may be that stands for the value while nothing moves it.

        That option has the name of the buffer that takes the value, or of the value, perhaps without its first word
        (`capacity` for `moe_capacity`). Every shape stays between its ends.
        """
        for value, given in self.config.schedules.items():
            for offer in {(each.kind, each.used): each for each in offers.get(value, ())}.values():
                model = type(offer.provider)
                named = (model.scheduled[value], value, value.partition("_")[2])
                names = [name for name in named if name in model.model_fields]
                ends = _ends(value, given) if names else {}
                for where, end in ends.items():
                    if reason := refused(offer.provider, names[0], end):
                        hint = f"{offer.kind}.{offer.used} takes it as its option {names[0]}: {reason}"
                        self.faults.append(Fault(where, f"{end:g} is not allowed", hint))

    def _check_architecture(self, data: Provider | None) -> None:
        """An encoder-decoder is trained on pairs, and only it; what calls the model with one text cannot be used with it."""
        config = self.config
        paired = config.architecture == "encoder_decoder"
        if isinstance(data, DataProvider) and data.gives_pairs() != paired:
            what = "gives pairs, and a decoder reads one text" if not paired else "gives no pairs of source and target"
            hint = (
                "use architecture: encoder_decoder"
                if not paired
                else "an encoder-decoder needs them; use source: pairs"
            )
            self.faults.append(Fault("data.source", f"{data.get_name()!r} {what}", hint))
        if not paired:
            return
        if config.num_layers is not None:
            hint = "use num_encoder_layers and num_decoder_layers"
            self.faults.append(Fault("model.num_layers", "is for decoders, and this is an encoder-decoder", hint))
        for name, least in (
            ("num_encoder_layers", config.num_encoder_layers),
            ("num_decoder_layers", config.num_blocks),
        ):
            if least < 1:
                self.faults.append(Fault(f"model.{name}", f"{least} is not allowed", "1 or more in an encoder-decoder"))
        if config.hardware.matmul == "auto":
            self.faults.append(
                Fault("hardware.matmul", "auto measures a decoder, and this is an encoder-decoder", "strict")
            )
        if "align" in config.plugins:
            self.faults.append(Fault("plugins", "'align' aligns states of one text, not of pairs", "leave it out"))

    def _check_vocabulary(self, tokenizer: Provider | None, whole: bool) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id") if whole else ():
            if (number := getattr(self.config, name)) >= self.config.vocab_size:
                what = f"{number} is no id of a vocabulary of {self.config.vocab_size}"
                self.faults.append(Fault(f"model.{name}", what, f"0 to {self.config.vocab_size - 1}"))
        if isinstance(tokenizer, TokenizerProvider) and (size := tokenizer.get_vocab_size()) > self.config.vocab_size:
            what = f"{self.config.vocab_size} is too small: the tokenizer {tokenizer.get_name()} has {size} ids"
            self.faults.append(Fault("model.vocab_size", what, f"give at least {size}, or leave it out"))
