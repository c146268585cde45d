import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from apt.layers.units import has_units
from apt_moe.grouped import grouped_linear


def operands(
    counts: list[int], d_in: int, d_out: int, tail: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, weight, bias, offsets, and the expert of each row; `tail` rows belong to no expert."""
    generator = torch.Generator().manual_seed(sum(counts) + d_in)
    rows = torch.randn(sum(counts) + tail, d_in, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(len(counts), d_out, d_in, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(len(counts), d_out, generator=generator, dtype=dtype).requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).int()
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return rows, weight, bias, offsets, torch.cat([experts, experts.new_zeros(tail)])


def reference(rows: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
    products = torch.einsum("ni,noi->no", rows, weight[experts])
    owned = torch.arange(len(rows)) < offsets[-1]
    return torch.where(owned.unsqueeze(1), products, 0.0) + bias[experts]


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from([(8, 4), (3, 5), (16, 7)]), st.integers(0, 3)
)
def test_product_and_gradients_are_those_of_a_loop(counts: list[int], sizes: tuple[int, int], tail: int) -> None:
    given = operands(counts, *sizes, tail=tail)
    ours, theirs = grouped_linear(*given), reference(*given)
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn(ours.shape)
    gradients = torch.autograd.grad((ours * probe).sum(), given[:3])
    for mine, its in zip(gradients, torch.autograd.grad((theirs * probe).sum(), given[:3]), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("sizes", [(8, 4), (3, 5)])
def test_the_gradient_of_a_sum_is_taken(sizes: tuple[int, int]) -> None:
    given = operands([3, 0, 2], *sizes)
    grouped_linear(*given).sum().backward()
    assert given[1].grad is not None
    assert given[1].grad[1].abs().sum() == 0


def test_double_precision_passes_the_numerical_gradient_check() -> None:
    rows, weight, bias, offsets, experts = operands([2, 0, 3], 3, 4, tail=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *learnt: grouped_linear(*learnt, offsets, experts), (rows, weight, bias))


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    given = operands([3, 0, 5], 8, 4)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), grouped_linear(*given))
    mine = torch.autograd.grad(compiled(*given).square().sum(), given[:3])
    for ours, theirs in zip(mine, torch.autograd.grad(grouped_linear(*given).square().sum(), given[:3]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shapes_are_known_on_the_meta_device() -> None:
    given = (operand.to("meta") for operand in operands([3, 0, 5], 8, 4))
    assert grouped_linear(*given).shape == (8, 4)


def test_autocast_is_followed() -> None:
    given = operands([3, 0, 5], 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_linear(*given)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), grouped_linear(*given), rtol=0.03, atol=0.1)


def test_flops_are_counted() -> None:
    rows, weight, _, offsets, experts = operands([3, 0, 5], 8, 4)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(rows, weight, None, offsets, experts).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 8 * 4


def test_bf16_is_multiplied_in_float32_where_a_processor_with_avx_512_has_no_units_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, weight, _, offsets, experts = operands([3, 0, 5], 8, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    has_units.cache_clear()
    multiplied = set()
    multiply = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: multiplied.add(a.dtype) or multiply(a, b))
    try:
        grouped_linear(rows, weight, None, offsets, experts)
    finally:
        has_units.cache_clear()
    assert multiplied == {torch.float32}
