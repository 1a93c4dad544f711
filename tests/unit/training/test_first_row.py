"""The check before the first step: silent when packing is right, a stop for every way in which it could be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_llava.data.rows as batch_module
import lora_llava.modeling.attention as attention_module
from lora_llava.conversation.encode import Turn
from lora_llava.data.packing import Row
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.rows import Batch, ImageTransform, PackedRows, build_row
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import additive_mask
from lora_llava.training.checks.first_row import MAX_CONVERSATIONS, _first_trees, check_first_row
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD
from tests.parity.test_packed import branches, build_model, conversation

CPU = torch.device("cpu")


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    """A text alone, then a tree of four questions."""
    Image.new("RGB", (30, 20), (200, 30, 90)).save(tmp_path / "a.png")
    encoded = [conversation("Who is it?", "no one"), *branches(4)]
    image = ImageSource("a.png", tmp_path / "a.png", None)
    records = [Record(str(n), image if n else None, (Turn("user", "?"),), f"record {n}") for n in range(5)]
    transform = ImageTransform(IMAGE_SIZE, IMAGE_MEAN, IMAGE_STD, "pad")
    return PackedRows([((0,),), ((1, 2, 3, 4),)], records, encoded, transform)


def test_right_packing_passes_and_leaves_the_model_as_it_was(rows: PackedRows) -> None:
    model = build_model().train()
    difference = check_first_row(model, rows, torch.float32, CPU)
    assert difference is not None
    assert difference < 1e-5
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_single_conversations_leave_nothing_to_check(rows: PackedRows) -> None:
    for some in ([((0,),), (), ((1,),)], [(), ()]):
        rows.rows = some
        assert check_first_row(build_model(), rows, torch.float32, CPU) is None


def test_of_many_trees_the_widest_are_compared_up_to_a_few_conversations(rows: PackedRows) -> None:
    assert MAX_CONVERSATIONS == 3
    for row, compared in [
        (((0,), (1, 2), (3,), (4,)), ((1, 2), (0,))),
        (((0,), (1, 2, 3, 4)), ((1, 2, 3),)),
        (((0,), (1,)), ((0,), (1,))),
    ]:
        rows.rows = [row]
        assert _first_trees(rows) == compared


def eager(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bool mask, which eager attention adds."""
    monkeypatch.setattr(attention_module, "additive_mask", lambda *inputs: additive_mask(*inputs) == 0)
    model.set_attn_implementation("eager")


def no_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Batch:
        batch = build_row(*args, **kwargs)
        length = batch["input_ids"].shape[1]
        one_tree = {"tree_spans": torch.tensor([[0, length, length]]), "segments": torch.zeros(2, length).long()}
        one_tree["segments"][1] = 1
        return batch | one_tree

    monkeypatch.setattr(batch_module, "build_row", broken)


def linear_positions(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Batch:
        batch = build_row(*args, **kwargs)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(batch_module, "build_row", broken)


TREE, TREES_OF_ONE = ((1, 2, 3, 4),), ((0,), (1,), (2,))


# Positions count relative to one another: a shift of whole conversations that do not share anything changes nothing.
@pytest.mark.parametrize(
    ("mistake", "row"),
    [(eager, TREE), (no_mask, TREE), (linear_positions, TREE), (eager, TREES_OF_ONE), (no_mask, TREES_OF_ONE)],
)
def test_each_silent_mistake_stops_the_run(
    rows: PackedRows, monkeypatch: pytest.MonkeyPatch, mistake: Any, row: Row
) -> None:
    rows.rows = [row]
    model = build_model()
    mistake(model, monkeypatch)
    with pytest.raises(TrainingError, match=r"record [01] and others.*relative difference.*packing: none"):
        check_first_row(model, rows, torch.float32, CPU)


@pytest.mark.fault("training: a loss of NaN or infinity")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.norm.weight", "projector"])
def test_k39_a_weight_that_is_not_finite_is_named(rows: PackedRows, value: float, name: str) -> None:
    model = build_model()
    names = [
        one for one, _ in model.named_parameters() if one.endswith(name) or "modules_to_save.default.linear_1.b" in one
    ]
    [full] = [one for one in names if ("linear_1" in one) == (name == "projector")]
    with torch.no_grad():
        dict(model.named_parameters())[full].view(-1)[1] = value
    with pytest.raises(TrainingError) as caught:
        check_first_row(model, rows, torch.float32, CPU)
    assert str(caught.value).startswith(f"the model holds NaN or infinity before its first step: {full}. Its base, or ")
    assert "acking" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_k39_an_image_that_is_not_finite_is_named(rows: PackedRows, value: float) -> None:
    read = rows.read_image

    def spoiled(record: Record) -> torch.Tensor:
        pixels = read(record).clone()
        pixels[0, 3, 3] = value
        return pixels

    rows.read_image = spoiled
    with pytest.raises(TrainingError, match=r"^record 1: its image holds NaN or infinity\. Replace it, or exclude"):
        check_first_row(build_model(), rows, torch.float32, CPU)
    # A step with it will be left out.
    assert check_first_row(build_model(), rows, torch.float32, CPU, True) is None
