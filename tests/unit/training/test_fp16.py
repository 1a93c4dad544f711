"""Training in fp16: the loss is scaled, gradients are judged without the scale, and what overflows is counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.rows import PackedRows
from lora_llava.errors import TrainingError
from lora_llava.training.checkpoints.state import SCALER, HeldState, load_scaler
from lora_llava.training.checks.trained_weights import TrainedWeights
from lora_llava.training.objectives.objective import TokenLoss
from lora_llava.training.optimizer import make_scaler
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import state_of
from tests.helpers.steps import STEPS, guard_of, made_rows, made_trainer, same, states_of_steps

CPU = torch.device("cpu")
TOO_LARGE = 2.0**28


def fp16_trainer(
    directory: Path, scale: float = 2.0**16, *, growth_interval: int = 2000, **settings: Any
) -> PackedTrainer:
    """A trainer on a model in fp16 whose scale starts at `scale`."""
    trainer = made_trainer(directory, settings.pop("rows", None) or made_rows(), dtype=torch.float16, **settings)

    def begin() -> None:
        PackedTrainer._begin(trainer)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)

    trainer._begin = begin  # type: ignore[method-assign]
    return trainer


def values(trainer: PackedTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def scales_of(trainer: PackedTrainer) -> list[float]:
    """The scale before each step; filled while the trainer trains."""
    scales: list[float] = []
    checked = trainer._checked_loss

    def watched() -> Any:
        scales.append(trainer.scaler.get_scale())
        return checked()

    trainer._checked_loss = watched  # type: ignore[method-assign]
    return scales


def test_losses_and_norms_are_those_of_fp32(tmp_path: Path) -> None:
    exact, ours = made_trainer(tmp_path, made_rows()), fp16_trainer(tmp_path)
    for trainer in (exact, ours):
        trainer.train()
    for key in ("loss", "grad_norm", "grad_norm_lora", "grad_norm_projector"):
        assert values(ours, key) == pytest.approx(values(exact, key), rel=0.02), key
        assert values(ours, key) != values(exact, key)
    trained = [one for one in ours.model.parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {torch.float32}
    assert ours.scaler.get_scale() == 2.0**16


def test_a_process_whose_first_step_has_no_row_is_ready_for_the_sums_of_the_others(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path)
    trainer._begin()
    rows = trainer.train_dataset
    empty = PackedRows([()], rows.records, rows.encoded, rows.read_image)[0]
    assert float(trainer.training_step(empty, torch.tensor(1.0))) == 0.0
    # From another process.
    for one in trainer.model.parameters():
        one.grad = torch.full_like(one, 2.0**16) if one.requires_grad else None
    trainer.scaler.unscale_(trainer.optimizer)
    assert {float(one.grad.max()) for one in trainer.model.parameters() if one.requires_grad} == {1.0}


def test_without_a_scale_small_gradients_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a loss of 2^-24 of the usual, gradients are below fp16's smallest number.
    whole, norms = TokenLoss.loss, []
    monkeypatch.setattr(TokenLoss, "loss", lambda *options: whole(*options) * 2.0**-24)
    for scale in (1.0, 2.0**30):
        trainer = fp16_trainer(tmp_path, scale, learning_rate=0.0)
        trainer.train()
        norms.append(values(trainer, "grad_norm")[0] * 2.0**24)
    monkeypatch.undo()
    exact = made_trainer(tmp_path, made_rows(), learning_rate=0.0)
    exact.train()
    assert norms[1] == pytest.approx(values(exact, "grad_norm")[0], rel=0.05)
    assert norms[0] < 0.9 * norms[1]


def test_a_step_that_overflows_is_left_out_and_not_one_of_the_schedule(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "cosine", "logging_steps": 1}
    trainer = fp16_trainer(tmp_path, TOO_LARGE, rows=made_rows([*range(STEPS)] * 3), max_steps=18, **settings)
    states, scales = states_of_steps(trainer), scales_of(trainer)
    trainer.train()
    guard = guard_of(trainer)
    count = len(guard.overflowed)
    assert guard.overflowed == [*range(1, count + 1)]
    assert 2 < count < 15
    assert guard.skipped == []
    # Weights stay until the scale is found; it is halved each time.
    assert all(same(states[0], state) for state in states[: count + 1])
    assert not same(states[count], states[count + 1])
    assert scales == [TOO_LARGE / 2 ** min(step, count) for step in range(18)]
    # The schedule starts with the first step that is taken.
    rates = values(trainer, "learning_rate")
    assert rates[: count + 1] == [rates[0]] * (count + 1)
    assert rates[count + 1] < rates[count]
    assert trainer.lr_scheduler.last_epoch == 18 - count
    # Their losses are as good as any; norms they have none.
    lines = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["overflowed_steps"] for row in lines[: count + 2]] == [*range(1, count + 1), count, count]
    assert ["grad_norm" in row for row in lines[: count + 1]] == [False] * count + [True]
    assert len({row["loss"] for row in lines[: count + 1 : STEPS]}) == 1
    assert "skipped_steps" not in lines[-1]
    assert guard.on_save() == f"fp16: {count} steps left out, whose gradients overflowed while the loss scale was found"


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_a_loss_of_nan_is_a_bad_step_and_leaves_the_scale(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, rows=made_rows(spoilt=["4"]), most_skipped=1)
    scales = scales_of(trainer)
    trainer.train()
    assert (guard_of(trainer).skipped, guard_of(trainer).overflowed) == ([3], [])
    assert set(scales) == {2.0**16}
    assert trainer.lr_scheduler.last_epoch == STEPS
    with pytest.raises(TrainingError, match=r"step 3: the loss of 1 of 2 micro-batches is not finite.*record 8"):
        fp16_trainer(tmp_path, rows=made_rows(spoilt=["4"])).train()


@pytest.mark.fault("training: an exploding gradient")
def test_gradients_that_overflow_without_a_scale_are_a_bad_step(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, 4.0)
    weight = next(one for name, one in trainer.model.named_parameters() if "lora_A" in name)
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    before = state_of(trainer.model)
    with pytest.raises(TrainingError, match=r"step 3: the gradient is not finite; the weights are as they were"):
        trainer.train()
    assert guard_of(trainer).overflowed == [1, 2]
    assert trainer.scaler.get_scale() == 1.0
    assert same(state_of(trainer.model), before)


def test_the_scale_grows_as_torch_has_it(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, 8.0, growth_interval=2)
    scales = scales_of(trainer)
    trainer.train()
    assert scales == [8.0, 8.0, 16.0, 16.0, 32.0, 32.0]


def test_the_scale_and_its_age_are_saved(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, 8.0, growth_interval=4)
    trainer.train()
    HeldState.of(trainer.optimizer.state_dict(), trainer.lr_scheduler, trainer.state, trainer.scaler).write(tmp_path)
    other = make_scaler(CPU, torch.float16)
    load_scaler(tmp_path, other)
    assert other.state_dict() == trainer.scaler.state_dict()
    assert (other.get_scale(), other.state_dict()["_growth_tracker"]) == (16.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_have_no_scale_and_no_file(tmp_path: Path, dtype: torch.dtype) -> None:
    scaler = make_scaler(CPU, dtype)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    trainer = made_trainer(tmp_path, made_rows([0]))
    trainer.train()
    assert not trainer.scaler.is_enabled()
    HeldState.of(trainer.optimizer.state_dict(), trainer.lr_scheduler, trainer.state, scaler).write(tmp_path)
    assert not (tmp_path / SCALER).exists()
    load_scaler(tmp_path, make_scaler(CPU, torch.float16))
    (tmp_path / SCALER).write_text('{"scale": 2.0}', encoding="utf-8")
    load_scaler(tmp_path, scaler)
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize(("skipped", "overflowed"), [([], []), ([2], []), ([], [1]), ([3, 4], [1, 2])])
def test_both_lists_go_into_a_checkpoint(tmp_path: Path, skipped: list[int], overflowed: list[int]) -> None:
    guard = guard_of(made_trainer(tmp_path, made_rows()))
    guard.skipped += skipped
    guard.overflowed += overflowed
    state = guard.state()
    # A training without fp16 writes what earlier versions read.
    assert isinstance(state, list) == (not overflowed)
    other = guard_of(made_trainer(tmp_path, made_rows()))
    lists = other.skipped, other.overflowed
    other.overflowed.append(9)
    other.restore(state)
    assert lists == (skipped, overflowed)
    other.restore(None)
    assert lists == ([], [])


@pytest.mark.parametrize(("overflowed", "message"), [([1, 2, 3], "overflowed in fp16"), ([1, 2], "rounded away")])
def test_a_training_that_only_looked_for_its_scale_has_failed(
    tmp_path: Path, overflowed: Sequence[int], message: str
) -> None:
    model = made_trainer(tmp_path, made_rows()).model
    check = TrainedWeights("instruct", [], overflowed)
    check.before_training(model)
    with pytest.raises(TrainingError, match=message):
        check.after_training(model, 3)
