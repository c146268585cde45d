"""On a GPU: the attentions agree with those of the CPU, flex with sdpa, forward and backward, whatever is masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apt.builtin.attention import SDPA, Flex
from apt.layers.attend import attend

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and to be asked for: pytest tests/gpu"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(
        "ignore:.*TensorFloat32 tensor cores", "ignore:.*torch._inductor", "ignore:.*Online softmax"
    ),
]
WIDE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""What may differ, relative to the largest number."""
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 37}, id="window"),
    pytest.param({"num_kv_heads": 2, "qk_norm": True}, id="grouped"),
    pytest.param({"window": 200, "num_kv_heads": 1, "bias": "all"}, id="one-kv-head-window"),
]


def padded(seq: int, device: str = "cuda") -> Tensor:
    """A mask [2, seq] whose second text begins late: a block and a bit."""
    kept = torch.ones(2, seq, dtype=torch.bool, device=device)
    kept[1, :140] = False
    return kept


def close(one: Tensor, two: Tensor, tolerance: float) -> None:
    assert one.isfinite().all()
    difference = (one.double().cpu() - two.double().cpu()).abs().max().item()
    assert difference <= tolerance * max(1.0, two.abs().max().item()), difference


def run(layer: nn.Module, x: Tensor, dtype: torch.dtype, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    layer.zero_grad()
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x, mask=mask, positions=positions).float()
    kept = torch.ones_like(y[..., 0], dtype=torch.bool) if mask is None else mask
    weigh = torch.sin(torch.arange(y.numel(), device=y.device, dtype=torch.float32)).view_as(y)
    (y * weigh)[kept].sum().backward()
    return y[kept].detach(), {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "written-out"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS)
def test_flex_computes_what_sdpa_does_and_so_does_its_gradient_on_a_gpu(
    options: dict[str, object], masked: bool, compiled: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ours = SDPA.model_validate(options).create_layer(128, 4).cuda()
    theirs = Flex.model_validate({**options, "compiled": compiled}).create_layer(128, 4).cuda()
    theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 300, 128, device="cuda"), padded(300) if masked else None
    (y, grads), (other, others) = run(ours, x, dtype, mask), run(theirs, x, dtype, mask)
    close(other, y, WIDE[dtype])
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        close(others[name], grad, 5 * WIDE[dtype])


@pytest.mark.parametrize("options", OPTIONS)
def test_sdpa_computes_on_a_gpu_what_it_does_on_the_cpu(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = SDPA.model_validate({**options, "sinks": True}).create_layer(128, 4)
    x = torch.randn(2, 300, 128)
    for mask in (None, padded(300, "cpu")):
        y, grads = run(layer.cpu(), x, torch.float32, mask)
        grads = {name: each.clone() for name, each in grads.items()}
        other, others = run(layer.cuda(), x.cuda(), torch.float32, None if mask is None else mask.cuda())
        close(other, y, 2e-5)
        for name, grad in grads.items():
            close(others[name], grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_row_that_sees_nothing_gives_0_on_a_gpu_and_its_gradient_is_finite(dtype: torch.dtype, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 40, 32, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    mask = torch.ones(2, 40, dtype=torch.bool, device="cuda")
    mask[1, :7] = False
    y = attend(q, k, v, causal=True, mask=mask)
    assert y.isfinite().all()
    assert not y[1, :, :7].any()
    y.float().square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in (q, k, v))
    exact = attend(*(each.detach().double().cpu() for each in (q, k, v)), causal=True, mask=mask.cpu())
    close(y.detach(), exact, WIDE[dtype])
