"""A profile's document: a file, what it inherits from, and the command line, merged. Every value keeps its origin.

What stands above changes what lies below key by key. Lists are replaced as a whole; a provider that is replaced leaves its
options behind; null takes a schedule, a provider's section, or a whole section away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import get_origin

from pydantic import BaseModel

from apt.core import layout, yaml
from apt.core.config import APTConfig, Data
from apt.core.layout import type_at
from apt.core.legacy import KINDS, settle, translate
from apt.core.local import real_path, seen_from
from apt.core.options import leaves
from apt.core.registry import Registry
from apt.core.yaml import Key, Origin, Source, Value
from apt.errors import Fault, ProfileError

MAX_FILES = 16
SECTIONS = ("plugins", "model", "schedules", "data", "extra", *layout.SECTIONS)
NAMES_CODE = ("plugins", "model", "data", "monitoring")
"""Sections where a text of the form ``./file.py:Class`` is a provider."""
TOKENIZER: Key = ("data", "tokenizer")


@dataclass(frozen=True)
class Document:
    """The values of a profile in today's form, with what was found on the way to them."""

    values: dict[str, Value]
    origins: dict[str, Origin]
    """By dotted path."""
    notes: tuple[str, ...]
    faults: tuple[Fault, ...]
    files: tuple[Path, ...]


def read_document(path: Path, sets: Sequence[str], plugins: Sequence[str] | None, registry: Registry) -> Document:
    """Read a file and its chain of `base`, translate old keys, merge, and apply the command line.

    Raises `ProfileError` for what cannot be read at all.
    """
    files: list[Path] = []
    layers = _chain(path, files, real_path(path.parent))[::-1]
    if sum(len(layer.origins) for layer in layers) > yaml.MAX_VALUES:
        what = f"has, with what it inherits, more than {yaml.MAX_VALUES} values"
        raise ProfileError([Fault(str(path), what, "a profile has fewer")])
    listed = _listed(layers, sets, plugins)
    notes: list[str] = []
    faults: list[Fault] = []
    merged = Source({}, {})

    def add(layer: Source) -> Source:
        translated, said, contradictions = translate(layer)
        notes.extend(said)
        faults.extend(contradictions)
        return _merge(merged, translated)

    for layer in layers:
        merged = add(layer)
    for text in sets:
        try:
            merged = add(_read_set(text, merged, registry))
        except ProfileError as error:
            faults += error.faults
    values, origins = merged.values, {_dotted(key): origin for key, origin in merged.origins.items()}
    if plugins is not None:
        values["plugins"], origins["plugins"] = list(plugins), Origin("--plugins")
    faults += settle(values, listed)
    _take_away(values)
    return Document(values, origins, tuple(dict.fromkeys(notes)), tuple(faults), tuple(files))


def _listed(layers: Sequence[Source], sets: Sequence[str], plugins: Sequence[str] | None) -> object:
    """What the whole profile lists as plugins, wherever it says so."""
    if plugins is not None:
        return plugins
    for text in reversed(sets):
        path, _, value = text.partition("=")
        if path.strip() == "plugins":
            with suppress(ProfileError):  # told when the text itself is read
                return _of_list(value)
    return next((layer.values["plugins"] for layer in reversed(layers) if "plugins" in layer.values), [])


def _chain(path: Path, files: list[Path], top: Path) -> list[Source]:
    """The file and what it inherits from, nearest first; provider code in files is named as seen from the folder `top`."""
    real = real_path(path)
    if real in files:
        chain = " -> ".join(each.name for each in (*files, real))
        raise ProfileError([Fault(str(path), f"inherits from itself: {chain}")])
    if len(files) == MAX_FILES:
        raise ProfileError([Fault(str(path), f"is inherited through more than {MAX_FILES} files")])
    files.append(real)
    source = _seen_from_top(yaml.read_file(path), real_path(path.parent), top)
    base = source.values.pop("base", None)
    if base is None:
        return [source]
    if not isinstance(base, str) or "\0" in base:
        raise ProfileError([Fault(f"{source.origins[('base',)]}: base", f"{base!r} is not the path of a profile")])
    return [source, *_chain(path.parent / base, files, top)]


def _seen_from_top(source: Source, folder: Path, top: Path) -> Source:
    """A base in another folder names provider code beside itself; in the whole profile the names are the top's."""
    if folder == top:
        return source
    origins = dict(source.origins)

    def renamed(value: Value, path: Key) -> Value:
        if isinstance(value, str):
            return seen_from(value, folder, top)
        if isinstance(value, list):
            return [renamed(each, (*path, index)) for index, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        result: dict[str, Value] = {}
        for key, each in value.items():
            name = seen_from(key, folder, top)  # of a plugin with options
            if name != key:
                for old in [old for old in origins if old[: len(path) + 1] == (*path, key)]:
                    origins[(*path, name, *old[len(path) + 1 :])] = origins.pop(old)
            result[name] = renamed(each, (*path, key))
        return result

    values = {key: renamed(each, (key,)) if key in NAMES_CODE else each for key, each in source.values.items()}
    return Source(values, origins)


def _read_set(text: str, merged: Source, registry: Registry) -> Source:
    """``a.b=value`` as a document of one value."""
    path, equals, value = text.partition("=")
    keys, said = path.strip().split("."), Origin(f"--set {text}")
    if not equals or not all(keys):
        raise ProfileError([Fault(str(said), "is not of the form a.b=value")])
    if keys == ["base"]:
        raise ProfileError([Fault(str(said), "a base is inherited before --set is applied", "name it in a file")])
    holder: Value = merged.values
    for key in keys[:-1]:
        holder = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(holder, list):
            raise ProfileError([Fault(str(said), f"{key} is a list", "give the whole of it")])
    try:
        parsed = _typed(value, type_at(keys, merged.values, registry))
    except ProfileError as error:
        raise ProfileError([Fault(str(said), fault.what, fault.hint) for fault in error.faults]) from error
    origins: dict[Key, Origin] = {(*keys, *below): said for below in _paths(parsed)}
    for count in range(1, len(keys)):
        origins[tuple(keys[:count])] = merged.origins.get(tuple(keys[:count]), said)
    for key in reversed(keys):
        parsed = {key: parsed}
    assert isinstance(parsed, dict)
    return Source(parsed, origins)


def _typed(text: str, annotation: object) -> Value:
    """The value that a text means where `annotation` is wanted: words are taken as they are, a list needs no brackets."""
    wanted = {get_origin(leaf) or leaf for leaf in leaves(annotation)}
    try:
        value = yaml.parse_value(text)
    except ProfileError:
        if str not in wanted:
            raise
        return text
    if str in wanted:
        fits = isinstance(value, str) or type(value) in wanted or (value is None and NoneType in wanted)
        fits |= isinstance(value, list) and tuple in wanted
        fits |= isinstance(value, dict) and any(
            isinstance(each, type) and issubclass(each, BaseModel) for each in wanted
        )
        return value if fits else text
    if wanted & {list, tuple} and value is not None:
        return _of_list(text)
    return value


def _of_list(text: str) -> Value:
    value = yaml.parse_value(text)
    return value if isinstance(value, list) else yaml.parse_value(f"[{text}]")


def _paths(value: Value) -> Iterator[Key]:
    """The paths of a value and of everything in it."""
    yield ()
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from ((key, *below) for below in _paths(inner))


def _merge(below: Source, above: Source) -> Source:
    origins = dict(below.origins)

    def forget(path: Key) -> None:
        for key in [key for key in origins if len(key) > len(path) and key[: len(path)] == path]:
            del origins[key]

    def merge(low: dict[str, Value], high: dict[str, Value], path: Key) -> dict[str, Value]:
        result, chooser = dict(low), _chooser(path)
        if chooser in high and high[chooser] != low.get(chooser, _default(path)):
            # Options belong to their provider: another provider starts with none.
            kept = Data.model_fields.keys() if path == ("data",) else ()  # of the section, not of the source
            for key in [key for key in low if key not in kept]:
                forget((*path, key))
                origins.pop((*path, key), None)
                del result[key]
        for key, value in high.items():
            here, old = (*path, key), result.get(key)
            if _chooser(here) == "provider":
                # A provider's name, and a mapping with `provider`, are two forms of one thing.
                old = {"provider": old} if isinstance(old, str) and isinstance(value, dict) else old
                value = {"provider": value} if isinstance(value, str) and isinstance(old, dict) else value
            if isinstance(old, dict) and isinstance(value, dict):
                result[key] = merge(old, value, here)
            else:
                forget(here)
                result[key] = value
        return result

    values = merge(below.values, above.values, ())
    return Source(values, {**origins, **above.origins})


def _chooser(path: Key) -> str:
    """The key by which a mapping at this path names its provider; nothing where it does not."""
    if path == ("data",):
        return "source"
    holds = len(path) > 1 and (path[0] == "data" or (path[0] == "model" and path[1] in KINDS))
    return "provider" if holds else ""


def _default(path: Key) -> str | None:
    """The provider that is meant where a mapping at this path names none."""
    fields = APTConfig.model_fields
    if path == ("data",):
        return str(fields["data"].get_default().source)
    if path == TOKENIZER:
        return str(fields["data"].get_default().tokenizer.provider)
    return str(fields[f"{path[1]}_name"].get_default()) if len(path) == 2 else None


def _take_away(values: dict[str, Value]) -> None:
    """Leave out what is null: sections, and in them schedules and providers."""
    for section in [section for section in SECTIONS if section in values and values[section] is None]:
        del values[section]
    for section, removable in (("schedules", None), ("model", KINDS)):
        inner = values.get(section)
        if isinstance(inner, dict):
            values[section] = {
                key: each
                for key, each in inner.items()
                if each is not None or (removable is not None and key not in removable)
            }


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)
