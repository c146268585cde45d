"""Steps that are compiled ahead of time: the same numbers, one graph for blocks of one form, and nothing that changes unseen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import ExportedProgram
from torch.utils import _pytree

from apt.builtin.tokenizer import ByteTokenizer
from apt.core.config import APTConfig
from apt.core.special import SpecialIds
from apt.data.cache import VARIABLE
from apt.errors import UserError
from apt.inference import ahead
from apt.inference.ahead import AheadStep
from apt.inference.context import Context
from apt.inference.generate import generate, generate_batch
from apt.inference.prepare import get_ready, prepare
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

TOKENIZER = ByteTokenizer()
ENDLESS = SpecialIds(start=None, stop=frozenset())
PROMPTS = ["hello there", "x", "ab"]
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 4}}
Made = list[ExportedProgram]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "_graphs", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What was compiled. It is run as it was exported: a C++ compiler takes a quarter of a minute for each."""
    programs: Made = []

    def compile_package(exported: ExportedProgram, path: Path) -> None:
        path.write_text(str(len(programs)))
        programs.append(exported)

    def load_package(path: Path) -> ahead.Graph:
        exported = programs[int(path.read_text())]
        module = exported.module()

        def run(flat: list[Tensor]) -> Sequence[Tensor]:
            arguments, _ = _pytree.tree_unflatten(flat, exported.call_spec.in_spec)
            return [module(*arguments)]

        return run

    monkeypatch.setattr(ahead, "compile_package", compile_package)
    monkeypatch.setattr(ahead, "load_package", load_package)
    return programs


def build(options: dict[str, object] | None = None, **sizes: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "num_heads": 4, "num_layers": 3, "max_seq_len": 16, **sizes}
    config = APTConfig(
        vocab_size=259, attention_name="sdpa", ffn_name="swiglu", options={"attention": options or {}}, **sizes
    )
    model = ModelBuilder(config).build_model().eval()
    with torch.no_grad():
        for each in model.parameters():
            each += 0.2 * torch.randn_like(each)
    return model


def write(model: Decoder, prompt: str = "hello", count: int = 20) -> tuple[int, ...]:
    return generate(model, TOKENIZER, prompt, max_new_tokens=count, temperature=0, special=ENDLESS).tokens


def write_batch(model: Decoder) -> list[tuple[int, ...]]:
    rows = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=20, temperature=0, special=ENDLESS)
    return [row.tokens for row in rows]


def forbid(model: Decoder) -> None:
    """Let nothing be left to torch.compile."""

    def otherwise(*_: object, **__: object) -> Any:
        raise AssertionError("left to torch.compile")

    model.compile_step(lambda _: AheadStep(otherwise))


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"num_kv_heads": 2, "window": 8}, 3),
        ({"sinks": True, "qk_norm": True, "bias": "all"}, 2),
        *(pytest.param(options, 2, marks=pytest.mark.thorough) for options in ({}, {"positions": "none"}, YARN)),
    ],
)
def test_it_writes_what_the_model_writes_with_one_graph_for_all_blocks_and_lengths(
    options: dict[str, object], graphs: int, made: Made
) -> None:
    model = build(options)
    right = write(model), write_batch(model)
    prepare(model)
    forbid(model)
    assert (write(model), write_batch(model)) == right  # past the context, where all is read anew
    assert (write(model), write_batch(model)) == right
    # One text and several; a ring that is full is one more for each, and never fills before three rows begin.
    assert len(made) == graphs


@pytest.mark.parametrize("precision", [{"dtype": "bf16"}, {"quantize": "int8"}])
def test_weights_of_fewer_bits_are_inputs_like_others(precision: dict[str, Any], made: Made) -> None:
    model = build()
    prepare(model, **precision)
    right = write(model)
    forbid(model)
    assert write(model) == right
    assert len(made) == 1


def test_a_block_of_another_form_has_a_graph_of_its_own(made: Made) -> None:
    model, wider = build(), build(d_ff=96)
    model.blocks[1] = wider.blocks[1]
    right = write(model)
    prepare(model)
    forbid(model)
    assert write(model) == right
    assert len(made) == 2


def test_what_changes_between_two_texts_is_seen(made: Made) -> None:
    class Doubled(nn.Module):
        factor = 2.0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.times = inner, [1.0]

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.inner(x, mask=mask)
            return y * self.factor * self.times[0]

    model = build()
    prepare(model)
    forbid(model)
    texts = [write(model)]
    changes: list[Callable[[], object]] = [
        lambda: setattr(model.blocks[0], "ffn", Doubled(model.blocks[0].ffn)),
        lambda: setattr(model.blocks[0].ffn, "factor", 0.5),
        lambda: model.blocks[0].ffn.times.__setitem__(0, 7.0),  # type: ignore[union-attr, operator]
        lambda: model.blocks[2].attention.qkv.weight.data.mul_(-1),  # type: ignore[union-attr, operator]
        lambda: setattr(model.blocks[2], "ffn", copy.deepcopy(model.blocks[1].ffn)),
    ]
    for change in changes:
        change()
        plain = copy.deepcopy(model)
        plain._step = None
        texts.append(write(model))
        assert texts[-1] == write(plain)
    assert len(set(texts)) == len(texts)


def test_what_a_copy_of_the_model_compiles_is_its_own(made: Made) -> None:
    model = build()
    prepare(model)
    forbid(model)
    right = write(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    assert write(other) == right


def test_a_graph_that_gives_other_numbers_is_not_taken(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ahead.load_package

    def wrong(path: Path) -> ahead.Graph:
        run = load(path)
        return lambda flat: [1.01 * run(flat)[0]]

    monkeypatch.setattr(ahead, "load_package", wrong)
    model = build()
    right = write(model)
    prepare(model)
    model.compile_step(lambda _: AheadStep(lambda block, x, **what: block(x, **what)))
    with pytest.warns(UserWarning, match=r"by torch.compile alone, which is slower: .*it gives other numbers"):
        assert write(model) == right


class Held(nn.Module):
    """Adds a tensor that is no buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.held = inner, torch.randn(32)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x, mask=mask)
        return y + self.held


class InDict(Held):
    """Holds it in a dictionary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.held = {"one": self.held}  # type: ignore[assignment]

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x, mask=mask)
        return y + self.held["one"]


class Switching(nn.Module):
    """Chooses by a number that no input tells."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x, mask=mask)
        return y if x.sum() > 0 else -y


class Lazy(nn.Module):
    """Makes a tensor when it is needed first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.made: list[Tensor] = []

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x, mask=mask)
        if x.shape[1] > 1:
            return y
        if not self.made:
            self.made.append(torch.full((32,), 2.0))
        return y * self.made[0]


class Counting(nn.Module):
    """Another function at each call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x, mask=mask)
        return y * (1 + self.calls % 3)


def hook(model: Decoder) -> None:
    model.blocks[1].ffn.register_forward_hook(lambda *what: 2 * what[2])  # type: ignore[union-attr]


def replace(kind: type[nn.Module]) -> Callable[[Decoder], None]:
    return lambda model: setattr(model.blocks[1], "ffn", kind(model.blocks[1].ffn))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hook, "there are hooks on ffn"),
        (replace(Held), "ffn.held is a tensor that is neither parameter nor buffer"),
        (replace(Switching), "data-dependent|GuardOnDataDependent"),
        (replace(Lazy), "it keeps something of each call"),
        (replace(InDict), r"ffn.held is a tensor that is neither"),
        (replace(Counting), "it keeps something of each call"),
    ],
)
def test_what_cannot_be_compiled_ahead_is_left_to_torch_compile_with_the_reason(
    change: Callable[[Decoder], None], why: str, made: Made
) -> None:
    model = build()
    change(model)
    right = write(copy.deepcopy(model), count=8)
    prepare(model)
    left: list[nn.Module] = []

    def otherwise(block: nn.Module, x: Tensor, **what: Any) -> Any:
        left.append(block)
        return block(x, **what)

    model.compile_step(lambda _: AheadStep(otherwise))
    with pytest.warns(UserWarning, match=why) as warned:
        assert write(model, count=8) == right
    assert len(warned) == 1
    assert set(left) == {model.blocks[1]}


def test_training_and_gradients_are_left_to_torch_compile(made: Made) -> None:
    model = build()
    prepare(model, compiled=True)
    calls: list[nn.Module] = []
    step = AheadStep(lambda block, x, **what: calls.append(block) or block(x, **what))  # type: ignore[func-returns-value]
    model.compile_step(lambda _: step)
    cache = model.create_cache(1)
    token = torch.zeros(1, 1, dtype=torch.long)
    model(token, cache=cache)
    assert len(calls) == 3
    model.train()
    with torch.inference_mode():
        model(token, cache=cache)
    assert len(calls) == 6
    assert not made


@pytest.mark.thorough
def test_a_block_that_chooses_by_lengths_has_a_graph_for_each_choice(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(num_layers=1, max_seq_len=32)
    attend = type(model.blocks[0].attention).attend

    def chosen(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        y: Tensor = attend(self, q, k, v, **how)  # type: ignore[arg-type]
        return y * sum(k.shape[2] > length for length in (8, 12, 16, 20, 24))

    monkeypatch.setattr(type(model.blocks[0].attention), "attend", chosen)
    right = write(model, count=12)
    prepare(model)
    forbid(model)
    assert write(model, count=12) == right
    assert len(made) == 3
    model.compile_step(lambda _: AheadStep(lambda block, x, **what: block(x, **what)))
    with pytest.warns(UserWarning, match="it chooses by lengths, and has 4 graphs already"):
        write(model, "x", count=28)


def test_a_graph_is_kept_for_other_processes_and_made_anew_where_it_was_damaged(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    prepare(model)
    forbid(model)
    right = write(model)
    for damaged in (False, True):
        if damaged:
            (package,) = (tmp_path / "cache").rglob(ahead.PACKAGE)
            package.write_text("")
        monkeypatch.setattr(ahead, "_graphs", {})
        forbid(model)
        if damaged:
            with pytest.warns(UserWarning, match="is damaged .* and is made anew"):
                assert write(model) == right
        else:
            assert write(model) == right
        assert len(made) == 1 + damaged


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cache"))
    model = build()
    right = write(model)
    prepare(model)
    forbid(model)
    with pytest.warns(UserWarning, match=r"the compiled step is not kept: .*cannot be written"):
        assert write(model) == right


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_cpp_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
    with pytest.raises(
        UserError, match="--compile: needs a C\\+\\+ compiler, and none is found; install one, such as g"
    ):
        prepare(build(), compiled=True)


def test_what_a_text_would_wait_for_is_compiled_before(made: Made) -> None:
    model = build({"window": 6})
    prepare(model)
    forbid(model)
    get_ready(model)
    assert len(made) == 2
    for prompt in ("hello", "x"):
        write(model, prompt)
    assert len(made) == 2


@pytest.mark.parametrize("sizes", [{"max_seq_len": 1}, {"max_seq_len": 2}, {"max_seq_len": 3}, {"window": 16}])
def test_a_short_context_is_made_ready_and_nothing_that_no_text_would_use(sizes: dict[str, int], made: Made) -> None:
    model = build({"window": sizes.pop("window", None), "positions": "learned"}, **sizes)
    prepare(model)
    forbid(model)
    get_ready(model)
    # As many tokens as the context has fill a ring, and then all is read anew.
    assert len(made) == (model.max_seq_len > 3)
    write(model)


def test_texts_that_are_written_by_turns_are_proven_once_each(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[ahead.Form] = []
    prove = ahead._prove
    monkeypatch.setattr(ahead, "_prove", lambda *what: proofs.append(what[1]) or prove(*what))  # type: ignore[func-returns-value]
    model = build()

    def write_by_turns() -> list[list[int]]:
        contexts = [Context(model, [TOKENIZER.encode(prompt)], 16) for prompt in ("hello", "hi")]
        for _ in range(6):
            for each in contexts:
                each.add([int(each.logits().argmax())])
        return [each.texts[0] for each in contexts]

    prepare(model)
    right = write_by_turns()
    forbid(model)
    assert write_by_turns() == right
    assert len(proofs) == 2 * len(model.blocks)
    assert len(made) == 1


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_compiled_for_the_processor_it_writes_the_same() -> None:
    model = build({"num_kv_heads": 2, "window": 8})
    prepare(model, quantize="int8")
    right = write(model), write_batch(model)
    forbid(model)
    assert (write(model), write_batch(model)) == right
