"""What each stage trains, adapts and quantises, counted on a real model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from lora_llava.errors import ModelError
from lora_llava.modeling.base import BaseIdentity, load_base
from lora_llava.modeling.stages import build_stage, check_stage, is_quantized, parameter_table, target_pattern
from lora_llava.modeling.structure import LANGUAGE_MODEL, LM_HEAD, PROJECTOR, VISION_TOWER, PartParameters, part_of
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName
from tests.helpers.tiny import tiny_config, tiny_llava

R = 4
KINDS: list[tuple[StageName, str]] = [
    ("align", "lora"),
    ("instruct", "lora"),
    ("instruct", "rslora"),
    ("instruct", "dora"),
]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(kind: str = "lora", **changes: Any) -> AdapterSettings:
    return AdapterSettings(type=kind, r=R, lora_alpha=8.0, **changes)


def load(directory: Path, *, nf4: bool, dtype: torch.dtype = torch.float32) -> Any:
    loaded = load_base(
        directory,
        BaseIdentity("tiny", None, ""),
        nf4=nf4,
        double_quant=True,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return loaded.model


def rows(table: list[PartParameters]) -> dict[str, PartParameters]:
    return {row.part: row for row in table}


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def language_linears() -> list[nn.Linear]:
    language_model = tiny_llava().get_submodule(LANGUAGE_MODEL)
    return [module for module in language_model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize(("stage", "kind"), KINDS)
def test_counts(tiny_base: Path, stage: StageName, kind: str, nf4: bool, dtype: torch.dtype) -> None:
    table = rows(check_stage(build_stage(load(tiny_base, nf4=nf4, dtype=dtype), stage, adapter(kind)), stage, nf4=nf4))
    plain = tiny_llava()
    # The layer behind the one that is projected is not loaded.
    del plain.model.vision_tower.encoder.layers[1:]
    for part, row in table.items():
        assert row.total == numel(plain.get_submodule(part))
    linears = language_linears()
    assert len(linears) == 14
    lora = sum(R * (one.in_features + one.out_features) for one in linears)
    magnitudes = sum(one.out_features for one in linears) if kind == "dora" else 0
    adapted = lora + magnitudes if stage == "instruct" else 0
    assert {part: row.adapter for part, row in table.items() if row.adapter} == (
        {LANGUAGE_MODEL: adapted} if adapted else {}
    )
    trained = {part: row.trainable for part, row in table.items() if row.trainable}
    assert trained == {PROJECTOR: table[PROJECTOR].total} | ({LANGUAGE_MODEL: adapted} if adapted else {})
    quantized = {part: row.quantized for part, row in table.items() if row.quantized}
    assert quantized == ({LANGUAGE_MODEL: sum(one.weight.numel() for one in linears)} if nf4 else {})


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_nf4_takes_the_language_models_linear_layers_alone(tiny_base: Path, stage: StageName) -> None:
    model = build_stage(load(tiny_base, nf4=True), stage, adapter()).get_base_model()
    in_4_bits = [name for name, parameter in model.named_parameters() if is_quantized(parameter)]
    assert len(in_4_bits) == 14
    assert all(name.startswith(f"{LANGUAGE_MODEL}.layers.") for name in in_4_bits)
    assert {name.split(".")[5] for name in in_4_bits} == set(LINEARS)


def test_what_is_trained_and_the_projector_are_fp32_and_the_rest_keeps_its_type(tiny_base: Path) -> None:
    model = build_stage(load(tiny_base, nf4=True, dtype=torch.bfloat16), "instruct", adapter())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        elif not is_quantized(parameter):
            # The projector's frozen original stays whole too: a trained one passes through it to the next stage.
            whole = ".multi_modal_projector." in name
            assert parameter.dtype == (torch.float32 if whole else torch.bfloat16), name


@pytest.mark.parametrize(("stage", "kind"), KINDS)
def test_k32_what_is_trained_is_fp32_on_a_base_that_is_bf16_throughout(stage: StageName, kind: str) -> None:
    model = build_stage(tiny_llava().to(torch.bfloat16), stage, adapter(kind))
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("multi_modal_projector" in name for name in trained)
    assert any("lora_" in name for name in trained) == (stage == "instruct")
    assert set(trained.values()) == {torch.float32}


def lora_gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(7, 19)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_an_evaluation_leaves_the_gradients_through_nf4_as_they_are(tiny_base: Path) -> None:
    # bitsandbytes repacks weights in evaluation mode on some CPUs, and then has no gradients.
    model = build_stage(load(tiny_base, nf4=True), "instruct", adapter())
    packing = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert packing == [False] * 14
    before = lora_gradients(model)
    ids = torch.arange(7, 19)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    after = lora_gradients(model)
    assert len(before) >= 28
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def real_bytes(model: nn.Module, part: str) -> int:
    """Bytes of the storages that a part's parameters, and what quantised ones are read with, really have."""
    storages: dict[int, int] = {}
    for tensor in tensors_of(model, part):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_of(model: nn.Module, part: str) -> Iterator[torch.Tensor]:
    for name, parameter in model.named_parameters():
        if part_of(name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")) != part:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_bytes_are_those_of_the_tensors(tiny_base: Path, nf4: bool) -> None:
    model = build_stage(load(tiny_base, nf4=nf4, dtype=torch.bfloat16), "instruct", adapter())
    for row in parameter_table(model):
        # The tables of NF4 and of its scales are shared by all layers; a few KiB are counted more than once.
        assert row.bytes == pytest.approx(real_bytes(model, row.part), abs=14 * (16 + 256) * 4)
        assert nf4 or row.bytes == real_bytes(model, row.part)


def check(model: Any, stage: StageName = "instruct", *, nf4: bool = False) -> str:
    """Return what `check_stage` complains about."""
    with pytest.raises(ModelError) as caught:
        check_stage(model, stage, nf4=nf4)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [f"{LM_HEAD}.weight", f"{LANGUAGE_MODEL}.norm.weight", f"{VISION_TOWER}.embeddings.class_embedding"]
)
def test_a_parameter_trained_by_mistake_is_named(name: str) -> None:
    model = build_stage(tiny_llava(), "instruct", adapter())
    model.get_base_model().get_parameter(name).requires_grad_(True)
    assert f"trained although it must be frozen: base_model.model.{name}" in check(model)


def test_the_projectors_original_must_stay_frozen() -> None:
    model = build_stage(tiny_llava(), "instruct", adapter())
    model.get_base_model().get_submodule(PROJECTOR).original_module.linear_1.weight.requires_grad_(True)
    assert "original_module.linear_1.weight" in check(model)


def test_lora_in_the_vision_tower_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    # The suffixes that everyone writes; half of them lie in the vision tower.
    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    message = check(get_peft_model(tiny_llava(), config))
    assert f"{VISION_TOWER} has " in message
    assert "adapter parameters" in message


def test_a_stage_is_not_taken_for_the_other() -> None:
    assert "adapter parameters" in check(build_stage(tiny_llava(), "instruct", adapter()), "align")
    assert f"{LANGUAGE_MODEL} has 0 adapter parameters" in check(build_stage(tiny_llava(), "align", adapter()))


def test_a_frozen_projector_or_adapter_is_refused() -> None:
    model = build_stage(tiny_llava(), "align", adapter())
    model.get_base_model().get_submodule(PROJECTOR).requires_grad_(False)
    assert "frozen although it must be trained: base_model.model.model.multi_modal" in check(model, "align")
    model = build_stage(tiny_llava(), "instruct", adapter())
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    assert "lora_A.default.weight" in check(model)


def test_a_half_frozen_projector_is_refused() -> None:
    model = build_stage(tiny_llava(), "align", adapter())
    model.get_base_model().get_submodule(PROJECTOR).modules_to_save["default"].linear_1.requires_grad_(False)
    message = check(model, "align")
    assert "frozen although it must be trained" in message
    assert "linear_1.bias" in message
    assert "linear_2" not in message


def quantized_in(directory: Path, skipped: list[str]) -> Any:
    """Load with another list of modules that stay plain."""
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    return LlavaForConditionalGeneration.from_pretrained(
        directory, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


def test_a_quantised_projector_or_vision_tower_is_refused(tiny_base: Path) -> None:
    # The names that seem right and match nothing.
    model = quantized_in(tiny_base, ["vision_tower", "multi_modal_projector", LM_HEAD])
    table = rows(parameter_table(model))
    assert table[PROJECTOR].quantized
    assert table[VISION_TOWER].quantized
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    from peft import LoraConfig, get_peft_model

    pattern = target_pattern(model, "all-linear")
    message = check(get_peft_model(model, LoraConfig(target_modules=pattern)), nf4=True)
    assert f"{PROJECTOR} has 3,840 parameters in 4 bits" in message
    assert f"{VISION_TOWER} has " in message


def test_a_language_model_in_the_wrong_precision_is_refused(tiny_base: Path) -> None:
    plain = build_stage(load(tiny_base, nf4=False), "instruct", adapter())
    assert "14 linear layers of the language model are not in 4 bits" in check(plain, nf4=True)
    quantized = build_stage(load(tiny_base, nf4=True), "instruct", adapter())
    assert "14 linear layers of the language model are in 4 bits" in check(quantized, nf4=False)
    part = quantized_in(tiny_base, [VISION_TOWER, PROJECTOR, LM_HEAD, f"{LANGUAGE_MODEL}.layers.0"])
    assert "7 linear layers of the language model are not in 4 bits" in check(
        build_stage(part, "instruct", adapter()), nf4=True
    )


def test_target_pattern_is_anchored_on_the_language_model() -> None:
    model = tiny_llava()
    names = [name for name, _ in model.named_modules()]
    everything = re.compile(target_pattern(model, "all-linear"))
    linears = [name for name in names if everything.fullmatch(name)]
    assert len(linears) == 14
    assert all(name.startswith(f"{LANGUAGE_MODEL}.") for name in linears)
    two = re.compile(target_pattern(model, ["q_proj", "v_proj"]))
    assert [name.rsplit(".", 1)[-1] for name in names if two.fullmatch(name)] == ["q_proj", "v_proj"] * 2


def test_target_pattern_names_what_it_does_not_know() -> None:
    with pytest.raises(ModelError) as caught:
        target_pattern(tiny_llava(), ["q_proj", "w_pack"])
    assert "w_pack" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_chosen_targets_are_adapted_alone() -> None:
    model = build_stage(tiny_llava(), "instruct", adapter(target_modules=["q_proj", "v_proj"]))
    check_stage(model, "instruct", nf4=False)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_linear_projector_keeps_its_identity(stage: StageName) -> None:
    config = tiny_config()
    config.projector_hidden_act = "linear"
    config._attn_implementation = "sdpa"
    model = build_stage(LlavaForConditionalGeneration(config), stage, adapter())
    table = rows(check_stage(model, stage, nf4=False))
    assert table[PROJECTOR].trainable == 32 * 48 + 48
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [name.split(".")[-2:] for name in trained] == [["linear_1", "weight"], ["linear_1", "bias"]]
    projector = model.get_base_model().get_submodule(PROJECTOR).modules_to_save["default"]
    projector.linear_2.requires_grad_(True)
    assert "linear_2.weight" in check(model, stage)
