"""Runs in fp16, on a CPU, whose operators know it: losses are those of fp32, and a stopped run continues exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lora_llava.training.train as train_module
import lora_llava.training.trainer as trainer_module
from lora_llava.run_directory.output import read_log
from lora_llava.system.files import file_sha256
from tests.helpers.resuming import Stopped, at_step, outcome, stop, train

SETTINGS = ("quantization.type=nf4", "quantization.keep_dequantized=false", "stages.align.num_train_epochs=1")


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp16 on a CPU, which `pick_dtype` refuses because it is slow; the scale grows every fourth step."""

    def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
        assert dtype == torch.float16
        return torch.amp.GradScaler(device.type, init_scale=2.0**12, growth_interval=4)

    monkeypatch.setattr(train_module, "pick_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(trainer_module, "make_scaler", scaler)


def losses(directory: Path, key: str) -> list[float]:
    return [row[key] for row in read_log(directory) if key in row]


def scaler_file(directory: Path) -> Path:
    return directory / "checkpoints" / "instruct" / "step-10" / "scaler.json"


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
def test_fp16_has_the_losses_of_fp32_and_goes_on_to_the_bit(project: Path, tmp_path: Path, in_fp16: None) -> None:
    ours = (*SETTINGS, "precision=fp16")
    _, shown = train(project, tmp_path / "fp16", *ours)
    assert "align: precision: fp16 (recipe); the loss is scaled" in shown
    assert "float16, float32, nf4" in shown
    state = json.loads(scaler_file(tmp_path / "fp16").read_text(encoding="utf-8"))
    assert (state["scale"], state["_growth_tracker"]) == (2.0**14, 2)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", 8, stop)
        with pytest.raises(Stopped):
            train(project, tmp_path / "stopped", *ours)
    train(project, tmp_path / "stopped", *ours, resume="exact")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "fp16")
    assert file_sha256(scaler_file(tmp_path / "stopped")) == file_sha256(scaler_file(tmp_path / "fp16"))

    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(train_module, "pick_dtype", lambda *_: torch.float32)
        patch.setattr(trainer_module, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
        train(project, tmp_path / "fp32", *SETTINGS)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert losses(tmp_path / "fp16", key) == pytest.approx(losses(tmp_path / "fp32", key), rel=0.02), key
    assert not scaler_file(tmp_path / "fp32").exists()
