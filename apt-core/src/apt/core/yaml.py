"""YAML read with the place of every value, and without its traps.

PyYAML's event stream (the C parser where it is there) is turned into plain values here, so that each has its line and column,
and so that tags, aliases, duplicate keys, deep nesting and huge files are refused before they cost anything. Scalars are read by
YAML 1.2's core schema: ``3e-5`` is a number, ``on`` is a word. ``${NAME}`` and ``${NAME:-default}`` are replaced from the
environment, except between single quotes, as in a shell.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from apt.errors import Fault, ProfileError

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
Key = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 4_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?\d+|0x[0-9a-fA-F]+|0o[0-7]+", re.ASCII)
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(:-(?P<default>[^}]*))?\}")


@dataclass(frozen=True)
class Origin:
    """Where a value was said."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Source:
    """The values of a file and where each of them stands, by the path of keys that leads to it."""

    values: dict[str, Value]
    origins: dict[Key, Origin]


def read_file(path: Path) -> Source:
    """The mapping that a file holds. Raises `ProfileError` with the place of the first fault."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(MAX_BYTES + 1)  # what is no plain file has no size
        if len(content) > MAX_BYTES:
            what = f"is {size} bytes" if size > MAX_BYTES else "does not end"
            raise ProfileError([Fault(str(path), what, f"a profile has at most {MAX_BYTES} bytes")])
    except OSError as error:
        raise ProfileError([Fault(str(path), f"cannot be read: {error.strerror}")]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError([Fault(str(path), f"is not UTF-8 (byte {error.start})", "save it as UTF-8")]) from error
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Source:
    """The mapping that a text holds; `name` is what its places are called."""
    reader = _Reader(name)
    if found := _NOT_PRINTABLE.search(text):
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        what = f"the control character {found[0]!r} is not allowed"
        raise ProfileError([Fault(str(Origin(name, line, column)), what, "take it out")])
    try:
        reader.read(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(Origin(name, mark.line + 1, mark.column + 1)) if mark else name
        before = text.split("\n")[mark.line][: mark.column + 1] if mark and mark.line <= text.count("\n") else ""
        hint = "YAML is indented with spaces, and here is a tab" if before.lstrip(" ").startswith("\t") else ""
        raise ProfileError([Fault(where, getattr(error, "problem", None) or str(error), hint)]) from error
    if not isinstance(reader.root, dict):
        raise ProfileError([Fault(name, "holds no mapping", "a profile begins with a line such as `name: mine`")])
    return Source(reader.root, reader.origins)


def parse_scalar(text: str) -> Value:
    """A plain scalar as YAML 1.2's core schema reads it."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        # Python converts no more than 4300 decimal digits; so many are too many for any purpose.
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text) if len(text) < 4000 else math.inf
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse_value(text: str) -> Value:
    """A value from the command line: any YAML, flow style included; nothing is null."""
    return None if not text.strip() else read_text(f"value: {text}", "value").values["value"]


def _is_too_large(value: Value) -> bool:
    """Whether a number is none of 64 bits."""
    if isinstance(value, float):
        return math.isinf(value)
    return isinstance(value, int) and not -(2**63) <= value < 2**63


class _Reader:
    """Turns events into values, without recursion."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Value = None
        self.origins: dict[Key, Origin] = {}
        self._open: list[tuple[dict[str, Value] | list[Value], Key]] = []
        self._key: str | None = None
        self._seen = False

    def read(self, text: str) -> None:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise self._fault(event, "aliases (*name) are not allowed", "write the value out, or use `base`")
            if isinstance(event, yaml.MappingStartEvent):
                self._begin(event, {})
            elif isinstance(event, yaml.SequenceStartEvent):
                self._begin(event, [])
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._open.pop()
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, yaml.DocumentStartEvent):
                if self._seen:
                    raise self._fault(event, "a second document begins", "a profile is one document")
                self._seen = True

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        if event.tag is not None and event.tag != "!":
            raise self._fault(event, f"the tag {event.tag} is not allowed", "leave it out")
        parent = self._open[-1][0] if self._open else None
        if isinstance(parent, dict) and self._key is None:
            if event.value in parent:
                raise self._fault(event, f"the key {event.value!r} stands twice")
            if event.value == "<<":
                raise self._fault(event, "merge keys (<<) are not allowed", "use `base`")
            self._key = event.value
            return
        plain = not event.style  # None from the Python parser, '' from the C one
        if plain and not event.value and len(self._open) == 1:
            hint = "leave it out, or write null to take away what is inherited"
            raise self._fault(event, f"nothing follows {self._key!r}", hint)
        text = self._substitute(event) if "${" in event.value and event.style != "'" else event.value
        value = parse_scalar(text) if plain else text
        if _is_too_large(value):
            shown = reprlib.repr(text).strip("'")
            raise self._fault(
                event, f"{shown} is too large a number", "integers have 64 bits, others are below 1.8e308"
            )
        self._put(event, value)

    def _substitute(self, event: yaml.ScalarEvent) -> str:
        def value(match: re.Match[str]) -> str:
            found = os.environ.get(match["name"])
            if not found and match["default"] is not None:
                return match["default"]
            if found is None:
                raise self._fault(
                    event, f"the environment has no {match['name']}", f"set it, or write ${{{match['name']}:-default}}"
                )
            return found

        # Behind the last brace nothing ends, and every beginning there would be searched for its end.
        end = event.value.rfind("}") + 1
        return _VARIABLE.sub(value, event.value[:end]) + event.value[end:]

    def _begin(self, event: yaml.NodeEvent, holder: dict[str, Value] | list[Value]) -> None:
        if getattr(event, "tag", None) is not None:
            raise self._fault(event, f"the tag {event.tag} is not allowed", "leave it out")  # type: ignore[attr-defined]
        if len(self._open) >= MAX_DEPTH:
            raise self._fault(event, f"nested deeper than {MAX_DEPTH} levels")
        if self._open and isinstance(self._open[-1][0], dict) and self._key is None:
            raise self._fault(event, "a key must be a word")
        self._open.append((holder, self._put(event, holder)))

    def _put(self, event: yaml.NodeEvent, value: Value) -> Key:
        path: Key = ()
        if self._open:
            parent, above = self._open[-1]
            if isinstance(parent, dict):
                assert self._key is not None
                path, parent[self._key], self._key = (*above, self._key), value, None
            else:
                path = (*above, len(parent))
                parent.append(value)
        else:
            self.root = value
        if len(self.origins) >= MAX_VALUES:
            raise self._fault(event, f"more than {MAX_VALUES} values", "a profile has fewer")
        self.origins[path] = self._place(event)
        return path

    def _fault(self, event: yaml.Event, what: str, hint: str = "") -> ProfileError:
        return ProfileError([Fault(str(self._place(event)), what, hint)])

    def _place(self, event: yaml.Event) -> Origin:
        mark = event.start_mark
        return Origin(self.name) if mark is None else Origin(self.name, mark.line + 1, mark.column + 1)


def dump(values: Mapping[str, object]) -> str:
    """YAML of plain values that `read_text` reads back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes what this module reads: floats with an exponent keep their digits, short lists stand on one line."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    digits, exponent, power = repr(value).partition("e")
    # YAML 1.1 wants a point before an exponent; with it, every YAML reader sees a number.
    point = ".0" if exponent and "." not in digits else ""
    return dumper.represent_scalar("tag:yaml.org,2002:float", f"{digits}{point}{exponent}{power}")


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = isinstance(parse_scalar(value), str) and "${" not in value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if plain else "'")


def _represent_list(dumper: yaml.SafeDumper, value: list[object]) -> yaml.SequenceNode:
    flow = all(isinstance(each, str | int | float | bool | None) for each in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_list)
