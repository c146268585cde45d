"""apt-core's kit, on both attentions in their main forms."""

from __future__ import annotations

from apt.testing import conformance

test_tva_default = conformance("attention.tva_default")
test_tva_with_normals = conformance("attention.tva_default", {"r": 2, "s": 2})
test_tva_per_head_and_grouped = conformance("attention.tva_default", {"per_head": True, "num_kv_heads": 2})
test_tva_projected_last = conformance(
    "attention.tva_default", {"rank": 5, "project": "last", "per_head": True, "qk_norm": True, "window": 6}
)
test_autopoietic = conformance("attention.autopoietic")
test_autopoietic_with_a_window = conformance("attention.autopoietic", {"window": 6, "qk_norm": True})
