"""The structure of a LLaVA, from its configuration: parts, image tokens, parameter counts. Without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from lora_llava.conversation.encode import ImageTokens
from lora_llava.errors import ModelError, TrainingError
from lora_llava.formats.names import memory_name
from lora_llava.formats.shapes import LlavaShape, linear_layers, used_layers
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName, trains_lora
from lora_llava.system.text import dtype_name

if TYPE_CHECKING:
    from transformers import LlavaConfig

VISION_TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
LANGUAGE_MODEL = "model.language_model"
LM_HEAD = "lm_head"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, LM_HEAD)
"""Module names of the four parts; every selection of modules starts from one of them."""

Attention = str
"""An attention of the language model. Training uses SDPA tree by tree, or FlexAttention, which skips empty blocks of
the mask; generation uses transformers' own `sdpa`."""
TREES, FLEX, SDPA = "sdpa_by_tree", "flex_attention", "sdpa"

HEAD_CHUNK = 512
"""Supervised tokens whose logits exist at the same time: 512 x 32,064 in fp32 are 63 MiB."""


class ElementType(Protocol):
    """The part of `torch.dtype` that counting bytes needs."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A dtype for code that does not import PyTorch."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        """Return the name that PyTorch uses, without `torch.`."""
        return self.name


FP32, FP16, BF16 = Precision("float32", 4), Precision("float16", 2), Precision("bfloat16", 2)


@dataclass(frozen=True, slots=True)
class PartParameters:
    """Parameter counts of one part of a model, and its memory in bytes."""

    part: str
    total: int
    trainable: int
    quantized: int
    adapter: int
    dtypes: str
    bytes: int


def attention_on_cpu(setting: str) -> Attention:
    """Return the attention for training on a CPU; TrainingError if `setting` asks for FlexAttention."""
    if setting == FLEX:
        raise TrainingError(
            "attn_implementation: flex_attention has no backward pass on a CPU; set auto or sdpa, or run on CUDA"
        )
    return TREES


def is_fused(text_config: Any, adapter: AdapterSettings | None) -> bool:
    """Return whether decoder layers of this configuration train fused; see `modeling.fused.support`.

    `adapter`: None if the stage trains no LoRA. `fuse_layers` judges the built model, which may have parts that no
    configuration tells; a plan made here is then too small, and the trial of the longest row shows it.
    """
    biased = getattr(text_config, "attention_bias", False) or getattr(text_config, "mlp_bias", False)
    has_dropout = bool(getattr(text_config, "attention_dropout", 0.0))
    is_plain = adapter is None or adapter.type != "dora"
    return is_plain and not biased and not has_dropout and text_config.hidden_act == "silu"


def part_of(name: str) -> str:
    """Return the part that a parameter or module of the (unwrapped) model belongs to; ModelError if none."""
    for part in PARTS:
        if name == part or name.startswith(part + "."):
            return part
    raise ModelError(f"{name!r} belongs to none of the parts {', '.join(PARTS)}")


def num_image_tokens(config: LlavaConfig) -> int:
    """Count the vision tower's output tokens: one per patch, plus the class token if the strategy keeps it."""
    patches = (int(config.vision_config.image_size) // int(config.vision_config.patch_size)) ** 2
    return patches + (1 if config.vision_feature_select_strategy == "full" else 0)


def image_tokens(config: LlavaConfig) -> ImageTokens:
    """Return how `input_ids` represent an image."""
    return ImageTokens(int(config.image_token_id), num_image_tokens(config))


def linear_weights(config: LlavaConfig) -> int:
    """Count the weights of all linear layers of the language model, without the head."""
    per_layer = sum(outputs * inputs for outputs, inputs in linear_layers(config.text_config).values())
    return int(config.text_config.num_hidden_layers) * per_layer


def adapted_names(target_modules: str | list[str], linears: set[str]) -> set[str]:
    """Return the names of the linear layers that LoRA adapts; ModelError for a name not among `linears`."""
    targets = linears if isinstance(target_modules, str) else set(target_modules)
    if unknown := targets - linears:
        raise ModelError(
            f"adapter.target_modules: no linear layer {', '.join(sorted(unknown))} in the language model; "
            f"it has {', '.join(sorted(linears))}"
        )
    return targets


def stage_parameters(
    shape: LlavaShape, stage: StageName, adapter: AdapterSettings, dtype: ElementType
) -> list[PartParameters]:
    """Compute the parameters of each part of a stage's model; `stages.parameter_table` counts those of a built one.

    Frozen parameters are in `dtype`, trainable ones in fp32, none is quantized. Raises ModelError for a LoRA target
    that the language model lacks.
    """
    sizes = _part_sizes(shape)
    name, lora = dtype_name(dtype), _lora_parameters(shape, adapter) if trains_lora(stage) else 0
    rows = []
    for part, size in sizes.items():
        if part == PROJECTOR:
            # PEFT keeps the original projector, frozen, next to the trained copy; both in fp32.
            rows.append(PartParameters(part, size, _trained_projector(shape), 0, 0, "float32", 2 * 4 * size))
        elif part == LANGUAGE_MODEL:
            dtypes = ", ".join(sorted({name, "float32"} if lora else {name}))
            rows.append(PartParameters(part, size, lora, 0, lora, dtypes, size * dtype.itemsize + 4 * lora))
        else:
            rows.append(PartParameters(part, size, 0, 0, 0, name if size else "", size * dtype.itemsize))
    return rows


def _part_sizes(shape: LlavaShape) -> dict[str, int]:
    """Count the parameters of each part, without the vision tower's dropped layers."""
    layers = used_layers(int(shape.whole["vision_feature_layer"]), int(shape.vision["num_hidden_layers"]))
    used = replace(shape, vision={**shape.vision, "num_hidden_layers": layers})
    sizes = dict.fromkeys(PARTS, 0)
    for name, size in used.tensors():
        sizes[part_of(memory_name(name))] += prod(size)
    return sizes


def _trained_projector(shape: LlavaShape) -> int:
    """Count the trained parameters of the projector; `linear_2` of a `linear` one is the identity and stays frozen."""
    is_linear = shape.whole["projector_hidden_act"] == "linear"
    return sum(prod(size) for name, size in shape.projector() if not (is_linear and "linear_2" in name))


def _lora_parameters(shape: LlavaShape, adapter: AdapterSettings) -> int:
    """Count the parameters of LoRA on the language model: A and B of each adapted layer, plus DoRA's magnitudes."""
    linears = {name.partition(".")[2]: size for name, size in linear_layers(shape.text).items()}
    adapted = [linears[name] for name in adapted_names(adapter.target_modules, set(linears))]
    per_layer = sum(adapter.r * (outputs + inputs) for outputs, inputs in adapted)
    if adapter.type == "dora":
        per_layer += sum(outputs for outputs, _ in adapted)
    return int(shape.text.num_hidden_layers) * per_layer
