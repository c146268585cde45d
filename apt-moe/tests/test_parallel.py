"""Two ranks that share the experts out give what one rank gives with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from apt.errors import UserError
from apt_moe.parallel import shard_experts
from apt_moe.provider import MoE

RANK = """
import os, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from apt.training.ranks import leave
from apt_moe.parallel import shard_experts
from apt_moe.provider import MoE
rank, backend, skew = int(os.environ["RANK"]), sys.argv[2], float(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
expert = {"provider": "default", "bias": True} if backend == "bmm" else "swiglu"

def make():
    torch.manual_seed(0)
    router = {"provider": "topk_default", "top_k": 2, "balance_loss": 0.0, "z_loss": 0.0}
    layer = MoE.model_validate(
        {"experts": 6, "expert": expert, "upcycle": False, "backend": backend, "router": router}
    ).create_layer(8, 12)
    with torch.no_grad():
        layer.router.weight[:, 0] += skew * torch.arange(6.0)  # the last experts, of the second rank, take all
    return layer

x = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))
x[..., 0] = 1.0
probe = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(2))
alone, shared = make(), make()
shard_experts(shared, mesh)
assert all(stack.to_local().shape[0] == 3 for stack in shared.experts.parameters())
learners = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (alone, shared)]
for _ in range(3):
    whole = x.clone().requires_grad_()
    right = alone(whole).output
    (right * probe).sum().backward()
    half = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
    output = shared(half).output
    (output * probe[2 * rank : 2 * rank + 2]).sum().backward()
    torch.testing.assert_close(output, right[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.grad, whole.grad[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
    torch.distributed.all_reduce(shared.router.weight.grad)
    torch.testing.assert_close(shared.router.weight.grad, alone.router.weight.grad, rtol=1e-4, atol=1e-5)
    for mine, its in zip(shared.experts.parameters(), alone.experts.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), its.grad, rtol=1e-4, atol=1e-5)
    for learner in learners:
        learner.step()
        learner.zero_grad()
torch.distributed.destroy_process_group()
leave(0)
"""


@pytest.mark.parametrize(("backend", "skew"), [("loop", 50.0), pytest.param("bmm", 0.0, marks=pytest.mark.thorough)])
def test_output_gradients_and_steps_are_those_of_one_rank(tmp_path: Path, backend: str, skew: float) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "store"), backend, str(skew)],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]


def test_the_reference_is_not_shared_out(tmp_path: Path) -> None:
    layer = MoE.model_validate({"experts": 4, "upcycle": False, "backend": "naive"}).create_layer(8, 12)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="naive runs every expert on every token, and cannot share them out"):
            shard_experts(layer, init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
