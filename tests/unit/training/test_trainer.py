"""What the training loop computes, reports and asks in each step, against the conversations one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_llava.data.rows import PackedRows
from lora_llava.training import trainer as trainer_module
from lora_llava.training.checkpoints.background import BackgroundWriter
from lora_llava.training.checks.check import Check
from lora_llava.training.parallel import gradients as gradients_module
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import state_of
from tests.helpers.steps import IN_A_STEP, made_rows, made_trainer, same
from tests.parity.test_packed import Gradients, branches, build_model, error, gradients, image, own_loss

STEPS = 3


class Watch:
    """A callback that lists what it is told, and copies the gradients before each optimizer step."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gradients: list[Gradients] = []

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Return the callback's method for `event`."""

        def note(_args: Any, state: Any, _control: Any, *, model: Any, **_: Any) -> None:
            self.events.append(f"{event.removeprefix('on_')} {state.global_step}")
            if event == "on_pre_optimizer_step":
                named = model.named_parameters()
                self.gradients.append({name: one.grad.clone() for name, one in named if one.grad is not None})

        return note


class Saver:
    """Saves at the steps `due`, and stops the training at step `last`."""

    def __init__(self, due: tuple[int, ...], last: int = STEPS) -> None:
        self.due, self.last, self.now = due, last, 0
        self.asked: list[tuple[int, bool]] = []
        self.saved: list[int] = []
        self.restored = 0
        self.background = BackgroundWriter()

    def is_due(self, trainer: PackedTrainer, loss: float | None) -> bool:
        """Note the step, and whether it has a validation loss."""
        self.now = trainer.state.global_step
        self.asked.append((self.now, loss is not None))
        return self.now in self.due

    def save(self, trainer: PackedTrainer) -> None:
        """Note the step."""
        self.saved.append(trainer.state.global_step)

    def restore(self, _trainer: PackedTrainer) -> None:
        """Count the calls."""
        self.restored += 1

    @property
    def should_stop(self) -> bool:
        """Whether the last step was taken."""
        return self.now >= self.last


def watched(directory: Path, *, validation: PackedRows | None = None, **settings: Any) -> tuple[PackedTrainer, Watch]:
    """A trainer of three steps, which leaves the weights and gradients as they are unless `settings` say otherwise."""
    still = {"learning_rate": 0.0, "max_grad_norm": 0.0}
    trainer = made_trainer(directory, made_rows(range(STEPS)), **{**still, **settings})
    trainer.mm_projector_lr, trainer.eval_dataset = None, validation
    watch: Any = Watch()
    trainer.callbacks.append(watch)
    return trainer, watch


def of_step(step: int) -> tuple[float, Gradients]:
    """Loss and gradients of a step's conversations one by one: the mean over their supervised tokens."""
    model, start = build_model(), IN_A_STEP * step
    encoded = branches(start + IN_A_STEP)[start:]
    total = sum(one.num_supervised for one in encoded)
    loss = torch.zeros(())
    for index, one in enumerate(encoded):
        pixels = image((start + index) // 2, torch.float32)[None]
        loss = loss + own_loss(model, one, pixels) * one.num_supervised / total
    return float(loss.detach()), gradients(model, loss)


def norm_of(tensors: Gradients) -> float:
    return sum(float(one.square().sum()) for one in tensors.values()) ** 0.5


def lines_of(trainer: PackedTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.fault("training: gradient accumulation that changes the loss")
def test_k32_each_step_takes_the_gradient_of_the_mean_over_its_own_tokens(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path)
    trainer.train()
    assert (len(watch.gradients), len(lines_of(trainer))) == (STEPS, STEPS)
    for step in range(STEPS):
        loss, expected = of_step(step)
        assert error(watch.gradients[step], expected) < 1e-5
        line = lines_of(trainer)[step]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm_of(expected), rel=1e-4)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in trainer.model.parameters())


def test_k32_gradients_are_clipped_to_the_norm_and_the_log_has_what_it_was(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, max_grad_norm=0.01)
    trainer.train()
    _, expected = of_step(0)
    norm = norm_of(expected)
    assert norm > 0.01
    assert error(watch.gradients[0], {name: one * 0.01 / norm for name, one in expected.items()}) < 1e-4
    assert lines_of(trainer)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_k32_a_line_has_the_mean_since_the_line_before_and_the_last_all(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, logging_steps=2)
    trainer.train()
    losses = [of_step(step)[0] for step in range(STEPS)]
    lines = lines_of(trainer)
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, pytest.approx(2 / 3)), (3, pytest.approx(1.0))]
    assert [line["loss"] for line in lines] == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]], rel=1e-5)
    last = trainer.state.log_history[-1]
    assert last["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-5)
    rows = [trainer.train_dataset[index] for index in range(2 * STEPS)]
    tokens = sum(row["input_ids"].numel() for row in rows)
    assert last["total_flos"] == 6 * trainer.model.num_parameters(exclude_embeddings=True) * tokens
    assert last["train_steps_per_second"] > 0
    assert last["train_samples_per_second"] == pytest.approx(2 * last["train_steps_per_second"], rel=0.05)


def test_k32_what_happens_is_told_in_order(tmp_path: Path) -> None:
    validation = made_rows(range(1))
    trainer, watch = watched(tmp_path, validation=validation, eval_strategy="steps", eval_steps=2, logging_steps=5)
    saver: Any = Saver(due=(2,))
    trainer.saver = saver
    trainer.train()
    begun = ["substep_end {0}", "substep_end {0}", "pre_optimizer_step {0}", "step_end {1}"]
    steps = [[f"step_begin {step}", *(one.format(step, step + 1) for one in begun)] for step in range(STEPS)]
    assert watch.events == [
        "train_begin 0",
        *steps[0],
        *steps[1], "log 2", "log 2", "evaluate 2", "save 2",
        *steps[2], "log 3", "log 3", "evaluate 3",
        "log 3", "train_end 3",
    ]  # fmt: skip
    assert (saver.asked, saver.saved, saver.restored) == ([(1, False), (2, True), (3, True)], [2], 1)


def test_k32_the_loop_ends_where_the_saver_says(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path)
    saver: Any = Saver(due=(1, 2), last=2)
    trainer.saver = saver
    trainer.train()
    assert (saver.saved, len(watch.gradients), trainer.state.global_step) == ([1, 2], 2, 2)
    assert watch.events[-1] == "train_end 2"


def test_k32_a_resumed_training_takes_the_steps_that_are_left(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, logging_steps=5)
    saver: Any = Saver(due=())
    trainer.saver = saver
    trainer.state.global_step = 1
    trainer.train()
    assert len(watch.gradients) == STEPS - 1
    assert error(watch.gradients[0], of_step(1)[1]) < 1e-5
    assert [line["step"] for line in lines_of(trainer)] == [STEPS]


class Noting(Check):
    """A check with a state."""

    key = "noting"

    def __init__(self) -> None:
        self.restored: list[Any] = []
        self.saves = 0

    def state(self) -> Any:
        """Return something to recognize."""
        return {"saves": self.saves}

    def restore(self, state: Any) -> None:
        """Note the state."""
        self.restored.append(state)

    def on_save(self) -> str | None:
        """Count the calls."""
        self.saves += 1
        return None


def test_k32_checks_keep_their_state_and_look_before_each_save(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path)
    check, saver = Noting(), Saver(due=(1, 3))
    any_saver: Any = saver
    trainer.checks, trainer.saver = [*trainer.checks, check], any_saver
    trainer.train()
    assert (check.restored, check.saves) == ([None], 2)
    # The state of a step is from before its save.
    assert trainer.state.stateful_callbacks["lora_llava_guards"]["noting"] == {"saves": 1}
    trainer.restore_checks()
    assert check.restored == [None, {"saves": 1}]


def test_k32_the_random_numbers_of_the_model_are_left_alone(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, validation=made_rows(range(1)), eval_strategy="steps", eval_steps=1)
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training


def test_k32_an_empty_row_adds_nothing(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path)
    rows = trainer.train_dataset
    empty = PackedRows([(), rows.rows[0]], rows.records, rows.encoded, rows.read_image)
    trainer.train_dataset, trainer.args.max_steps = empty, 1
    before = state_of(trainer.model)
    trainer.train()
    [line] = lines_of(trainer)
    encoded, model = branches(2), build_model()
    total = sum(one.num_supervised for one in encoded)
    losses = [own_loss(model, one, image(0, torch.float32)[None]) * one.num_supervised / total for one in encoded]
    assert line["loss"] == pytest.approx(float((losses[0] + losses[1]).detach()), rel=1e-5)
    assert same(state_of(trainer.model), before)


def test_k32_gradients_are_summed_over_the_processes_once_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, watch = watched(tmp_path)
    trainer.args.max_steps = 1
    after: list[int] = []

    def double(parameters: list[torch.nn.Parameter]) -> None:
        after.append(watch.events.count("substep_end 0"))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= 2

    # Of a second process with the same rows, so that counts and gradients are twice those of one.
    monkeypatch.setattr(gradients_module, "sum_gradients", double)
    monkeypatch.setattr(trainer_module, "summed", lambda tensor: 2 * tensor)
    trainer.train()
    assert after == [2]
    assert error(watch.gradients[0], of_step(0)[1]) < 1e-5
    [line] = lines_of(trainer)
    assert line["loss"] == pytest.approx(of_step(0)[0], rel=1e-5)


def test_k32_a_projector_without_a_rate_has_that_of_lora(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, learning_rate=1e-3)
    trainer.create_optimizer()
    assert {group["name"]: group["lr"] for group in trainer.optimizer.param_groups} == {"lora": 1e-3, "projector": 1e-3}


@pytest.mark.parametrize("lost", [False, True])
def test_k32_a_stage_that_has_lost_patience_is_not_trained_further(tmp_path: Path, lost: bool) -> None:
    trainer, watch = watched(tmp_path)
    asked: list[str] = []
    trainer.state.log_history = [{"eval_loss": 1.0}, {"eval_loss": 2.0 if lost else 0.5}]
    saver: Any = Saver(due=())
    saver.settings = SimpleNamespace(early_stopping_patience=1)
    saver.last_whole = lambda: "step-7"
    saver.restore_weights = lambda _: asked.append("weights")
    saver.interruption = nullcontext()
    saver.stop_if_asked = lambda step: asked.append(f"stop {step}")
    check = Noting()
    check.before_training = lambda _: asked.append("before")  # type: ignore[method-assign]
    trainer.checks = [*trainer.checks, check]
    trainer.train_and_save(saver)
    assert asked == (["before", "weights"] if lost else ["before", "weights", f"stop {STEPS}"])
    assert len(watch.gradients) == (0 if lost else STEPS)
    assert check.restored == [None]
    assert trainer.last_checkpoint() == "step-7"
