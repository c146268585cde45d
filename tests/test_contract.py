"""The names that the contract promises, with their arguments: what others write against."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

import pytest

from apt.core import APTConfig, Provider, Registry, Schedule, get_provider, register_provider, registry
from apt.core.catalogue import COMES_WITH
from apt.core.config import APTModelConfig, HardwareProfile, MultimodalConfig, create_optimized_config
from apt.core.providers import AlignProvider, AttentionProvider, FFNProvider, RetrievalProvider, RouterProvider
from apt.modeling.compose import ModelBuilder

SIGNATURES = {
    (Registry, "register"): ["kind", "name", "provider", "default", "excludes", "override"],
    (Registry, "get"): ["kind", "name", "config", "fallback"],
    (Registry, "list_providers"): ["kind"],
    (Registry, "get_info"): ["kind", "name"],
    (Registry, "check_conflicts"): ["providers"],
    (Registry, "register_init_hook"): ["kind", "callback"],
    (Registry, "clear_cache"): ["kind", "name"],
    (Registry, "set_default"): ["kind", "name"],
    (Provider, "get_name"): [],
    (Provider, "get_version"): [],
    (Provider, "validate_config"): ["config"],
    (Provider, "get_dependencies"): [],
    (Provider, "get_priority"): [],
    (AttentionProvider, "create_layer"): ["d_model", "num_heads", "dropout"],
    (AttentionProvider, "get_output_dim"): ["d_model"],
    (AttentionProvider, "supports_masking"): [],
    (AttentionProvider, "supports_kv_cache"): [],
    (AttentionProvider, "get_flops_estimate"): ["seq_len", "d_model", "num_heads"],
    (AttentionProvider, "get_memory_estimate"): ["seq_len", "d_model", "num_heads", "batch_size"],
    (FFNProvider, "create_layer"): ["d_model", "d_ff", "dropout", "activation"],
    (FFNProvider, "get_parameter_count"): ["d_model", "d_ff"],
    (FFNProvider, "supports_gating"): [],
    (RouterProvider, "create_router"): ["d_model", "num_experts", "top_k"],
    (RouterProvider, "route"): ["router", "inputs", "train", "mask"],
    (RouterProvider, "compute_load_balance_loss"): ["router_logits", "expert_mask"],
    (RouterProvider, "get_capacity"): ["batch_size", "seq_len", "num_experts", "top_k", "capacity_factor"],
    (RouterProvider, "supports_dynamic_capacity"): [],
    (RouterProvider, "supports_expert_choice"): [],
    (AlignProvider, "create_aligner"): ["d_model", "alpha", "beta"],
    (AlignProvider, "compute_alignment"): ["aligner", "state_1", "state_2", "mask"],
    (AlignProvider, "compute_consistency_loss"): ["state_1", "state_2", "metric", "mask"],
    (AlignProvider, "get_interpolation_weight"): ["epoch", "max_epochs", "warmup"],
    (AlignProvider, "supports_multi_state"): [],
    (AlignProvider, "supports_asymmetric_alignment"): [],
    (RetrievalProvider, "create_retriever"): ["d_model", "top_k"],
    (RetrievalProvider, "retrieve"): ["retriever", "query", "top_k"],
    (RetrievalProvider, "build_index"): ["corpus", "embedding_model"],
    (RetrievalProvider, "encode_query"): ["query"],
    (RetrievalProvider, "encode_document"): ["document"],
    (RetrievalProvider, "fuse_context"): ["hidden_states", "retrieved_docs", "scores", "method"],
    (RetrievalProvider, "supports_online_retrieval"): [],
    (RetrievalProvider, "supports_batch_retrieval"): [],
    (RetrievalProvider, "get_index_size"): [],
    (Schedule, "should_enable_plugin"): ["name", "epoch", "step"],
    (Schedule, "get_param"): ["name", "epoch", "step", "max_epochs", "max_steps"],
    (Schedule, "get_all_params"): ["epoch", "step", "max_epochs", "max_steps"],
    (Schedule, "list_enabled_plugins"): ["plugins", "epoch", "step"],
    (Schedule, "add_param_schedule"): ["name", "schedule"],
    (APTConfig, "from_yaml"): ["path"],
    (APTConfig, "to_dict"): [],
    (APTConfig, "save_pretrained"): ["folder"],
    (APTConfig, "from_pretrained"): ["folder"],
    (APTConfig, "get_provider_config"): ["kind"],
    (HardwareProfile, "is_compatible_with"): ["config"],
    (MultimodalConfig, "get_enabled_modalities"): [],
}


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda each: getattr(each, "__name__", each))
def test_a_promised_method_takes_what_was_promised(owner: type, name: str) -> None:
    parameters = [each for each in inspect.signature(getattr(owner, name)).parameters if each not in ("self", "cls")]
    assert parameters == SIGNATURES[owner, name]


def test_the_rest_of_the_promised_names_is_there() -> None:
    assert APTModelConfig is APTConfig
    assert isinstance(registry, Registry)
    for each in (register_provider, get_provider, create_optimized_config, HardwareProfile.detect_hardware):
        assert callable(each)
    builder = ("attention", "ffn", "router", "aligner", "retriever", "block", "model")
    assert all(callable(getattr(ModelBuilder, f"build_{name}")) for name in builder)
    assert callable(ModelBuilder.list_components)


def test_defaults_of_the_interfaces_are_the_contracts() -> None:
    def default(function: object, name: str) -> object:
        return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]

    assert default(RouterProvider.create_router, "top_k") == 2
    assert default(RouterProvider.get_capacity, "capacity_factor") == 1.25
    assert (default(AlignProvider.create_aligner, "alpha"), default(AlignProvider.create_aligner, "beta")) == (
        0.35,
        0.2,
    )
    assert default(AlignProvider.get_interpolation_weight, "warmup") == 5
    assert default(RetrievalProvider.create_retriever, "top_k") == 5
    assert default(FFNProvider.create_layer, "activation") == "gelu"
    assert default(Registry.get, "fallback") is True


def test_the_capacity_of_an_expert() -> None:
    provider = registry.get("router", "topk_default")
    assert isinstance(provider, RouterProvider)
    assert provider.get_capacity(4, 128, 8, 2) == int(4 * 128 * 2 / 8 * 1.25)
    assert provider.get_capacity(1, 1, 64, 2) == 2


def test_whatever_of_ours_is_not_installed_the_package_that_brings_it_is_known() -> None:
    ours = ("apt-align", "apt-attention-tva", "apt-moe", "apt-rag")
    installed = {each.name: each.dist.name for each in entry_points(group="apt.providers") if each.dist is not None}
    assert {name: each for name, each in installed.items() if each in ours} == COMES_WITH
