"""The interfaces of the kinds that APT itself uses; importing them needs no PyTorch."""

from apt.core.provider import Provider, Slot
from apt.core.providers.align import AlignProvider
from apt.core.providers.attention import AttentionProvider
from apt.core.providers.data import DataProvider, Document, Pair
from apt.core.providers.ffn import FFNProvider
from apt.core.providers.heads import HeadsProvider, RopeScaling, SizedHeadsProvider
from apt.core.providers.logger import Logger, LoggerProvider
from apt.core.providers.plugin import Plugin
from apt.core.providers.retrieval import RetrievalProvider
from apt.core.providers.router import RouterProvider
from apt.core.providers.tokenizer import Tokenizer, TokenizerProvider

INTERFACES: dict[str, type[Provider]] = {
    interface.kind: interface
    for interface in (
        AttentionProvider,
        FFNProvider,
        RouterProvider,
        AlignProvider,
        RetrievalProvider,
        DataProvider,
        TokenizerProvider,
        LoggerProvider,
        Plugin,
    )
}
"""Kind -> the interface that a provider of that kind must implement. Packages may bring kinds that are not here."""

__all__ = [
    "INTERFACES",
    "AlignProvider",
    "AttentionProvider",
    "DataProvider",
    "Document",
    "FFNProvider",
    "HeadsProvider",
    "Logger",
    "LoggerProvider",
    "Pair",
    "Plugin",
    "Provider",
    "RetrievalProvider",
    "RopeScaling",
    "RouterProvider",
    "SizedHeadsProvider",
    "Slot",
    "Tokenizer",
    "TokenizerProvider",
]
