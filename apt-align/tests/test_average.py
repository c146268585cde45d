import pytest
import torch
from torch import Tensor, nn

from apt_align.average import Average


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.on, self.off = nn.Linear(3, 3), nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.on(x))


def step(model: Tiny, average: Average, shift: float = 1.0) -> None:
    """A step that adds `shift` to what is trained."""
    model.zero_grad()
    model.on(torch.ones(1, 3)).sum().backward()
    average.see_gradients(model)
    with torch.no_grad():
        for parameter in model.on.parameters():
            parameter.add_(shift)
    average.update(model)


def test_after_n_steps_it_is_the_closed_form() -> None:
    model, average = Tiny(), Average(0.9)
    start = model.on.weight.detach().clone()
    step(model, average)
    expected = start + 1
    for t in range(1, 30):
        step(model, average)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.on.weight.detach()
    torch.testing.assert_close(average.weights["on.weight"], expected)
    assert average.updates == 30


def test_what_is_switched_on_later_starts_from_itself() -> None:
    model, average = Tiny(), Average(0.9)
    step(model, average)
    with torch.no_grad():
        model.off.weight.fill_(7.0)  # the switch
    model.off(torch.ones(1, 3)).sum().backward()
    average.see_gradients(model)
    average.update(model)
    assert average.weights["off.weight"].equal(model.off.weight)
    with torch.no_grad():
        model.off.weight.fill_(8.0)
    average.update(model)
    assert (average.weights["off.weight"] > 7).all()
    assert (average.weights["off.weight"] < 8).all()


def test_it_is_float32_and_speaks_in_the_model_s_dtype() -> None:
    model, average = Tiny().bfloat16(), Average(0.5)
    model.on(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    average.see_gradients(model)
    average.update(model)
    assert average.weights["on.weight"].dtype == torch.float32
    assert average(model, torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_answers_without_dropout_or_gradient_and_leaves_the_model_as_it_was() -> None:
    model, average = Tiny(), Average(0.9)
    step(model, average)
    step(model, average, shift=10.0)
    model.off.eval()
    x = torch.ones(4, 3)
    answer = average(model, x)
    weights = average.weights
    assert answer.equal(nn.functional.linear(x, weights["on.weight"], weights["on.bias"]))
    assert not answer.requires_grad
    assert not model.on.weight.equal(weights["on.weight"])
    assert model.training
    assert model.on.training
    assert not model.off.training


def test_what_is_saved_goes_on_as_if_nothing_had_happened() -> None:
    model, average = Tiny(), Average(0.9)
    step(model, average)
    step(model, average)
    again = Average(0.9)
    again.load(average.save())
    again.to(torch.device("cpu"))
    step(model, average)
    again.update(model)
    for name, weight in average.weights.items():
        assert again.weights[name].equal(weight)


def test_another_form_is_refused() -> None:
    with pytest.raises(TypeError, match="another form"):
        Average(0.9).load({"updates": "3"})


def test_what_nothing_has_trained_has_no_average() -> None:
    model, average = Tiny(), Average(0.9)
    step(model, average)
    assert average.weights.keys() == {"on.weight", "on.bias"}
    again = Average(0.9)
    again.load(average.save())
    again.update(model)
    assert again.weights.keys() == {"on.weight", "on.bias"}


def test_a_run_that_goes_back_keeps_its_average_on_its_device() -> None:
    model, average = Tiny(), Average(0.9)
    step(model, average)
    saved = average.save()
    average.to(torch.device("meta"))
    average.load(saved)
    assert {weight.device.type for weight in average.weights.values()} == {"meta"}
