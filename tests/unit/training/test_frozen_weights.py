"""Checksums of frozen weights: nothing that changes passes, and nothing that is trained is looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import Linear4bit

import lora_llava.training.checks.frozen_weights as frozen_module
from lora_llava.errors import TrainingError
from lora_llava.training.checks.frozen_weights import FrozenWeights, checksum, chunk_sums
from tests.parity.test_packed import build_model

Sum = Callable[[torch.Tensor], object]


def device_sum(tensor: torch.Tensor) -> list[int]:
    return chunk_sums(tensor.contiguous().flatten().view(torch.uint8))


@pytest.fixture(params=[checksum, device_sum], ids=["cpu", "device"])
def sum_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sum:
    monkeypatch.setattr(frozen_module, "CHUNK", 64)
    frozen_module._factors.cache_clear()
    made: Sum = request.param
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_bit_counts(sum_of: Sum, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 211, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    assert sum_of(tensor) == sum_of(tensor.clone())
    data = tensor.flatten().view(torch.uint8)
    for place in (0, 1, len(data) // 2, len(data) - 2, len(data) - 1):
        for bit in (0, 7):
            changed = data.clone()
            changed[place] ^= 1 << bit
            assert sum_of(changed.view(dtype).view(3, 211)) != sum_of(tensor)


def test_changes_that_cancel_in_a_plain_sum_are_seen(sum_of: Sum) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    swapped = tensor.clone()
    swapped[[3, 900]] = tensor[[900, 3]]
    two_signs = tensor.clone()
    two_signs[[4, 6]] *= -1
    for other in (swapped, two_signs, -tensor, tensor.flip(0), tensor.roll(64), tensor.roll(1)):
        assert sum_of(other) != sum_of(tensor)


def test_type_and_shape_count() -> None:
    zeros = torch.zeros(4, 6)
    assert len({checksum(zeros), checksum(zeros.view(6, 4)), checksum(zeros.int()), checksum(torch.zeros(0))}) == 4


def test_pieces_of_a_storage_are_summed_as_their_copies(sum_of: Sum) -> None:
    data = torch.arange(100, dtype=torch.uint8)
    for start in range(5):
        assert sum_of(data[start : start + 50]) == sum_of(data[start : start + 50].clone())
    assert sum_of(torch.zeros(4, 3).t()) == sum_of(torch.zeros(3, 4))


def frozen_weights_of(model: torch.nn.Module) -> FrozenWeights:
    frozen = FrozenWeights("align")
    frozen.before_training(model)
    return frozen


@pytest.mark.fault("training: frozen weights that change")
@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.language_model.layers.1.mlp.up_proj.base_layer.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.multi_modal_projector.original_module.linear_1.weight",
    ],
)
def test_a_frozen_weight_that_changes_is_named(name: str) -> None:
    model = build_model()
    frozen = frozen_weights_of(model)
    weight = model.get_base_model().get_parameter(name)
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(
        TrainingError, match=rf"stage align: 1 of \d+ frozen .*: base_model\.model\.{name}\. Nothing more"
    ):
        frozen.on_save()


def test_what_is_trained_may_change() -> None:
    model = build_model()
    frozen = frozen_weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    size = sum(one.nbytes for one in model.parameters() if not one.requires_grad)
    assert frozen.bytes == size + sum(one.nbytes for one in model.buffers())
    assert "the frozen weights did not change" in str(frozen.on_save())


def test_a_weight_that_is_thawed_is_named() -> None:
    model = build_model()
    frozen = frozen_weights_of(model)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"lm_head\.weight"):
        frozen.on_save()


def test_the_scales_of_4_bit_weights_count() -> None:
    layer = Linear4bit(64, 64, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    layer.requires_grad_(False)
    frozen = frozen_weights_of(layer)
    assert set(frozen.sums) == {"weight", "weight.absmax", "weight.nested_absmax", "weight.offset"}
    layer.weight.quant_state.offset += 1e-4
    with pytest.raises(TrainingError, match=r"1 of 4 frozen .*: weight\.offset\."):
        frozen.on_save()
