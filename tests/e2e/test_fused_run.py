"""A run trains fused layers, with the numbers of PEFT's path; what cannot be fused says so in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

import lora_llava.training.train as train_module
from lora_llava.modeling.fused.layer import FusedLayer
from lora_llava.recipe.file import load_recipe
from lora_llava.run_directory.output import read_log
from lora_llava.training.checkpoints.differences import Resume
from lora_llava.training.run import run_recipe
from tests.helpers.resuming import Stopped, at_step, stop
from tests.helpers.runs import write_data, write_recipe

NOT_FUSED = "decoder layers train through PEFT's path, not fused: "
OVERRIDES = (
    "stages.instruct.max_steps=4", "stages.instruct.num_sample_answers=0", "stages.instruct.keep=last",
    "stages.instruct.save_steps=2", "adapter.lora_dropout=0.1",
)  # fmt: skip
WEIGHTS = "instruct/adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fused")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)}, ["instruct"])


def train(recipe: Path, directory: Path, *overrides: str, resume: Resume = "no") -> str:
    """Run it, or resume it, and return what it prints."""
    shown = io.StringIO()
    settings = load_recipe(recipe, [*OVERRIDES, f"output_dir={directory}", *overrides])
    run_recipe(settings, Console(file=shown, width=200), resume=resume)
    return shown.getvalue()


def stop_at_step_3(recipe: Path, directory: Path) -> None:
    """Run it to its third step and end it there; the checkpoint of the second is left."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", 3, stop)
        with pytest.raises(Stopped):
            train(recipe, directory)


def logged(directory: Path) -> list[float]:
    """Return the figures of training and validation."""
    keys = ("loss", "grad_norm", "eval_loss", "eval_loss_blind")
    return [row[key] for row in read_log(directory) for key in keys if key in row]


@pytest.fixture
def fused_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the rows that fused layers compute."""
    rows: list[int] = []
    packed = FusedLayer._packed

    def noted(self: FusedLayer, x: Any, *args: Any) -> Any:
        rows.append(len(x))
        return packed(self, x, *args)

    monkeypatch.setattr(FusedLayer, "_packed", noted)
    return rows


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run_trains_fused_layers_with_the_numbers_of_pefts(
    recipe: Path, tmp_path: Path, fused_rows: list[int], monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    text = train(recipe, tmp_path / "fused", f"quantization.type={quantization}")
    assert NOT_FUSED not in text
    assert len(fused_rows) > 4
    fused_rows.clear()
    monkeypatch.setattr(train_module, "fuse_layers", lambda _model: "a test")
    text = train(recipe, tmp_path / "peft", f"quantization.type={quantization}")
    assert text.count(f"instruct: {NOT_FUSED}a test") == 1
    assert not fused_rows
    ours, theirs = logged(tmp_path / "fused"), logged(tmp_path / "peft")
    assert len(ours) > 8
    assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("fused", "peft")]
    assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole")
    stop_at_step_3(recipe, tmp_path / "resumed")
    train(recipe, tmp_path / "resumed", resume="exact")
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_an_earlier_version_is_resumed_to_rounding(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused_rows: list[int]
) -> None:
    # Versions without fused layers trained through PEFT's path.
    with monkeypatch.context() as earlier:
        earlier.setattr(train_module, "fuse_layers", lambda _model: "an earlier version")
        train(recipe, tmp_path / "whole")
        stop_at_step_3(recipe, tmp_path / "resumed")
    assert not fused_rows
    train(recipe, tmp_path / "resumed", resume="exact")
    assert fused_rows
    assert logged(tmp_path / "resumed") == pytest.approx(logged(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize(
    ("override", "reason"),
    [("adapter.type=dora", "DoraLinearVariant instead of plain LoRA")],
)
def test_an_adapter_that_cannot_be_fused_trains_through_peft(
    recipe: Path, tmp_path: Path, fused_rows: list[int], override: str, reason: str
) -> None:
    text = train(recipe, tmp_path / "run", override, "stages.instruct.max_steps=1")
    assert text.count(f"instruct: {NOT_FUSED}{reason}") == text.count(NOT_FUSED) == 1
    assert not fused_rows
    assert json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["instruct"]["steps"] == 1
