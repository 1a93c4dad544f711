"""The training loss of each source, against its conversations one by one, and against the loss of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lora_llava.modeling.packed as packed_module
from lora_llava.conversation.encode import Encoded
from lora_llava.data.record import Record
from lora_llava.data.rows import PackedRows
from lora_llava.modeling.packed import packed_logits, packed_loss, packed_loss_by_token
from lora_llava.training.log import log_figures
from lora_llava.training.objectives import by_source
from lora_llava.training.objectives.by_source import LossBySource
from lora_llava.training.objectives.preference import PreferenceObjective
from lora_llava.training.trackers import _renaming
from tests.helpers.pairs import prefer_settings
from tests.helpers.runs import state_of
from tests.helpers.steps import IN_A_STEP, made_rows, made_trainer, same
from tests.parity.test_packed import branches, build_model, gradients, image, own_loss, row_of

STEPS = 3
NAMES = ("own.json", "replay")
CPU = torch.device("cpu")


def source_of(number: int) -> str:
    """Both sources are in each step, in unequal parts, and in most rows."""
    return NAMES[number % 3 == 0]


def mixed_rows(steps: Sequence[int] = range(STEPS), names: Sequence[str] = NAMES, **options: Any) -> PackedRows:
    rows = made_rows(steps, **options)
    records = [replace(record, source=source_of(number)) for number, record in enumerate(rows.records)]
    return PackedRows(rows.rows, records, rows.encoded, rows.read_image, names)


def still(directory: Path, rows: PackedRows, **settings: Any) -> Any:
    """A trainer that leaves the weights as they are."""
    trainer = made_trainer(directory, rows, **{"learning_rate": 0.0, "max_grad_norm": 0.0, **settings})
    trainer.mm_projector_lr = None
    return trainer


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def one_by_one(steps: Sequence[int]) -> dict[str, tuple[float, int]]:
    """Summed loss and supervised tokens of each source in these steps."""
    model, sums = build_model(), dict.fromkeys(NAMES, (0.0, 0))
    encoded = branches(IN_A_STEP * (max(steps) + 1))
    for number in (number for step in steps for number in range(step * IN_A_STEP, (step + 1) * IN_A_STEP)):
        count = encoded[number].num_supervised
        loss = float(own_loss(model, encoded[number], image(number // 2, torch.float32)[None]).detach()) * count
        before = sums[source_of(number)]
        sums[source_of(number)] = before[0] + loss, before[1] + count
    return sums


def test_each_line_has_the_mean_of_each_source_and_by_tokens_they_make_up_the_loss(tmp_path: Path) -> None:
    trainer = still(tmp_path, mixed_rows())
    trainer.train()
    assert len(lines_of(trainer)) == STEPS
    for step, line in enumerate(lines_of(trainer)):
        sums = one_by_one([step])
        for name, (loss, count) in sums.items():
            assert line[f"loss/{name}"] == pytest.approx(loss / count, rel=1e-5)
        tokens = sum(count for _, count in sums.values())
        weighted = sum(line[f"loss/{name}"] * count for name, (_, count) in sums.items())
        assert weighted / tokens == pytest.approx(line["loss"], rel=1e-6)


def test_a_line_over_several_steps_weighs_their_tokens(tmp_path: Path) -> None:
    trainer = still(tmp_path, mixed_rows(), logging_steps=2)
    trainer.train()
    lines = lines_of(trainer)
    assert [line["step"] for line in lines] == [2, 3]
    for line, steps in zip(lines, ([0, 1], [2]), strict=True):
        for name, (loss, count) in one_by_one(steps).items():
            assert line[f"loss/{name}"] == pytest.approx(loss / count, rel=1e-5)


def test_losses_and_weights_are_to_the_bit_those_without_sources(tmp_path: Path) -> None:
    trainers = [made_trainer(tmp_path, mixed_rows(names=names)) for names in ((), NAMES)]
    for trainer in trainers:
        trainer.train()
    plain, mixed = ([line["loss"] for line in lines_of(trainer)] for trainer in trainers)
    assert plain == mixed
    assert same(state_of(trainers[0].model), state_of(trainers[1].model))
    assert not any(key.startswith("loss/") for line in lines_of(trainers[0]) for key in line)


@pytest.mark.parametrize("chunk", [3, 4096])
def test_losses_by_token_come_with_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", chunk)
    model, row = build_model(), row_of([branches(3)], torch.float32)
    assert row["shift_labels"].numel() > 3
    expected = packed_loss(model, row, 7)
    loss, by_token = packed_loss_by_token(model, row, 7)
    assert torch.equal(loss, expected)
    assert not by_token.requires_grad
    with torch.no_grad():
        alone = F.cross_entropy(packed_logits(model, row).float(), row["shift_labels"], reduction="none")
    torch.testing.assert_close(by_token, alone)
    assert same(gradients(model, loss), gradients(model, expected))


def test_a_step_that_is_skipped_is_left_out(tmp_path: Path) -> None:
    # Row 2 is in the second step; all of its tokens have a loss of NaN.
    trainer = still(tmp_path, mixed_rows(spoilt=["2"]), logging_steps=3, most_skipped=1)
    trainer.train()
    [line] = lines_of(trainer)
    for name, (loss, count) in one_by_one([0, 2]).items():
        assert line[f"loss/{name}"] == pytest.approx(loss / count, rel=1e-5)


def test_sums_survive_a_checkpoint_between_two_lines() -> None:
    def of(*steps: Sequence[float], sums: LossBySource | None = None) -> LossBySource:
        sums = sums or LossBySource(NAMES, CPU)
        for losses in steps:
            sums.add(torch.tensor([0, 1, 1]), torch.tensor(losses))
            sums.end_step(counts=True)
        return sums

    first, second = (0.1, 0.2, 0.7), (0.3, 1.1, 5.0)
    own, *replay = torch.tensor(first).double().tolist()
    assert of(first).state() == {"own.json": (own, 1.0), "replay": (sum(replay), 2.0)}
    resumed = LossBySource(NAMES, CPU)
    resumed.restore(json.loads(json.dumps(of(first).state())))
    expected = of(first, second).take()
    assert of(second, sums=resumed).take() == expected
    assert expected == pytest.approx({"loss/own.json": 0.2, "loss/replay": 7.0 / 4})
    # After a line the sums start again; a source that had no item has no mean.
    assert resumed.take() == {}
    resumed.add(torch.tensor([1]), torch.tensor([2.0]))
    resumed.end_step(counts=True)
    assert resumed.take() == {"loss/replay": 2.0}
    # Neither of before nor of a source that the recipe has no more is anything left.
    resumed.add(torch.tensor([0, 1]), torch.tensor([8.0, 9.0]))
    resumed.end_step(counts=True)
    resumed.add(torch.tensor([0]), torch.tensor([8.0]))
    resumed.restore({"gone.json": (3.0, 1.0)})
    resumed.add(torch.tensor([0]), torch.tensor([5.0]))
    resumed.end_step(counts=True)
    assert resumed.take() == {"loss/own.json": 5.0}


def test_of_several_processes_the_first_takes_up_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, expected in ((0, {"loss/replay": 2.0}), (1, {})):
        monkeypatch.setattr(by_source, "rank", lambda number=number: number)
        sums = LossBySource(NAMES, CPU)
        sums.restore({"replay": (6.0, 3.0)})
        assert sums.take() == expected


def test_nothing_in_a_step_waits_for_the_device() -> None:
    """A tensor on the device `meta` has no values: reading one raises."""
    device = torch.device("meta")
    sums = LossBySource((*NAMES, "third"), device)
    for counts in (True, False):
        sums.add(torch.zeros(5, dtype=torch.int64, device=device), torch.ones(5, device=device))
        sums.end_step(counts=counts)
    with pytest.raises(RuntimeError, match="meta tensor"):
        sums.take()


def test_a_pair_is_one_item() -> None:
    chosen, rejected = branches(2)[0], branches(2)[1]
    shared = chosen.prefix_length
    pair = replace(chosen, rejected=replace(rejected, prefix_length=shared), reference=(-3.0, -4.0))
    records = [Record(str(number), None, (), "", source=NAMES[number != 1]) for number in range(3)]
    encoded: list[Encoded] = [pair] * 3
    row = PackedRows([((0,), (1,), (2,))], records, encoded, lambda _: image(0, torch.float32), NAMES)[0]
    assert row["sources"].tolist() == [1, 0, 1]
    # As exact as they were computed.
    assert row["reference"].dtype == torch.float64
    row["pixel_values"] = torch.stack([image(number, torch.float32) for number in range(3)])
    objective, model = PreferenceObjective(prefer_settings()), build_model()
    loss, losses = objective.loss_by_item(model, row, 3)
    assert losses.shape == (3,)
    assert float(losses.sum() / 3) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert len(set(losses.tolist())) == 3


def test_the_line_on_the_screen_names_the_sources_after_the_loss() -> None:
    row = {"loss": 1.0, "learning_rate": 1e-4, "questions_per_second": 1.0, "supervised_tokens_per_second": 2.0}
    assert not any("of " in figure for figure in log_figures(row))
    named = {**row, "loss/own.json": 0.5, f"loss/a\x1b{'long' * 20}": 1.25}
    assert log_figures(named)[1] == "of own.json 0.5000, a\\elonglonglonglonglongl\N{HORIZONTAL ELLIPSIS} 1.2500"


def test_no_name_of_a_tracked_figure_is_a_directory_of_another() -> None:
    """MLflow keeps figures as files, so `loss` and `loss/replay` cannot both exist."""
    seen: list[dict[str, float]] = []
    callback = SimpleNamespace(on_log=lambda _args, logs, step: seen.append({**logs, "at": step}))
    row = {"loss": 1.0, "loss/replay": 2.0, "loss/org/set": 3.0, "eval_loss": 4.0, "eval_loss/replay": 5.0, "lr": 6.0}
    _renaming(callback).on_log("args", logs=row, step=7)
    assert list(seen[0].values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7]
    assert "loss_by_source/org/set" in seen[0]
    assert not any(one.startswith(f"{other}/") for one in seen[0] for other in seen[0])
