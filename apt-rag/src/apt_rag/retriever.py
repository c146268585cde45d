"""A retriever: an index, how many passages it gives, and the parameters that bring them into a model."""

from __future__ import annotations

from torch import Tensor, nn

from apt_rag.chunk import Passage
from apt_rag.fusion import Fusion
from apt_rag.index import Index


class Retriever(nn.Module):
    """What `Cosine.create_retriever` makes."""

    def __init__(self, index: Index, d_model: int, top_k: int, temperature: float) -> None:
        super().__init__()
        self.index, self.top_k, self.d_model = index, top_k, d_model
        self.fusion = Fusion(index.embedder.features, d_model, temperature)

    def forward(self, queries: list[str], top_k: int | None = None) -> list[list[tuple[Passage, float]]]:
        """The nearest passages of each query with their cosines, best first."""
        wanted = self.top_k if top_k is None else top_k
        return [self.index.search(query, wanted) for query in queries]

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"passages={len(self.index)}, top_k={self.top_k}"

    def fuse(self, hidden: Tensor, vectors: Tensor, scores: Tensor, method: str) -> Tensor:
        """Bring passages' `vectors` [batch, k, features] into `hidden` [batch, seq, d_model]."""
        if method == "weighted_sum":
            return self.fusion.weighted_sum(hidden, vectors, scores)
        return self.fusion.concat(hidden, vectors)
