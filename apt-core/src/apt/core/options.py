"""What pydantic found wrong with a provider's options, in the shape of all errors: where, what, what would be right."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from apt.core.provider import Provider
from apt.errors import Fault, OptionsError, nearest

PROVIDER_FAULT = "provider"
"""The type of the pydantic error that stands for a nested provider which cannot be had."""


_PLAIN: frozenset[object] = frozenset({int, float, bool, type(None)})


def explain(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """The faults of options; `where` is the dotted path below the provider, empty for the options as a whole."""
    faults: list[Fault] = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if detail["type"] == PROVIDER_FAULT and isinstance(cause, OptionsError):
            faults += [below(where, fault) for fault in relative(cause)]
        elif detail["type"] == PROVIDER_FAULT:
            faults.append(Fault(join(where, "provider"), str(cause) if cause else detail["msg"]))
        else:
            faults.append(_fault(where, detail, model))
    return faults


def mistyped(model: type[BaseModel], options: Mapping[str, object]) -> list[Fault]:
    """What pydantic would quietly turn into another type: true into 1, "4" into 4, 1 into true."""
    faults: list[Fault] = []
    for name, field in model.model_fields.items():
        if name in options:
            faults += _mistyped(name, set(_leaves(field.annotation)), options[name])
    return faults


def _mistyped(where: str, leaves: set[object], value: object) -> list[Fault]:
    if isinstance(value, list | tuple):
        inner = {each for leaf in leaves for argument in get_args(leaf) for each in _leaves(argument)}
        return [fault for i, each in enumerate(value) if inner for fault in _mistyped(f"{where}.{i}", inner, each)]
    if isinstance(value, bool):
        wrong, wanted = bool not in leaves and bool(leaves & {int, float}), _number(leaves)
    elif isinstance(value, str):
        wrong, wanted = leaves <= _PLAIN, "true or false" if bool in leaves else _number(leaves)
    else:
        wrong, wanted = isinstance(value, int | float) and leaves <= _PLAIN - {int, float}, "true or false"
    return [Fault(where, f"{reprlib.repr(value)} is not allowed", f"input should be {wanted}")] if wrong else []


def _number(leaves: set[object]) -> str:
    return "a number" if float in leaves else "a whole number"


def _leaves(annotation: object) -> Iterator[object]:
    """The members of a union, metadata taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _leaves(member)
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
    return json.dumps(options, sort_keys=True, default=_plain, separators=(",", ":"))


def _plain(value: object) -> object:
    if isinstance(value, Provider):
        return [f"{type(value).__module__}:{type(value).__qualname__}", value.model_dump(mode="json")]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return repr(value)


def _fault(where: str, detail: ErrorDetails, model: type[BaseModel]) -> Fault:
    if detail["type"] == "extra_forbidden":
        known = _options(model, detail["loc"][:-1])
        hint = " ".join(
            filter(None, (nearest(str(detail["loc"][-1]), known), f"options: {', '.join(known) or 'none'}"))
        )
        return Fault(where, "no such option", hint)
    return Fault(where, *reword(detail))


def reword(detail: ErrorDetails) -> tuple[str, str]:
    """What is wrong with a value, and what would be right, from what pydantic says of it."""
    kind, message = detail["type"], detail["msg"]
    if kind == "missing":
        return "must be given", ""
    if kind in ("value_error", "assertion_error"):
        return message.partition(", ")[2] or message, ""
    hint = message[:1].lower() + message[1:]
    if kind == "literal_error" and isinstance(detail["input"], str):
        near = nearest(detail["input"], re.findall("'([^']*)'", str(detail["ctx"]["expected"])))
        hint = " ".join(filter(None, (near, hint)))
    return f"{reprlib.repr(detail['input'])} is not allowed", hint


def _options(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """The names of the options of the model at `path` below `model`."""
    for part in path:
        field = model.model_fields.get(str(part))
        leaves = [] if field is None else list(_leaves(field.annotation))
        inner = [each for each in leaves if isinstance(each, type) and issubclass(each, BaseModel)]
        if len(inner) != 1:
            return []
        model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]
