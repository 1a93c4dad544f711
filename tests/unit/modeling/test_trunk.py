"""Rows through graphs against rows layer by layer: replayed as recorded operators, and with a capture that repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

from lora_llava.data.rows import Batch
from lora_llava.modeling import attention as attention_module
from lora_llava.modeling.attention import repeat_kv, set_attention, with_block_lists
from lora_llava.modeling.fused.layer import fuse_layers, graph_lengths, install_trunk, remove_trunk
from lora_llava.modeling.fused.trunk import Trunk
from lora_llava.modeling.packed import llava_in, packed_logits
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.structure import FLEX, TREES
from lora_llava.recipe.settings import AdapterSettings
from tests.helpers.layers import Layers, training_model
from tests.parity.test_packed import Gradients, branches, row_of
from tests.unit.modeling.test_fused import gradients_of

LENGTHS = (256, 512)
TOLERANCE = 1e-5


class Recorder(TorchDispatchMode):
    """Records operators with the tensors that they read and write, and repeats them, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function; what repeats it does not run its Python."""
        recorded = Recorder()
        with recorded:
            function()
        assert len(recorded.calls) > 20
        return recorded.replay

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        assert function.name().split("::")[1] not in ("_local_scalar_dense", "nonzero", "item")
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run every operator again, and write its results where they were when it was recorded."""
        for function, args, kwargs, recorded in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(recorded), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> Sequence[torch.Tensor]:
    found = result if isinstance(result, (tuple, list)) else (result,)
    return [one for one in found if isinstance(one, torch.Tensor)]


def repeating(function: Callable[[], None]) -> Callable[[], None]:
    """Capture nothing: run the same function again."""
    return function


def dense(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float, **_: Any) -> Any:
    """Attend as `attend_by_blocks` does, with operators that a CPU has a backward pass of."""
    key, value = (repeat_kv(one, query.shape[1] // one.shape[1]) for one in (key, value))
    positions = torch.arange(query.shape[2])
    seen = attention_mask.mask_mod(0, 0, positions[:, None], positions[None, :])
    bias = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + bias, -1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def _dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention_module._FLEX_NAME, dense)


def row(counts: Sequence[int], dtype: torch.dtype = torch.float32, lengths: Sequence[int] = LENGTHS) -> Batch:
    """A row of trees with these numbers of questions, padded to one of `lengths`."""
    return with_block_lists(row_of([branches(count, number) for number, count in enumerate(counts)], dtype), lengths)


def model_of(shapes: Layers) -> Any:
    model = training_model(shapes)
    assert fuse_layers(model) is None
    set_attention(llava_in(model), FLEX)
    return model


def installed(model: Any, capture: Any, lengths: Sequence[int] = LENGTHS) -> Trunk:
    trunk = install_trunk(model, lengths, capture)
    assert isinstance(trunk, Trunk)
    return trunk


def assert_close(ours: Gradients, theirs: Gradients, tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm()) <= tolerance * float(expected.norm()), name


SHAPES = {
    "NF4": Layers(),
    "stage 1": Layers(stage="align", quantization="none"),
    "grouped keys": Layers(key_value_heads=2, quantization="none"),
    "queries and values": Layers(adapter=AdapterSettings(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"])),
    "bf16": Layers(dtype=torch.bfloat16, quantization="none"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_recorded_operators_give_the_gradients_of_any_row(name: str, is_recomputed: bool) -> None:
    shapes = SHAPES[name]
    model = model_of(shapes)
    set_recompute(model, is_recomputed)
    first, second, longer, other = (row(counts, shapes.dtype) for counts in ([2], [1], [2, 1], [1, 1]))
    assert [len(one["kv_indices"][0, 0]) * 128 for one in (first, second, longer, other)] == [256, 256, 512, 512]
    # Recorded with the first, the second length within a step, then repeated for others: other trees, and more padding.
    steps = ((first, longer), (second,), (first, other, second), (longer,))
    expected = [gradients_of(model, *rows) for rows in steps]
    installed(model, Recorder())
    tolerance = TOLERANCE if shapes.dtype == torch.float32 else 1e-2
    for rows, theirs in zip(steps, expected, strict=True):
        assert_close(gradients_of(model, *rows), theirs, tolerance)


def test_graphs_compute_layer_by_layer_to_the_bit_where_nothing_is_padded_more() -> None:
    model = model_of(Layers())
    rows = [row([2]), row([1])]
    expected = gradients_of(model, *rows)
    trunk = installed(model, repeating)
    gradients = gradients_of(model, *rows)
    assert all(torch.equal(gradients[name], one) for name, one in expected.items())
    assert list(trunk._rows) == [256]
    remove_trunk(model)
    assert graph_lengths(model) == []


def test_padding_to_a_longer_row_changes_nothing() -> None:
    model = model_of(Layers())
    least, more = row([2], lengths=()), row([2], lengths=(640,))
    assert (least["kv_indices"].shape[-1], more["kv_indices"].shape[-1]) == (2, 5)
    expected = gradients_of(model, least)
    installed(model, Recorder(), (640,))
    # What an earlier row left in the buffers is not read.
    gradients_of(model, row([1, 2, 1], lengths=(640,)))
    assert_close(gradients_of(model, more), expected)


def test_steps_and_validations_between_rows_change_nothing() -> None:
    def train(model: Any) -> list[Any]:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses: list[Any] = []
        for step, counts in enumerate(([2, 1], [1], [3, 1])):
            gradients_of(model, row(counts), row([2]))
            optimizer.step()
            with torch.no_grad():
                losses.append(packed_logits(model.eval(), row([2] if step % 2 else [2, 1])))
            model.train()
            # As the trainer and the checks clear gradients, in either way.
            model.zero_grad(set_to_none=bool(step % 2))
        return losses

    expected = train(model_of(Layers()))
    model = model_of(Layers())
    trunk = installed(model, Recorder())
    for ours, theirs in zip(train(model), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert sorted(trunk._rows) == list(LENGTHS)


def test_a_backward_pass_after_another_row_computes_its_own_again() -> None:
    model = model_of(Layers())
    rows = [row([2, 1]), row([1])]

    def together() -> Gradients:
        model.zero_grad()
        logits = [packed_logits(model, one).sum() for one in rows]
        # Backward in the order of the forward passes: the first row's results have been overwritten.
        for one in logits:
            one.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    expected = together()
    installed(model, Recorder())
    assert_close(together(), expected)


def test_gradients_that_were_there_are_added_to() -> None:
    model = model_of(Layers())
    rows = [row([2]), row([1])]
    expected = gradients_of(model, *rows)
    trunk = installed(model, Recorder())
    gradients_of(model, *rows, rows[1])
    # The first row layer by layer, the second through graphs, and the other way around.
    for order in ((False, True), (True, False)):
        model.zero_grad()
        for one, is_on in zip(rows, order, strict=True):
            trunk.is_on = is_on
            packed = _loss(model, one)
            packed.backward()
        assert_close({name: one.grad for name, one in model.named_parameters() if one.grad is not None}, expected)


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = packed_logits(model, batch).float()
    return F.cross_entropy(logits, batch["shift_labels"], reduction="sum") / 10


def test_rows_without_graphs_run_layer_by_layer() -> None:
    model = model_of(Layers())
    expected = gradients_of(model, row([1], lengths=(384,)))
    trunk = installed(model, repeating)
    assert graph_lengths(model) == [256, 512]
    assert_close(gradients_of(model, row([1], lengths=(384,))), expected)
    assert not trunk._rows
    assert trunk.output is None


@pytest.mark.parametrize(
    ("shapes", "attention", "reason"),
    [
        (Layers(), TREES, "the attention is not flex_attention"),
        (Layers(adapter=AdapterSettings(r=4, lora_dropout=0.1)), FLEX, "lora_dropout draws"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused_with_a_reason(shapes: Layers, attention: Any, reason: str) -> None:
    model = model_of(shapes)
    set_attention(llava_in(model), attention)
    refused = install_trunk(model, LENGTHS, repeating)
    assert isinstance(refused, str)
    assert refused.startswith(reason)
    assert install_trunk(training_model(replace(shapes, layers=2)), LENGTHS, repeating) == "the layers are not fused"
