"""Fused decoder layers against transformers', PEFT's and bitsandbytes' own: gradients, names, and what is not fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_llava.data.rows import Batch
from lora_llava.modeling.attention import set_attention, with_sdpa
from lora_llava.modeling.base import undo_double_quantization
from lora_llava.modeling.fused.layer import FusedLayer, fuse_layers
from lora_llava.modeling.packed import llava_in, packed_logits, packed_loss
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.structure import FLEX, LANGUAGE_MODEL, is_fused
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.system.device import autocast
from tests.helpers.layers import Layers, config_of, one_tree, training_model, two_trees
from tests.parity.test_packed import Gradients

TOLERANCE = 1e-5
SHAPES = {
    "NF4": Layers(),
    "unquantized": Layers(quantization="none"),
    "dequantized": Layers(quantization="dequantized"),
    "stage 1": Layers(stage="align"),
    "grouped keys": Layers(key_value_heads=2),
    "queries and values": Layers(adapter=AdapterSettings(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"])),
    "gate and output": Layers(adapter=AdapterSettings(r=4, lora_alpha=8.0, target_modules=["gate_proj", "o_proj"])),
    "down": Layers(adapter=AdapterSettings(r=4, lora_alpha=8.0, target_modules=["down_proj"])),
    "rank-stabilized": Layers(adapter=AdapterSettings(type="rslora", r=4, lora_alpha=8.0)),
    "dropout": Layers(adapter=AdapterSettings(r=4, lora_alpha=8.0, lora_dropout=0.3)),
    "dropout, queries and down": Layers(
        adapter=AdapterSettings(r=4, lora_alpha=8.0, lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    ),
}


def layers_of(model: Any) -> Any:
    return llava_in(model).get_submodule(LANGUAGE_MODEL).layers


def unfuse(model: Any) -> None:
    for layer in layers_of(model):
        layer.__class__ = LlamaDecoderLayer


def gradients_of(model: Any, *rows: Batch) -> Gradients:
    """Accumulate the gradients of rows; dropout draws the same numbers each time."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    for row in rows:
        with autocast(torch.device("cpu"), dtype):
            loss = packed_loss(model, row, 10)
        loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def worst(ours: Gradients, theirs: Gradients) -> float:
    """Return the largest relative error of a parameter's gradient."""
    assert ours.keys() == theirs.keys()
    assert all(float(one.norm()) > 0 for one in theirs.values())
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.usefixtures("masked_trees")
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_the_gradients_are_those_of_peft_and_bitsandbytes(shapes: Layers) -> None:
    model, rows = training_model(shapes), (two_trees(), one_tree())
    names = [name for name, _ in model.named_parameters()]
    before = gradients_of(model, *rows)
    assert fuse_layers(model) is None
    assert [type(layer) for layer in layers_of(model)] == [FusedLayer] * (shapes.layers - 1) + [LlamaDecoderLayer]
    assert [name for name, _ in model.named_parameters()] == names
    assert worst(gradients_of(model, *rows), before) < TOLERANCE

    # The copies of the factors follow the optimizer.
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.step()
    after = gradients_of(model, *rows)
    unfuse(model)
    assert worst(after, gradients_of(model, *rows)) < TOLERANCE
    assert worst(after, before) > 100 * TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("policy", "full"), [(True, 0), ("selective", 1), ("selective", 0)])
def test_recomputing_changes_no_bit(policy: Any, full: int, dropout: float) -> None:
    model = training_model(Layers(layers=4, adapter=AdapterSettings(r=4, lora_alpha=8.0, lora_dropout=dropout)))
    fuse_layers(model)
    whole = gradients_of(model, two_trees())
    set_recompute(model, policy, full)
    again = gradients_of(model, two_trees())
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_dropout_differs_from_row_to_row_and_ends_with_the_training() -> None:
    model, row = training_model(SHAPES["dropout"]), two_trees()
    fuse_layers(model)

    def loss() -> float:
        with torch.no_grad():
            return float(packed_loss(model, row, 1))

    assert len({loss() for _ in range(4)}) == 4
    model.eval()
    state = torch.get_rng_state()
    assert loss() == loss()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_backward_pass_takes_the_masks_of_its_forward_pass() -> None:
    model = training_model(SHAPES["dropout"])
    fuse_layers(model)
    expected = gradients_of(model, two_trees())
    model.zero_grad()
    torch.manual_seed(5)
    loss = packed_loss(model, two_trees(), 10)
    # Neither what was drawn since, nor the mode of the model, matters; nor does it draw itself.
    model.eval()
    torch.rand(3)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.grad, expected[name]) for name, one in model.named_parameters() if name in expected)


def test_an_optimizer_that_leaves_the_version_of_a_factor_is_followed() -> None:
    model = training_model(Layers())
    fuse_layers(model)
    before = gradients_of(model, one_tree())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            # As bitsandbytes' optimizers write.
            parameter.detach().numpy()[:] *= 2
    changed = gradients_of(model, one_tree())
    unfuse(model)
    assert worst(changed, gradients_of(model, one_tree())) < TOLERANCE < worst(changed, before)


@pytest.mark.parametrize(
    ("dtype", "least", "quantization"),
    [(torch.bfloat16, 1e-3, "nf4"), (torch.bfloat16, 1e-3, "dequantized"), (torch.float16, 1e-4, "nf4")],
)
def test_half_precision_is_as_near_the_truth_as_peft(dtype: torch.dtype, least: float, quantization: str) -> None:
    # Truth: the same weights, in half precision all, computed in fp32.
    shapes = Layers(
        layers=3, width=256, intermediate=688, quantization=quantization, dtype=dtype,
        adapter=AdapterSettings(r=16, lora_alpha=32.0),
    )  # fmt: skip
    model, row = training_model(shapes), two_trees()
    theirs = gradients_of(model, row)
    fuse_layers(model)
    ours = gradients_of(model, row)
    exact = training_model(replace(shapes, quantization="dequantized"))
    truth = gradients_of(exact.float(), row)
    assert truth.keys() == theirs.keys()
    assert error(ours, truth) <= 1.05 * error(theirs, truth)
    assert least < error(theirs, truth) < 100 * least


def test_plain_scales_change_no_bit() -> None:
    model = training_model(Layers())
    fuse_layers(model)
    nested = gradients_of(model, two_trees())
    undo_double_quantization(model)
    states = [module.weight.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    assert states
    assert not any(state.nested for state in states)
    plain = gradients_of(model, two_trees())
    assert all(torch.equal(plain[name], nested[name]) for name in nested)
    unfuse(model)
    assert worst(plain, gradients_of(model, two_trees())) < TOLERANCE


def error(gradients: Gradients, truth: Gradients) -> float:
    difference = torch.stack([(gradients[name] - truth[name]).norm() for name in truth]).norm()
    return float(difference / torch.stack([one.norm() for one in truth.values()]).norm())


def test_validation_and_a_row_without_images_are_the_same() -> None:
    model = training_model(Layers()).eval()
    row = {name: tensor for name, tensor in one_tree().items() if name != "pixel_values"}
    row["input_ids"] = row["input_ids"].clamp(min=10)
    with torch.no_grad():
        theirs = packed_logits(model, row)
        fuse_layers(model)
        ours = packed_logits(model, row)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert worst(gradients_of(model, row), gradients_without(model, row)) < TOLERANCE


def gradients_without(model: Any, row: Batch) -> Gradients:
    unfuse(model)
    return gradients_of(model, row)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_called_by_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = training_model(Layers()).eval()
    # Not compiled, which takes long: what is computed is the same.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        trees = packed_logits(model, two_trees())
        fuse_layers(model)
        set_attention(llava_in(model), FLEX)
        lengths: list[int] = []
        packed = FusedLayer._packed
        monkeypatch.setattr(
            FusedLayer, "_packed", lambda layer, x, *args: lengths.append(x.shape[1]) or packed(layer, x, *args)
        )
        blocks = packed_logits(model, two_trees())
    assert len(lengths) == 2
    assert all(length % 128 == 0 for length in lengths)
    assert torch.allclose(blocks, trees, rtol=1e-4, atol=1e-5)


def test_generation_and_disabled_adapters_take_the_path_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = training_model(Layers()).eval(), torch.tensor([[1, 15, 16, 17], [1, 18, 19, 20]])

    def answers() -> list[torch.Tensor]:
        with torch.no_grad(), with_sdpa(llava_in(model)):
            return [model.generate(input_ids=some, max_new_tokens=4, do_sample=False) for some in (ids, ids[:1])]

    with torch.no_grad(), model.disable_adapter():
        base = packed_logits(model, one_tree())
    before = answers()
    fuse_layers(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(packed_logits(model, one_tree()), base)
    monkeypatch.setattr(FusedLayer, "_packed", None)
    assert all(torch.equal(one, other) for one, other in zip(before, answers(), strict=True))


class OtherLinear(nn.Linear):
    """A linear layer that is not known."""


def with_bias(layer: Any) -> None:
    layer.mlp.up_proj.base_layer.bias = nn.Parameter(torch.zeros(176), requires_grad=False)


def with_query_norm(layer: Any) -> None:
    layer.self_attn.q_norm = nn.Identity()


def of_another_type(layer: Any) -> None:
    layer.__class__ = type("OtherLayer", (LlamaDecoderLayer,), {})


def with_other_weights(layer: Any) -> None:
    layer.self_attn.k_proj.base_layer.__class__ = OtherLinear


def with_weights_in_another_precision(layer: Any) -> None:
    layer.self_attn.o_proj.base_layer.bfloat16()


def with_a_norm_in_another_precision(layer: Any) -> None:
    layer.post_attention_layernorm.bfloat16()


def with_a_trained_norm(layer: Any) -> None:
    layer.input_layernorm.weight.requires_grad_(True)


def with_trained_weights(layer: Any) -> None:
    layer.mlp.gate_proj.base_layer.weight.requires_grad_(True)


def with_other_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU()


def with_two_adapters(layer: Any) -> None:
    layer.mlp.down_proj._active_adapter = ["default", "other"]


def with_an_adapter_that_it_has_not(layer: Any) -> None:
    layer.mlp.down_proj._active_adapter = ["other"]


def with_another_kind_of_adapter(layer: Any) -> None:
    layer.self_attn.v_proj.__class__ = type("OtherLora", (LoraLinear,), {})


def with_a_bias_of_lora(layer: Any) -> None:
    layer.self_attn.q_proj.lora_bias["default"] = True


def with_transposed_weights(layer: Any) -> None:
    layer.mlp.up_proj.fan_in_fan_out = True


def with_other_dropout(layer: Any) -> None:
    layer.mlp.down_proj.lora_dropout["default"] = nn.AlphaDropout(0.1)


def with_dropout_in_attention(layer: Any) -> None:
    layer.self_attn.attention_dropout = 0.1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_bias, "linear layers with a bias"),
        (with_query_norm, "a self_attn with other modules than Llama's: q_norm"),
        (of_another_type, "layers of type OtherLayer"),
        (with_other_weights, "linear layers of type OtherLinear"),
        (with_weights_in_another_precision, "weights in torch.bfloat16 and torch.float32"),
        (with_a_norm_in_another_precision, "weights in torch.bfloat16 and torch.float32"),
        (with_a_trained_norm, "trained base weights"),
        (with_trained_weights, "trained base weights"),
        (with_other_activation, "act_fn of type GELU"),
        (with_two_adapters, "other than one adapter"),
        (with_an_adapter_that_it_has_not, "other than one adapter"),
        (with_another_kind_of_adapter, "adapters of type OtherLora"),
        (with_a_bias_of_lora, "LoRA with a bias or transposed weights"),
        (with_transposed_weights, "LoRA with a bias or transposed weights"),
        (with_other_dropout, "dropout of type AlphaDropout"),
        (with_dropout_in_attention, "dropout in attention"),
    ],
)
def test_what_is_not_known_is_not_fused(change: Callable[[Any], None], reason: str) -> None:
    model = training_model(Layers(quantization="none"))
    change(layers_of(model)[1])
    assert fuse_layers(model) == reason
    assert not any(isinstance(layer, FusedLayer) for layer in layers_of(model))


def test_four_bit_weights_that_compute_in_another_precision_are_not_fused() -> None:
    model = training_model(Layers())
    layers_of(model)[1].mlp.down_proj.base_layer.compute_dtype = torch.bfloat16
    assert fuse_layers(model) == "4-bit weights that compute in torch.bfloat16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": AdapterSettings(type="dora", r=4)}, "DoraLinearVariant instead of plain LoRA"),
        ({"dtype": torch.float64, "quantization": "none"}, "weights in torch.float64"),
    ],
)
def test_an_adapter_or_a_dtype_that_is_not_known_is_not_fused(changes: dict[str, Any], reason: str) -> None:
    model = training_model(replace(Layers(), **changes))
    assert fuse_layers(model) == reason
    assert not any(isinstance(layer, FusedLayer) for layer in layers_of(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stage": "align", "adapter": AdapterSettings(r=4, lora_dropout=0.1)},
        {"adapter": AdapterSettings(r=4, lora_dropout=0.1)},
        {"adapter": AdapterSettings(type="dora", r=4)},
        {"adapter": AdapterSettings(type="rslora", r=4)},
        {"text": {"attention_bias": True}},
        {"text": {"mlp_bias": True}},
        {"text": {"attention_dropout": 0.1}},
        {"text": {"hidden_act": "gelu"}},
    ],
    ids=str,
)
def test_the_planner_knows_from_the_configuration_what_is_fused(changes: dict[str, Any]) -> None:
    shapes = replace(Layers(quantization="none"), **changes)
    adapter = shapes.adapter if shapes.stage == "instruct" else None
    planned = is_fused(config_of(shapes).text_config, adapter)
    assert planned == (fuse_layers(training_model(shapes)) is None)


def test_a_second_derivative_is_refused() -> None:
    model = training_model(Layers())
    fuse_layers(model)
    trained = [one for name, one in model.named_parameters() if "layers.0" in name and "lora_A" in name]
    first = torch.autograd.grad(packed_loss(model, one_tree(), 1), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()
