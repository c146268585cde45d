"""On a GPU every way to run experts gives what the reference gives, the same bits twice, and makes nobody wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from apt_moe.layer import MixtureOfExperts
from apt_moe.provider import MoE

DEVICE = "cuda"
BACKENDS = ["loop", "bmm", "grouped_mm"]
"""Beside the reference; what `auto` takes here is the last of them."""
EXACT, ROUGH = 1e-5, 3e-2
"""Of the largest number of the reference: in float32, and where products are in bfloat16 (8 bits, in three products)."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOADS = [
    pytest.param((4, 61), 0.0, {}, id="even"),
    pytest.param((1, 1), 0.0, {}, id="one token"),
    pytest.param((4, 61), 50.0, {}, id="all tokens to two experts, the others empty"),
    pytest.param((4, 61), 1.0, {"capacity": 0.6}, id="beyond capacity"),
    pytest.param((4, 61), 50.0, {"capacity": 0.3}, id="beyond capacity, and empty experts"),
    pytest.param(
        (4, 61), 0.0, {"router": {"provider": "expert_choice", "allow_noncausal": True}}, id="experts that choose"
    ),
]


def layer(backend: str, d_model: int = 64, d_ff: int = 48, **options: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    options = {"experts": 5, "expert": "swiglu", "upcycle": False, "backend": backend, **options}
    return MoE.model_validate(options).create_layer(d_model, d_ff).to(DEVICE)


def skewed(made: MixtureOfExperts, skew: float) -> MixtureOfExperts:
    """A router that favours the first experts."""
    with torch.no_grad():
        made.router.weight[:, 0] += skew * torch.arange(len(made.router.weight), 0.0, -1.0, device=DEVICE)
    return made


def tokens(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1.0  # what a skewed router looks at
    return x.to(DEVICE)


def poison() -> None:
    """Leave NaN in the memory that is handed out next: rows that nobody writes are to be seen."""
    blocks = [
        torch.full((size // 4,), torch.nan, device=DEVICE) for size in (1 << 25, *[1 << 18] * 64, *[1 << 12] * 64)
    ]
    del blocks


def results(made: MixtureOfExperts, x: Tensor, run: object = None) -> list[Tensor]:
    """The output and every gradient: of the input, the router and the experts."""
    poison()
    x = x.clone().requires_grad_()
    part = (made if run is None else run)(x)  # type: ignore[operator]
    probe = torch.randn(part.output.shape, generator=torch.Generator().manual_seed(1)).to(part.output)
    learnt = [x, *made.router.parameters(), *made.experts.parameters()]
    total = (part.output * probe).sum() + sum(part.losses.values())
    return [part.output.detach(), *torch.autograd.grad(total, learnt)]


def assert_close(mine: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for number, (one, other) in enumerate(zip(mine, right, strict=True)):
        assert one.isfinite().all(), f"result {number} is not finite"
        apart = (one.double() - other.double()).abs().max()
        assert apart <= tolerance * other.double().abs().max().clamp(min=1), f"result {number} is {apart.item()} apart"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
@pytest.mark.parametrize("sizes", [(64, 48), (60, 42)], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(("shape", "skew", "options"), LOADS)
def test_a_backend_gives_the_reference_s_output_and_gradients(
    backend: str,
    expert: object,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    skew: float,
    options: dict[str, object],
) -> None:
    x = tokens(*shape, sizes[0])
    right = results(skewed(layer("naive", *sizes, expert=expert, **options), skew), x)
    assert_close(results(skewed(layer(backend, *sizes, expert=expert, **options), skew), x), right, EXACT)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
@pytest.mark.parametrize("sizes", [(64, 48), (60, 42)], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(("shape", "skew", "options"), LOADS)
def test_in_bfloat16_a_backend_is_close_to_the_reference_in_float32(
    backend: str,
    expert: object,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    skew: float,
    options: dict[str, object],
) -> None:
    made = skewed(layer(backend, *sizes, expert=expert, **options), skew).bfloat16()
    exact = layer("naive", *sizes, expert=expert, **options)
    exact.load_state_dict(made.state_dict())
    x = tokens(*shape, sizes[0]).bfloat16()
    assert_close(results(made, x), results(exact, x.float()), ROUGH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "skew", "options"), LOADS)
def test_under_autocast_products_are_in_bfloat16_and_gradients_in_float32(
    backend: str, shape: tuple[int, int], skew: float, options: dict[str, object]
) -> None:
    x = tokens(*shape, 64)
    made = skewed(layer(backend, **options), skew)

    def run(x: Tensor) -> object:
        with torch.autocast(DEVICE, torch.bfloat16):
            return made(x)

    mine = results(made, x, run)
    assert all(result.dtype == torch.float32 for result in mine)
    right = results(skewed(layer("naive", **options), skew), x)
    assert_close(mine, right, ROUGH)
    assert not mine[0].equal(right[0])


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_an_empty_batch_is_an_empty_batch(backend: str) -> None:
    made = layer(backend).bfloat16()
    x = torch.randn(0, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    output = made(x).output
    assert output.shape == (0, 4, 64)
    output.sum().backward()
    assert all(stack.grad is None or not stack.grad.any() for stack in made.experts.parameters())


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
@pytest.mark.parametrize("options", [{}, {"capacity": 0.8}], ids=["", "with a capacity"])
def test_two_calls_give_the_same_bits(
    backend: str, dtype: torch.dtype, expert: object, options: dict[str, object]
) -> None:
    made = layer(backend, 128, 256, experts=8, expert=expert, **options).to(dtype)
    x = tokens(4, 512, 128).to(dtype)
    first = results(made, x)
    for _ in range(3):
        for one, two in zip(first, results(made, x), strict=True):
            assert one.equal(two)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "with padding"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": 1.0},
        {"expert": {"provider": "default", "bias": True}},
        {"router": {"provider": "sigmoid_bias", "sequence_balance": 0.1}},
        {"router": {"provider": "expert_choice", "allow_noncausal": True}},
        {"shared": 1},
    ],
    ids=["plain", "capacity", "bias", "sigmoid_bias", "expert_choice", "shared"],
)
def test_a_training_step_never_waits_for_the_device(autocast: bool, padded: bool, options: dict[str, object]) -> None:
    made = layer("auto", **options)
    made = made if autocast else made.bfloat16()
    x = tokens(4, 61, 64).to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    mask = torch.arange(61, device=DEVICE).expand(4, 61) < 50 if padded else None
    probe = torch.randn_like(x)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            part = made(x, mask=mask)
        ((part.output * probe).sum() + sum(part.losses.values())).backward()

    step()  # a capacity is read once
    with no_waiting():
        step()


def test_a_capacity_that_a_schedule_sets_is_noticed() -> None:
    made = layer("auto")
    x = tokens(4, 61, 64)
    assert made(x).metrics["moe_dropped"] == 0
    made.capacity_factor.fill_(0.3)
    assert made(x).metrics["moe_dropped"] > 0
    made.capacity_factor.fill_(torch.inf)
    assert made(x).metrics["moe_dropped"] == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
@pytest.mark.parametrize("texts", [1, 3, 40])
def test_writing_gives_what_the_reference_gives_and_does_not_wait(expert: object, texts: int) -> None:
    x = tokens(texts, 1, 64)
    with torch.no_grad():
        right = layer("naive", expert=expert).eval()(x).output
        assert_close([layer("auto", expert=expert).eval()(x).output], [right], EXACT)
        made, x = layer("auto", expert=expert).eval().bfloat16(), x.bfloat16()
        made(x)
        with no_waiting():
            output = made(x).output
    assert_close([output], [right], ROUGH)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
def test_a_gradient_has_a_gradient_itself(backend: str, expert: object) -> None:
    def second(made: MixtureOfExperts) -> list[Tensor]:
        x = tokens(2, 9, 64).requires_grad_()
        part = made(x)
        (first,) = torch.autograd.grad(part.output.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *made.parameters()]))

    options = {"expert": expert, "capacity": 0.9}
    assert_close(second(layer(backend, **options)), second(layer("naive", **options)), 1e-4)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # what the compiler says while it works
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize(
    "options",
    [{}, {"capacity": 0.6}, {"expert": {"provider": "default", "bias": True}}],
    ids=["plain", "capacity", "bias"],
)
def test_compiled_it_gives_the_same_and_the_same_bits_twice(autocast: bool, options: dict[str, object]) -> None:
    torch._dynamo.reset()
    made = layer("auto", **options)
    made = made if autocast else made.bfloat16()
    x = tokens(4, 61, 64).to(torch.float32 if autocast else torch.bfloat16)
    compiled = torch.compile(made, fullgraph=True)

    def run(x: Tensor) -> object:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return compiled(x)

    def eager(x: Tensor) -> object:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return made(x)

    mine = results(made, x, run)
    assert_close(mine, results(made, x, eager), ROUGH)
    for one, two in zip(mine, results(made, x, run), strict=True):
        assert one.equal(two)
