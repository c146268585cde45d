"""What pydantic found wrong with a provider's options, in the shape of all errors: where, what, what would be right."""

from __future__ import annotations

import functools
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from apt.core.provider import Provider
from apt.errors import Fault, OptionsError, nearest

PROVIDER_FAULT = "provider"
"""The type of the pydantic error that stands for a nested provider which cannot be had."""

Loc = tuple[int | str, ...]
_PLAIN: frozenset[object] = frozenset({int, float, bool, type(None)})


def explain(error: ValidationError, model: type[BaseModel], given: object) -> list[Fault]:
    """The faults of the options `given`; `where` is the dotted path below the provider, empty for them as a whole."""
    faults: list[Fault] = []
    for path, details in _grouped(error, given).items():
        where = ".".join(map(str, path))
        cause = details[0].get("ctx", {}).get("error")
        if details[0]["type"] == PROVIDER_FAULT and isinstance(cause, OptionsError):
            faults += [below(where, fault) for fault in relative(cause)]
        elif details[0]["type"] == PROVIDER_FAULT:
            faults.append(Fault(join(where, "provider"), str(cause) if cause else details[0]["msg"]))
        else:
            faults.append(_fault(path, details, model))
    return faults


def _grouped(error: ValidationError, given: object) -> dict[Loc, list[ErrorDetails]]:
    """What pydantic says of each place in `given`; it speaks of every member of a union by itself."""
    found: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path_in(given, detail), []).append(detail)
    # Where one member of a union got further into the value than the others, it is the one that was meant.
    outer = {path[:length] for path in found for length in range(len(path))}
    return {path: details for path, details in found.items() if path not in outer}


def _path_in(given: object, detail: ErrorDetails) -> Loc:
    """The part of a location that names something in `given`; the rest are tags of unions."""
    path: list[int | str] = []
    if not detail["loc"]:
        return ()
    *before, last = detail["loc"]
    for part in before:
        held = given.get(part) if isinstance(given, Mapping) else None
        if isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
            held = given[part]
        if held is not None:
            path.append(part)
            given = held
    if (
        detail["type"] == "missing"
        or (isinstance(given, Mapping) and last in given)
        or (isinstance(given, list | tuple) and isinstance(last, int))
    ):
        path.append(last)
    return tuple(path)


def mistyped(model: type[BaseModel], options: Mapping[str, object]) -> list[Fault]:
    """What pydantic would quietly turn into another type: true into 1, "4" into 4, 1 into true."""
    faults: list[Fault] = []
    for name, field in model.model_fields.items():
        if name in options:
            faults += _mistyped(name, set(leaves(field.annotation)), options[name])
    return faults


@functools.lru_cache(maxsize=256)
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[object]:
    field = model.model_fields[name]
    ranged: Any = Annotated[field.annotation, field]
    return TypeAdapter(ranged)


def refused(provider: Provider, name: str, value: object) -> str:
    """What `provider`, its other options as they are, has against `value` for its option `name`; nothing where it takes it."""
    model = type(provider)
    given = {each: getattr(provider, each) for each in provider.model_fields_set} | {name: value}
    try:
        _adapter(model, name).validate_python(value)
        model.model_validate({model.model_fields[each].alias or each: option for each, option in given.items()})
    except ValidationError as error:
        return lowered(_said(error.errors(include_url=False)[0]))
    return ""


def lowered(message: str) -> str:
    """What pydantic says, to stand within a sentence."""
    return message[:1].lower() + message[1:]


def _said(detail: ErrorDetails) -> str:
    """What a validator says, without pydantic's word for its kind before it."""
    message = detail["msg"]
    return message.partition(", ")[2] or message if detail["type"] in ("value_error", "assertion_error") else message


def _mistyped(where: str, wanted: set[object], value: object) -> list[Fault]:
    if isinstance(value, list | tuple):
        inner = {each for leaf in wanted for argument in get_args(leaf) for each in leaves(argument)}
        return [fault for i, each in enumerate(value) if inner for fault in _mistyped(f"{where}.{i}", inner, each)]
    if isinstance(value, Mapping):
        models = [leaf for leaf in wanted if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        if len(models) == 1 and not issubclass(models[0], Provider):
            return [below(where, fault) for fault in mistyped(models[0], value)]
        held = [
            get_args(leaf)[1] for leaf in wanted if get_origin(leaf) in (dict, Mapping) and len(get_args(leaf)) == 2
        ]
        inner = {each for argument in held for each in leaves(argument)}
        return [fault for key, each in value.items() if inner for fault in _mistyped(f"{where}.{key}", inner, each)]
    if isinstance(value, bool):
        wrong, right = bool not in wanted and bool(wanted & {int, float}), _number(wanted)
    elif isinstance(value, str):
        wrong, right = wanted <= _PLAIN, "true or false" if bool in wanted else _number(wanted)
    else:
        wrong, right = isinstance(value, int | float) and wanted <= _PLAIN - {int, float}, "true or false"
    right += " or null" if type(None) in wanted else ""
    return [Fault(where, f"{reprlib.repr(value)} is not allowed", f"input should be {right}")] if wrong else []


def _number(wanted: set[object]) -> str:
    return "a number" if float in wanted else "a whole number"


def leaves(annotation: object) -> Iterator[object]:
    """The members of a union, metadata taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from leaves(member)
    elif origin is Literal:
        yield from (type(value) for value in get_args(annotation))
        yield annotation
    else:
        yield annotation


def relative(error: OptionsError) -> list[Fault]:
    """The faults of an `OptionsError` with paths that begin below the provider."""
    prefix = f"{error.kind}.{error.name}"
    return [
        Fault(fault.where.removeprefix(prefix).removeprefix("."), fault.what, fault.hint)
        if fault.where == prefix or fault.where.startswith(prefix + ".")
        else fault
        for fault in error.faults
    ]


def below(where: str, fault: Fault) -> Fault:
    """The fault with its path put under `where`."""
    return Fault(join(where, fault.where), fault.what, fault.hint)


def join(*parts: str) -> str:
    """A dotted path of those parts that are not empty."""
    return ".".join(part for part in parts if part)


def canonical(options: Mapping[str, object]) -> str:
    """One string for equal options, whatever the order of their keys."""
    try:
        return json.dumps(options, sort_keys=True, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError):
        # Keys of several types, or options within themselves: validation says what is wrong.
        return repr(options)


def _plain(value: object) -> object:
    if isinstance(value, Provider):
        return [f"{type(value).__module__}:{type(value).__qualname__}", value.model_dump(mode="json")]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return repr(value)


def _fault(path: Loc, details: Sequence[ErrorDetails], model: type[BaseModel]) -> Fault:
    where, (first, *others) = ".".join(map(str, path)), details
    kind = first["type"]
    if kind == "extra_forbidden":
        known = _options(model, path[:-1])
        hint = " ".join(filter(None, (nearest(str(path[-1]), known), f"options: {', '.join(known) or 'none'}")))
        return Fault(where, "no such option", hint)
    if kind == "missing":
        return Fault(where, "must be given")
    if kind in ("value_error", "assertion_error"):
        return Fault(where, _said(first))
    hints = list(dict.fromkeys(lowered(each["msg"]) for each in (first, *others)))
    hint = ", or ".join((*hints[:1], *(each.removeprefix("input should be ") for each in hints[1:])))
    if kind == "literal_error" and isinstance(first["input"], str):
        near = nearest(first["input"], re.findall("'([^']*)'", str(first["ctx"]["expected"])))
        hint = " ".join(filter(None, (near, hint)))
    return Fault(where, f"{reprlib.repr(first['input'])} is not allowed", hint)


def _options(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """The names of the options of the model at `path` below `model`."""
    for part in path:
        if isinstance(part, int):
            continue  # in a list of models
        field = model.model_fields.get(part)
        held = [] if field is None else [each for leaf in leaves(field.annotation) for each in (leaf, *get_args(leaf))]
        models = [each for each in held if isinstance(each, type) and issubclass(each, BaseModel)]
        if not models:
            return []
        model = models[0]
    return [field.alias or name for name, field in model.model_fields.items()]
