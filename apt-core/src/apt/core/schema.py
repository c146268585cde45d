"""One JSON Schema for profiles, of exactly what is installed: an editor completes and checks third parties' options too.

Each kind is a definition, ``#/$defs/<kind>``: any of its providers' names, or a mapping with `provider` and the options of that
provider. Options that are providers themselves refer to the definition of their kind. The predecessor's keys are there, marked as
deprecated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apt.core.config import APTConfig
from apt.core.layout import MODEL, RENAMED, SECTIONS, TOP
from apt.core.legacy import KINDS
from apt.core.provider import SLOT_KEY, Provider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.core.schedules import Piecewise, Ramp, Segment
from apt.core.sections import Data
from apt.errors import ProviderError

Schema = dict[str, Any]  # JSON
VARIABLE = r"\$\{\w+(:-[^}]*)?\}"
_ANNOTATIONS = ("title", "description", "default", "deprecated")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def profile_schema(registry: Registry | None = None) -> tuple[Schema, list[str]]:
    """The schema, and one line for each provider that is left out because it cannot be loaded.

    Provider classes are imported, PyTorch is not.
    """
    return _Writer(installed if registry is None else registry).write()


class _Writer:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.defs: Schema = {}
        self.left_out: list[str] = []
        self.classes: dict[str, dict[str, type[Provider]]] = {}

    def write(self) -> tuple[Schema, list[str]]:
        for kind, names in self.registry.list_providers().items():
            self.classes[kind] = self._load(kind, names)
        for kind in {*self.classes, *KINDS, "router", "tokenizer", "logger"}:
            self.defs.setdefault(kind, self._kind(kind))
        config = self._object(APTConfig)
        properties = config["properties"]
        sections: Schema = {name: self._object(section) for name, section in SECTIONS.items()}
        for old, new in RENAMED.items():
            sections["training"]["properties"][old] = properties[new]
        sections |= {
            "plugins": self._plugins(),
            "model": self._model({name: properties[name] for name in MODEL}),
            "schedules": self._schedules(),
            "data": self._data(),
            "extra": properties["extra"],
        }
        schema = {
            "$schema": DIALECT,
            "title": "APT profile",
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **{name: properties[name] for name in TOP if name not in sections},
                "base": {"type": "string", "description": "another profile to inherit from, seen from this file"},
                # null takes an inherited section away, and so below.
                **{name: _or_null(section) for name, section in sections.items()},
            },
            "$defs": self.defs,
        }
        return {key: _with_variables(each) for key, each in schema.items()}, self.left_out

    def _load(self, kind: str, names: Iterable[str]) -> dict[str, type[Provider]]:
        found: dict[str, type[Provider]] = {}
        for name in names:
            try:
                found[name] = self.registry.load(kind, name)
                self._object(found[name])
            except ProviderError as error:
                self.left_out.append(str(error))
            except Exception as error:  # noqa: BLE001  a package can raise anything, and its name is told
                del found[name]
                self.left_out.append(
                    f"{kind}.{name}: its options have no JSON Schema: {str(error).partition(chr(10))[0]}"
                )
        return found

    def _object(self, model: type[Any]) -> Schema:
        """A pydantic model's schema; its definitions go to the one place where they are all kept."""
        schema: Schema = _referring(model.model_json_schema(ref_template="#/$defs/{model}"))
        self.defs |= schema.pop("$defs", {})
        return schema

    def _options(self, provider: type[Provider]) -> Schema:
        return dict(self._object(provider).get("properties", {}))

    def _kind(self, kind: str) -> Schema:
        """A provider of this kind: its name, or a mapping."""
        classes = self.classes.get(kind, {})
        forms: list[Schema] = [{"enum": list(classes)}, _LOCAL]
        for name, provider in classes.items():
            required = [key for key, field in provider.model_fields.items() if field.is_required()]
            forms.append(
                {
                    "type": "object",
                    "description": (provider.__doc__ or "").strip().partition("\n")[0],
                    "properties": {"provider": {"const": name}, "fallback": _FALLBACK, **self._options(provider)},
                    "required": ["provider", *required],
                    "additionalProperties": False,
                }
            )
        forms.append({"type": "object", "properties": {"provider": _LOCAL}, "required": ["provider"]})
        inherited = self._loose(kind, more={"fallback": _FALLBACK})
        inherited["description"] = "further options of the provider that the base names, or of the default"
        return {"anyOf": [*forms, inherited]}

    def _model(self, properties: Schema) -> Schema:
        kinds = {kind: {"anyOf": [{"$ref": f"#/$defs/{kind}"}, {"type": "null"}]} for kind in KINDS}
        names = {
            f"{kind}_name": {"enum": [*self.classes.get(kind, {}), *(["none"] if kind == "retrieval" else [])]}
            for kind in (*KINDS, "router")
        }
        old = {
            **names,
            "tva": self._loose("attention"),
            "bistate": self._loose("align"),
            "moe": self._loose("ffn", "router", more={"enabled": {"type": "boolean"}}),
        }
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **properties,
                **kinds,
                **{key: {**value, "deprecated": True} for key, value in old.items() if key not in properties},
            },
        }

    def _loose(self, *kinds: str, more: Mapping[str, Schema] | None = None) -> Schema:
        """An old section: the options of every provider of these kinds, whichever is meant."""
        properties: Schema = dict(more or {})
        for kind in kinds:
            for provider in self.classes.get(kind, {}).values():
                for name, schema in self._options(provider).items():
                    known = properties.get(name)
                    if known is None:
                        properties[name] = schema
                    elif known != schema:
                        forms = known.get("anyOf", [known]) if set(known) == {"anyOf"} else [known]
                        properties[name] = {"anyOf": [*forms, schema]}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _plugins(self) -> Schema:
        classes = self.classes.get("plugin", {})
        options = {
            name: {"type": "object", "properties": self._options(provider), "additionalProperties": False}
            for name, provider in classes.items()
        }
        with_options = {
            "type": "object",
            "properties": options,
            "patternProperties": {_LOCAL["pattern"]: {"type": "object"}},
            "additionalProperties": False,
            "maxProperties": 1,
        }
        return {"type": "array", "items": {"anyOf": [{"enum": list(classes)}, _LOCAL, with_options]}}

    def _schedules(self) -> Schema:
        entry = {"anyOf": [self._object(model) for model in (Ramp, Piecewise)]}
        entry["anyOf"] += [{"type": "array", "items": self._object(Segment), "minItems": 1}, {"type": "null"}]
        readers: dict[str, list[str]] = {}
        for kind, classes in self.classes.items():
            for name, provider in classes.items():
                for value in provider.scheduled:
                    readers.setdefault(value, []).append(f"{kind}.{name}")
        properties: Schema = {
            value: {**entry, "description": f"read by {', '.join(who)}"} for value, who in readers.items()
        }
        for plugin in self.classes.get("plugin", {}):
            for unit in ("epoch", "step"):
                properties[f"enable_{plugin}_at_{unit}"] = {
                    "type": ["integer", "null"],
                    "minimum": 0,
                    "description": f"the {unit} from which on {plugin} is on",
                }
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _data(self) -> Schema:
        """The source's options stand beside `source`."""
        forms = []
        common = {"tokenizer": {"$ref": "#/$defs/tokenizer"}, "cache": Data.model_json_schema()["properties"]["cache"]}
        for name, provider in self.classes.get("data", {}).items():
            required = [key for key, field in provider.model_fields.items() if field.is_required()]
            default = name == APTConfig.model_fields["data"].get_default().source
            forms.append(
                {
                    "type": "object",
                    "properties": {"source": {"const": name}, **common, **self._options(provider)},
                    "required": required if default else ["source", *required],
                    "additionalProperties": False,
                }
            )
        forms.append({"type": "object", "properties": {"source": _LOCAL, **common}, "required": ["source"]})
        forms.append(self._loose("data", more=common))  # of the source that the base names
        return {"anyOf": forms}


_LOCAL: Schema = {"type": "string", "pattern": r"\.py:", "description": "a class in a file beside the profile"}
_FALLBACK: Schema = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "what may stand in, in order",
}


def _or_null(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def _with_variables(value: Any) -> Any:
    """The schema with ``${NAME}`` beside every value that is not any text: its type is known when the profile is read."""
    if isinstance(value, list):
        return [_with_variables(each) for each in value]
    if not isinstance(value, dict):
        return value
    kinds = value.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    if isinstance(value.get("enum"), list):
        kept = {key: each for key, each in value.items() if key in _ANNOTATIONS}
        rest = {key: each for key, each in value.items() if key not in kept}
        return {"anyOf": [rest, {"type": "string", "pattern": VARIABLE}], **kept}
    if kinds & {"integer", "number", "boolean"}:
        # `pattern` speaks of text alone, as `minimum` of numbers.
        return {**value, "type": [*sorted(kinds), "string"], "pattern": VARIABLE}
    if kinds == {"string"} and "pattern" in value:
        return {**value, "pattern": f"{value['pattern']}|{VARIABLE}"}
    return {
        key: each if key in ("default", "const", "required") else _with_variables(each) for key, each in value.items()
    }


def _referring(value: Any) -> Any:
    """The schema with nested providers as references to the definition of their kind."""
    if isinstance(value, list):
        return [_referring(each) for each in value]
    if not isinstance(value, dict):
        return value
    rest = {key: _referring(each) for key, each in value.items() if key != SLOT_KEY}
    return {"$ref": f"#/$defs/{value[SLOT_KEY]}", **rest} if SLOT_KEY in value else rest
