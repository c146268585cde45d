"""apt-core's kit, on the retriever and its plugin."""

from __future__ import annotations

from apt.testing import conformance

test_cosine = conformance("retrieval.cosine")
test_plugin = conformance("plugin.rag")
