"""Profiles: a YAML document, what it inherits, and the command line become one `APTConfig`, and every value keeps its origin.

The way: read the document (`apt.core.document`); validate the values; resolve the providers. All faults are reported
together, each with the place where the value was said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from apt.core import yaml
from apt.core.config import PREDECESSOR, APTConfig, Choice, Data
from apt.core.document import read_document
from apt.core.layout import MODEL, RENAMED, SECTIONS, TOP, document_path
from apt.core.legacy import KINDS
from apt.core.local import LocalCode
from apt.core.options import explain, mistyped
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.core.resolve import Resolved, resolve_config
from apt.core.yaml import Origin, Value
from apt.errors import Fault, ProfileError, ProviderError, nearest

OLD = ("router_name", *PREDECESSOR)
"""Keys of `model` that stand in the canonical form only where they say something."""


@dataclass(frozen=True)
class Profile:
    """A profile that was read: the value, where each part of it was said, and its providers."""

    config: APTConfig
    values: dict[str, Value]
    """The document after inheritance and the command line, in today's form."""
    origins: Mapping[str, Origin]
    """Dotted path -> where its value was said; paths that are not here have their default."""
    notes: tuple[str, ...] = ()
    """One line for each old key that was translated."""
    resolved: Resolved | None = None
    files: tuple[Path, ...] = field(default=())

    def origin(self, path: str) -> str:
        """Where the value at a dotted path was said."""
        return str(self.origins[path]) if path in self.origins else "default"


def load_profile(
    path: str | Path,
    *,
    sets: Sequence[str] = (),
    plugins: Sequence[str] | None = None,
    registry: Registry | None = None,
    resolve: bool = True,
    allow_local_code: bool = False,
) -> Profile:
    """Read, inherit, change, validate and resolve a profile. Raises `ProfileError` with every fault.

    Provider code in a file beside the profile may run, since whoever names the profile here names that folder;
    `allow_local_code` lets any file run.
    """
    path = Path(path)
    registry = installed if registry is None else registry
    registry.allow_local_code(LocalCode(path.parent, anywhere=allow_local_code))
    document = read_document(path, sets, plugins, registry)
    faults = [*document.faults, *_unknown_keys(document.values)]
    flat, more = _flatten(document.values)
    faults += more
    config, more, whole = _validate(flat, document.values, registry)
    faults += more
    resolved: Resolved | None = None
    if whole:
        faults += _across_fields(config)
    if resolve:
        try:
            resolved = resolve_config(config, registry, whole=whole)
        except ProfileError as error:
            faults += error.faults
    if faults:
        raise ProfileError([_placed(fault, document.origins, str(path)) for fault in dict.fromkeys(faults)])
    return Profile(config, document.values, document.origins, document.notes, resolved, document.files)


def to_profile(config: APTConfig) -> dict[str, Value]:
    """The canonical nested form of a configuration, with every value, as a profile says it."""
    dumped = cast("dict[str, Value]", config.model_dump(mode="json"))
    options = cast("dict[str, dict[str, Value]]", dumped["options"])
    fallback = cast("dict[str, list[Value]]", dumped["fallback"])
    fields = APTConfig.model_fields
    unsaid = {name for name in OLD if getattr(config, name) == fields[name].get_default()}
    if "router" in options.get("ffn", {}):
        unsaid.add("router_name")
    model: dict[str, Value] = {name: dumped[name] for name in MODEL if name not in unsaid}
    for kind in KINDS:
        used = {"align": "align" in config.plugins, "retrieval": config.retrieval_name != "none"}
        if used.get(kind, True):
            choice: dict[str, Value] = {"provider": dumped[f"{kind}_name"]}
            if fallback.get(kind):
                choice["fallback"] = fallback[kind]
            model[kind] = {**choice, **options.get(kind, {})}
    training = {old: dumped[new] for old, new in RENAMED.items()} | cast("dict[str, Value]", dumped["training"])
    plugins: list[Value] = [
        {name: options[f"plugin.{name}"]} if options.get(f"plugin.{name}") else name for name in config.plugins
    ]
    data = cast("dict[str, Value]", dumped["data"])
    tokenizer = cast("dict[str, Value]", data["tokenizer"])
    data["tokenizer"] = {"provider": tokenizer["provider"], **cast("dict[str, Value]", tokenizer["options"])}
    profile: dict[str, Value] = {name: dumped[name] for name in ("name", "version", "description")}
    profile |= {
        "plugins": plugins,
        "model": model,
        "training": training,
        "schedules": dumped["schedules"],
        "data": data,
    }
    profile |= {name: dumped[name] for name in SECTIONS if name != "training"}
    if dumped["extra"]:
        profile["extra"] = dumped["extra"]
    return profile


def dump_profile(config: APTConfig) -> str:
    """The canonical form as YAML."""
    return yaml.dump(to_profile(config))


def dump_resolved(config: APTConfig, resolved: Resolved) -> str:
    """The canonical form, under comments that say what every provider was resolved to, and why another stands in."""
    lines = []
    for each in resolved.resolutions:
        why = f" (asked for {each.asked}: {each.why})" if each.why else ""
        lines.append(f"# {each.where}: {each.kind}.{each.used} of {each.distribution} {each.version}{why}")
    return "\n".join(lines) + "\n" + dump_profile(config)


def read_resolved(
    path: Path,
    registry: Registry | None = None,
    allow_local_code: bool = False,
    *,
    sets: Sequence[str] = (),
    plugins: Sequence[str] | None = None,
) -> Profile:
    """The profile that a run or checkpoint holds, changed by `sets` and `plugins`; code in files runs only with leave."""
    used = installed if registry is None else registry
    profile = load_profile(
        path, sets=sets, plugins=plugins, registry=used, resolve=False, allow_local_code=allow_local_code
    )
    used.allow_local_code(LocalCode(path.parent, anywhere=True) if allow_local_code else None)
    return profile


def _unknown_keys(values: Mapping[str, Value]) -> list[Fault]:
    known = (*TOP, "base", "plugins", "model", "data", *SECTIONS)
    faults = [Fault(key, "no such section", _hint(key, known)) for key in values if key not in known]
    keys: dict[str, tuple[str, ...]] = {name: tuple(section.model_fields) for name, section in SECTIONS.items()}
    keys["training"] += tuple(RENAMED)
    keys["model"] = (*MODEL, *KINDS)
    if not isinstance(values.get("data", {}), dict):
        faults.append(Fault("data", f"{values['data']!r} is not a mapping", "such as data: {source: stdlib}"))
    for section, allowed in keys.items():
        inner = values.get(section, {})
        if isinstance(inner, dict):
            faults += [
                Fault(f"{section}.{key}", "no such option", _hint(key, allowed)) for key in inner if key not in allowed
            ]
        else:
            faults.append(Fault(section, f"{inner!r} is not a mapping", f"keys: {', '.join(allowed)}"))
    return faults


def _hint(key: str, known: Sequence[str]) -> str:
    today = [each for each in known if each not in OLD]
    return " ".join(filter(None, (nearest(key, known), f"options: {', '.join(today)}")))


def _flatten(values: Mapping[str, Value]) -> tuple[dict[str, object], list[Fault]]:
    """The arguments of `APTConfig` that the document means. Unknown keys are left out: they are faults already."""
    faults: list[Fault] = []
    flat: dict[str, object] = {key: values[key] for key in TOP if key in values}
    options: dict[str, object] = {}
    fallback: dict[str, object] = {}
    model = _mapping(values, "model")
    flat |= {key: model[key] for key in MODEL if key in model}
    for kind in KINDS:
        if kind not in model:
            continue
        try:
            choice = to_choice(model[kind])
        except ValueError as error:
            faults.append(Fault(f"model.{kind}", str(error)))
            continue
        if choice.provider:
            flat[f"{kind}_name"] = choice.provider
        options[kind] = choice.options
        fallback[kind] = choice.fallback
        if kind == "ffn" and isinstance(router := choice.options.get("router"), dict | str):
            flat["router_name"] = router if isinstance(router, str) else router.get("provider", "topk_default")
    plugins, more = _plugins(values.get("plugins", []))
    faults += more
    flat["plugins"] = tuple(plugins)
    options |= {f"plugin.{name}": given for name, given in plugins.items() if given}
    for name, section in SECTIONS.items():
        inner = _mapping(values, name)
        flat[name] = {key: value for key, value in inner.items() if key in section.model_fields}
        if name == "training":
            flat |= {RENAMED[key]: value for key, value in inner.items() if key in RENAMED}
    data = dict(_mapping(values, "data"))
    if "tokenizer" in data:
        try:
            tokenizer = to_choice(data["tokenizer"])
            data["tokenizer"] = {**tokenizer.model_dump(), "provider": tokenizer.provider or Data().tokenizer.provider}
        except ValueError as error:
            faults.append(Fault("data.tokenizer", str(error)))
            del data["tokenizer"]
    flat |= {"data": data, "options": options, "fallback": {key: value for key, value in fallback.items() if value}}
    return flat, faults


def to_choice(value: Value) -> Choice:
    """A provider as a profile asks for it: its name, or a mapping with `provider`. Raises `ValueError`."""
    if isinstance(value, str):
        value = {"provider": value}
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a provider; give a name, or {{provider: name, option: value}}")
    if value.get("provider") == "":
        raise ValueError("'' is no name of a provider; leave it out, or give one")
    provider, fallback = value.get("provider", ""), value.get("fallback", [])
    names = [fallback] if isinstance(fallback, str) else fallback
    if not isinstance(provider, str) or not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise ValueError("provider must be a name, and fallback a list of names")
    rest = {key: each for key, each in value.items() if key not in ("provider", "fallback")}
    return Choice(provider=provider, fallback=tuple(map(str, names)), options=rest)


def _plugins(value: Value) -> tuple[dict[str, Value], list[Fault]]:
    plugins: dict[str, Value] = {}
    faults: list[Fault] = []
    if not isinstance(value, list):
        return {}, [Fault("plugins", f"{value!r} is not a list", "write plugins: [moe, align]")]
    for index, entry in enumerate(value):
        pairs: list[tuple[str, Value]] = []
        if isinstance(entry, str):
            pairs = [(entry, {})]
        elif isinstance(entry, dict):
            pairs = list(entry.items())
        else:
            faults.append(
                Fault(f"plugins.{index}", f"{entry!r} is not a plugin", "give a name, or {name: {option: value}}")
            )
        for name, options in pairs:
            if name in plugins:
                faults.append(Fault(f"plugins.{index}", f"{name!r} is listed twice"))
            if not isinstance(options, dict):
                faults.append(Fault(f"plugins.{index}.{name}", f"{options!r} is not a mapping of options"))
            plugins[name] = options if isinstance(options, dict) else {}
    return plugins, faults


def _mapping(values: Mapping[str, Value], key: str) -> dict[str, Value]:
    inner = values.get(key)
    return inner if isinstance(inner, dict) else {}


def _validate(
    flat: dict[str, object], values: Mapping[str, Value], registry: Registry
) -> tuple[APTConfig, list[Fault], bool]:
    """The configuration without those of its values that are refused, their faults, and whether it is whole."""
    found = mistyped(APTConfig, flat)
    for fault in found:
        flat = _without(flat, fault.where.split("."))
    while True:
        try:
            config = APTConfig.model_validate(flat)
            break
        except ValidationError as error:
            found += explain(error, APTConfig, flat)
            for detail in error.errors(include_url=False):
                flat = _without(flat, detail["loc"])
    found = [Fault(document_path(fault.where.split(".")), fault.what, fault.hint) for fault in found]
    if "vocab_size" not in _mapping(values, "model"):
        try:
            tokenizer = registry.resolve("tokenizer", config.data.tokenizer).provider
        except ProviderError:
            return config, found, not found  # reported with the others when the providers are resolved
        config = config.model_copy(update={"vocab_size": tokenizer.get_vocab_size()})  # type: ignore[attr-defined]
    return config, found, not found


def _without(flat: Mapping[str, object], path: Sequence[int | str]) -> dict[str, object]:
    """Without what stands at `path`, or the nearest thing around it."""
    first, *rest = map(str, path)
    inner = flat.get(first)
    if rest and isinstance(inner, dict) and rest[0] in inner:
        return {**flat, first: _without(inner, rest)}
    return {key: value for key, value in flat.items() if key != first}


def _across_fields(config: APTConfig) -> list[Fault]:
    """What no field can know by itself."""
    faults: list[Fault] = []
    if config.d_model % config.num_heads:
        near = config.d_model - config.d_model % config.num_heads or config.num_heads
        faults.append(
            Fault(
                "model.d_model",
                f"{config.d_model} is not a multiple of num_heads {config.num_heads}",
                f"such as {near}",
            )
        )
    training = config.training
    if training.max_epochs is None and training.max_steps is None:
        faults.append(Fault("training", "gives neither max_epochs nor max_steps", "say how long to train"))
    if training.max_steps is not None and config.warmup_steps > training.max_steps:
        faults.append(
            Fault("training.warmup_steps", f"{config.warmup_steps} is more than max_steps {training.max_steps}")
        )
    for kind, needs in (("align", "align" in config.plugins), ("retrieval", config.retrieval_name != "none")):
        if kind in config.options and not needs:
            hint = "add it to plugins, or leave the section out" if kind == "align" else "name a provider"
            faults.append(Fault(f"model.{kind}", "is configured, but nothing switches it on", hint))
    return faults


def _placed(fault: Fault, origins: Mapping[str, Origin], file: str) -> Fault:
    """The fault with the place of its value, or of the nearest thing around it that was said."""
    if fault.where.startswith("--set"):
        return fault
    parts = fault.where.split(".")
    for length in range(len(parts), 0, -1):
        origin = origins.get(".".join(parts[:length]))
        if origin is not None:
            return Fault(f"{origin}: {fault.where}", fault.what, fault.hint)
    return Fault(f"{file}: {fault.where}", fault.what, fault.hint)
