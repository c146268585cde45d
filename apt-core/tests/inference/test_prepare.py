"""Fewer bits: what is cast, what is quantised, how far the answer moves; and folding, which moves nothing."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from apt.builtin.tokenizer import ByteTokenizer
from apt.cli import main
from apt.core.profile import load_profile
from apt.errors import UserError
from apt.inference import packed
from apt.inference import prepare as inference
from apt.inference.generate import generate
from apt.inference.half import HalfLinear, RowLinear
from apt.inference.int8 import AT_ONCE, Int8Linear
from apt.inference.prepare import prepare
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.training import assembly

TOKENIZER = ByteTokenizer()


@pytest.fixture
def model(profile_file: Path) -> Decoder:
    profile = load_profile(profile_file)
    torch.manual_seed(0)
    return ModelBuilder(profile.config, resolved=profile.resolved).build_model().eval()


def scores(model: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(3, 15)[None]).logits.float()
    return logits


@pytest.mark.parametrize("units", [True, False])
def test_bf16_is_everywhere_but_in_scheduled_values_and_weights_stay_tied(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr(inference, "has_units", lambda: units)
    monkeypatch.setattr(HalfLinear, "is_worth_it", lambda: False)
    model.register_buffer("temperature", torch.tensor(0.3))
    before = scores(model)
    assert prepare(model, dtype="bf16") == 0.0
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.head.weight is model.embedding.weight
    assert {type(each) for each in model.modules() if hasattr(each, "in_features")} == {
        RowLinear if units else nn.Linear
    }
    assert model.temperature.dtype == torch.float32
    assert 0 < (scores(model) - before).abs().max() < 0.02 * before.std() * 10
    assert generate(model, TOKENIZER, "x", max_new_tokens=3).tokens


def test_without_units_for_bf16_its_weights_are_multiplied_as_fp16(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "has_units", lambda: False)
    monkeypatch.setattr(HalfLinear, "is_worth_it", lambda: True)
    model.blocks[0].attention.out.weight.data[0, 0] = 0  # type: ignore[union-attr, index, operator]
    before = scores(model)
    model.blocks[0].attention.out.weight.data[0, 0] = 1e5  # type: ignore[union-attr, index, operator]
    prepare(model, dtype="bf16")
    linear = [each for each in model.modules() if type(each) is nn.Linear]
    assert linear == [model.blocks[0].attention.out]  # float16 has no such number
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    linear[0].weight.data[0, 0] = 0
    assert 0 < (scores(model) - before).abs().max() < 0.02 * before.std() * 10
    assert generate(model, TOKENIZER, "x", max_new_tokens=3).tokens


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_a_half_layer_is_as_exact_as_bf16_allows(tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(torch.bfloat16)
    x = torch.randn(2, tokens, 64, dtype=torch.bfloat16)
    layer = HalfLinear(linear)
    right = nn.functional.linear(x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float())
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), right.to(torch.bfloat16), atol=0, rtol=2**-7)
    torch.testing.assert_close(layer.weight, linear.weight, atol=2**-25, rtol=0)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight is layer.weight
    assert "in_features=64, out_features=48, bf16 as fp16" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1)])
def test_a_row_is_multiplied_as_exactly_as_bf16_allows_and_compiled_as_it_is(
    shape: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(torch.bfloat16)
    x = torch.randn(*shape, 64, dtype=torch.bfloat16)
    layer = RowLinear(linear)
    right = nn.functional.linear(x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float())
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), right.to(torch.bfloat16), atol=2**-8, rtol=2**-7)
    assert layer.weight is linear.weight
    assert f"in_features=64, out_features=48, bias={bias}" in repr(layer)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert (torch.ops.apt.multiply_row in called) == (shape == (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), nn.functional.linear(x, linear.weight, linear.bias))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("largest", "fits"), [(1.0, True), (1e5, False), (1e-6, False), (0.0, True), (float("nan"), False)]
)
def test_weights_that_float16_has_no_numbers_for_stay_as_they_are(largest: float, fits: bool) -> None:
    linear = nn.Linear(8, 8)
    linear.weight.zero_()[0, 0] = -largest
    assert HalfLinear.supports(linear) is fits


def test_int8_takes_every_linear_layer_and_moves_the_logits_little(model: Decoder) -> None:
    before = scores(model)
    assert prepare(model, quantize="int8") > 0.98
    assert not any(type(each) is nn.Linear for each in model.modules())
    assert 0 < (scores(model) - before).norm() / before.norm() < 0.03
    assert generate(model, TOKENIZER, "x", max_new_tokens=3).tokens


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, AT_ONCE, AT_ONCE + 1])
def test_an_int8_layer_gives_each_token_a_scale_of_its_own_and_loses_nothing_to_its_large_channels(tokens: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    linear.weight[0] = 0.0  # a row without a scale
    layer, x = Int8Linear(linear), torch.randn(tokens, 64)
    x[0] *= 1e4
    x[-1, 3] = 100.0
    # Of what seven bits would leave of the other channels of the last token, a hundredth is lost.
    right = nn.functional.linear(x, layer.weight, linear.bias)
    error = (layer(x) - right).norm(dim=-1) / right.norm(dim=-1)
    assert error.max() < 1e-3
    torch.testing.assert_close(layer(x), linear(x), atol=0.02 * x.abs().max().item(), rtol=0.02)
    assert torch.equal(layer(torch.zeros(2, 64)), linear.bias.expand(2, -1))
    assert "in_features=64, out_features=48, int8" in repr(layer)
    assert (layer.weight - linear.weight).abs().max() <= linear.weight.abs().max() / 254


def test_int8_is_for_float32(model: Decoder) -> None:
    with pytest.raises(UserError, match="--quantize int8: its activations are float32; leave --dtype bf16 out"):
        prepare(model, dtype="bf16", quantize="int8")


def test_int8_on_a_gpu_is_refused_before_anything_goes_there(
    profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["train", "-p", str(profile_file), "--out", str(tmp_path / "run"), "--set", "training.max_steps=2"]) == 0
    )
    monkeypatch.setattr(assembly, "pick_device", lambda asked, option: torch.device("cuda"))
    monkeypatch.setattr(Decoder, "to", lambda *where: pytest.fail("moved"))
    for command in (["generate", "--prompt", "x"], ["evaluate"]):
        words = [command[0], str(tmp_path / "run"), *command[1:], "--device", "cuda", "--quantize", "int8"]
        assert main(words) == 2
        assert "--quantize int8: is for the CPU; use --dtype bf16 on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_step_that_torch_compiles_writes_the_same_and_is_compiled_once_for_all_blocks(
    model: Decoder, quantize: Literal["int8"] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(model, quantize=quantize)
    right = generate(model, TOKENIZER, "x", max_new_tokens=12, temperature=0).tokens
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, dynamic: compiled(step, backend=counter, dynamic=dynamic))
    model.compile_step()
    assert generate(model, TOKENIZER, "x", max_new_tokens=12, temperature=0).tokens == right
    assert len(model.blocks) == 2
    assert counter.frame_count == 1


def test_an_int8_layer_is_compiled_whole_for_few_tokens_and_for_many_and_lets_go_of_its_weights() -> None:
    layer = Int8Linear(nn.Linear(64, 48))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, AT_ONCE + 1):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), layer(x))
    number = int(layer._number)
    assert number in packed._packed
    del layer, compiled
    torch.compiler.reset()
    gc.collect()
    assert number not in packed._packed


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_an_int8_layer_and_a_pickled_one_outlive_it(way: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = Int8Linear(nn.Linear(64, 48)), torch.randn(AT_ONCE + 1, 64)
    right, few, weight, number = layer(x), layer(x[:3]), layer.weight, int(layer._number)
    other = way(layer)
    assert torch.equal(layer(x), right)
    del layer
    gc.collect()
    assert number not in packed._packed
    for each in (other, way(other)):
        assert torch.equal(each(x), right)
        assert torch.equal(each(x[:3]), few)
        assert torch.equal(each.weight, weight)
    own = int(other._number)
    del other, each
    gc.collect()
    assert own not in packed._packed


def test_a_copy_of_an_int8_model_outlives_it_and_is_compiled_like_it(model: Decoder) -> None:
    prepare(model, quantize="int8")
    right = generate(model, TOKENIZER, "x", max_new_tokens=4, temperature=0).tokens
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for block in model.blocks:
        block.ffn = block.attention = nn.Identity()
    gc.collect()
    for other in others:
        layers = [each for each in other.modules() if isinstance(each, Int8Linear)]
        assert len({int(each._number) for each in layers}) == len(layers)
        assert generate(other, TOKENIZER, "x", max_new_tokens=4, temperature=0).tokens == right
    compiled = torch.compile(copy.deepcopy(layers[0]), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, layers[0].in_features)
    assert torch.equal(compiled(x), layers[0](x))


def test_what_cannot_be_compiled_is_refused(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "supports_kv_cache", property(lambda self: False))
    with pytest.raises(UserError, match="--compile: is for attention with a KV cache"):
        prepare(model, compiled=True)


def test_attention_that_can_be_folded_is_while_it_writes(model: Decoder) -> None:
    class Foldable(nn.Module):
        """Twice the layer, until it is folded into it."""

        folds = 0

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def fold(self) -> nn.Module:
            Foldable.folds += 1
            return self.layer

    right = generate(model, TOKENIZER, "x", max_new_tokens=5, temperature=0).tokens
    layers = [Foldable(block.attention) for block in model.blocks]
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attention = layer
    assert generate(model, TOKENIZER, "x", max_new_tokens=5, temperature=0).tokens == right
    assert Foldable.folds == 2
    assert [block.attention for block in model.blocks] == layers
    prepare(model)
    assert generate(model, TOKENIZER, "x", max_new_tokens=5, temperature=0).tokens == right
    assert Foldable.folds == 4


def test_the_command_line_says_what_fewer_bits_cost(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "-p", str(profile_file), "--out", str(run)]) == 0
    capsys.readouterr()
    for words, said in ((["--quantize", "int8"], "in int8: "), (["--dtype", "bf16"], "in bf16: ")):
        assert main(["evaluate", str(run), *words]) == 0
        assert said in capsys.readouterr().out
    prompts = ["--prompt", "ab", "--prompt", "x", "--max-new-tokens", "3"]
    assert main(["generate", str(run), *prompts, "--quantize", "int8"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("[1] ab")
    assert "\n[2] x" in captured.out
    assert "of the weights that a token meets are in int8" in captured.err
    assert main(["generate", str(run), *prompts, "--device", "cpu"]) == 0
    if not torch.cuda.is_available():
        assert main(["generate", str(run), *prompts, "--device", "cuda"]) == 2
        assert "--device: cuda is asked for, but PyTorch sees no GPU; use auto or cpu" in capsys.readouterr().err
