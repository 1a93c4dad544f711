"""What is not finite never reaches the weights: the run stops and names the record, or continues without the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from lora_llava.errors import TrainingError
from lora_llava.recipe.stages import DataSettings, InstructSettings
from lora_llava.training.checks.check import CompletedStep
from lora_llava.training.checks.non_finite import skip_limit
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import state_of
from tests.helpers.steps import guard_of, made_rows, made_trainer, same, states_of_steps

THIRD_STEP = "4"
"""An image of the third step: the first row's, of records 8 and 9."""


def training_rows(trainer: PackedTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "learning_rate" in row]


def moments(trainer: PackedTrainer) -> list[torch.Tensor]:
    assert trainer.optimizer is not None
    states = trainer.optimizer.state_dict()["state"].values()
    return [tensor for state in states for tensor in state.values()]


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_a_nan_stops_before_the_weights_and_names_the_records(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(spoilt=[THIRD_STEP]))
    states = states_of_steps(trainer)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert len(states) == 3
    assert same(state_of(trainer.model), states[2])
    assert not same(states[2], states[1])
    message = str(caught.value)
    assert message.startswith("stage instruct, step 3: the loss of 1 of 2 micro-batches is not finite")
    assert "are 2 of 2 records: train.json, record 8; train.json, record 9." in message
    assert "Gradient norms: lora nan, projector nan." in message
    assert "Last good checkpoint: none yet." in message
    assert "/data" not in message
    assert all(torch.isfinite(tensor).all() for tensor in moments(trainer))


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(spoilt=["0"]))
    trainer.last_checkpoint = lambda: "checkpoint-2"
    with pytest.raises(TrainingError, match=r"step 1: .*Last good checkpoint: checkpoint-2\."):
        trainer.train()


@pytest.mark.fault("training: an exploding gradient")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(tmp_path: Path, value: float) -> None:
    # 1e30 is a number, the square in its norm is none: clipping would make all gradients 0.
    trainer = made_trainer(tmp_path, made_rows())
    weight = next(one for name, one in trainer.model.named_parameters() if "lora_A" in name)
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    before = state_of(trainer.model)
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite.*4 of 4 records.*projector \d"):
        trainer.train()
    assert same(state_of(trainer.model), before)


@pytest.mark.fault("training: an exploding gradient")
def test_a_gradient_of_one_record_is_found_among_all(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows())
    original = trainer.model.get_base_model().model.multi_modal_projector
    calls: list[float] = []

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        # The image of records 2 and 3 alone sends back infinity.
        if output.requires_grad and torch.equal(output.detach()[0, :1, :1], expected):
            output.register_hook(lambda gradient: gradient * float("inf"))
            calls.append(1)

    with torch.no_grad():
        pixels = trainer.train_dataset[1]["pixel_values"]
        expected = trainer.model.get_base_model().model.get_image_features(pixels).pooler_output[0][:1, :1]
    original.register_forward_hook(spoil)
    with pytest.raises(
        TrainingError, match=r"step 1: the gradient is not finite.*are 2 of 4 records: .*record 2; .*3\."
    ):
        trainer.train()
    assert len(calls) == 3


def test_weights_that_were_broken_before_are_named(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows())
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight[0, 0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"Not finite before the step already: base_model\.model\.lm_head\.weight\."
    ):
        trainer.train()


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_a_step_left_out_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    skipping = made_trainer(tmp_path, made_rows(spoilt=[THIRD_STEP]), most_skipped=1, weight_decay=0.1)
    states = states_of_steps(skipping)
    skipping.train()
    without = made_trainer(tmp_path, made_rows([0, 1, 3, 4, 5]), weight_decay=0.1)
    without.train()
    assert same(states[3], states[2])
    assert same(state_of(skipping.model), state_of(without.model))
    for one, other in zip(moments(skipping), moments(without), strict=True):
        assert torch.equal(one, other)
    assert guard_of(skipping).skipped == [3]


def test_a_step_left_out_is_in_the_log_and_not_in_its_losses(tmp_path: Path) -> None:
    skipping = made_trainer(tmp_path, made_rows(spoilt=[THIRD_STEP]), most_skipped=1)
    skipping.train()
    rows = training_rows(skipping)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["loss" in row for row in rows] == [True, True, False, True, True, True]
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, None, None, None]
    [warning] = [row["warning"] for row in skipping.state.log_history if "warning" in row]
    assert "step 3: " in warning
    assert warning.endswith("record 8; train.json, record 9. Gradient norms: lora nan, projector nan. The step was "
                            "left out, 1 of at most 1.")  # fmt: skip
    sparse = made_trainer(tmp_path, made_rows(spoilt=[THIRD_STEP]), most_skipped=1, logging_steps=6)
    sparse.train()
    [row] = training_rows(sparse)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert row["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_the_schedule_goes_on_over_a_step_left_out(tmp_path: Path) -> None:
    linear = {"lr_scheduler_type": "linear"}
    skipping = made_trainer(tmp_path, made_rows(spoilt=[THIRD_STEP]), most_skipped=1, **linear)
    skipping.train()
    sound = made_trainer(tmp_path, made_rows(), **linear)
    sound.train()
    rates = [row["learning_rate"] for row in training_rows(sound)]
    assert [row["learning_rate"] for row in training_rows(skipping)] == rates
    assert len(set(rates)) == 6


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_more_steps_than_the_limit_stop_the_run(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(spoilt=["0", "5", "8"]), most_skipped=2)
    states = states_of_steps(trainer)
    with pytest.raises(TrainingError, match=r"step 5: .*More than max_non_finite_steps 2 steps \(1, 3, 5\)"):
        trainer.train()
    assert same(state_of(trainer.model), states[-1])
    assert all(torch.isfinite(tensor).all() for tensor in states[-1].values())


def test_looking_for_the_culprit_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(spoilt=["0"]), most_skipped=1)
    # As dropout would.
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda *_: draws.append(torch.rand(1)))
    draws: list[torch.Tensor] = []
    drawn: list[int] = []
    guard = guard_of(trainer)
    on_step = guard.on_step

    def watched(step: CompletedStep) -> str | None:
        before, count = torch.get_rng_state(), len(draws)
        found = on_step(step)
        drawn.append(len(draws) - count)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    guard.on_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert drawn == [2, 0, 0, 0, 0, 0]


def test_the_count_of_steps_left_out_outlives_a_resumption(tmp_path: Path) -> None:
    first = made_trainer(tmp_path, made_rows([0, 1], spoilt=["0"]), most_skipped=1)
    first.train()
    assert guard_of(first).skipped == [1]
    first.state.save_to_json(str(tmp_path / "state.json"))
    second = made_trainer(tmp_path, made_rows())
    second.state = TrainerState.load_from_json(str(tmp_path / "state.json"))
    second.restore_checks()
    assert guard_of(second).skipped == [1]
    assert second.checks[1].state() == first.checks[1].state()
    assert second.checks[1].state()["last_logged"] == 2


def test_a_trainer_that_trains_again_begins_anew(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(spoilt=["0"]), most_skipped=1)
    for _ in range(2):
        trainer.train()
        assert guard_of(trainer).skipped == [1]


@pytest.mark.parametrize(("on_non_finite", "most"), [("skip", 7), ("error", 0)])
def test_steps_are_skipped_only_where_the_recipe_says_so(on_non_finite: Any, most: int) -> None:
    data = DataSettings(path="train.json")
    assert skip_limit(InstructSettings(data=data, on_non_finite=on_non_finite, max_non_finite_steps=7)) == most
