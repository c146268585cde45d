"""What apt-core itself provides conforms."""

from __future__ import annotations

from apt.testing import conformance

test_sdpa = conformance("attention.sdpa")
test_grouped_queries = conformance("attention.sdpa", {"num_kv_heads": 2})
test_one_key_head_without_positions = conformance("attention.sdpa", {"num_kv_heads": 1, "positions": "none"})
test_learned_positions = conformance("attention.sdpa", {"positions": "learned"})
test_window = conformance("attention.sdpa", {"window": 5})
test_window_and_sinks = conformance("attention.sdpa", {"window": 5, "sinks": True, "num_kv_heads": 2})
test_normed_narrow_heads_with_biases = conformance(
    "attention.sdpa", {"qk_norm": True, "head_width": 6, "bias": "all", "sinks": True}
)
test_biases_as_in_qwen = conformance("attention.sdpa", {"bias": "qkv", "qk_norm": True, "head_width": 16})
test_flex = conformance("attention.flex", {"compiled": False})
test_flex_with_a_window = conformance("attention.flex", {"compiled": False, "window": 5, "num_kv_heads": 2})
test_stretched_positions = conformance(
    "attention.sdpa", {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_seq_len": 8}}
)
test_default = conformance("ffn.default")
test_default_with_bias = conformance("ffn.default", {"bias": True})
test_swiglu = conformance("ffn.swiglu")
test_byte = conformance("tokenizer.byte")
test_bpe = conformance("tokenizer.bpe")
test_stdlib = conformance("data.stdlib")
