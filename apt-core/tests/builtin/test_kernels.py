"""`flex` and `flash_v2` compute what `sdpa` does, and say where they cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from apt.builtin.attention import SDPA, FlashV2, Flex
from apt.core.profile import load_profile
from apt.errors import OptionsError, ProfileError, UserError
from apt.layers.attend import attend
from apt.training.trainer import Trainer

OPTIONS = [
    {"window": 5, "num_kv_heads": 2, "qk_norm": True},
    *(pytest.param(each, marks=pytest.mark.thorough) for each in ({}, {"positions": "none", "num_kv_heads": 1})),
]


def mask(seq: int) -> Tensor:
    kept = torch.ones(2, seq, dtype=torch.bool)
    kept[1, :3] = False
    return kept


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Both layers agree on whole texts, with padding, across, and while decoding."""
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, seen = torch.randn(2, 11, 32), mask(11)
    at = (seen.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(theirs(x), ours(x))
    torch.testing.assert_close(theirs(x, mask=seen, positions=at)[seen], ours(x, mask=seen, positions=at)[seen])
    for length in (7, 11):
        for source in (mask(length), mask(length).flip(1), mask(length) & torch.tensor([[True], [False]])):
            across = {"causal": False, "memory": torch.randn(2, length, 32), "mask": source}
            torch.testing.assert_close(theirs(x, **across), ours(x, **across))
    torch.testing.assert_close(theirs(x, causal=False), ours(x, causal=False))
    both = {"causal": False, "mask": seen, "positions": at}
    torch.testing.assert_close(theirs(x, **both)[seen], ours(x, **both)[seen])
    for padding in (None, seen, mask(11) & (torch.arange(11) > 7)):
        caches = [layer.create_cache(2, 11, torch.float32, torch.device("cpu")) for layer in (theirs, ours)]
        end = 0
        for part in x.split([4, 1, 1, 3, 1, 1], 1):
            new = slice(end, end := end + part.shape[1])
            until = {} if padding is None else {"mask": padding[:, :end], "positions": at[:, new]}
            kept = seen[:, new] if padding is None else padding[:, new]
            theirs_, ours_ = theirs(part, cache=caches[0], **until), ours(part, cache=caches[1], **until)
            torch.testing.assert_close(theirs_[kept], ours_[kept])


@pytest.mark.parametrize("options", OPTIONS)
def test_flex_computes_what_sdpa_does(options: dict[str, object]) -> None:
    with torch.no_grad():
        ours = SDPA.model_validate(options).create_layer(32, 4).eval()
        same(ours, Flex.model_validate({**options, "compiled": False}).create_layer(32, 4).eval())


def test_flex_does_not_break_the_graph_of_a_compiled_model() -> None:
    with torch.no_grad():
        layer, x = Flex(positions="none", compiled=False).create_layer(32, 4).eval(), torch.randn(2, 5, 32)
        whole = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x, causal=False), layer(x, causal=False))


def test_flex_has_no_backward_pass_on_the_cpu_and_the_run_is_refused_before_it_begins(
    profile_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no backward pass on the CPU; train on a GPU, or with attention: sdpa"):
        Flex(compiled=False).create_layer(32, 4)(torch.randn(1, 3, 32))
    profile = load_profile(profile_file, sets=["model.attention.provider=flex", "hardware.device=cpu"])
    with pytest.raises(UserError, match=r"model\.attention: 'flex' has no backward pass on the cpu"):
        Trainer(profile.config, tmp_path / "run", resolved=profile.resolved).fit()


def test_flex_drops_no_weights() -> None:
    with pytest.raises(OptionsError, match=r"model\.attention_dropout: 0\.1 is not allowed"):
        Flex().create_layer(32, 4, 0.1)


def test_flash_attn_that_is_not_installed_is_named_with_what_would_mend_it(profile_file: Path) -> None:
    with pytest.raises(ProfileError, match=r"flash_v2.*flash-attn>=2\.3, which is not installed.*pip install"):
        load_profile(profile_file, sets=["model.attention.provider=flash_v2"])


def test_what_may_stand_in_for_it_trains_and_is_written_down(profile_file: Path, tmp_path: Path) -> None:
    text = profile_file.read_text().replace("{provider: sdpa}", "{provider: flash_v2, window: 8, fallback: [sdpa]}")
    profile_file.write_text(text)
    profile = load_profile(profile_file, sets=["training.max_steps=2"])
    assert profile.resolved is not None
    attention = profile.resolved.providers["attention"]
    assert isinstance(attention, SDPA)
    assert attention.window == 8
    result = Trainer(profile.config, tmp_path / "run", resolved=profile.resolved).fit()
    (resolution,) = (each for each in result.resolved.resolutions if each.kind == "attention")
    assert (resolution.asked, resolution.used) == ("flash_v2", "sdpa")
    assert "flash-attn>=2.3, which is not installed" in resolution.why
    assert "flash_v2" in (result.folder / "resolved.yaml").read_text()


def flash_attn() -> ModuleType:
    """flash-attn's functions as its documentation has them, written out: layouts, windows, bottom-right causality."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        left, right = window_size
        assert right == (-1 if left == -1 else 0 if causal else left)
        window = None if left == -1 else left + 1
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return attend(*heads_first, causal=causal, scale=softmax_scale, window=window).transpose(1, 2)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        assert q.shape[1] < cache_seqlens == k_cache.shape[1]
        assert not torch.is_grad_enabled()
        return flash_attn_func(q, k_cache, v_cache, 0.0, softmax_scale, causal, window_size)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, **shared
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = [each.diff().tolist() for each in (cu_seqlens_q, cu_seqlens_k)]
        assert [max(each) for each in lengths] == [max_seqlen_q, max_seqlen_k]
        samples = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        mixed = [flash_attn_func(*(part[None] for part in parts), **shared)[0] for parts in samples]
        return torch.cat(mixed)

    module = ModuleType("flash_attn")
    module.__dict__.update(
        flash_attn_func=flash_attn_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    return module


@pytest.mark.parametrize("options", OPTIONS)
def test_flash_v2_calls_the_functions_of_flash_attn_so_that_they_compute_what_sdpa_does(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn())
    monkeypatch.setattr("apt.builtin.flash.has_kernel", lambda q: True)
    with torch.no_grad():
        ours = SDPA.model_validate(options).create_layer(32, 4).eval()
        same(ours, FlashV2.model_validate(options).create_layer(32, 4).eval())


def test_flash_v2_says_what_it_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn())
    with pytest.raises(UserError, match="on a GPU in bf16 or fp16, not on cpu in float32"):
        FlashV2().create_layer(32, 4)(torch.randn(1, 3, 32))
    with pytest.raises(OptionsError, match="heads of width 12; flash-attn has kernels for multiples of 8 up to 256"):
        FlashV2().create_layer(48, 4)


def test_a_model_that_was_trained_with_flash_v2_is_scored_where_flash_attn_has_no_kernel() -> None:
    with torch.no_grad():
        ours = SDPA().create_layer(32, 4).eval()
        same(ours, FlashV2().create_layer(32, 4).eval())
