"""What each stage freezes, trains, adapts and quantizes; and a check that the built model matches."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from lora_llava.errors import ModelError
from lora_llava.formats.names import unwrap_peft
from lora_llava.modeling.structure import LANGUAGE_MODEL, PARTS, PROJECTOR, PartParameters, adapted_names, part_of
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName, trains_lora
from lora_llava.system.text import dtype_name


def build_stage(model: Any, stage: StageName, adapter: AdapterSettings) -> PeftModel:
    """Wrap a loaded base for one stage: trainable parameters in fp32, everything else frozen.

    Every stage trains the projector; one that `trains_lora` also trains LoRA on the language model.
    """
    if not trains_lora(stage):
        # PEFT's way to say "no target": the adapter holds only the projector.
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["multi_modal_projector"])
    else:
        config = LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            use_rslora=adapter.type == "rslora",
            use_dora=adapter.type == "dora",
            # Anchored on the language model: a bare suffix would also match layers of the vision tower.
            target_modules=target_pattern(model, adapter.target_modules),
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        )
    wrapped = get_peft_model(model, config)
    freeze_unsaved(wrapped)
    return wrapped


def freeze_unsaved(model: PeftModel) -> None:
    """Cast trainable parameters to fp32; freeze `linear_2` of a `linear` projector, which is the identity."""
    identity = model.get_base_model().config.projector_hidden_act == "linear"
    for name, parameter in model.named_parameters():
        if identity and ".multi_modal_projector." in name and "linear_2" in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_pattern(model: nn.Module, target_modules: str | list[str]) -> str:
    """Return a regular expression that matches the linear layers to adapt in the language model.

    Raises ModelError if a named layer does not exist in it.
    """
    language_model = model.get_submodule(LANGUAGE_MODEL)
    linears = {name.rsplit(".", 1)[-1] for name, module in language_model.named_modules() if _is_linear(module)}
    adapted = adapted_names(target_modules, linears)
    return rf"{re.escape(LANGUAGE_MODEL)}\..*\.({'|'.join(sorted(adapted))})"


def _is_linear(module: nn.Module) -> bool:
    # bitsandbytes' Linear4bit is a subclass.
    return isinstance(module, nn.Linear)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a 4-bit weight of bitsandbytes, of any shape."""
    return getattr(parameter, "quant_state", None) is not None or type(parameter).__name__ == "Params4bit"


def _elements(parameter: torch.Tensor) -> int:
    """Count the weights of a parameter; a packed byte holds two 4-bit weights."""
    if is_quantized(parameter) and parameter.dtype == torch.uint8:
        return parameter.numel() * 2
    return parameter.numel()


def _memory(parameter: torch.Tensor) -> int:
    """Count the bytes of a parameter, with the scales of a quantized one."""
    size = parameter.nbytes
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
        size += sum(tensor.nbytes for tensor in tensors)
    return size


def _named_parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the part, the name and the parameter of each; the part is found without PEFT's wrapping in the name."""
    for name, parameter in model.named_parameters():
        yield part_of(unwrap_peft(name)), name, parameter


def parameter_table(model: nn.Module) -> list[PartParameters]:
    """Count the parameters of each part of a built model; the projector's frozen original adds only to its bytes."""
    sums: dict[str, dict[str, int]] = {part: defaultdict(int) for part in PARTS}
    dtypes: dict[str, set[str]] = {part: set() for part in PARTS}
    for part, name, parameter in _named_parts(model):
        row = sums[part]
        row["bytes"] += _memory(parameter)
        # PEFT keeps a frozen copy of the projector next to the trained one: memory, but no parameters of the model.
        if ".original_module." in name:
            continue
        is_adapter = ".lora_" in name
        row["adapter" if is_adapter else "total"] += _elements(parameter)
        row["trainable"] += _elements(parameter) if parameter.requires_grad else 0
        row["quantized"] += _elements(parameter) if is_quantized(parameter) else 0
        dtypes[part].add("nf4" if is_quantized(parameter) else dtype_name(parameter.dtype))
    return [
        PartParameters(
            part=part,
            total=row["total"],
            trainable=row["trainable"],
            quantized=row["quantized"],
            adapter=row["adapter"],
            dtypes=", ".join(sorted(dtypes[part])),
            bytes=row["bytes"],
        )
        for part, row in sums.items()
    ]


def check_stage(model: PeftModel, stage: StageName, *, nf4: bool) -> list[PartParameters]:
    """Check the built model against its stage and return its parameters per part.

    Selecting modules by name fails silently, so the outcome is counted: LoRA is in the language model only; LoRA and
    the projector are trainable, and nothing else; with `nf4`, the linear layers of the language model are in 4 bits,
    and nothing else. Raises ModelError with the differences.
    """
    problems = []
    table = parameter_table(model)
    # By part: where the adapter is, and that only the language model is quantized.
    for row in table:
        adapted = row.part == LANGUAGE_MODEL and trains_lora(stage)
        if bool(row.adapter) != adapted:
            problems.append(f"{row.part} has {row.adapter:,} adapter parameters")
        if row.part != LANGUAGE_MODEL and row.quantized:
            problems.append(f"{row.part} has {row.quantized:,} parameters in 4 bits")
    # By parameter: the precision of the language model's linear layers, and what is trainable.
    problems += _wrong_precision(model, nf4)
    problems += _wrongly_trained(model, stage)
    if problems:
        raise ModelError(f"stage {stage}: the built model does not match the stage: {'; '.join(problems[:8])}")
    return table


def _wrongly_trained(model: PeftModel, stage: StageName) -> list[str]:
    """Name the parameters that are trainable but must be frozen, or the other way round."""
    identity = model.get_base_model().config.projector_hidden_act == "linear"
    problems = []
    for part, name, parameter in _named_parts(model):
        if part == PROJECTOR:
            must_train = ".original_module." not in name and not (identity and ".linear_2." in name)
        else:
            must_train = trains_lora(stage) and part == LANGUAGE_MODEL and ".lora_" in name
        if parameter.requires_grad != must_train:
            is_not, must_be = ("frozen", "trained") if must_train else ("trained", "frozen")
            problems.append(f"{is_not} although it must be {must_be}: {name}")
    return problems


def _wrong_precision(model: PeftModel, nf4: bool) -> list[str]:
    """Count the language model's linear layers that are quantized and must not be, or the other way round."""
    language_model = model.get_base_model().get_submodule(LANGUAGE_MODEL)
    wrong = [
        name
        for name, module in language_model.named_modules()
        if _is_linear(module) and "lora_" not in name and is_quantized(module.weight) != nf4
    ]
    return [f"{len(wrong)} linear layers of the language model are {'not ' if nf4 else ''}in 4 bits"] if wrong else []
