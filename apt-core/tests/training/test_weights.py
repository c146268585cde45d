from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apt.errors import CheckpointError
from apt.training.checkpoint import EXTRA
from apt.training.weights import list_weights, use_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        "hooks.align/weights.ema.one.weight": torch.full((2, 3), 7.0),
        "hooks.align/other": torch.zeros(1),
        "random.torch.0": torch.zeros(1),
    }
    save_file(tensors, tmp_path / EXTRA)
    return tmp_path


def model() -> nn.Module:
    return nn.ModuleDict({"one": nn.Linear(3, 2)})


def test_the_sets_are_those_that_plugins_saved_beside_the_trained_one(folder: Path) -> None:
    assert list_weights(folder) == ["trained", "ema"]


def test_a_set_replaces_what_it_holds_and_leaves_the_rest(folder: Path) -> None:
    changed, trained = model(), model()
    trained.load_state_dict(changed.state_dict())
    use_weights(folder, changed, "trained")
    assert changed.one.weight.equal(trained.one.weight)
    use_weights(folder, changed, "ema")
    assert changed.one.weight.eq(7).all()
    assert changed.one.bias.equal(trained.one.bias)


def test_a_set_that_is_not_there_or_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights 'emma'; it has: trained, ema"):
        use_weights(folder, model(), "emma")
    with pytest.raises(CheckpointError, match=r"its weights 'ema' do not fit the profile's model: one\.weight"):
        use_weights(folder, nn.ModuleDict({"one": nn.Linear(4, 4)}), "ema")
