"""Exact cosine search over passages, with tf-idf weights that follow what is in the index.

What is stored are counts; weights are made from them at the first search after a change, so adding and deleting
passages never leaves a stale inverse document frequency behind. The search adds up, for each cell of the query, the
passages that touch it (an inverted file): exact, and cheap because a text touches few cells.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt.errors import DataError
from apt_rag.chunk import Passage
from apt_rag.embed import HashedNgrams, Indices, Values

FORMAT = 1


@dataclass(frozen=True)
class _Weights:
    """The index by cell: passages `rows[starts[f]:starts[f + 1]]` touch cell f, with `values`; `idf` of each cell."""

    idf: NDArray[np.float64]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    values: NDArray[np.float64]


class Index:
    """Passages and their counts. A cell's weight is sign(c) (1 + log |c|) idf, idf = 1 + log((1 + N) / (1 + n_f)), with
    N passages of which n_f touch the cell; vectors have length 1 (Salton and Buckley 1988)."""

    def __init__(self, embedder: HashedNgrams) -> None:
        self.embedder = embedder
        self.passages: list[Passage] = []
        self._counts: list[tuple[Indices, Values]] = []
        self._cached: _Weights | None = None

    def __len__(self) -> int:
        return len(self.passages)

    def add(self, passages: Iterable[Passage]) -> None:
        """Put passages in, after those that are there."""
        for passage in passages:
            self.passages.append(passage)
            self._counts.append(self.embedder.count(passage.text))
        self._cached = None

    def delete(self, source: str) -> int:
        """Take out all passages of a document; returns how many there were."""
        kept = [row for row, passage in enumerate(self.passages) if passage.source != source]
        deleted = len(self.passages) - len(kept)
        self.passages = [self.passages[row] for row in kept]
        self._counts = [self._counts[row] for row in kept]
        self._cached = None
        return deleted

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """The `top_k` nearest passages (all, where there are fewer) and their cosines, best first.

        Equal scores keep the order of the index.
        """
        weights = self._weights()
        cells, values = self._weigh(*self.embedder.count(query))
        spans = [slice(weights.starts[cell], weights.starts[cell + 1]) for cell in cells]
        rows = [weights.rows[span] for span in spans]
        products = [weights.values[span] * value for span, value in zip(spans, values, strict=True)]
        every = np.concatenate([np.empty(0, np.int64), *rows])
        scores = np.bincount(every, np.concatenate([np.empty(0), *products]), minlength=len(self))
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [(self.passages[row], float(np.clip(scores[row], -1.0, 1.0))) for row in best]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [texts, features] of length 1 (or 0, for a text without words), under the weights of this index."""
        vectors = np.zeros((len(texts), self.embedder.features), np.float32)
        for row, text in enumerate(texts):
            cells, values = self._weigh(*self.embedder.count(text))
            vectors[row, cells] = values
        return vectors

    def _weigh(self, cells: Indices, counts: Values) -> tuple[Indices, NDArray[np.float64]]:
        values = np.sign(counts) * (1 + np.log(np.abs(counts).astype(np.float64))) * self._weights().idf[cells]
        return cells, values / max(float(np.linalg.norm(values)), np.finfo(np.float64).tiny)

    def _weights(self) -> _Weights:
        if self._cached is None:
            self._cached = self._make_weights()
        return self._cached

    def _make_weights(self) -> _Weights:
        lengths = np.array([len(cells) for cells, _ in self._counts], np.int64)
        rows = np.repeat(np.arange(len(self)), lengths)
        cells = np.concatenate([np.empty(0, np.int32), *(cells for cells, _ in self._counts)])
        counts = np.concatenate([np.empty(0, np.float32), *(counts for _, counts in self._counts)]).astype(np.float64)
        touched = np.bincount(cells, minlength=self.embedder.features)
        idf = 1 + np.log((1 + len(self)) / (1 + touched))
        values = np.sign(counts) * (1 + np.log(np.abs(counts))) * idf[cells]
        norms = np.sqrt(np.bincount(rows, values**2, minlength=len(self)))
        values /= norms[rows]
        order = np.argsort(cells, kind="stable")
        return _Weights(idf, np.concatenate(([0], touched.cumsum())), rows[order], values[order])

    def save(self, folder: Path) -> None:
        """Write ``index.json`` (passages, embedder, digests) and ``counts.npz`` to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            lengths=np.array([len(cells) for cells, _ in self._counts], np.int64),
            cells=np.concatenate([np.empty(0, np.int32), *(cells for cells, _ in self._counts)]),
            counts=np.concatenate([np.empty(0, np.float32), *(counts for _, counts in self._counts)]),
        )
        about = {
            "format": FORMAT,
            "embedder": asdict(self.embedder),
            "embedder_digest": self.embedder.digest,
            "counts_digest": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "passages": [asdict(passage) for passage in self.passages],
        }
        (folder / "counts.npz").write_bytes(buffer.getvalue())
        (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, embedder: HashedNgrams) -> Index:
        """The index that was saved in `folder`.

        Raises `apt.errors.DataError` where there is none, where it is damaged, and where another embedder made it.
        """
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            stored = (folder / "counts.npz").read_bytes()
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, and this version reads {FORMAT}")
            made_by, digest = about["embedder_digest"], about["counts_digest"]
            passages = [Passage(**passage) for passage in about["passages"]]
        except FileNotFoundError as error:
            raise DataError(f"{folder}: no index here; build_index and save make one") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / 'index.json'}: damaged or of another kind ({error}); build the index again"
            ) from error
        if made_by != embedder.digest:
            raise DataError(
                f"{folder}: made by another embedder ({about['embedder']}) than the one in use ({asdict(embedder)}); "
                "use its options, or build the index again"
            )
        if hashlib.sha256(stored).hexdigest() != digest:
            raise DataError(f"{folder / 'counts.npz'}: not the file that index.json speaks of; build the index again")
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            ends = arrays["lengths"].cumsum()[:-1]
            counts = list(zip(np.split(arrays["cells"], ends), np.split(arrays["counts"], ends), strict=True))
            if len(arrays["lengths"]) != len(passages):
                raise DataError(
                    f"{folder}: index.json has {len(passages)} passages and counts.npz {len(arrays['lengths'])}; "
                    "build the index again"
                )
        index = cls(embedder)
        index.passages, index._counts = passages, counts[: len(passages)]
        return index
