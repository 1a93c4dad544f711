"""An adapter folded into the weights computes what it computes next to them, and leaves the base as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from lora_llava.artifact import load_artifact
from lora_llava.modeling.base import LoadedModel
from lora_llava.modeling.folded import can_fold, folded
from tests.helpers.artifacts import CPU, logits, make_artifact


def loaded_for_many(artifact: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_artifact(artifact, device=CPU, dtype=dtype, keep_dequantized=None)[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_folded_equals_base_and_adapter(tiny_base: Path, tmp_path: Path, kind: str, nf4: bool) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=nf4, kind=kind)
    apart = load_artifact(artifact, device=CPU, dtype=torch.float32)[0].model
    theirs = logits(apart)
    with apart.disable_adapter():
        base = logits(apart)
    model = loaded_for_many(artifact).model
    assert can_fold(model)
    with folded(model):
        ours = logits(model)
        # PEFT neither adds the adapter a second time nor leaves it out.
        assert all(module.merged for module in model.modules() if hasattr(module, "lora_variant"))
    assert 0 < difference(ours, theirs) < 1e-5
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert difference(base, theirs) > 0.1, "the adapter changes nothing, so nothing was shown"
    assert difference(logits(model), theirs) < 1e-5
    with model.disable_adapter():
        assert difference(logits(model), base) < 1e-5


@pytest.mark.parametrize("why", ["dora", "bf16", "4 bits"])
def test_what_rounds_otherwise_stays_apart(
    tiny_base: Path, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "4 bits":
        monkeypatch.setattr("lora_llava.modeling.base.free_memory_bytes", lambda _: 1000)
    kind = "dora" if why == "dora" else "lora"
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=why != "dora", kind=kind)
    model = loaded_for_many(artifact, torch.bfloat16 if why == "bf16" else torch.float32).model
    assert any(isinstance(module, Linear4bit) for module in model.modules()) == (why == "4 bits")
    assert not can_fold(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "bf16"):
        before = logits(model)
        with folded(model):
            assert torch.equal(logits(model), before)


def test_weights_are_dequantized_where_half_of_the_memory_holds_them(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    layers = [module for module in loaded_for_many(artifact).model.modules() if hasattr(module, "lora_variant")]
    needed = sum(4 * layer.get_base_layer().weight.numel() for layer in layers)
    for free, quantized in ((2 * needed, False), (2 * needed - 1, True)):
        monkeypatch.setattr("lora_llava.modeling.base.free_memory_bytes", lambda _, free=free: free)
        model = loaded_for_many(artifact).model
        assert any(isinstance(module, Linear4bit) for module in model.modules()) == quantized
