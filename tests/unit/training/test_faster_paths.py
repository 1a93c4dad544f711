"""Faster ways through the decoder layers are left where they fail, are slower, or compute something else."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaDecoderLayer

from lora_llava.data.packing import PlanItem
from lora_llava.modeling import attention as attention_module
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.fused import functions
from lora_llava.modeling.fused.layer import FusedLayer, fuse_layers, graph_lengths, install_trunk
from lora_llava.modeling.fused.projection import Projection
from lora_llava.modeling.fused.trunk import Trunk
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.structure import FLEX
from lora_llava.training.checks import faster_paths, longest_row
from lora_llava.training.checks.faster_paths import check_fused, try_graphs
from tests.helpers.runs import state_of
from tests.helpers.steps import guard_of, made_rows, made_trainer, same
from tests.parity.test_packed import build_model
from tests.unit.modeling.test_fused import layers_of
from tests.unit.modeling.test_trunk import Recorder, dense, repeating

ROWS = made_rows(range(2))
ITEMS = [PlanItem(len(one.input_ids), one.prefix_length, 0) for one in ROWS.encoded]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fused model in evaluation mode, as between stages."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention_module._FLEX_NAME, dense)
    made = build_model(layers=3)
    assert fuse_layers(made) is None
    set_attention(llava_in(made), FLEX)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    return made


@pytest.fixture
def graphs_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which the second of two ways takes half the time."""

    def seconds() -> Iterator[float]:
        now = 0.0
        while True:
            # Two passes without graphs, then two with: each is begun and ended.
            for length in (4.0, 4.0, 2.0, 2.0):
                yield now
                now += length
                yield now

    clock = seconds()
    monkeypatch.setattr(longest_row, "_now", lambda _: next(clock))


def test_fused_layers_that_compute_what_pefts_do_are_used_and_nothing_changes(model: Any) -> None:
    before, random_state = state_of(model), torch.get_rng_state()
    assert check_fused(model, ROWS, ITEMS, torch.float32) is None
    assert same(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(one.grad is None for one in model.parameters())
    assert isinstance(layers_of(model)[0], FusedLayer)
    assert not model.training


def test_every_gradient_is_compared_although_lora_starts_at_zero(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    passed = faster_paths._pass_row

    def noted(*args: Any) -> Any:
        done = passed(*args)
        seen.append(done.gradients)
        return done

    monkeypatch.setattr(faster_paths, "_pass_row", noted)
    check_fused(model, ROWS, ITEMS, torch.float32)
    fused, peft = seen
    assert fused.keys() == peft.keys()
    assert all(one.any() for name, one in fused.items() if "lora" in name and "layers.2" not in name)


@pytest.mark.parametrize("kind", ["wrong", "NaN", "raises"])
def test_fused_layers_that_compute_something_else_give_way_to_pefts(
    model: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    backward = Projection.backward

    def spoilt(self: Projection, *args: Any) -> Any:
        if kind == "raises":
            raise RuntimeError("no kernel image\nfor this card")
        dx, d_factors = backward(self, *args)
        return dx, [one * (1.5 if kind == "wrong" else math.nan) for one in d_factors]

    monkeypatch.setattr(Projection, "backward", spoilt)
    before = state_of(model)
    line = check_fused(model, ROWS, ITEMS, torch.float32)
    assert line is not None
    reasons = {
        "wrong": "gradients differ by ",
        "NaN": "gradients differ by nan",
        "raises": "RuntimeError: no kernel image",
    }
    assert f"PEFT's path with full recomputation, not fused: {reasons[kind]}" in line
    assert "\n" not in line
    assert [type(layer) for layer in layers_of(model)] == [LlamaDecoderLayer] * 3
    assert [layer.gradient_checkpointing for layer in layers_of(model)] == [True, True, False]
    assert same(state_of(model), before)
    # Without fused layers there is nothing to compare.
    assert check_fused(model, ROWS, ITEMS, torch.float32) is None


def test_an_image_that_is_not_finite_says_nothing_about_the_layers(model: Any) -> None:
    assert check_fused(model, made_rows(range(2), spoilt=["0", "1", "2", "3"]), ITEMS, torch.float32) is None
    assert isinstance(layers_of(model)[0], FusedLayer)


def test_a_comparison_that_memory_has_no_room_for_is_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(functions, "qkv_forward", full)
    before = state_of(model)
    line = check_fused(model, ROWS, ITEMS, torch.float32)
    assert line == "fused layers are not compared with PEFT's path, which takes more memory than there is"
    assert isinstance(layers_of(model)[0], FusedLayer)
    assert same(state_of(model), before)


def test_the_comparison_keeps_little_drops_nothing_and_restores_what_it_changed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_recompute(model, False)
    seen: list[tuple[int, list[bool]]] = []
    passed = faster_paths._pass_row

    def noted(model: Any, batch: Any, dtype: torch.dtype) -> Any:
        seen.append((batch["input_ids"].shape[1], [layer.gradient_checkpointing for layer in layers_of(model)]))
        assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
        assert model.training
        return passed(model, batch, dtype)

    monkeypatch.setattr(faster_paths, "_pass_row", noted)
    assert check_fused(model, ROWS, ITEMS, torch.float32) is None
    shortest = min(len(ROWS.encoded[index].input_ids) for row in ROWS.rows for tree in row for index in tree)
    assert seen == [(shortest, [True, True, False])] * 2
    assert [layer.gradient_checkpointing for layer in layers_of(model)] == [False] * 3
    assert not model.training


@pytest.mark.usefixtures("graphs_are_faster")
def test_graphs_that_give_the_same_gradients_faster_are_used(model: Any) -> None:
    before = state_of(model)
    line = try_graphs(model, ROWS, ITEMS, torch.float32, Recorder())
    assert line == "cuda_graphs: rows are padded to 256 tokens; the longest takes 2000 ms instead of 4000 ms"
    assert graph_lengths(model) == [256]
    assert same(state_of(model), before)
    assert all(one.grad is None for one in model.parameters())


def _raises(_function: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")


def _full(_function: Callable[[], None]) -> Callable[[], None]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _noted(trunks: list[weakref.ref[Any]]) -> Callable[..., Any]:
    def install(*options: Any) -> Any:
        trunk = install_trunk(*options)
        trunks.append(weakref.ref(trunk))
        return trunk

    return install


def _does_nothing(_function: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


@pytest.mark.usefixtures("graphs_are_faster")
@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (_raises, "RuntimeError: operation not permitted when stream is capturing"),
        (_full, "OutOfMemoryError: CUDA out of memory"),
        (_does_nothing, "gradients differ by "),
    ],
)
def test_graphs_that_fail_or_compute_something_else_are_left(
    model: Any, monkeypatch: pytest.MonkeyPatch, capture: Any, reason: str
) -> None:
    trunks: list[weakref.ref[Any]] = []
    held: list[bool] = []
    monkeypatch.setattr(faster_paths, "install_trunk", _noted(trunks))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(trunks[0]() is not None))
    before = state_of(model)
    line = try_graphs(model, ROWS, ITEMS, torch.float32, capture)
    assert line.startswith(f"cuda_graphs: off ({reason}")
    # When the device's memory is given back, nothing of the graphs is left.
    assert held == [False]
    assert graph_lengths(model) == []
    assert same(state_of(model), before)
    assert all(one.grad is None for one in model.parameters())


def test_graphs_that_are_slower_are_left(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 8.0])
    monkeypatch.setattr(longest_row, "_now", lambda _: next(times))
    line = try_graphs(model, ROWS, ITEMS, torch.float32, repeating)
    assert line == "cuda_graphs: off (the longest row takes 3000 ms with graphs and 1000 ms without)"
    assert graph_lengths(model) == []


def test_a_stage_trains_and_validates_through_graphs_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention_module._FLEX_NAME, dense)
    trained = []
    for through_graphs in (False, True):
        trainer = made_trainer(tmp_path, made_rows(range(3)), eval_strategy="steps", eval_steps=1)
        trainer.eval_dataset = made_rows(range(1))
        assert fuse_layers(trainer.model) is None
        set_attention(llava_in(trainer.model), FLEX)
        if through_graphs:
            trunk = install_trunk(trainer.model, [384], Recorder())
            assert isinstance(trunk, Trunk)
        trainer.train()
        losses = [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history[:-1]]
        trained.append((losses, state_of(trainer.model)))
        assert len(losses) >= 4
    assert list(trunk._rows) == [384]
    (losses, weights), (graph_losses, graph_weights) = trained
    assert graph_losses == pytest.approx(losses, rel=1e-4)
    assert all(torch.allclose(graph_weights[name], one, rtol=1e-3, atol=1e-4) for name, one in weights.items())


@pytest.mark.fault("training: a loss of NaN or infinity")
def test_a_step_left_out_adds_nothing_through_graphs_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention_module._FLEX_NAME, dense)
    trainer = made_trainer(tmp_path, made_rows(range(1), spoilt=["0"]), most_skipped=1)
    assert fuse_layers(trainer.model) is None
    set_attention(llava_in(trainer.model), FLEX)
    # As long as the conversations by themselves, among which the one that is not finite is looked for.
    trunk = install_trunk(trainer.model, [256], Recorder())
    assert isinstance(trunk, Trunk)
    before = state_of(trainer.model)
    trainer.train()
    assert list(trunk._rows) == [256]
    assert guard_of(trainer).skipped == [1]
    assert same(state_of(trainer.model), before)
