import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from apt.core import registry
from apt.core.providers import AlignProvider
from apt_align.provider import BiState


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 20))
def test_the_interpolation_weight_rises_from_0_to_1_after_the_warm_up(epoch: int, max_epochs: int, warmup: int) -> None:
    provider = BiState()
    weight = provider.get_interpolation_weight(epoch, max_epochs, warmup)
    assert 0 <= weight <= 1
    if epoch < warmup:
        assert weight == 0
    assert provider.get_interpolation_weight(max(max_epochs, warmup), max_epochs, warmup) == 1
    assert provider.get_interpolation_weight(epoch + 1, max_epochs, warmup) >= weight


def test_the_interpolation_weight_s_middle() -> None:
    assert BiState().get_interpolation_weight(10, 15, warmup=5) == 0.5


@pytest.mark.parametrize("metric", ["cosine", "l2", "kl"])
def test_equal_states_have_no_loss(metric: str) -> None:
    state = torch.randn(2, 3, 8)
    loss = BiState().compute_consistency_loss(state, state, metric)
    torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2", "kl"])
@given(repeat=st.integers(1, 4))
def test_the_loss_does_not_depend_on_how_often_a_batch_is_repeated(metric: str, repeat: int) -> None:
    one, two = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(repeat))
    once = BiState().compute_consistency_loss(one, two, metric)
    often = BiState().compute_consistency_loss(one.repeat(repeat, 1, 1), two.repeat(repeat, 1, 1), metric)
    torch.testing.assert_close(often, once)


@pytest.mark.parametrize(("metric", "option", "changed"), [("kl", "kl_temperature", 3.0), ("nce", "tau_align", 0.5)])
def test_each_temperature_is_its_metric_s(metric: str, option: str, changed: float) -> None:
    one, two = torch.randn(2, 2, 3, 8)
    before = BiState().compute_consistency_loss(one, two, metric)
    other = BiState.model_validate({option: changed})
    assert other.compute_consistency_loss(one, two, metric) != before
    kind = "nce" if metric == "kl" else "kl"
    assert other.compute_consistency_loss(one, two, kind) == BiState().compute_consistency_loss(one, two, kind)


@pytest.mark.parametrize(("state", "metric"), [("dropout", "kl"), ("ema", "kl"), ("layer", "cosine")])
def test_each_state_has_its_usual_metric(state: str, metric: str) -> None:
    assert BiState(state=state).distance == metric
    assert BiState(state=state, metric="nce").distance == "nce"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "layer", "metric": "kl"}, "hidden states, which are no logits"),
        ({"state": "layer", "alpha": 0}, "the map from the earlier layer learns nothing"),
        ({"layer": 1}, "layer is an option of state layer, but the state is dropout"),
        ({"decay": 0.9}, "decay is an option of state ema, but the state is dropout"),
        ({"state": "ema", "beta": 0.3}, "get no gradient; set beta: 0"),
    ],
)
def test_options_that_could_not_act_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BiState.model_validate(options)


def test_averaged_weights_are_not_pulled() -> None:
    assert BiState(state="ema").create_aligner(8, 0.3, 0.4).beta == 0


def test_the_scheduled_weight_is_a_zero_dimensional_float32_buffer_that_is_saved() -> None:
    provider = BiState(weight=0.25)
    aligner = provider.create_aligner(8)
    assert aligner.apt_provider is provider
    assert aligner.weight.shape == ()
    assert aligner.weight.dtype == torch.float32
    assert aligner.state_dict()["weight"] == 0.25


def test_an_aligner_of_another_make_is_refused() -> None:
    with pytest.raises(TypeError, match="its own aligners, not with Identity"):
        BiState().compute_alignment(nn.Identity(), torch.ones(1, 1, 2), torch.ones(1, 1, 2))


def test_it_comes_through_its_entry_point_and_has_the_whole_interface() -> None:
    provider = registry.get("align", "bistate_default", {"alpha": 0.5}, fallback=False)
    assert isinstance(provider, AlignProvider)
    assert isinstance(provider, BiState)
    assert provider.alpha == 0.5
    assert provider.supports_asymmetric_alignment()
    assert not provider.supports_multi_state()
