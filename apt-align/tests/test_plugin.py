"""The loss in a run: on a real model, by the hooks that the trainer calls."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from apt.core.config import APTConfig
from apt.core.providers import AlignProvider
from apt.core.providers.align import Metric
from apt.errors import ProfileError
from apt.hookspecs import Batch, RunState
from apt.modeling.compose import ModelBuilder
from apt.modeling.parts import set_active
from apt_align.plugin import AlignPlugin
from apt_align.provider import RDrop

CONFIG = APTConfig(
    vocab_size=300,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_layers=3,
    dropout=0.2,
    attention_dropout=0.0,
    max_seq_len=32,
    attention_name="sdpa",
    plugins=("align",),
)


def config(**options: object) -> APTConfig:
    """The profile with these options of the aligner."""
    return CONFIG.model_copy(update={"options": {"align": options}})


def state(**values: float) -> RunState:
    return RunState(step=3, epoch=0, max_steps=9, max_epochs=1, plugins_on=("align",), values=values)


def batch() -> Batch:
    tokens = torch.randint(3, 300, (2, 9))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(8).expand(2, 8) < torch.tensor([[8], [5]]))


class Run:
    """A model, its plugin, and what the trainer does between them."""

    def __init__(self, provider: str = "bistate_default", **options: object) -> None:
        torch.manual_seed(0)
        self.config = config(**options).model_copy(update={"align_name": provider})
        self.model = ModelBuilder(self.config).build_model()
        self.plugin = AlignPlugin()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.passes = 0
        self.model.register_forward_hook(self._count)

    def start(self) -> None:
        self.plugin.apt_training_start(state(), self.model, self.optimizer)

    def loss(self, **values: float) -> Mapping[str, Tensor] | None:
        """The extra losses of one micro-batch."""
        given = batch()
        self.output = self.model(given.tokens)
        return self.plugin.apt_loss_extra(state(**values), self.model, given, self.output)

    def step(self) -> None:
        self.optimizer.zero_grad()
        extra = self.loss() or {}
        (self.output.logits.logsumexp(-1).mean() + sum(extra.values())).backward()
        self.plugin.apt_gradients_ready(state(), self.model)
        self.optimizer.step()
        self.plugin.apt_step_end(state(), self.model, {})

    def _count(self, model: nn.Module, arguments: object, output: object) -> None:
        self.passes += 1


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"state": "dropout"}, 2),
        ({"state": "ema"}, 2),
        ({"state": "layer"}, 1),
        ({"state": "evidence"}, 1),
        ({"provider": "rdrop"}, 2),
        ({"provider": "rdrop", "num_states": 3}, 3),
        ({"provider": "mean_teacher"}, 2),
    ],
)
def test_each_state_costs_the_passes_that_it_says_and_none_at_weight_0(options: dict[str, object], passes: int) -> None:
    run = Run(**options)
    run.start()
    run.step()
    run.passes = 0
    extra = run.loss(align_weight=0.5)
    assert run.passes == passes
    assert extra is not None
    assert extra["align"].isfinite()
    assert extra["align"].requires_grad
    run.passes = 0
    assert run.loss(align_weight=0.0) is None
    assert run.passes == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"state": each} for each in ("dropout", "ema", "layer", "evidence")),
        *({"state": "layer", "metric": "nce"}, {"provider": "rdrop"}),
    ],
    ids=str,
)
def test_a_micro_batch_of_which_no_target_counts_has_a_loss_of_0(options: dict[str, object]) -> None:
    run = Run(**options)
    run.start()
    run.step()
    given = batch()
    given.mask = torch.zeros_like(given.targets, dtype=torch.bool)
    extra = run.plugin.apt_loss_extra(state(), run.model, given, run.model(given.tokens))
    assert extra is not None
    assert all(each.item() == 0 for each in extra.values())


def test_while_the_plugin_is_off_there_is_no_loss_and_no_second_pass() -> None:
    run = Run()
    run.start()
    set_active(run.model, "align", False)
    assert run.loss(align_weight=0.5) is None
    assert run.passes == 1


def test_the_loss_is_multiplied_by_the_scheduled_weight_and_without_one_by_the_option() -> None:
    run = Run(state="layer", weight=0.25)
    run.start()
    run.model.eval()  # the same numbers each time
    run.model.blocks.train()
    for block in run.model.blocks:
        for part in block.children():
            part.eval()
    torch.manual_seed(1)
    whole = run.loss(align_weight=1.0)
    torch.manual_seed(1)
    quarter = run.loss()
    assert whole is not None
    assert quarter is not None
    torch.testing.assert_close(quarter["align"], 0.25 * whole["align"])


def test_two_passes_with_dropout_are_symmetric_divergences_of_their_logits() -> None:
    run = Run(alpha=0.5, beta=0.5)
    run.start()
    given = batch()
    torch.manual_seed(1)
    first, second = run.model(given.tokens), run.model(given.tokens)
    torch.manual_seed(1)
    extra = run.plugin.apt_loss_extra(state(), run.model, given, run.model(given.tokens))
    p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1)
    assert extra is not None
    assert given.mask is not None
    torch.testing.assert_close(extra["align"], divergence[given.mask].mean() / 2)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_state_layer_compares_the_last_state_with_that_block_s_output(layer: int | None) -> None:
    options = {} if layer is None else {"layer": layer}
    run = Run(state="layer", **options)
    run.start()
    given = batch()
    kept: list[Tensor] = []
    block = run.model.blocks[1 if layer is None else layer]
    block.register_forward_hook(lambda module, arguments, result: kept.append(result.output))
    output = run.model(given.tokens)
    extra = run.plugin.apt_loss_extra(state(), run.model, given, output)
    assert extra is not None
    assert isinstance(run.model.aligner, nn.Module)
    torch.testing.assert_close(extra["align"], run.model.aligner(output.hidden, kept[0], mask=given.mask))


def test_training_leaves_no_hook_behind() -> None:
    run = Run(state="layer")
    run.start()
    run.plugin.apt_training_end(state(), run.model)
    assert not any(block._forward_hooks for block in run.model.blocks)


@pytest.mark.parametrize("options", [{"state": "dropout"}, {"state": "ema"}, {"state": "layer"}])
def test_it_trains(options: dict[str, object]) -> None:
    run = Run(**options)
    run.start()
    for _ in range(3):
        run.step()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    learnt = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("aligner.") for name in learnt) == (options["state"] == "layer")


def test_the_averaged_weights_are_saved_and_found_again() -> None:
    run = Run(state="ema")
    run.start()
    assert run.plugin.apt_checkpoint_save(state()) is not None
    run.step()
    run.step()
    saved = run.plugin.apt_checkpoint_save(state())
    assert saved is not None
    assert saved["updates"] == 2
    again = Run(state="ema")
    again.plugin.apt_checkpoint_load(state(), saved)
    again.start()
    restored = again.plugin.apt_checkpoint_save(state())
    assert restored is not None
    assert restored.keys() == saved.keys()
    assert all(torch.equal(value, restored[key]) for key, value in saved.items() if isinstance(value, Tensor))
    assert Run().plugin.apt_checkpoint_save(state()) is None


def test_the_average_begins_when_the_plugin_is_on() -> None:
    run = Run(state="ema")
    run.start()
    set_active(run.model, "align", False)
    run.step()
    saved = run.plugin.apt_checkpoint_save(state())
    assert saved is not None
    assert saved["updates"] == 0


def test_wrappers_of_the_model_do_not_hide_it() -> None:
    run = Run(state="ema")
    wrapped = torch.nn.Module()
    wrapped.module = run.model
    run.plugin.apt_training_start(state(), wrapped, run.optimizer)
    run.model(batch().tokens).logits.sum().backward()
    run.plugin.apt_gradients_ready(state(), wrapped)
    run.plugin.apt_step_end(state(), wrapped, {})
    saved = run.plugin.apt_checkpoint_save(state())
    assert saved is not None
    assert "weights.ema.embedding.weight" in saved


class Midway(AlignProvider):
    """A third party's aligner: the interface, and no more."""

    def create_aligner(self, d_model: int, alpha: float = 0.35, beta: float = 0.20) -> nn.Module:
        return nn.Linear(d_model, d_model)

    def compute_alignment(
        self, aligner: nn.Module, state_1: Tensor, state_2: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        aligned = aligner(state_2)
        return aligned, self.compute_consistency_loss(state_1, aligned, mask=mask)

    def compute_consistency_loss(
        self, state_1: Tensor, state_2: Tensor, metric: Metric = "cosine", mask: Tensor | None = None
    ) -> Tensor:
        return (state_1.detach() - state_2).square().mean()


def test_any_aligner_gets_the_hidden_states_of_two_passes() -> None:
    run = Run()
    run.model.aligner = Midway().create_aligner(16)
    run.start()
    extra = run.loss(align_weight=2.0)
    assert extra is not None
    assert extra["align"] > 0
    assert run.passes == 2
    extra["align"].backward()
    assert run.model.aligner.weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.0}, "model.align.state: dropout, but the model's dropout is 0"),
        ({"num_layers": 1, "options": {"align": {"state": "layer"}}}, "a model of one block has no earlier one"),
        ({"options": {"align": {"state": "layer", "layer": 2}}}, "model.align.layer: 2 is not before the last of 3"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        AlignPlugin().apt_config_resolved(CONFIG.model_copy(update=changes))


def test_what_works_is_accepted() -> None:
    for options in ({"state": "layer", "layer": 1}, {"state": "dropout"}, {"state": "ema"}):
        AlignPlugin().apt_config_resolved(config(**options))
    attention = CONFIG.model_copy(update={"dropout": 0.0, "attention_dropout": 0.1})
    AlignPlugin().apt_config_resolved(attention)


def test_a_model_without_an_aligner_says_so() -> None:
    with pytest.raises(RuntimeError, match="this model holds no aligner"):
        AlignPlugin().apt_training_start(state(), nn.Linear(2, 2), torch.optim.SGD(nn.Linear(1, 1).parameters()))


def test_rdrop_is_the_mean_cross_entropy_of_the_passes_and_their_symmetric_divergence() -> None:
    run = Run("rdrop", weight=0.5)
    run.start()
    given = batch()
    torch.manual_seed(1)
    outputs = [run.model(given.tokens) for _ in range(2)]
    torch.manual_seed(1)
    extra = run.plugin.apt_loss_extra(state(), run.model, given, run.model(given.tokens))
    assert extra is not None
    assert given.mask is not None
    targets = given.targets[given.mask]
    first, second = (nn.functional.cross_entropy(each.logits[given.mask], targets) for each in outputs)
    torch.testing.assert_close(first + extra["align_passes"], (first + second) / 2)
    p, q = (each.logits.log_softmax(-1)[given.mask] for each in outputs)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    torch.testing.assert_close(extra["align"], 0.5 * divergence)


def test_rdrop_moves_both_passes_and_of_three_takes_the_mean_over_pairs() -> None:
    provider = RDrop(num_states=3)
    aligner = provider.create_aligner(8)
    logits = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)]
    loss = aligner(*logits)
    pairs = [aligner(logits[i], logits[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(loss, logits))


def test_a_mean_teacher_of_weight_0_averages_the_weights_and_makes_no_pass() -> None:
    run = Run("mean_teacher", weight=0.0)
    run.start()
    run.step()
    saved = run.plugin.apt_checkpoint_save(state())
    assert run.passes == 1
    assert saved is not None
    assert saved["updates"] == 1


def test_the_evidence_is_of_earlier_batches_and_teaches_the_model() -> None:
    run = Run(state="evidence")
    run.start()
    first = run.loss()
    assert first is not None
    assert abs(first["align"].item()) < 1e-5
    second = run.loss()
    assert second is not None
    assert second["align"] > 1e-3


def test_the_warm_up_is_the_interpolation_weight() -> None:
    run = Run(state="layer", weight=0.5, warmup=2)
    run.start()
    for epoch, expected in ((0, 0.0), (2, 0.0), (4, 0.25), (6, 0.5)):
        now = dataclasses.replace(state(), epoch=epoch, max_epochs=6)
        run.plugin.apt_step_start(now)
        assert run.model.aligner.weight.item() == expected
        given = batch()
        losses = run.plugin.apt_loss_extra(now, run.model, given, run.model(given.tokens))
        assert (losses is None) == (expected == 0)


def test_evaluations_say_how_alike_the_states_were() -> None:
    run = Run(state="layer")
    run.start()
    metrics: dict[str, float] = {}
    run.plugin.apt_evaluation_end(state(), run.model, metrics)
    assert not metrics
    run.loss()
    run.plugin.apt_evaluation_end(state(), run.model, metrics)
    assert -1 <= metrics["align_cka"] <= 1.01


def test_one_plugin_trains_one_model_after_another() -> None:
    run = Run(state="ema")
    run.start()
    other = Run(state="layer")
    run.plugin.apt_training_start(state(), other.model, other.optimizer)
    assert run.plugin.apt_checkpoint_save(state()) is None
    run.plugin.apt_training_end(state(), other.model)


@pytest.mark.parametrize(
    ("provider", "options", "changes", "message"),
    [
        ("rdrop", {}, {"dropout": 0.0}, "model.align: rdrop, but the model's dropout is 0"),
        ("mean_teacher", {"warmup": 1}, {"schedules": {"align_weight": {"start": 0, "end": 1}}}, "keep one of them"),
    ],
)
def test_the_named_aligners_say_what_cannot_work(
    provider: str, options: dict[str, object], changes: dict[str, object], message: str
) -> None:
    made = config(**options).model_copy(update={"align_name": provider, **changes})
    with pytest.raises(ProfileError, match=message):
        AlignPlugin().apt_config_resolved(made)


def test_what_a_run_went_back_to_is_not_the_beginning_of_the_next_one() -> None:
    run = Run(state="ema")
    run.start()
    run.step()
    saved = run.plugin.apt_checkpoint_save(state())
    assert saved is not None
    run.plugin.apt_checkpoint_load(state(), saved)
    run.plugin.apt_training_end(state(), run.model)
    run.plugin.apt_training_start(state(), Run(state="ema").model, run.optimizer)
    assert run.plugin.apt_checkpoint_save(state()) == {"updates": 0}
