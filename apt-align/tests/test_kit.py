"""apt-core's kit, on the aligner with each of its states."""

from __future__ import annotations

from apt.testing import conformance

test_dropout = conformance("align.bistate_default")
test_ema = conformance("align.bistate_default", {"state": "ema"})
test_layer = conformance("align.bistate_default", {"state": "layer"})
test_evidence = conformance("align.bistate_default", {"state": "evidence"})
test_rdrop = conformance("align.rdrop")
test_mean_teacher = conformance("align.mean_teacher")
test_plugin = conformance("plugin.align")
