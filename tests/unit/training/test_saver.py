"""When a checkpoint is due, which weights it holds, and what a resumed training gets back, on a clock set by hand."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file

from lora_llava.errors import RunInterruptedError
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.stages import DataSettings, InstructSettings
from lora_llava.run_directory.claim import move_into
from lora_llava.run_directory.output import TRAIN_LOG
from lora_llava.training.checkpoints import saver as saver_module
from lora_llava.training.checkpoints.files import Checkpoint, read_verified
from lora_llava.training.checkpoints.saver import CheckpointSaver
from lora_llava.training.log import TrainingLog
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.runs import State, state_of
from tests.helpers.steps import made_rows, made_trainer, same

STARTED = 1000.0
INSTRUCT = InstructSettings(data=DataSettings(path="train.json"), template="vicuna_v1")
FACTS = {"stages.instruct.optim": "adamw_torch"}


class Clock:
    """The time, which passes where a test says so."""

    def __init__(self) -> None:
        self.now = STARTED
        self.of_a_write = 0.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(saver_module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of no run: checkpoints are moved there and listed nowhere."""

    def place(root: Path, staged: Path, target: Path, hashes: Mapping[str, str], *, first: bool) -> None:
        names = {path.name for path in staged.iterdir()} - {"checkpoint.json"}
        assert (target.is_relative_to(root), first, set(hashes)) == (True, True, names)
        move_into(staged, target)

    monkeypatch.setattr(saver_module, "place", place)


@dataclass
class Plan:
    """A plan of the memory."""

    tokens: int = 7


class Artifact:
    """Writes the weights of a trainer and the metrics it is given; the clock advances meanwhile."""

    def __init__(self, root: Path, clock: Clock, model: Any = None, **settings: Any) -> None:
        settings = {"save_steps": "auto", "save_total_limit": 9, **settings}
        self.stage = SimpleNamespace(
            name="instruct",
            key="stages.instruct",
            settings=INSTRUCT.model_copy(update=settings),
            run_directory=root,
            checkpoints=root / "checkpoints/instruct",
        )
        self.clock, self.model = clock, model
        self.written: list[tuple[str, int, dict[str, float]]] = []

    def write(
        self, staging: Path, directory: Path, step: int, metrics: dict[str, float], weights: State | None = None
    ) -> None:
        """Write the trained weights, or those given."""
        self.clock.now += self.clock.of_a_write
        self.written.append((directory.name, step, metrics))
        save_file(trained(self.model, weights), staging / WEIGHTS)


def trained(model: Any, weights: State | None = None) -> State:
    """Copy the weights that an artifact holds, with `weights` by parameter name in the place of the model's."""
    state = None if weights is None else {**dict(model.named_parameters()), **weights}
    saved = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {name: one.detach().clone() for name, one in saved.items()}


def saver_of(artifact: Artifact, resumed: Checkpoint | None = None, **options: Any) -> CheckpointSaver:
    any_artifact: Any = artifact
    any_plan: Any = Plan()
    return CheckpointSaver(any_artifact, any_plan, FACTS, STARTED, resumed, **options)


def stub(step: int, max_steps: int = 100, losses: tuple[float, ...] = ()) -> Any:
    """A trainer of which only the state is asked."""
    history = [{"eval_loss": loss} for loss in losses]
    return SimpleNamespace(state=SimpleNamespace(global_step=step, max_steps=max_steps, log_history=history))


def trainer_of(root: Path) -> PackedTrainer:
    """A trainer after two steps, which gets a log then."""
    trainer = made_trainer(root, made_rows(range(2)), lr_scheduler_type="linear")
    trainer.train()
    trainer.callbacks.append(TrainingLog("instruct", root / TRAIN_LOG, (), Console(quiet=True)))
    return trainer


def save(saver: CheckpointSaver, trainer: PackedTrainer) -> None:
    """Save, and wait until it is written."""
    saver.save(trainer)
    saver.background.wait()


def test_k31_steps_that_the_recipe_names_and_the_last_are_saved(tmp_path: Path, clock: Clock) -> None:
    saver = saver_of(Artifact(tmp_path, clock, save_steps=4))
    clock.now += 10_000
    due = [step for step in range(1, 11) if saver.is_due(stub(step, max_steps=10), None)]
    assert due == [4, 8, 10]
    assert not saver.should_stop


@pytest.mark.parametrize(("seconds", "wait"), [(0.0, 300.0), (6.0, 300.0), (10.0, 500.0)])
def test_k31_time_between_saves_is_five_minutes_or_fifty_times_their_own(
    tmp_path: Path, clock: Clock, seconds: float, wait: float
) -> None:
    saver = saver_of(Artifact(tmp_path, clock))
    saver.last_duration = seconds
    assert not saver.is_due(stub(1), None)
    clock.now += wait - 0.5
    assert not saver.is_due(stub(2), None)
    clock.now += 0.5
    assert saver.is_due(stub(3), None)
    assert saver.is_due(stub(100), None)


def test_k31_a_better_validation_is_saved_while_saving_takes_a_twentieth_of_the_time(
    tmp_path: Path, clock: Clock
) -> None:
    saver = saver_of(Artifact(tmp_path, clock))
    held: list[float] = []
    saver._hold = lambda _, loss: held.append(loss)  # type: ignore[method-assign]
    # The first checkpoint may take any time, and is whole; a worse loss, or the same, is none to save.
    assert saver.is_due(stub(1), 0.5)
    assert not saver.saves_held
    saver.best, saver.num_saved, saver.saving_seconds, saver.last_duration = 0.5, 1, 2.0, 1.0
    assert not saver.is_due(stub(2), 0.5)
    assert not saver.is_due(stub(2), 0.6)
    assert (saver.last_loss, saver.held) == ((2, 0.6), None)
    # With this one, 3 s of saving: at most 5 % from 60 s on.
    clock.now = STARTED + 60.0
    assert saver.is_due(stub(3), 0.4)
    assert saver.saves_held
    clock.now = STARTED + 59.0
    assert not saver.is_due(stub(3), 0.4)
    assert held == [0.4, 0.4]
    # The last step is saved whole, and so is one that a signal interrupts.
    assert saver.is_due(stub(100), 0.3)
    assert not saver.saves_held
    clock.now = STARTED + 60.0
    saver.interruption.received = signal.SIGTERM
    assert saver.is_due(stub(3), 0.3)
    assert not saver.saves_held


def test_k31_time_of_earlier_sessions_counts(tmp_path: Path, clock: Clock) -> None:
    saver = saver_of(Artifact(tmp_path, clock))
    saver.seconds_before = 40.0
    clock.now += 2.0
    assert saver.seconds == 42.0
    saver.num_saved, saver.saving_seconds = 3, 4.2
    assert str(saver) == "3 checkpoints saved in 4.2 s, 10.0% of the stage's time"
    saver.saving_seconds = 4.206
    assert saver.cost() == {"checkpoints_saved": 3, "saving_seconds": 4.21}


def test_k6_a_step_that_ends_the_patience_is_saved_and_the_last(tmp_path: Path, clock: Clock) -> None:
    saver = saver_of(Artifact(tmp_path, clock, early_stopping_patience=2))
    saver.best = 0.1
    assert not saver.is_due(stub(2, losses=(0.1, 0.2)), 0.2)
    assert not saver.should_stop
    assert saver.is_due(stub(3, losses=(0.1, 0.2, 0.3)), 0.3)
    assert saver.should_stop
    assert saver.stopped_early(3, 100) == "stopped after step 3 of 100: 2 validations without improvement"
    assert saver.stopped_early(1_234, 5_000) == "stopped after step 1,234 of 5,000: 2 validations without improvement"
    assert saver.stopped_early(100, 100) is None


def test_k31_a_step_that_a_signal_interrupts_is_saved_and_the_last(tmp_path: Path, clock: Clock) -> None:
    saver = saver_of(Artifact(tmp_path, clock))
    saver.stop_if_asked(1)
    assert not saver.is_due(stub(1), None)
    saver.interruption.received = signal.SIGTERM
    assert saver.is_due(stub(2), None)
    assert saver.should_stop
    words = r"^stopped by SIGTERM after step 2,000 of stage instruct, which is saved\. Continue with: .* --resume$"
    with pytest.raises(RunInterruptedError, match=words) as raised:
        saver.stop_if_asked(2_000)
    assert raised.value.exit_code == 128 + signal.SIGTERM


def test_k31_a_checkpoint_holds_the_step_and_what_came_before(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    clock.of_a_write = 3.0
    artifact = Artifact(tmp_path, clock, trainer.model, save_total_limit=2)
    saver = saver_of(artifact)
    trainer.log_file.path.write_text("x" * 17, encoding="utf-8")
    trainer.loss_sum += 0.25
    clock.now += 100.0
    saver.last_loss = (2, 0.5)
    trainer.state.max_steps = 2
    save(saver, trainer)
    assert artifact.written == [("step-2", 2, {"eval_loss": 0.5})]
    assert (saver.best, saver.num_saved, saver.last_duration, saver.saving_seconds) == (0.5, 1, 3.0, 3.0)
    assert (saver.last_saved, saver.should_stop) == (clock.now, False)
    saved = read_verified(tmp_path / "checkpoints/instruct/step-2")
    progress = saved.progress
    assert (saved.memory_plan, saved.facts, saved.resumable) == ({"tokens": 7}, FACTS, True)
    assert (progress.stage, progress.step, progress.eval_loss, progress.log_bytes) == ("instruct", 2, 0.5, 17)
    assert (progress.loss_sum, progress.loss_total) == (float(trainer.loss_sum), trainer.loss_total)
    assert progress.last_logged_step == trainer.last_logged_step
    assert (progress.seconds, progress.saving_seconds, progress.num_saved) == (100.0, 0.0, 1)
    # The next has no validation, or a worse one: the best loss stays. Two are left. Nothing waits for them.
    clock.of_a_write = 0.0
    for step, loss, best in ((3, None, 0.5), (4, 0.7, 0.5), (5, 0.2, 0.2)):
        trainer.state.global_step, trainer.state.max_steps = step, 9
        if loss is not None:
            saver.last_loss = (step, loss)
        save(saver, trainer)
        assert saver.best == best
        assert artifact.written[-1] == (f"step-{step}", step, {} if loss is None else {"eval_loss": loss})
    assert (saver.num_saved, saver.saving_seconds) == (4, 3.0)
    assert {path.name for path in saver.parent.iterdir()} == {"step-4", "step-5"}
    assert saver.last_whole() == "checkpoints/instruct/step-5"


def test_k31_a_signal_while_a_checkpoint_is_written_ends_the_training(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    saver = saver_of(Artifact(tmp_path, clock, trainer.model))
    assert saver.last_whole() is None
    saver.interruption.received = signal.SIGINT
    save(saver, trainer)
    assert saver.should_stop


@pytest.mark.fault("checkpoints: SIGINT and SIGTERM during a run")
def test_a_signal_while_only_the_best_weights_are_saved_is_left_to_the_next_step_which_is_saved_whole(
    tmp_path: Path, clock: Clock
) -> None:
    trainer = trainer_of(tmp_path)
    saver = saver_of(Artifact(tmp_path, clock, trainer.model))
    save(saver, trainer)
    held_at(saver, trainer, 3, 0.3)
    saver.saves_held, saver.interruption.received = True, signal.SIGTERM
    save(saver, trainer)
    assert not saver.should_stop
    trainer.state.global_step, trainer.state.max_steps = 4, 9
    assert saver.is_due(trainer, None)
    save(saver, trainer)
    assert saver.should_stop
    assert saver.last_whole() == "checkpoints/instruct/step-4"


@pytest.mark.fault("checkpoints: a rotation that deletes the best one, or the only good one")
def test_what_an_earlier_session_saved_after_the_resumed_step_does_not_push_out_the_best(
    tmp_path: Path, clock: Clock
) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model, save_total_limit=1)
    killed = saver_of(artifact)
    killed.last_loss = (2, 0.5)
    save(killed, trainer)
    held_at(killed, trainer, 3, 0.1)
    killed.saves_held = True
    save(killed, trainer)
    saver = saver_of(artifact, read_verified(killed.parent / "step-2"))
    trainer.state.max_steps = 9
    for trainer.state.global_step in (4, 5):
        save(saver, trainer)
    assert {path.name for path in saver.parent.iterdir()} == {"step-2", "step-5"}


def held_at(saver: CheckpointSaver, trainer: PackedTrainer, step: int, loss: float) -> State:
    """Hold the weights of `step`, then change them as further training would; return those held."""
    trainer.state.global_step = step
    saver.last_loss = (step, loss)
    saver._hold(trainer, loss)
    assert saver.best == loss
    before = trained(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    return before


@pytest.mark.parametrize("loss", [None, 0.3, 0.4])
def test_k31_held_weights_are_written_with_the_next_checkpoint_unless_it_is_better(
    tmp_path: Path, clock: Clock, loss: float | None
) -> None:
    trainer = trainer_of(tmp_path)
    saver = saver_of(Artifact(tmp_path, clock, trainer.model))
    best = held_at(saver, trainer, 2, 0.3)
    now = state_of(trainer.model)
    trainer.state.global_step = 4
    if loss is not None:
        saver.last_loss = (4, loss)
    save(saver, trainer)
    assert same(state_of(trainer.model), now)
    assert saver.held is None
    held = read_verified(saver.parent / "step-2")
    assert (held.resumable, held.progress.step, held.progress.eval_loss) == (False, 2, 0.3)
    assert (held.memory_plan, held.facts) == ({"tokens": 7}, FACTS)
    assert read_verified(saver.parent / "step-4").progress.num_saved == saver.cost()["checkpoints_saved"] == 2
    for step, weights in ((2, best), (4, trained(trainer.model))):
        assert same(load_file(saver.parent / f"step-{step}" / WEIGHTS), weights)
    assert saver.last_whole() == "checkpoints/instruct/step-4"


def test_k31_held_weights_give_way_to_better_ones_and_to_the_same_step(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    saver = saver_of(Artifact(tmp_path, clock, trainer.model))
    held_at(saver, trainer, 2, 0.3)
    trainer.state.global_step, saver.last_loss = 4, (4, 0.2)
    save(saver, trainer)
    held_at(saver, trainer, 5, 0.1)
    save(saver, trainer)
    assert {path.name for path in saver.parent.iterdir()} == {"step-4", "step-5"}
    assert read_verified(saver.parent / "step-5").resumable
    assert (saver.held, saver.num_saved) == (None, 2)


@pytest.mark.parametrize(("same_optimizer", "exact"), [(True, True), (True, False), (False, True)])
def test_k31_a_resumed_training_gets_back_what_was_saved(
    tmp_path: Path, clock: Clock, same_optimizer: bool, exact: bool
) -> None:
    trainer = trainer_of(tmp_path)
    trainer.log_file.seconds_before = 5.0
    saver = saver_of(Artifact(tmp_path, clock, trainer.model))
    trainer.loss_sum += 0.25
    trainer.loss_total, trainer.last_logged_step = 9.0, 1
    saver.last_loss = (2, 0.5)
    clock.now += 100.0
    clock.of_a_write = 2.0
    save(saver, trainer)
    clock.now = STARTED
    resumed = read_verified(saver.parent / "step-2")
    after_save = torch.rand(3)

    other = trainer_of(tmp_path)
    if not same_optimizer:
        resumed.facts["stages.instruct.optim"] = "adamw_8bit"
    again = saver_of(Artifact(tmp_path, clock, other.model), resumed, exact=exact)
    assert again.keeps_optimizer == same_optimizer
    assert not saver.keeps_optimizer
    assert (again.best, again.seconds, again.saving_seconds, again.num_saved) == (0.5, 100.0, 0.0, 1)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 1.0 if parameter.requires_grad else 0.0
    other.state.global_step = 77
    again.restore_weights(other)
    assert same(state_of(other.model), state_of(trainer.model))
    assert other.state.global_step == 2
    assert other.log_file.seconds_before == resumed.progress.log_seconds
    other.create_optimizer()
    for group in other.optimizer.param_groups:
        group["lr"] = 0.125
    other.loss_sum = torch.zeros(())
    again.restore(other)
    assert (float(other.loss_sum), other.loss_total, other.last_logged_step) == (float(trainer.loss_sum), 9.0, 1)
    assert bool(other.optimizer.state) == same_optimizer
    rates = [group["lr"] for group in other.optimizer.param_groups]
    if same_optimizer:
        expected = [group["lr"] for group in trainer.optimizer.param_groups]
        assert (rates == expected) == exact
    assert torch.equal(torch.rand(3), after_save)


def test_k31_a_new_training_gets_nothing_back(tmp_path: Path, clock: Clock) -> None:
    saver = saver_of(Artifact(tmp_path, clock))
    saver.restore_weights(stub(1))
    saver.restore(stub(1))
    assert (saver.best, saver.seconds, saver.saving_seconds, saver.num_saved) == (None, 0.0, 0.0, 0)
    assert (saver.last_loss, saver.held, saver.should_stop, saver.last_duration) == (None, None, False, 0.0)
