"""The plugin `rag`: before a prompt is tokenized, passages that bear on it are put before it, each with its source."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, PrivateAttr

from apt.core.provider import Slot
from apt.core.providers import Document, Plugin, RetrievalProvider
from apt.errors import UserError
from apt.hookspecs import Prompt, hookimpl
from apt_rag.corpus import read_folder

SHORTEST = 40
"""Fewer characters of a passage than this say nothing; it is left out rather than cut so short."""


class RAGPlugin(Plugin):
    """Retrieval-augmented generation by concatenation. The index is built at the first prompt."""

    api_level: ClassVar[int] = 1

    folder: Path | None = Field(default=None, description="the folder of texts that passages come from")
    top_k: int = Field(default=3, ge=1, description="passages a prompt, at most")
    max_chars: int = Field(default=2000, ge=1, description="characters that passages may take, sources included")
    retriever: Slot[RetrievalProvider] = Field(
        default="cosine",  # type: ignore[assignment]  # the slot turns a name into a provider
        description="what finds the passages",
    )

    _made: object = PrivateAttr(default=None)

    @hookimpl
    def apt_prompt_prepare(self, prompt: Prompt) -> None:
        """Put passages before the prompt.

        The best stands last, next to the prompt: a context that is cut from the left loses the worst first.
        Raises `apt.errors.UserError` where there is no folder, or nothing to read in it.
        """
        if self._made is None:
            self._made = self._make_retriever()
        found, scores = self.retriever.retrieve(self._made, prompt.text, self.top_k)
        bearing = [document for document, score in zip(found[0], scores[0].tolist(), strict=True) if score > 0]
        passages = fit(bearing, self.max_chars)
        prompt.text = "".join(_shown(passage) for passage in reversed(passages)) + prompt.text
        prompt.sources += [passage.name for passage in passages]

    def _make_retriever(self) -> object:
        if self.folder is None:
            raise UserError("plugin.rag: no folder to retrieve from; --rag FOLDER, or the option folder")
        self.retriever.build_index(read_folder(self.folder))
        return self.retriever.create_retriever(d_model=1, top_k=self.top_k)


def fit(passages: list[Document], max_chars: int) -> list[Document]:
    """As many of `passages`, best first, as `max_chars` hold; the last is cut at a word, or left out."""
    fitting: list[Document] = []
    room = max_chars
    for passage in passages:
        shown = _shown(passage)
        if len(shown) <= room:
            fitting.append(passage)
            room -= len(shown)
            continue
        left = room - (len(shown) - len(passage.text))
        if left >= SHORTEST:
            words = passage.text[: left + 1].rsplit(None, 1)[0]
            fitting.append(Document(passage.name, words if len(words) <= left else passage.text[:left]))
        break
    return fitting


def _shown(passage: Document) -> str:
    return f"[{passage.name}]\n{passage.text}\n\n"
