import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.core.providers import FFNProvider, RouterProvider
from apt.errors import UserError
from apt_moe import dispatch
from apt_moe.layer import FEW, MixtureOfExperts
from apt_moe.provider import MoE, TopK
from apt_moe.upcycling import upcycle

dynamo_instantiates = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
"""PyTorch's own tracer does what PyTorch deprecates."""

SIZES = [(16, 24), (5, 9)]
"""The second is no multiple of 16 bytes."""


def mixture(d_model: int = 16, d_ff: int = 24, **options: object) -> MixtureOfExperts:
    return MoE(**options).create_layer(d_model, d_ff)


def naive(layer: MixtureOfExperts, provider: FFNProvider, x: Tensor) -> Tensor:
    """sum_e w_e f_e(x), token by token and choice by choice."""
    indices, weights, _ = layer.router_provider.route(layer.router, x, False)
    single = provider.create_layer(x.shape[-1], 24)
    assert isinstance(single, nn.Module)
    outputs = []
    for token, experts, shares in zip(x.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1), strict=True):
        output = torch.zeros_like(token)
        for expert, share in zip(experts, shares, strict=True):
            own = {name: stack[expert] for name, stack in layer.experts.layer.named_parameters()}
            output = output + share * torch.func.functional_call(single, own, (token.view(1, 1, -1),)).view(-1)
        outputs.append(output)
    return torch.stack(outputs).view_as(x)


def favour(layer: MixtureOfExperts, x: Tensor, experts: int) -> Tensor:
    """Inputs for which the router sends every token to the first `experts` experts."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:experts, 0] = torch.linspace(2, 1, experts)
        x[..., 0] = 5.0
    return x


@pytest.mark.parametrize("shape", [(2, 13), (1, 1), (1, 5)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("expert", ["default", "swiglu"])
@pytest.mark.parametrize("load", ["even", "one expert", "few"])
def test_output_and_every_gradient_are_those_of_a_naive_loop(
    expert: str, sizes: tuple[int, int], shape: tuple[int, int], load: str
) -> None:
    torch.manual_seed(0)
    provider = MoE(experts=6, expert=expert)
    layer = provider.create_layer(*sizes)
    x = torch.randn(*shape, sizes[0])
    if load != "even":
        x = favour(layer, x, 2 if load == "one expert" else 3)
    x.requires_grad_()
    ours, theirs = layer(x).output, naive(layer, provider.expert, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(x)
    learnt = [x, *layer.router.parameters(), *layer.experts.parameters()]
    mine = torch.autograd.grad((ours * probe).sum(), learnt)
    its = torch.autograd.grad((theirs * probe).sum(), learnt)
    for own, other in zip(mine, its, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert mine[1].abs().sum() > 0, "the router learns"


@pytest.mark.parametrize("expert", ["default", "swiglu"])
def test_renumbering_the_experts_changes_nothing(expert: str) -> None:
    layer = mixture(experts=5, expert=expert).eval()
    x = torch.randn(2, 9, 16)
    before = layer(x).output
    renumbered = torch.randperm(5)
    with torch.no_grad():
        for stack in (layer.router.weight, *layer.experts.parameters()):
            stack.copy_(stack[renumbered].clone())
    torch.testing.assert_close(layer(x).output, before, rtol=1e-6, atol=1e-6)


def test_without_a_capacity_a_token_does_not_see_its_neighbours() -> None:
    layer = mixture()
    x = torch.randn(3, 7, 16)
    whole = layer(x).output
    torch.testing.assert_close(layer(x[1:2, 2:4]).output, whole[1:2, 2:4])
    shuffled = torch.randperm(7)
    torch.testing.assert_close(layer(x[:, shuffled]).output, whole[:, shuffled])


@pytest.mark.parametrize("expert", ["default", "swiglu"])
@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_after_upcycling_the_mixture_is_the_dense_layer_in_value_and_input_gradient(expert: str, top_k: int) -> None:
    layer = mixture(experts=4, expert=expert, router=TopK(top_k=top_k))
    x = torch.randn(2, 11, 16, requires_grad=True)
    layer.active = False
    dense = layer(x).output
    probe = torch.randn_like(dense)
    (dense_gradient,) = torch.autograd.grad((dense * probe).sum(), x)
    upcycle(layer)
    layer.active = True
    sparse = layer(x).output
    (sparse_gradient,) = torch.autograd.grad((sparse * probe).sum(), x)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse_gradient, dense_gradient, rtol=1e-5, atol=1e-6)


def test_while_it_is_off_only_the_dense_layer_runs_and_learns() -> None:
    layer = mixture()
    layer.active = False
    x = torch.randn(2, 5, 16)
    part = layer(x)
    assert layer.dense is not None
    assert part.output.equal(layer.dense(x))
    assert not part.losses
    assert not part.metrics
    part.output.sum().backward()
    learnt = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert learnt == {f"dense.{name}" for name, _ in layer.dense.named_parameters()}


def test_once_on_the_dense_layer_is_idle_and_everything_else_learns() -> None:
    layer = mixture(experts=3)
    part = layer(torch.randn(4, 20, 16))
    (part.output.square().sum() + sum(part.losses.values())).backward()
    idle = {name for name, parameter in layer.named_parameters() if parameter.grad is None}
    assert layer.dense is not None
    assert idle == {f"dense.{name}" for name, _ in layer.dense.named_parameters()}
    for stack in (layer.router.weight, *layer.experts.parameters()):
        assert all(gradient.abs().sum() > 0 for gradient in stack.grad), "every expert learns"


def test_what_is_idle_is_what_gets_no_gradient() -> None:
    layer = mixture(experts=3)
    assert layer.idle() == [layer.dense]
    layer.active = False
    assert layer.idle() == [layer.router, layer.experts]
    assert mixture(upcycle=False).idle() == []


def test_without_upcycling_there_is_no_dense_layer_and_it_cannot_be_off() -> None:
    layer = mixture(upcycle=False)
    assert layer.dense is None
    layer.active = False
    with pytest.raises(RuntimeError, match="upcycle: true"):
        layer(torch.randn(1, 2, 16))


@given(st.floats(0.05, 2), st.integers(0, 99))
def test_a_tight_capacity_does_not_let_the_future_change_the_past(capacity: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = mixture(experts=4, capacity=capacity)
    x = torch.randn(1, 12, 16)
    t = seed % 12
    for future in (30 * torch.randn(1, 12 - t, 16), torch.full((1, 12 - t, 16), torch.nan)):
        other = torch.cat([x[:, :t], future], dim=1)
        # Not bit-equal: how many rows a product has may decide how it is summed.
        torch.testing.assert_close(layer(other).output[:, :t], layer(x).output[:, :t], rtol=1e-5, atol=1e-6)


def test_a_dropped_token_gets_nothing_and_is_counted() -> None:
    layer = mixture(experts=4, capacity=0.5)
    x = favour(layer, torch.randn(1, 16, 16), 2)
    part = layer(x)
    served = part.output.abs().sum(-1) > 0
    assert served.tolist() == [[True] * 4 + [False] * 12]
    torch.testing.assert_close(part.metrics["moe_dropped"], torch.tensor(12 / 16))
    torch.testing.assert_close(part.metrics["moe_load"], torch.tensor([0.5, 0.5, 0, 0]))


def test_evaluation_drops_no_token() -> None:
    layer = mixture(experts=4, capacity=0.1)
    free = mixture(experts=4)
    free.load_state_dict(layer.state_dict() | {"capacity_factor": free.capacity_factor})
    x = torch.randn(2, 9, 16)
    assert layer(x).metrics["moe_dropped"] > 0
    part = layer.eval()(x)
    assert part.metrics["moe_dropped"] == 0
    assert part.output.equal(free.eval()(x).output)


def test_padding_changes_no_other_token_and_no_loss_even_with_a_tight_capacity() -> None:
    layer = mixture(experts=4, capacity=0.5)
    x = torch.randn(2, 10, 16)
    mask = torch.arange(10).expand(2, 10) < torch.tensor([[10], [6]])
    other = torch.where(mask.unsqueeze(-1), x, 1e4)
    one, two = layer(x, mask=mask), layer(other, mask=mask)
    assert one.output[mask].equal(two.output[mask])
    for name in one.losses:
        torch.testing.assert_close(one.losses[name], two.losses[name])
    for name in one.metrics:
        torch.testing.assert_close(one.metrics[name], two.metrics[name])


def test_evaluation_has_no_losses_and_reports_the_router_s_entropy() -> None:
    layer = mixture(experts=4, router=TopK(init_std=1e-6)).eval()
    part = layer(torch.randn(1, 8, 16))
    assert not part.losses
    torch.testing.assert_close(part.metrics["router_entropy"], torch.tensor(4.0).log())
    torch.testing.assert_close(part.metrics["moe_load"].sum(), torch.tensor(1.0))
    assert not any(metric.requires_grad for metric in part.metrics.values())


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_in_bfloat16_everything_is_finite_and_close(capacity: float | None) -> None:
    layer = mixture(experts=4, capacity=capacity, router=TopK(init_std=1.0))
    x = torch.randn(2, 16, 16)
    full = layer(x).output
    with torch.autocast("cpu", torch.bfloat16):
        part = layer(x)
    torch.testing.assert_close(part.output, full, rtol=0.05, atol=0.05)
    half = layer.bfloat16()(30 * x.bfloat16())
    assert half.output.dtype == torch.bfloat16
    assert half.output.isfinite().all()
    half.output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.experts.parameters() if p.grad is not None)


@dynamo_instantiates
def test_one_compiled_graph_serves_every_capacity_and_temperature() -> None:
    layer = mixture(experts=4, capacity=1.0)
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(2, 8, 16)
    for capacity, temperature in ((1.0, 1.0), (0.25, 0.5), (2.0, 3.0)):
        layer.capacity_factor.fill_(capacity)
        layer.router.temperature.fill_(temperature)
        torch.testing.assert_close(compiled(x).output, layer(x).output)
    assert len(graphs) == 1


@dynamo_instantiates
def test_compiled_gradients_are_the_eager_ones() -> None:
    layer = mixture(experts=4, capacity=1.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 16)
    layer(x).output.square().sum().backward()
    eager = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    compiled(x).output.square().sum().backward()
    for gradient, parameter in zip(eager, layer.parameters(), strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


def test_activation_checkpointing_gives_the_same_gradients_and_counts_nothing_twice() -> None:
    layer = mixture(experts=4, capacity=1.0)
    x = torch.randn(2, 8, 16, requires_grad=True)

    def gradients(checkpointed: bool) -> list[Tensor]:
        layer.zero_grad()
        part = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        (part.output.square().sum() + sum(part.losses.values())).backward()
        return [layer.router.weight.grad.clone(), *(p.grad.clone() for p in layer.experts.parameters())]

    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain)
    for name, buffer in layer.named_buffers():
        assert buffer.equal(buffers[name])


def test_it_is_copied_saved_and_loaded_whole() -> None:
    layer = mixture(experts=3, capacity=1.5).eval()
    x = torch.randn(1, 4, 16)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = mixture(experts=3).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert other.capacity_factor == 1.5
    for twin in (other, copy.deepcopy(layer)):
        assert twin(x).output.equal(layer(x).output)


def test_the_largest_profile_s_layers_are_built_on_the_meta_device() -> None:
    provider = MoE(experts=64, capacity=1.25)
    with torch.device("meta"):
        layers = nn.ModuleList(provider.create_layer(768, 3072, 0.15, "gelu") for _ in range(24))
        part = layers[0](torch.empty(2, 8, 768))
    assert part.output.shape == (2, 8, 768)
    assert sum(p.numel() for p in layers.parameters()) == 24 * provider.get_parameter_count(768, 3072)
    assert {p.device.type for p in layers.parameters()} == {"meta"}


def test_the_router_may_be_a_third_party_s() -> None:
    class First(RouterProvider):
        """Sends everything to the first k experts, in equal parts."""

        def create_router(self, d_model: int, num_experts: int, top_k: int = 2) -> nn.Module:
            return nn.Identity()

        def route(
            self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            indices = torch.arange(self.top_k).expand(*inputs.shape[:2], self.top_k)
            return indices, torch.full(indices.shape, 1 / self.top_k), {}

        def compute_load_balance_loss(self, router_logits: Tensor, expert_mask: Tensor) -> Tensor:
            return router_logits.new_zeros(())

        def get_parameter_count(self, d_model: int, num_experts: int) -> int:
            return 0

    part = mixture(experts=4, router=First(top_k=3))(torch.randn(1, 5, 16))
    torch.testing.assert_close(part.metrics["moe_load"], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_a_router_that_takes_no_mask_does_without_unless_padding_would_count_in_a_loss() -> None:
    class Untold(TopK):
        """As the contract's first form has it."""

        def route(  # type: ignore[override]
            self, router: nn.Module, inputs: Tensor, train: bool = True
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            indices, weights, losses = super().route(router, inputs, train)
            return indices, weights, losses if self.z_loss else {}

    class Told(TopK):
        """As a wrapper writes it."""

        def route(self, router: nn.Module, inputs: Tensor, train: bool = True, **more: Tensor | None) -> object:  # type: ignore[override]
            return super().route(router, inputs, train, **more)

    x, mask = torch.randn(2, 6, 16), torch.arange(6).expand(2, 6) < 4
    assert mixture(router=Untold())(x).losses
    plain = mixture(router=Untold(z_loss=0))
    torch.testing.assert_close(plain(x, mask=mask).output[mask], plain(x).output[mask])
    with pytest.raises(UserError, match="padding, and it counts in balance_loss, z_loss, since route takes no mask"):
        mixture(router=Untold())(x, mask=mask)
    with torch.no_grad():  # nothing learns from its losses
        assert mixture(router=Untold())(x, mask=mask).output.isfinite().all()
    told = mixture(router=Told())
    torch.testing.assert_close(told(x, mask=mask).losses["z_loss"], told(x[:, :4]).losses["z_loss"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["auto", "loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize("expert", ["swiglu", {"provider": "default", "bias": True}], ids=["swiglu", "with a bias"])
def test_its_second_derivatives_and_what_torch_func_makes_of_it_are_the_reference_s(
    backend: str, expert: object
) -> None:
    layers = []
    for each in (backend, "naive"):
        torch.manual_seed(0)
        options = {"experts": 4, "backend": each, "expert": expert, "upcycle": False, "capacity": 0.9}
        layers.append(MoE.model_validate(options).create_layer(16, 24))
    made, right = layers
    x = torch.randn(3, 2, 5, 16)

    def second(layer: MixtureOfExperts) -> list[Tensor]:
        inputs = x[0].clone().requires_grad_()
        part = layer(inputs)
        first = torch.autograd.grad(part.output.square().sum() + part.losses["z_loss"], inputs, create_graph=True)
        return list(torch.autograd.grad(first[0].square().sum(), [inputs, *layer.parameters()]))

    def each_text_s_gradient(layer: MixtureOfExperts) -> list[Tensor]:
        def loss(weights: dict[str, Tensor], text: Tensor) -> Tensor:
            part = torch.func.functional_call(layer, weights, (text,))
            return part.output.square().sum() + part.losses["balance_loss"]

        weights = dict(layer.named_parameters())
        return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x).values())

    for results in (second, each_text_s_gradient):
        for mine, other in zip(results(made), results(right), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


ROUTERS: list[dict[str, object]] = [
    {"provider": "topk_default", "top_k": 2, "z_loss": 0.1},
    {"provider": "topk_default", "top_k": 4},
    {"provider": "noisy_topk", "top_k": 2},
    {"provider": "switch"},
    {"provider": "sigmoid_bias", "top_k": 2, "sequence_balance": 0.1},
    {"provider": "expert_choice", "top_k": 2, "allow_noncausal": True},
    {"provider": "hash", "top_k": 2},
    {"provider": "random", "top_k": 2},
]
LIMITED = [each for each in ROUTERS if each["provider"] != "expert_choice"]
"""Those whose experts take what tokens choose; where experts choose, a capacity is refused."""


every_router = pytest.mark.parametrize(
    "router", ROUTERS, ids=lambda router: f"{router['provider']}-{router.get('top_k', 1)}"
)


@every_router
@pytest.mark.parametrize("expert", ["default", "swiglu", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_in_writing_meets_its_experts_unsorted_and_gets_what_sorting_gives(
    router: dict[str, object], expert: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    capacity = {"capacity": 1.0} if router in LIMITED else {}
    options = {"experts": 4, "router": router, **capacity, "upcycle": False, "shared": 1}
    layer = MoE.model_validate({**options, "expert": "swiglu" if expert == "odd" else expert}).create_layer(8, 16)
    layer.experts.grouped = expert != "odd"  # as for a layer whose parameters are not those of linear maps alone
    layer.to(dtype).eval()
    choices = 4 if router["provider"] == "expert_choice" else router.get("top_k", 1)
    for batch in (0, 1, 2, 3):
        x = torch.randn(batch, 1, 8, dtype=dtype)
        given = {"tokens": torch.arange(batch)[:, None]} if layer.takes_tokens else {}
        torch.manual_seed(1)
        sorted_ = layer(x, **given).output
        torch.manual_seed(1)
        with torch.no_grad(), monkeypatch.context() as patch:
            if 0 < batch * choices <= FEW:
                patch.setattr(dispatch, "plan", None)
            written = layer(x, **given).output
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(written, sorted_, rtol=tolerance, atol=tolerance)
        assert written.dtype == dtype


@pytest.mark.parametrize(
    ("router", "capacity"),
    [(each, None) for each in ROUTERS] + [(each, 0.01) for each in LIMITED],
    ids=lambda value: f"{value['provider']}-{value.get('top_k', 1)}" if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_there_is_no_token_or_only_padding_every_number_is_finite_and_nothing_is_dropped(
    router: dict[str, object], capacity: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    options = {"experts": 4, "router": router, "capacity": capacity, "upcycle": False}
    layer = MoE.model_validate(options).create_layer(8, 16).to(dtype)
    for shape, padding in (((0, 3), False), ((2, 0), False), ((2, 3), True)):
        for training in (True, False):
            layer.train(training)
            x = torch.randn(*shape, 8, dtype=dtype, requires_grad=True)
            given = {"tokens": torch.zeros(shape, dtype=torch.long)} if layer.takes_tokens else {}
            part = layer(x, mask=torch.zeros(shape, dtype=torch.bool) if padding else None, **given)
            assert (part.output.shape, part.output.dtype) == (x.shape, dtype)
            torch.autograd.backward(part.output.float().sum() + sum(part.losses.values()))
            told = {**part.losses, **part.metrics}
            assert all(each.isfinite().all() for each in told.values()), told
            assert part.metrics["moe_dropped"] == 0
