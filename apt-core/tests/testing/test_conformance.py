"""What apt-core itself provides conforms."""

from __future__ import annotations

from apt.testing import conformance

test_sdpa = conformance("attention.sdpa")
test_grouped_queries = conformance("attention.sdpa", {"num_kv_heads": 2})
test_one_key_head_without_positions = conformance("attention.sdpa", {"num_kv_heads": 1, "rope_theta": None})
test_default = conformance("ffn.default")
test_default_with_bias = conformance("ffn.default", {"bias": True})
test_swiglu = conformance("ffn.swiglu")
test_byte = conformance("tokenizer.byte")
test_bpe = conformance("tokenizer.bpe")
test_stdlib = conformance("data.stdlib")
