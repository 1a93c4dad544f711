"""Where the speed that a stage is planned with comes from, and what a resumed stage takes from its checkpoint."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_llava.training.checkpoints.resume as resume
import lora_llava.training.train as train
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.planning.memory_plan import GIB, MemoryPlan, plan_memory
from lora_llava.planning.speed import ASSUMED, Machine, Speed
from tests.unit.planning.test_memory_plan import recipe, shapes_of

MEASURED = Speed(0.2, 2e-5, 0.015, is_measured=True)
SHAPES = shapes_of(recipe(), torch.bfloat16, 700)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the devices that were measured; the machine has a GPU."""
    devices: list[str] = []

    def measure(_shapes: Any, attention: str, device: torch.device) -> tuple[Speed, str]:
        assert attention == FLEX
        devices.append(device.type)
        return MEASURED, "speed: as measured"

    monkeypatch.setattr(train, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(train, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(train, "pick_attention", lambda *_: (FLEX, "auto"))
    monkeypatch.setattr(train, "usable_bytes", lambda _device, memory: memory)
    monkeypatch.setattr(train, "measure_speed", measure)
    return devices


def machine(checkpoint: Any = None) -> tuple[Machine, list[str]]:
    stage: Any = SimpleNamespace(recipe=recipe())
    return train._measure_machine(stage, SHAPES, checkpoint, 21 * GIB)


def checkpoint_of(plan: MemoryPlan, **changes: Any) -> Any:
    stored = asdict(plan) | changes
    return SimpleNamespace(directory=Path("step-3"), memory_plan=stored, facts={"device": "cuda"})


def test_a_new_stage_on_a_gpu_measures_once(asked: list[str]) -> None:
    found, lines = machine()
    assert found == Machine("cuda", 21 * GIB, FLEX, MEASURED)
    assert asked == ["cuda"]
    assert lines == ["attn_implementation: flex_attention (auto)", "speed: as measured"]
    assert plan_memory(SHAPES, found).speed == MEASURED


class Left:
    """A model in a cycle of references."""

    def __init__(self) -> None:
        self.trainer = self


@pytest.mark.usefixtures("asked")
def test_the_model_of_an_earlier_stage_is_gone_before_the_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    left = weakref.ref(Left())
    gone: list[bool] = []
    monkeypatch.setattr(train, "usable_bytes", lambda _device, memory: gone.append(left() is None) or memory)
    machine()
    assert gone == [True]


def test_a_resumed_stage_takes_the_speed_of_its_checkpoint(asked: list[str]) -> None:
    slow = Speed(0.5, 3e-5, 0.0, is_measured=True)
    plan = plan_memory(SHAPES, Machine("cuda", 21 * GIB, FLEX, slow))
    assert machine(checkpoint_of(plan))[0].speed == slow
    earlier = checkpoint_of(plan)
    del earlier.memory_plan["speed"]
    assert machine(earlier)[0].speed == ASSUMED["cuda"]
    assert asked == []


def test_a_cpu_plans_with_an_assumed_speed(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "pick_device", lambda: torch.device("cpu"))
    assert machine()[0].speed == ASSUMED["cpu"]
    assert asked == []


def test_processes_plan_with_the_firsts_choice_and_speed_and_the_least_memory(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_first = iter([(TREES, "the first"), (Speed(0.5, 3e-5, 0.0, is_measured=True), "speed of the first")])
    monkeypatch.setattr(train, "by_first", lambda _: next(of_first))
    monkeypatch.setattr(train, "least", lambda memory: memory - GIB)
    found, lines = machine()
    assert found == Machine("cuda", 20 * GIB, TREES, Speed(0.5, 3e-5, 0.0, is_measured=True))
    assert lines == ["attn_implementation: sdpa_by_tree (the first)", "speed of the first"]
    assert asked == []


def test_a_resumed_stage_keeps_its_plan_unless_other_memory_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_memory(SHAPES, Machine("cuda", 21 * GIB, TREES, MEASURED))
    checkpoint, stage = checkpoint_of(plan), SimpleNamespace(key="stages.instruct", recipe=recipe())
    monkeypatch.setattr(resume, "stored_recipe", lambda _: recipe())
    stored: Any = resume.stored_memory_plan
    assert stored(checkpoint, stage, None) == plan
    assert stored(checkpoint, stage, 21 * GIB) == plan
    assert stored(checkpoint, stage, 20 * GIB) is None
    assert stored(None, stage, None) is None
    other = SimpleNamespace(key="stages.instruct", recipe=recipe(stage={"tokens_per_micro_batch": 2048}))
    assert stored(checkpoint, other, None) is None
