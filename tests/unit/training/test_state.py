"""What a training holds besides its weights comes back to the bit, from safetensors and JSON alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from transformers import TrainerState

from lora_llava.errors import TrainingError
from lora_llava.training.checkpoints import state as state_module
from lora_llava.training.checkpoints.state import (
    HeldState,
    load_optimizer,
    load_random_state,
    load_scheduler,
    torch_random_state,
)


def trained(make: Callable[[list[torch.nn.Parameter]], Any], count: int) -> tuple[list[torch.nn.Parameter], Any, Any]:
    """Train two parameters, one large enough for 8-bit states, by `count` steps of a schedule."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(96, 64)), torch.nn.Parameter(torch.randn(5))]
    optimizer = make(parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(count):
        advance(parameters, optimizer, scheduler, step)
    return parameters, optimizer, scheduler


def advance(parameters: list[torch.nn.Parameter], optimizer: Any, scheduler: Any, step: int) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.sin(parameter.detach() * (step + 2) + number)
    optimizer.step()
    scheduler.step()


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.8, 0.95)),
    "adamw_8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=0.1),
    "adamw_32bit": lambda parameters: bitsandbytes.optim.AdamW32bit(parameters, lr=0.1),
}


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    ours, optimizer, scheduler = trained(OPTIMIZERS[name], 3)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)
    theirs, other, schedule = trained(OPTIMIZERS[name], 0)
    for here, there in zip(ours, theirs, strict=True):
        there.data.copy_(here.data)
    load_optimizer(tmp_path, other, settings=True)
    load_scheduler(tmp_path, schedule, settings=True)
    assert other.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    for step in (3, 4):
        for one in ((ours, optimizer, scheduler), (theirs, other, schedule)):
            advance(*one, step)
    assert all(torch.equal(here, there) for here, there in zip(ours, theirs, strict=True))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    states = {}
    for label, one in {"ours": optimizer, "theirs": other}.items():
        (tmp_path / label).mkdir()
        HeldState.of(one.state_dict(), scheduler, TrainerState()).write(tmp_path / label)
        states[label] = [(tmp_path / label / name).read_bytes() for name in ("optimizer.json", "optimizer.safetensors")]
    assert states["ours"] == states["theirs"]


def test_moments_alone_go_on_with_new_settings(tmp_path: Path) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 3)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)
    _, other, schedule = trained(lambda parameters: torch.optim.AdamW(parameters, lr=0.5), 0)
    load_optimizer(tmp_path, other, settings=False)
    load_scheduler(tmp_path, schedule, settings=False)
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["initial_lr"]) == (0.5 / 4, (0.9, 0.999), 0.5)
    for here, there in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(here["exp_avg"], there["exp_avg"])
    other.step()
    schedule.step()
    assert group["lr"] == 0.5 / 5


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 1)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)
    with pytest.raises(TrainingError, match="another number of parameters"):
        load_optimizer(tmp_path, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]), settings=True)


def test_k41_a_state_fits_groups_cut_where_biases_begin(tmp_path: Path) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 3)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)

    def cut(parameters: list[torch.nn.Parameter]) -> Any:
        groups = [{"params": [one], "weight_decay": decay} for one, decay in zip(parameters, (0.1, 0.0), strict=True)]
        return torch.optim.AdamW(groups, lr=0.5)

    parameters, other, _ = trained(cut, 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, [lambda step: 1 / (1 + step)] * 2)
    load_optimizer(tmp_path, other, settings=True)
    load_scheduler(tmp_path, schedule, settings=True)
    assert [(group["lr"], group["weight_decay"]) for group in other.param_groups] == [(0.125, 0.1), (0.125, 0.0)]
    for here, there in zip(optimizer.state.values(), (other.state[one] for one in parameters), strict=True):
        assert torch.equal(here["exp_avg"], there["exp_avg"])


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
def test_random_numbers_go_on(tmp_path: Path) -> None:
    # The one that libraries draw from.
    numpy_state: Any = np.random.mtrand._rand

    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            numpy_state.random_sample(),
            numpy_state.normal(),
            *torch.rand(3).tolist(),
        ]

    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 0)
    draw()
    held = HeldState.of(optimizer.state_dict(), scheduler, TrainerState())
    expected = draw()
    held.write(tmp_path)
    draw()
    load_random_state(tmp_path)
    assert draw() == expected


def test_each_process_gets_its_own_random_state_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 0)
    states, expected = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(torch_random_state())
        expected.append(torch.rand(3).tolist())
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState(), generators=states).write(tmp_path)
    found = []
    # The third and fourth were not there when the checkpoint was saved.
    for number in (0, 1, 2, 3, 2):
        monkeypatch.setattr(state_module, "rank", lambda number=number: number)
        load_random_state(tmp_path)
        found.append(torch.rand(3).tolist())
    assert found[:2] == expected
    assert found[2] == found[4]
    assert len({tuple(one) for one in found}) == 4


def test_the_settings_of_a_checkpoint_win_over_those_of_now(tmp_path: Path) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 3)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)
    _, other, _ = trained(lambda parameters: torch.optim.AdamW(parameters, lr=0.5), 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda _: 1.0)
    load_optimizer(tmp_path, other, settings=True)
    load_scheduler(tmp_path, schedule, settings=True)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["betas"]) == (0.1 / 4, (0.8, 0.95))
    assert (schedule.base_lrs, schedule.get_last_lr(), schedule.last_epoch) == ([0.1], [0.1 / 4], 3)


def test_the_log_takes_the_rate_of_the_schedule_of_now(tmp_path: Path) -> None:
    _, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 3)
    HeldState.of(optimizer.state_dict(), scheduler, TrainerState()).write(tmp_path)
    _, _, schedule = trained(lambda parameters: torch.optim.AdamW(parameters, lr=0.5), 0)
    load_scheduler(tmp_path, schedule, settings=False)
    assert schedule.get_last_lr() == [0.5 / 4]
    # As a schedule that took these steps itself.
    counts = [{key: one.state_dict()[key] for key in ("last_epoch", "_step_count")} for one in (scheduler, schedule)]
    assert counts[0] == counts[1] == {"last_epoch": 3, "_step_count": 4}


def test_a_held_state_shares_nothing_that_training_changes(tmp_path: Path) -> None:
    parameters, optimizer, scheduler = trained(OPTIMIZERS["adamw_torch"], 3)
    trainer = TrainerState()
    trainer.log_history, trainer.stateful_callbacks = [{"loss": 1.0}], {"guard": {"seen": [1]}}
    held = HeldState.of(optimizer.state_dict(), scheduler, trainer)
    held.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    advance(parameters, optimizer, scheduler, 3)
    trainer.log_history.append({"loss": 2.0})
    trainer.stateful_callbacks["guard"]["seen"].append(2)
    held.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_large_states_of_a_paged_optimizer_go_to_paged_memory() -> None:
    """On a card alone, where `get_state_buffer` gives paged memory to large parameters."""

    class Parameter(SimpleNamespace):
        __hash__ = object.__hash__

    card, host = Parameter(device=torch.device("cuda")), Parameter(device=torch.device("cpu"))
    pages: list[torch.Tensor] = []

    def buffer(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
        assert parameter is card
        pages.append(torch.zeros(3, dtype=dtype))
        return pages[-1]

    def states() -> dict[Any, dict[str, torch.Tensor]]:
        moments = torch.tensor([1, 2, 3], dtype=torch.uint8)
        # 8-bit Adam has two moments; Lion has one.
        return {
            card: {"state1": moments.clone(), "state2": moments.float(), "absmax1": moments.clone()},
            host: {"state1": moments.clone()},
        }

    paged = SimpleNamespace(is_paged=True, state=states(), get_state_buffer=buffer)
    state_module._page(paged)
    assert sorted(str(page.dtype) for page in pages) == ["torch.float32", "torch.uint8"]
    assert all(any(paged.state[card][name] is page for page in pages) for name in ("state1", "state2"))
    assert paged.state[card]["state1"].tolist() == paged.state[card]["state2"].tolist() == [1, 2, 3]
    assert not any(paged.state[card]["absmax1"] is page for page in pages)
    pages.clear()
    state_module._page(SimpleNamespace(is_paged=False, state=states(), get_state_buffer=buffer))
    state_module._page(SimpleNamespace(state=states()))
    state_module._page(SimpleNamespace(is_paged=True, state={card: {"state1": torch.ones(3)}}, get_state_buffer=buffer))
    assert len(pages) == 1
