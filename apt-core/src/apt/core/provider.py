"""The base of every provider: a frozen, closed pydantic model whose fields are its options and that makes one part.

A provider is described without PyTorch: importing its class, validating its options and reading its estimates need
none. Only the method that makes the part (`makes`) may import torch. Every part remembers its maker in the attribute
`apt_provider`; that is how scheduled values, switches and the proof of use find the modules of a provider.

A field annotated ``Slot[RouterProvider]`` is a nested provider: in YAML ``router: {provider: topk_default, top_k: 2}``.
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, PrivateAttr, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from apt.core.registry import ProviderRecord

SLOT_KEY = "x-provider-kind"
"""What stands for a nested provider in a provider's own JSON Schema; `apt.core.schema` knows what is installed."""
API_LEVEL = 1
"""Raised when an interface that providers implement changes; a provider built for another level is refused."""


class Provider(BaseModel, ABC):
    """A factory of one component; its fields are its options, with their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str]
    """The kind that it belongs to: attention, ffn, router, align, retrieval, data, tokenizer, plugin, ..."""
    makes: ClassVar[str] = ""
    """The name of the method that makes the part (set by the interface of the kind)."""
    api_level: ClassVar[int] = API_LEVEL
    """The API level that the provider was written for; state it as a number in your own class."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """What it cannot be used with: ``kind.name``, a kind, or ``capability:<word>``."""
    capabilities: ClassVar[frozenset[str]] = frozenset()
    """Words that others may exclude, such as ``"noncausal"``."""
    scheduled: ClassVar[Mapping[str, str]] = {}
    """The scheduled values that it offers: the name in a profile's `schedules`, and the zero-dimensional float32
    buffer of its module that takes the value (``{"route_temp": "temperature"}``)."""
    losses: ClassVar[Mapping[str, str]] = {}
    """The losses that its parts (a plugin: itself) add while they are on, and the scheduled value or option that weighs
    each (``{"balance_loss": "balance_loss"}``; ``""``: nothing does). One that weighs more than 0 and does not arrive
    stops the run."""
    sound: ClassVar[Mapping[str, tuple[float, float, str]]] = {}
    """Metrics of its parts that ought to stay within bounds: the least, the greatest, and what else it means. An evaluation
    that finds one outside warns, once a run."""
    switched_by: ClassVar[str | None] = None
    """The plugin whose switch governs its parts: until that plugin is on they are inert."""
    needs_plugin: ClassVar[str | None] = None
    """The plugin without whose hooks it does not do what it says; a profile that names it and does not list that is refused."""

    _record: ProviderRecord | None = PrivateAttr(default=None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        method = cls.__dict__.get(cls.makes)
        if callable(method) and not getattr(method, "__isabstractmethod__", False):
            setattr(cls, cls.makes, _signed(method))

    def get_name(self) -> str:
        """The entry point's name, or the class's own where it was registered by hand."""
        return self._record.name if self._record else type(self).__name__.lower()

    def get_version(self) -> str:
        """The version of the distribution that it came with."""
        return self._record.version if self._record else "0"

    @classmethod
    def validate_config(cls, config: Mapping[str, object]) -> bool:
        """Whether these options are accepted."""
        try:
            cls.model_validate(dict(config))
        except ValueError:
            return False
        return True

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """Requirement strings beyond the distribution's own, such as ``"faiss-cpu>=1.9"``; checked before use."""
        return []

    @classmethod
    def get_priority(cls) -> int:
        """Among providers of one kind, the order in listings (higher first); never decides which one is used."""
        return 0


def _signed(make: Callable[..., object]) -> Callable[..., object]:
    """Let the part that `make` returns remember its maker."""

    @functools.wraps(make)
    def signed(self: Provider, *args: object, **kwargs: object) -> object:
        part = make(self, *args, **kwargs)
        with suppress(AttributeError):  # a retriever may be a plain list, which remembers nothing; modules always do
            part.apt_provider = self  # type: ignore[attr-defined]
        return part

    return signed


class _SlotMarker:
    """Turns ``{provider: name, **options}``, a bare name, or a provider into a provider of the annotated interface."""

    def __get_pydantic_core_schema__(self, source: type[Provider], handler: GetCoreSchemaHandler) -> CoreSchema:
        def resolve(value: object, info: ValidationInfo) -> Provider:
            from apt.core.registry import resolve_slot

            return resolve_slot(source, value, info.context)

        def dump(value: Provider) -> dict[str, object]:
            return {"provider": value.get_name(), **value.model_dump(mode="json", exclude_unset=True)}

        return core_schema.with_info_plain_validator_function(
            resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(dump),
            metadata={"slot": source.kind},
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # A field's own validators stand around the slot.
        inner: Mapping[str, Any] = schema
        while "slot" not in inner.get("metadata", {}):
            inner = inner["schema"]
        return {SLOT_KEY: inner["metadata"]["slot"]}


P = TypeVar("P", bound=Provider)
Slot = Annotated[P, _SlotMarker()]
"""``router: Slot[RouterProvider] = "topk_default"``: an option that is itself a provider."""
