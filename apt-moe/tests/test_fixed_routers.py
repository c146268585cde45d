"""Experts that choose, and routers that learn nothing."""

import pytest
import torch
from pydantic import ValidationError

from apt.core.config import APTConfig
from apt.core.resolve import resolve_config
from apt.errors import OptionsError, ProfileError, UserError
from apt.modeling.compose import ModelBuilder
from apt_moe.expert_choice import ExpertChoice
from apt_moe.fixed_routers import Hash, Random
from apt_moe.layer import MixtureOfExperts
from apt_moe.provider import MoE
from apt_moe.routers import SigmoidBias


def test_experts_that_choose_are_refused_unless_the_future_is_allowed() -> None:
    with pytest.raises(ValidationError, match="let later tokens change earlier ones"):
        ExpertChoice()


@pytest.mark.parametrize(
    ("ffn", "schedules", "where"),
    [
        ({"capacity": 1.25}, {}, "model.ffn.router: expert_choice fixes how many tokens an expert takes by top_k"),
        (
            {},
            {"moe_capacity": {"start": 1.5, "end": 1.1}},
            r"schedules\.moe_capacity\.start: 1\.5 is not allowed; ffn\.moe",
        ),
    ],
)
def test_a_capacity_of_experts_that_choose_would_limit_nothing_and_is_refused(
    ffn: dict[str, object], schedules: dict[str, object], where: str
) -> None:
    router = {"provider": "expert_choice", "allow_noncausal": True}
    config = APTConfig(ffn_name="moe", options={"ffn": {"router": router, **ffn}}, schedules=schedules)
    with pytest.raises(ProfileError, match=where + ".*leave capacity and its schedule moe_capacity out, and set top_k"):
        resolve_config(config)


def test_each_expert_takes_the_tokens_that_score_highest_with_it() -> None:
    provider = ExpertChoice(allow_noncausal=True, top_k=2, init_std=1.0)
    router = provider.create_router(8, 4, 2)
    x = torch.randn(3, 10, 8)
    indices, weights, losses = provider.route(router, x)
    probabilities = router(x).softmax(-1)
    assert indices.equal(torch.arange(4).expand(3, 10, 4))
    for sample in range(3):
        for expert in range(4):
            best = probabilities[sample, :, expert].topk(10 * 2 // 4).indices.sort().values
            chosen = (weights[sample, :, expert] > 0).nonzero().flatten()
            assert chosen.equal(best)
            torch.testing.assert_close(weights[sample, best, expert], probabilities[sample, best, expert])
    assert set(losses) == {"z_loss"}


def test_one_token_for_an_expert_on_average_may_be_renormalised() -> None:
    provider = ExpertChoice(allow_noncausal=True, top_k=1, renormalise=True, init_std=1.0)
    layer = MoE(experts=4, router=provider).create_layer(8, 16)
    layer(torch.randn(2, 12, 8)).output.square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    _, weights, _ = provider.route(layer.router, torch.randn(2, 12, 8))
    total = weights.sum(-1)
    assert ((total - 1).abs().minimum(total) < 1e-6).all()
    assert (weights > 0).sum() == 2 * 4 * 3


def test_padding_is_chosen_by_no_expert() -> None:
    provider = ExpertChoice(allow_noncausal=True)
    router = provider.create_router(8, 4, 2)
    mask = torch.arange(10).expand(2, 10) < torch.tensor([[10], [3]])
    _, weights, _ = provider.route(router, torch.randn(2, 10, 8), True, mask)
    assert not weights[~mask].any()
    assert (weights[0] > 0).sum() == 4 * 5
    assert (weights[1] > 0).sum() == 4 * 1


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_choosing_experts_give_a_sequence_the_same_alone_behind_padding_and_beside_a_longer_one(
    train: bool, top_k: int
) -> None:
    torch.manual_seed(0)
    router = {"provider": "expert_choice", "top_k": top_k, "allow_noncausal": True, "init_std": 1.0}
    layer = MoE.model_validate({"experts": 4, "upcycle": False, "router": router}).create_layer(8, 12).train(train)
    longest = 12
    for length in range(1, longest):
        x = torch.randn(1, length, 8)
        alone = layer(x).output
        for left in (True, False):
            mask = torch.arange(longest)[None] < length
            mask = mask.flip(1) if left else mask
            padded = torch.randn(1, longest, 8)
            padded[mask] = x[0]
            torch.testing.assert_close(layer(padded, mask=mask).output[mask], alone[0])
            both = torch.cat((padded, torch.randn(1, longest, 8)))
            mask = torch.cat((mask, torch.ones_like(mask)))
            output = layer(both, mask=mask).output
            torch.testing.assert_close(output[0][mask[0]], alone[0])
            torch.testing.assert_close(output[1], layer(both[1:]).output[0])


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
def test_a_mixture_of_choosing_experts_is_that_of_the_reference_and_evenly_loaded(backend: str) -> None:
    made = []
    for name in ("naive", backend):
        torch.manual_seed(0)
        provider = MoE(experts=4, upcycle=False, backend=name, router=ExpertChoice(allow_noncausal=True, init_std=1.0))
        made.append(provider.create_layer(8, 12))
    x = torch.randn(2, 8, 8)
    right, part = (each(x) for each in made)
    torch.testing.assert_close(part.output, right.output)
    torch.testing.assert_close(part.metrics["moe_load"], torch.full((4,), 0.25))
    alone = (made[1].router_provider.route(made[1].router, x)[1] > 0).any(-1)
    torch.testing.assert_close(part.metrics["moe_dropped"], 1 - alone.float().mean())
    assert not part.output[~alone].any(), "what no expert chose passes by the residual"


def test_a_token_s_experts_follow_from_its_id_alone() -> None:
    provider = Hash(top_k=2)
    router = provider.create_router(8, 6, 2)
    ids = torch.randint(50_000, (2, 400))
    indices, weights, losses = provider.route(router, torch.randn(2, 400, 8), tokens=ids)
    again, _, _ = provider.route(router, torch.randn(400, 2, 8), False, tokens=ids.T)
    assert again.transpose(0, 1).equal(indices)
    assert weights.eq(0.5).all()
    assert not losses
    counts = torch.bincount(indices.flatten(), minlength=6).float() / indices.numel()
    assert counts.max() < 0.22, "nearly even"
    assert counts.min() > 0.12
    other = Hash(top_k=2, seed=1).route(router, torch.randn(2, 400, 8), tokens=ids)[0]
    assert (other.sort(-1).values == indices.sort(-1).values).all(-1).float().mean() < 0.2
    with pytest.raises(UserError, match="routes by token id, and was given none"):
        provider.route(router, torch.randn(1, 3, 8))


@pytest.mark.parametrize("seed", [3, 4, 1234, 2**63, 2**64 + 1])
def test_every_seed_gives_a_table_of_its_own(seed: int) -> None:
    ids = torch.arange(400).unsqueeze(0)
    router = Hash(top_k=2).create_router(8, 6, 2)
    tables = [Hash(top_k=2, seed=each).route(router, torch.randn(1, 400, 8), tokens=ids)[0] for each in (0, seed)]
    assert tables[1].sort(-1).values.diff().gt(0).all(), "no expert twice"
    assert (tables[0].sort(-1).values == tables[1].sort(-1).values).all(-1).float().mean() < 0.2


@pytest.mark.parametrize("provider", [Hash(top_k=2), Random(top_k=2)], ids=["hash", "random"])
def test_the_router_s_module_runs_which_is_the_proof_that_it_is_in_use(provider: Hash | Random) -> None:
    router, ran = provider.create_router(8, 6, 2), []
    router.register_forward_hook(lambda *_: ran.append(True))
    layer = MoE.model_validate({"experts": 6, "upcycle": False, "router": provider}).create_layer(8, 12)
    layer.router = router
    layer(torch.randn(1, 3, 8), tokens=torch.arange(3).unsqueeze(0))
    assert ran


def test_random_experts_are_all_alike_in_training_and_fixed_in_evaluation() -> None:
    provider = Random(top_k=2)
    router = provider.create_router(8, 5, 2)
    x = torch.randn(1, 2000, 8)
    indices, weights, _ = provider.route(router, x)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.bincount(indices.flatten(), minlength=5).float().div(4000).sub(0.2).abs().max() < 0.04
    assert weights.eq(0.5).all()
    assert provider.route(router, x, False)[0].equal(torch.tensor([0, 1]).expand(1, 2000, 2))


@pytest.mark.parametrize("provider", [Hash(), Random()])
def test_more_choices_than_experts_are_refused(provider: Hash | Random) -> None:
    with pytest.raises(OptionsError, match="5 of 4 experts"):
        provider.create_router(8, 4, 5)


def model(**options: object) -> torch.nn.Module:
    config = APTConfig(
        vocab_size=300,
        d_model=16,
        d_ff=24,
        num_heads=2,
        num_layers=4,
        dropout=0.0,
        attention_dropout=0.0,
        max_seq_len=16,
        attention_name="sdpa",
        ffn_name="moe",
        align_name="none",
        options={"ffn": {"experts": 4, **options}},
    )
    torch.manual_seed(0)
    return ModelBuilder(config).build_model()


def test_the_model_hands_ids_to_a_router_that_asks_for_them() -> None:
    made = model(router={"provider": "hash", "top_k": 1})
    one, two = (made(torch.full((1, 12), token)).metrics["moe_load"] for token in (7, 8))
    assert one.max() == 1, "equal tokens go to one expert in every block"
    assert two.max() == 1


@pytest.mark.parametrize(
    ("layers", "sparse"), [("all", [0, 1, 2, 3]), ({"every": 2}, [1, 3]), ({"every": 3}, [2]), ([3, 0], [0, 3])]
)
def test_experts_stand_in_the_blocks_that_are_named(layers: object, sparse: list[int]) -> None:
    made = model(layers=layers)
    assert [i for i, block in enumerate(made.blocks) if isinstance(block.ffn, MixtureOfExperts)] == sparse
    metrics = made(torch.randint(300, (2, 8))).metrics
    assert {name for name in metrics if name.startswith("moe_load.")} == {f"moe_load.{i}" for i in sparse}
    torch.testing.assert_close(metrics["moe_load"], torch.stack([metrics[f"moe_load.{i}"] for i in sparse]).mean(0))


@pytest.mark.parametrize("layers", [[], [1, 1], [-1], {"every": 0}, {"each": 2}, "some"])
def test_blocks_that_cannot_be_are_refused(layers: object) -> None:
    with pytest.raises(ValidationError):
        MoE.model_validate({"layers": layers})


def test_a_block_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"model\.ffn\.layers: there is no block 4: the model has 4, from 0"):
        model(layers=[4])
    with pytest.raises(
        ProfileError, match=r"no block would have experts: the model has 4, and every 5th was asked for"
    ):
        model(layers={"every": 5})


def test_the_balance_within_sequences_is_1_when_even_and_teaches_the_router() -> None:
    provider = SigmoidBias(sequence_balance=1.0, init_std=1e-6)
    router = provider.create_router(8, 4, 2)
    losses = provider.route(router, torch.randn(2, 64, 8))[2]
    torch.testing.assert_close(losses["sequence_balance_loss"], torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    mask = torch.arange(64).expand(2, 64) < 40
    x = torch.randn(2, 64, 8)
    padded = provider.route(router, x.masked_fill(~mask.unsqueeze(-1), 9.0), True, mask)[2]["sequence_balance_loss"]
    torch.testing.assert_close(padded, provider.route(router, x[:, :40])[2]["sequence_balance_loss"])
    padded.backward()
    assert router.weight.grad.abs().sum() > 0
