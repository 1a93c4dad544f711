"""What the images are worth to a model: nothing to one whose projector is dead, much to one that learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.packing import Row, conversations
from lora_llava.data.rows import ImageTransform, PackedRows
from lora_llava.training.checks.blind import MAX_CONVERSATIONS, MAX_IMAGES, BlindCheck, make_image_check, sample_rows
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.steps import Pictures, made_rows, made_trainer, record
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD
from tests.parity.test_packed import conversation

TRANSFORM = ImageTransform(IMAGE_SIZE, IMAGE_MEAN, IMAGE_STD, "pad")
STEPS = 40


def yes_or_no() -> PackedRows:
    """One question about two images, with an answer that only the image tells; a row for each, in turn."""
    encoded = [conversation("<image>\nIs it?", answer) for answer in ("yes", "no")]
    rows: list[Row] = [((0,),), ((1,),)] * STEPS
    return PackedRows(rows, [record(number, str(number)) for number in (0, 1)], encoded, Pictures())


def trainer_with_check(directory: Path, **settings: Any) -> PackedTrainer:
    rows = yes_or_no()
    trainer = made_trainer(directory, rows, **{"learning_rate": 1e-2, "max_steps": STEPS, **settings})
    trainer.mm_projector_lr = 1e-2
    trainer.eval_dataset = PackedRows(rows.rows[:2], rows.records, rows.encoded, rows.read_image)
    guard, monitor = trainer.checks
    trainer.checks = [guard, BlindCheck(make_image_check(trainer.eval_dataset, TRANSFORM)), monitor]
    return trainer


def test_a_model_that_looks_is_not_accused(tmp_path: Path) -> None:
    trainer = trainer_with_check(tmp_path)
    trainer.train()
    metrics = trainer.evaluate()
    # As far down as a head that is frozen at random lets it.
    assert metrics["eval_loss"] < 0.4
    assert metrics["image_gain"] > 0.5
    # The sample is all there is.
    assert metrics["eval_loss_blind"] - metrics["image_gain"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert "warning" not in metrics


def test_a_model_with_a_dead_projector_does_not_look(tmp_path: Path) -> None:
    trainer = trainer_with_check(tmp_path, max_steps=8)
    copy = trainer.model.get_base_model().model.multi_modal_projector.modules_to_save["default"]
    with torch.no_grad():
        copy.linear_2.weight.zero_()
        copy.linear_2.bias.zero_()
    copy.requires_grad_(False)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["image_gain"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval_loss"] > 0.5
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_blind"], abs=1e-6)
    assert metrics["warning"].startswith("the model does not look at the images: its validation loss is ")
    [logged] = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert logged["warning"] == metrics["warning"]


def test_blind_rows_share_the_prefix_of_the_mean_color_and_lose_nothing(tmp_path: Path) -> None:
    single = made_rows()
    # Three images a row.
    trees = [tree for row in single.rows for tree in row]
    rows = PackedRows(
        [tuple(trees[start : start + 3]) for start in range(0, len(trees), 3)],
        single.records,
        single.encoded,
        single.read_image,
    )
    check = make_image_check(rows, TRANSFORM)
    assert check is not None
    pixels = check.blind[0]["pixel_values"]
    # Nearly 0: the mean colour is one of whole numbers.
    assert pixels.abs().max() < 0.02

    # The rows as they were, with the mean color in place of every image.
    trainer = made_trainer(tmp_path, rows)
    unshared = PackedRows(check.true.rows, rows.records, rows.encoded, lambda _: pixels[0])
    assert sorted(conversations(check.blind.rows)) == sorted(conversations(unshared.rows))
    with torch.no_grad():
        losses = [trainer.held_out.mean(one) for one in (check.blind, unshared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    # Fewer tokens, in rows that are no longer.
    tokens, before = (
        [packed[number]["input_ids"].numel() for number in range(len(packed))] for packed in (check.blind, unshared)
    )
    assert max(tokens) <= max(before)
    assert sum(tokens) < 0.8 * sum(before)


def test_blind_rows_of_other_prefixes_are_other_trees() -> None:
    texts = [("<image>\nIs it?", "yes"), ("<image>\nIs it red?", "no")]
    encoded = [conversation(*text) for text in texts] + [conversation(*text, template="plain") for text in texts[:1]]
    rows = PackedRows([((0,), (1,), (2,))], [record(number, str(number)) for number in range(3)], encoded, Pictures())
    check = make_image_check(rows, TRANSFORM)
    assert check is not None
    assert sorted(check.blind.rows[0]) == [(0, 1), (2,)]


def test_a_sample_of_all_is_computed_once(tmp_path: Path) -> None:
    trainer = trainer_with_check(tmp_path)
    blind = trainer.checks[1]
    assert isinstance(blind, BlindCheck)
    assert blind.sample is not None
    passes: list[int] = []
    mean_loss = trainer.held_out.mean

    def counted(*args: Any) -> float | None:
        passes.append(1)
        return mean_loss(*args)

    trainer.held_out.mean = counted  # type: ignore[method-assign]
    once = trainer.evaluate()
    assert len(passes) == 2
    blind.sample = replace(blind.sample, is_whole=False)
    twice = trainer.evaluate()
    assert len(passes) == 5
    assert twice["image_gain"] == pytest.approx(once["image_gain"], abs=1e-6)


def test_rows_of_the_sample_that_were_just_validated_are_not_computed_again(tmp_path: Path) -> None:
    trainer = trainer_with_check(tmp_path)
    blind = trainer.checks[1]
    assert isinstance(blind, BlindCheck)
    assert blind.sample is not None
    computed: list[float] = []
    row_loss = trainer.held_out.row_loss

    def counted(batch: Any) -> torch.Tensor:
        loss = row_loss(batch)
        computed.append(float(loss))
        return loss

    trainer.held_out.row_loss = counted
    blind.sample = replace(blind.sample, is_whole=False)
    before = trainer.evaluate()
    # Two rows with their images, and the same without.
    assert len(computed) == 4
    assert before["eval_loss_blind"] - before["image_gain"] == pytest.approx(before["eval_loss"], abs=1e-9)

    # A row that is cut short is another row, and new weights are other losses.
    rows = trainer.eval_dataset
    assert rows is not None
    trainer.eval_dataset = PackedRows([((0,), (1,))], rows.records, rows.encoded, rows.read_image)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    computed.clear()
    after = trainer.evaluate()
    assert len(computed) == 5
    assert computed[0] == pytest.approx(computed[1] + computed[2], rel=1e-5)
    assert after["eval_loss"] != before["eval_loss"]


def rows_of(rows: Sequence[Row], texts: Sequence[int] = ()) -> PackedRows:
    count = 1 + max(index for row in rows for tree in row for index in tree)
    records = [record(number, str(number)) for number in range(count)]
    records = [one if one.number not in texts else type(one)("t", None, (), "") for one in records]
    return PackedRows(rows, records, [], Pictures())


def test_the_sample_is_bounded_and_spread() -> None:
    whole: list[Row] = [tuple((8 * tree + 4 * row, 8 * tree + 4 * row + 1) for tree in range(100)) for row in (0, 1)]
    sample = sample_rows(rows_of(whole))
    trees = [tree for row in sample for tree in row]
    assert len(trees) == MAX_IMAGES
    assert sum(map(len, trees)) == MAX_CONVERSATIONS
    assert [len(row) for row in sample] == [16, 16]
    assert all(set(row) <= set(before) for row, before in zip(sample, whole, strict=True))
    wide: list[Row] = [(tuple(range(200)),)]
    assert sample_rows(rows_of(wide)) == [(tuple(range(MAX_CONVERSATIONS)),)]


def test_texts_alone_leave_nothing_to_check() -> None:
    rows: list[Row] = [((0,), (1,)), ((2,),)]
    assert sample_rows(rows_of(rows, texts=[0, 2])) == [((1,),)]
    assert make_image_check(rows_of(rows, texts=[0, 1, 2]), TRANSFORM) is None
