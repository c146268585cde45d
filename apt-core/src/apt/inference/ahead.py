"""What a block does with one more token, compiled ahead of time, for the CPU.

`torch.compile` asks before each call whether the block still is what it was, and calls what it compiled through Python: for one
token of one text that takes a third of the products' time. Here a block is exported once, compiled to a library of its own
(AOTInductor) and called with its weights and its cache as inputs, so that blocks of one form share it. Whether a block still is
what it was, and whether the library gives what the block gives, is asked once for each cache, that is for each text.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import platform
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from apt.data.cache import Cache
from apt.errors import DataError
from apt.layers import Part, as_part
from apt.layers.cache import KVCache

MANY = 4
"""A block that chooses by lengths has several graphs; with more of them than this it is `torch.compile`'s."""
ROUGHLY = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Of the largest value: what compiled and plain results may differ by, since sums are made in another order."""

Graph = Callable[[list[Tensor]], Sequence[Tensor]]
"""Flat inputs to flat outputs."""

PACKAGE = "step.pt2"

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_graphs: dict[str, Graph] = {}
"""What was compiled in this process, by the graph's own digest."""


class NotAhead(Exception):
    """A block cannot be compiled ahead of time; the text says why."""


class Kind(NamedTuple):
    """What a graph takes for granted of a call."""

    several: bool
    """Whether there is more than one row."""
    x: tuple[int, torch.dtype]
    cache: tuple[int, int, int, int, torch.dtype]
    given: tuple[tuple[str, bool, torch.dtype], ...]
    """The names of what is given beside, whether each row has its own, and of what it is."""
    slots: int | None
    """Of a ring that is full; else their number is free."""


class Description(NamedTuple):
    """What a block computes depends on this, and on the values of its tensors."""

    modules: list[tuple[str, type, dict[str, object]]]
    tensors: list[tuple[str, torch.Size, torch.dtype, tuple[int, ...]]]


class Inputs(NamedTuple):
    """Of a graph, in its order. `place` is 2 longer than the cache, since for 0 and 1 `torch.export` makes other graphs."""

    x: Tensor
    k: Tensor
    v: Tensor
    place: Tensor
    given: list[Tensor]
    state: list[Tensor]

    def flat(self) -> list[Tensor]:
        """As the graph takes them."""
        return [self.x, self.k, self.v, self.place, *self.given, *self.state]


@dataclass(eq=False)
class Form:
    """What blocks of one description compute in calls of one kind, at the lengths that fit."""

    graph: Graph
    guards: Callable[[dict[str, Any]], bool]
    asked: tuple[int, ...] = ()
    """The sizes that `fits` was asked about last."""
    answer: bool = False

    def fits(self, inputs: Inputs) -> bool:
        """Whether the graph holds for these sizes; the blocks of a step ask about the same in turn."""
        sizes = (inputs.x.shape[0], inputs.place.shape[0], inputs.k.shape[2])
        if self.asked != sizes:
            self.asked, self.answer = sizes, self.guards(inputs._asdict())
        return self.answer


@dataclass(eq=False)
class Known:
    """What was made for blocks of one description, and the kinds of calls for which nothing can be."""

    description: Description
    forms: dict[Kind, list[Form]] = field(default_factory=dict)
    refused: set[Kind] = field(default_factory=set)


@dataclass(eq=False)
class Bound:
    """A block, and all that its graphs are given of it, as it was when a text began."""

    cache: weakref.ref[KVCache]
    known: Known
    state: list[Tensor]
    proven: list[Form] = field(default_factory=list)


class AheadStep:
    """Calls a block with one token of each row and its cache; see the module.

    What cannot be compiled ahead of time goes to `otherwise`, with a warning that says why; without one where it is another
    device, another cache than a `KVCache`, or the decoder of an encoder-decoder. Graphs are kept in `cache` for other processes.
    """

    def __init__(self, otherwise: Callable[..., Part], cache: Cache | None = None) -> None:
        self._otherwise = otherwise
        self._cache = Cache(note=_warn) if cache is None else cache
        self._bound: weakref.WeakKeyDictionary[KVCache, dict[nn.Module, Bound]] = weakref.WeakKeyDictionary()
        """By cache, since texts may be written by turns."""
        self._newest: dict[nn.Module, Bound] = {}
        self._place = torch.empty(0, dtype=torch.bool)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy compiles for itself."""
        return AheadStep, (self._otherwise, self._cache)

    def __call__(self, block: nn.Module, x: Tensor, *, cache: Any, **what: Any) -> Part:
        """The block's output. Losses and metrics, which nobody reads of one token, are left out."""
        given = {name: value for name, value in what.items() if value is not None}
        plain = type(cache) is KVCache and cache.k.is_contiguous() and cache.v.is_contiguous()
        known = plain and given.keys() <= {"mask", "positions", "tokens"}
        traced = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if not known or traced or not x.is_cpu or block.training or not len(x):
            return self._otherwise(block, x, cache=cache, **what)
        full = cache.length >= cache.slots
        if not cache.length or (not full and cache.length + 1 >= cache.slots) or (full and not cache.rolling):
            # The first place and the last make other graphs, and are filled once; what finds no place is refused.
            return as_part(block(x, cache=cache, **what))
        kind = _kind(x, cache, given, cache.slots if full else None)
        bound = self._newest.get(block)
        if bound is None or bound.cache() is not cache:
            of_text = self._bound.setdefault(cache, {})
            if block not in of_text:
                of_text[block] = self._bind(block, cache)
            bound = self._newest[block] = of_text[block]
        if kind not in bound.known.refused:
            try:
                return self._read(block, bound, kind, x, cache, given)
            except NotAhead as error:
                _warn(f"a token's step is compiled by torch.compile alone, which is slower: {error}")
                bound.known.refused.add(kind)
        return self._otherwise(block, x, cache=cache, **what)

    def _bind(self, block: nn.Module, cache: KVCache) -> Bound:
        """The block as it is now, with what is known of it, or of another block of the same description."""
        description = _describe(block)
        before = [self._newest[block], *self._newest.values()] if block in self._newest else self._newest.values()
        all_known = {id(each.known): each.known for each in before}.values()
        known = next((each for each in all_known if _same(each.description, description)), None)
        return Bound(weakref.ref(cache), known or Known(description), list(_tensors(block).values()))

    def _read(
        self, block: nn.Module, bound: Bound, kind: Kind, x: Tensor, cache: KVCache, given: dict[str, Tensor]
    ) -> Part:
        place = self._place
        if place.shape[0] != cache.length + 2:
            place = self._place = torch.empty(cache.length + 2, dtype=torch.bool)
        beside = [each.contiguous() for each in given.values()]
        inputs = Inputs(x.contiguous(), cache.k, cache.v, place, beside, bound.state)
        forms = bound.known.forms.setdefault(kind, [])
        form = next((each for each in forms if each.fits(inputs)), None)
        if form is None:
            if len(forms) == MANY:
                raise NotAhead(f"it chooses by lengths, and has {MANY} graphs already")
            form = self._make(block, kind, bound.known.description, inputs)
            forms.append(form)
        if form not in bound.proven:
            _prove(block, form, inputs, cache, given)
            bound.proven.append(form)
        (output,) = form.graph(inputs.flat())
        cache.length += 1
        return Part(output)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, block: nn.Module, kind: Kind, description: Description, inputs: Inputs) -> Form:
        """The block's graph; where another one had the same, what was compiled of that. Raises `NotAhead`."""
        _check(description)
        try:
            with warnings.catch_warnings(), _untouched(block):
                warnings.simplefilter("ignore")  # PyTorch's, about itself
                exported = _export(block, kind, inputs)
            guards = list(exported._guards_code)  # what is free, and in which bounds, nothing public says
            key: dict[str, object] = {
                "graph": _digest(exported),
                "inputs": [str((each.shape, each.stride(), each.dtype)) for each in inputs.state],
                "constants": {name: each.tolist() for name, each in exported.constants.items()},
                "guards": guards,
                "torch": torch.__version__,
                "machine": _machine(),
            }
            name = json.dumps(key)
            if name not in _graphs:
                _graphs[name] = self._load(exported, key)
        except NotAhead:
            raise
        except Exception as error:
            raise NotAhead(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        return Form(_graphs[name], _compile_guards(guards))

    def _load(self, exported: ExportedProgram, key: dict[str, object]) -> Graph:
        def make(folder: Path) -> Mapping[str, object]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile_package(exported, folder / PACKAGE)
            return {}

        try:
            return load_package(self._cache.get("steps", key, make).folder / PACKAGE)
        except DataError as error:
            _warn(f"the compiled step is not kept: {error}")
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder))
                return load_package(Path(folder) / PACKAGE)


class _Step(nn.Module):
    """A block as a function of its inputs alone."""

    def __init__(self, block: nn.Module, kind: Kind) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that none of its weights is this module's
        self._names, self._kind = list(_tensors(block)), kind

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, place: Tensor, given: list[Tensor], state: list[Tensor]
    ) -> Tensor:
        cache = KVCache.over(k, v, place.shape[0] - 2, rolling=self._kind.slots is not None)
        names = [name for name, *_ in self._kind.given]
        what = dict(zip(names, given, strict=True), cache=cache)
        tensors = dict(zip(self._names, state, strict=True))
        output: Tensor = as_part(torch.func.functional_call(self._block[0], tensors, (x,), what)).output
        return output


def _export(block: nn.Module, kind: Kind, inputs: Inputs) -> ExportedProgram:
    """Its graph for any number of rows above one, any length, and any number of slots but a full ring's.

    Raises `NotAhead` where it is one for these sizes alone.
    """
    rows = {0: Dim.AUTO} if kind.several else {}
    cache = {**rows, **({} if kind.slots is not None else {2: Dim.AUTO})}
    given = [{**(rows if own else {}), **({1: Dim.AUTO} if name == "mask" else {})} for name, own, _ in kind.given]
    free = {
        "x": rows,
        "k": cache,
        "v": cache,
        "place": {0: Dim.AUTO},
        "given": given,
        "state": [{} for _ in inputs.state],
    }
    # Like the inputs, which may have been made in inference mode; nobody reads what is in them.
    like = torch.utils._pytree.tree_map(
        lambda each: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype), tuple(inputs)
    )
    exported = torch.export.export(_Step(block, kind), like, dynamic_shapes=free, strict=False)
    sizes = {node.name: node.meta["val"].shape for node in exported.graph.nodes if node.op == "placeholder"}
    bound = [
        name
        for name, where in (("place", 0), ("k", 2), ("v", 2))
        if where in free[name] and isinstance(sizes[name][where], int)
    ]
    if bound:
        raise NotAhead("what it computes is bound to one length")
    return exported


def _prove(block: nn.Module, form: Form, inputs: Inputs, cache: KVCache, given: dict[str, Tensor]) -> None:
    """Raise `NotAhead` where the graph does not give what the block does, or leaves something else in the cache."""
    plain = KVCache.over(cache.k.clone(), cache.v.clone(), cache.length, rolling=cache.rolling)
    with _untouched(block):
        right = as_part(block(inputs.x, cache=plain, **given)).output
    k, v = cache.k.clone(), cache.v.clone()
    (output,) = form.graph(inputs._replace(k=k, v=v).flat())
    for one, other in ((output, right), (k, plain.k), (v, plain.v)):
        if not bool((one - other).abs().max() <= ROUGHLY[other.dtype] * other.abs().max()):
            raise NotAhead("compiled ahead of time it gives other numbers")


def _kind(x: Tensor, cache: KVCache, given: Mapping[str, Tensor], slots: int | None) -> Kind:
    _, k_heads, _, k_width = cache.k.shape
    _, v_heads, _, v_width = cache.v.shape
    names = tuple((name, each.shape[0] > 1, each.dtype) for name, each in given.items())
    return Kind(
        x.shape[0] > 1, (x.shape[-1], x.dtype), (k_heads, k_width, v_heads, v_width, cache.k.dtype), names, slots
    )


def _describe(block: nn.Module) -> Description:
    modules = []
    for name, module in block.named_modules():
        own = {key: _frozen(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        modules.append((name, type(module), {**own, "hooks": sum(len(getattr(module, each)) for each in _HOOKS)}))
    tensors = [(name, each.shape, each.dtype, each.stride()) for name, each in _tensors(block).items()]
    return Description(modules, tensors)


def _check(description: Description) -> None:
    """Raise `NotAhead` for what a graph would not notice."""
    for name, _, own in description.modules:
        if own["hooks"]:
            raise NotAhead(f"there are hooks on {name or 'a block'}")
        for key, value in own.items():
            if any(isinstance(each, Tensor) for each in _contents(value)):
                raise NotAhead(f"{name}.{key} is a tensor that is neither parameter nor buffer")


@contextmanager
def _untouched(block: nn.Module) -> Iterator[None]:
    """Take back what a call leaves in the block's modules: while it is exported, tensors without numbers.

    Raises `NotAhead` where there is anything, since a graph would not do it.
    """
    before, description = [dict(vars(module)) for module in block.modules()], _describe(block)
    try:
        yield
    finally:
        if not _same(_describe(block), description):
            for module, values, (_, _, was) in zip(block.modules(), before, description.modules, strict=True):
                vars(module).clear()
                vars(module).update(values)
                for key, value in values.items():
                    _refill(value, was.get(key))
            raise NotAhead("it keeps something of each call")


def _contents(value: object) -> Iterable[object]:
    """What a container holds; anything else holds itself."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple | set) else [value]


def _refill(container: object, was: object) -> None:
    """Let a container hold again what it did."""
    if isinstance(container, list) and isinstance(was, list):
        container[:] = was
    elif isinstance(container, dict | set) and isinstance(was, dict | set):
        container.clear()
        container.update(was)


def _frozen(value: object) -> object:
    """A container as it is now."""
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _same(one: Description, other: Description) -> bool:
    try:
        return one == other
    except Exception:  # noqa: BLE001 - some things cannot be compared, such as arrays
        return False


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def _compile_guards(guards: Sequence[str]) -> Callable[[dict[str, Any]], bool]:
    """One function of the inputs by name, from what `torch.export` found to hold for a graph."""
    code = compile(" and ".join(f"({each})" for each in guards) or "True", "guards", "eval")
    names = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    return lambda inputs: bool(eval(code, names, {"L": inputs}))


def _digest(exported: ExportedProgram) -> str:
    """Of the graph's text, without the comments, which name files."""
    text = exported.graph_module.print_readable(print_output=False)
    lines = [line for line in text.splitlines() if not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def compile_package(exported: ExportedProgram, path: Path) -> None:
    """Compile a graph to a file."""
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def load_package(path: Path) -> Graph:
    """The graph in a file."""
    graph: Graph = torch._inductor.aoti_load_package(str(path)).loader.run
    return graph


@functools.cache
def _machine() -> str:
    """The processor that is compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "; ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
