"""apt-core's kit, on both attentions in their main forms."""

from __future__ import annotations

from apt.testing import conformance

test_tva_default = conformance("attention.tva_default")
test_tva_with_normals = conformance("attention.tva_default", {"r": 2, "s": 2})
test_tva_per_head_and_grouped = conformance("attention.tva_default", {"per_head": True, "num_kv_heads": 2})
test_autopoietic = conformance("attention.autopoietic")
