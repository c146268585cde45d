"""apt-core's kit, on the mixture and on every router."""

from __future__ import annotations

from apt.testing import conformance

test_moe = conformance("ffn.moe")
test_moe_with_capacity = conformance("ffn.moe", {"experts": 4, "capacity": 1.25})
test_moe_of_gated_experts = conformance("ffn.moe", {"upcycle": False, "expert": "swiglu"})
test_moe_of_fine_grained_and_shared_experts = conformance("ffn.moe", {"experts": 3, "granularity": 2, "shared": 1})
test_moe_by_the_tokens_ids = conformance("ffn.moe", {"experts": 4, "router": "hash"})
test_moe_with_noise = conformance("ffn.moe", {"experts": 4, "router": "noisy_topk", "capacity": 1.1})
test_moe_with_jitter = conformance("ffn.moe", {"experts": 4, "router": "switch", "capacity": 1.0})
test_moe_by_the_reference = conformance("ffn.moe", {"experts": 4, "backend": "naive", "capacity": 1.0, "shared": 1})
test_topk_default = conformance("router.topk_default")
test_noisy_topk = conformance("router.noisy_topk")
test_switch = conformance("router.switch")
test_sigmoid_bias = conformance("router.sigmoid_bias")
test_sigmoid_bias_of_another_scale = conformance("router.sigmoid_bias", {"route_scale": 2.5, "sequence_balance": 0.1})
test_expert_choice = conformance("router.expert_choice", {"allow_noncausal": True})
test_hash = conformance("router.hash")
test_random = conformance("router.random")
test_plugin = conformance("plugin.moe")
