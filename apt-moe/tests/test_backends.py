"""Every way to run experts gives what the reference gives, in value and in every gradient."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt_moe.experts import MANY, SMALL, choose_backend
from apt_moe.layer import MixtureOfExperts
from apt_moe.provider import MoE
from apt_moe.recycle import SMALLEST, Recycler

BACKENDS = ["loop", "bmm", "grouped_mm"]


def layer(backend: str, d_model: int = 8, d_ff: int = 12, **options: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    options = {"experts": 5, "expert": "swiglu", "upcycle": False, "backend": backend, **options}
    return MoE.model_validate(options).create_layer(d_model, d_ff)


def skewed(made: MixtureOfExperts, skew: float) -> MixtureOfExperts:
    """A router that favours the first experts."""
    with torch.no_grad():
        made.router.weight[:, 0] += skew * torch.arange(len(made.router.weight), 0.0, -1.0)
    return made


def results(made: MixtureOfExperts, x: Tensor) -> list[Tensor]:
    """The output and every gradient: of the input, the router and the experts."""
    x = x.clone().requires_grad_()
    output = made(x).output
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    learnt = [x, *made.router.parameters(), *made.experts.parameters()]
    return [output, *torch.autograd.grad((output * probe).sum(), learnt)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", ["default", "swiglu", {"provider": "default", "bias": True}])
@pytest.mark.parametrize(
    ("shape", "skew", "capacity"),
    [((2, 13), 0.0, None), ((1, 1), 0.0, None), ((3, 20), 50.0, None), ((3, 20), 1.0, 0.6)],
)
def test_a_backend_gives_the_reference_s_output_and_gradients(
    backend: str, expert: object, shape: tuple[int, int], skew: float, capacity: float | None
) -> None:
    x = torch.randn(*shape, 8, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1.0  # with a skew all tokens go to the first two experts, and three are empty
    options = {"expert": expert, "capacity": capacity}
    right = results(skewed(layer("naive", **options), skew), x)
    for mine, its in zip(results(skewed(layer(backend, **options), skew), x), right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(
    st.integers(1, 7),
    st.integers(2, 9),
    st.integers(1, 30),
    st.sampled_from([(5, 9), (7, 3), (16, 32)]),
    st.integers(0, 99),
)
def test_on_random_sizes_too_k_up_to_all_experts(
    backend: str, top_k: int, experts: int, tokens: int, sizes: tuple[int, int], seed: int
) -> None:
    router = {"provider": "topk_default", "top_k": min(top_k, experts), "renormalise": False, "init_std": 1.0}
    x = torch.randn(1, tokens, sizes[0], generator=torch.Generator().manual_seed(seed))
    right = results(layer("naive", *sizes, experts=experts, router=router), x)
    for mine, its in zip(results(layer(backend, *sizes, experts=experts, router=router), x), right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "auto", *BACKENDS])
def test_an_empty_batch_is_an_empty_batch(backend: str) -> None:
    made = layer(backend)
    x = torch.randn(0, 4, 8, requires_grad=True)
    output = made(x).output
    assert output.shape == (0, 4, 8)
    output.sum().backward()
    assert all(stack.grad is None or not stack.grad.any() for stack in made.experts.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_a_backend_is_close_to_the_reference(backend: str) -> None:
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    right = results(layer("naive").bfloat16(), x)
    for mine, its in zip(results(layer(backend).bfloat16(), x), right, strict=True):
        torch.testing.assert_close(mine.float(), its.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_give_the_same_bits(backend: str) -> None:
    x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(4))
    for one, two in zip(results(layer(backend), x), results(layer(backend), x), strict=True):
        assert one.equal(two)


def test_the_choice_follows_device_and_size() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, SMALL, MANY + 1) == "loop"
    assert choose_backend(cpu, SMALL - 1, MANY) == "loop"
    assert choose_backend(cpu, SMALL - 1, MANY + 1) == "grouped_mm"
    assert choose_backend(torch.device("cuda"), SMALL, MANY) == "grouped_mm"


def test_memory_that_is_given_back_is_used_again_and_never_more_is_kept_than_was_in_use() -> None:
    recycler = Recycler()
    shape = (SMALLEST // 4,)
    one, two = recycler.empty(shape, torch.float32), recycler.empty(shape, torch.float32)
    assert one.data_ptr() != two.data_ptr()
    place = one.data_ptr()
    assert recycler.most == recycler.leased == 2 * SMALLEST
    view = one[:10].detach()
    del one
    assert recycler.idle == 0, "a view still reads it"
    del view
    assert recycler.idle == SMALLEST
    again = recycler.empty(shape, torch.float32)
    assert again.data_ptr() == place
    del again
    big = recycler.empty((SMALLEST // 2,), torch.float32)
    del big, two
    assert recycler.leased == 0
    assert recycler.idle <= recycler.most


def test_memory_that_a_garbage_collection_gives_back_in_the_midst_of_it_is_not_waited_for() -> None:
    recycler = Recycler()
    held = [recycler.empty((SMALLEST,), torch.uint8)]

    def collect() -> None:
        with recycler._lock:
            held.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert (recycler.leased, recycler.idle) == (0, SMALLEST)


def test_small_memory_is_left_to_the_allocator() -> None:
    recycler = Recycler()
    assert recycler.empty((3, 4), torch.bfloat16).shape == (3, 4)
    assert recycler.most == 0


def test_gradients_in_recycled_memory_accumulate_and_outlive_their_step() -> None:
    made = layer("loop", 64, 1 << 13)
    x = torch.randn(1, 6, 64)
    made(x).output.sum().backward()
    first = [stack.grad.clone() for stack in made.experts.parameters()]
    kept = [stack.grad for stack in made.experts.parameters()]
    made(x).output.sum().backward()
    for stack, once in zip(made.experts.parameters(), first, strict=True):
        torch.testing.assert_close(stack.grad, 2 * once)
    made.zero_grad()
    made(2 * x).output.sum().backward()
    for old, once in zip(kept, first, strict=True):
        torch.testing.assert_close(old, 2 * once)
