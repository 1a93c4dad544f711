"""A loaded base computes the same without what it does not need, and with its 4-bit weights held in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_llava.data.rows import build_row
from lora_llava.modeling.base import BaseIdentity, drop_unused_layers, load_base
from lora_llava.modeling.packed import packed_logits, packed_loss
from lora_llava.modeling.stages import build_stage, check_stage, is_quantized
from lora_llava.recipe.settings import AdapterSettings
from tests.helpers.tiny import IMAGE_SIZE, save_tiny_base, tiny_llava
from tests.parity.test_packed import branches, gradients


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def load(directory: Path, dtype: torch.dtype, *, keep_dequantized: bool) -> Any:
    model = load_base(
        directory,
        BaseIdentity("tiny", None, ""),
        nf4=True,
        double_quant=True,
        keep_dequantized=keep_dequantized,
        dtype=dtype,
        device=torch.device("cpu"),
    ).model
    torch.manual_seed(0)
    return build_stage(model, "instruct", AdapterSettings(r=4, lora_alpha=8.0)).train()


def row() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return build_row([branches(3)]) | {"pixel_values": pixels}


def test_dequantised_weights_compute_what_the_quantised_ones_do(directory: Path) -> None:
    quantized = load(directory, torch.float32, keep_dequantized=False)
    dequantized = load(directory, torch.float32, keep_dequantized=True)
    check_stage(dequantized, "instruct", nf4=False)
    assert not any(is_quantized(parameter) for parameter in dequantized.parameters())
    with torch.no_grad():
        assert torch.equal(packed_logits(quantized, row()), packed_logits(dequantized, row()))
    ours, theirs = (gradients(model, packed_loss(model, row(), 5)) for model in (dequantized, quantized))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_they_are_not_the_weights_before_quantising(directory: Path) -> None:
    model = load(directory, torch.float32, keep_dequantized=True).get_base_model()
    name = "model.language_model.layers.0.mlp.up_proj"
    ours, original = (one.get_submodule(name) for one in (model, tiny_llava()))
    ours = getattr(ours, "base_layer", ours)
    assert not torch.equal(ours.weight, original.weight)
    assert torch.corrcoef(torch.stack([ours.weight.flatten(), original.weight.flatten()]))[0, 1] > 0.97


def test_dequantised_weights_have_the_precision_that_is_computed_in(directory: Path) -> None:
    model = load(directory, torch.bfloat16, keep_dequantized=True).get_base_model()
    linears = [
        m for m in model.model.language_model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad
    ]
    assert len(linears) == 14
    assert {linear.weight.dtype for linear in linears} == {torch.bfloat16}


@pytest.mark.parametrize("layer", [-1, -2, 1, 2])
def test_features_are_the_same_without_the_layers_behind_them(layer: int) -> None:
    whole, short = tiny_llava(seed=1), tiny_llava(seed=1)
    whole.config.vision_feature_layer = short.config.vision_feature_layer = layer
    drop_unused_layers(short)
    assert len(short.model.vision_tower.encoder.layers) == layer % 3
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        theirs, ours = (model.get_image_features(pixels).pooler_output for model in (whole, short))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
