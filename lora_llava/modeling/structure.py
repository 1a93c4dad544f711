"""The structure of a LLaVA, from its configuration: parts, image tokens, parameter counts. Without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_llava.errors import ModelError, TrainingError
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import StageName
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


FP32, BF16 = Precision("float32", 4), Precision("bfloat16", 2)


@dataclass(frozen=True, slots=True)
class PartRow:
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


def part_of(name: str) -> str:
    """Return the part that a parameter or module of the (unwrapped) model belongs to; ModelError if none."""
    for part in PARTS:
        if name == part or name.startswith(part + "."):
            return part
    raise ModelError(f"{name!r} belongs to none of the parts {', '.join(PARTS)}")


def num_image_tokens(config: LlavaConfig) -> int:
    """Count the vision tower's output tokens: one per patch, plus the class token if the strategy keeps it."""
    return _patches(config) + (1 if config.vision_feature_select_strategy == "full" else 0)


def image_tokens(config: LlavaConfig) -> dict[str, int]:
    """Return how `input_ids` represent an image: `image_token_id`, and `num_image_tokens` of them."""
    return {"image_token_id": int(config.image_token_id), "num_image_tokens": num_image_tokens(config)}


def _patches(config: LlavaConfig) -> int:
    return (int(config.vision_config.image_size) // int(config.vision_config.patch_size)) ** 2


def used_layers(config: LlavaConfig) -> int:
    """Count the vision tower's layers up to the one whose output is projected; the layers after it are dropped."""
    layers = int(config.vision_config.num_hidden_layers)
    # Hidden state 0 is that of the embeddings. An index from the front stays valid when later layers are dropped.
    index = int(config.vision_feature_layer)
    index = index if index >= 0 else layers + 1 + index
    # transformers reads 0 as "no hidden states".
    return index or layers


def attention_widths(config: LlavaConfig) -> tuple[int, int]:
    """Return the widths of a decoder layer's queries and of its keys (or values), summed over heads."""
    text = config.text_config
    return int(text.num_attention_heads) * int(text.head_dim), int(text.num_key_value_heads) * int(text.head_dim)


@dataclass(frozen=True, slots=True)
class Linear:
    """Shape of a linear layer."""

    inputs: int
    outputs: int
    bias: bool

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.inputs * self.outputs + self.outputs * self.bias


def layer_linears(config: LlavaConfig) -> dict[str, Linear]:
    """Return the linear layers of one decoder layer, by name."""
    text = config.text_config
    queries, keys = attention_widths(config)
    width, wide = int(text.hidden_size), int(text.intermediate_size)
    attention, mlp = bool(text.attention_bias), bool(text.mlp_bias)
    return {
        "q_proj": Linear(width, queries, attention),
        "k_proj": Linear(width, keys, attention),
        "v_proj": Linear(width, keys, attention),
        "o_proj": Linear(queries, width, attention),
        "gate_proj": Linear(width, wide, mlp),
        "up_proj": Linear(width, wide, mlp),
        "down_proj": Linear(wide, width, mlp),
    }


def linear_weights(config: LlavaConfig) -> int:
    """Count the weights of all linear layers of the language model, without the head."""
    per_layer = sum(linear.inputs * linear.outputs for linear in layer_linears(config).values())
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
    config: LlavaConfig, stage: StageName, adapter: AdapterSettings, dtype: ElementType
) -> list[PartRow]:
    """Compute the parameters of each part of a stage's model; `stages.parameter_table` counts those of a built one.

    Frozen parameters are in `dtype`, trainable ones in fp32, none is quantized. Raises ModelError for a LoRA target
    that the language model lacks.
    """
    return list(_part_rows(config, stage, adapter, dtype))


def _part_rows(
    config: LlavaConfig, stage: StageName, adapter: AdapterSettings, dtype: ElementType
) -> Iterator[PartRow]:
    text, name = config.text_config, dtype_name(dtype)
    vision = vision_parameters(config)
    yield PartRow(VISION_TOWER, vision, 0, 0, 0, name, vision * dtype.itemsize)
    # PEFT keeps the original projector, frozen, next to the trained copy; both in fp32.
    first, second = projector_linears(config)
    trained = first.size + (0 if config.projector_hidden_act == "linear" else second.size)
    projector = first.size + second.size
    yield PartRow(PROJECTOR, projector, trained, 0, 0, "float32", 2 * 4 * projector)
    vocabulary = int(text.vocab_size) * int(text.hidden_size)
    lora = lora_parameters(config, adapter) if stage == "instruct" else 0
    language = vocabulary + _decoder_parameters(config)
    dtypes = ", ".join(sorted({name, "float32"} if lora else {name}))
    yield PartRow(LANGUAGE_MODEL, language, lora, 0, lora, dtypes, language * dtype.itemsize + 4 * lora)
    head = 0 if config.tie_word_embeddings else vocabulary
    yield PartRow(LM_HEAD, head, 0, 0, 0, name if head else "", head * dtype.itemsize)


def vision_parameters(config: LlavaConfig) -> int:
    """Count the parameters of the CLIP vision tower, without the dropped layers."""
    vision = config.vision_config
    width, wide = int(vision.hidden_size), int(vision.intermediate_size)
    embeddings = width * (1 + int(vision.num_channels) * int(vision.patch_size) ** 2 + _patches(config) + 1)
    layer = 4 * (width + 1) * width + (width + 1) * wide + (wide + 1) * width + 4 * width
    return embeddings + used_layers(config) * layer + 4 * width


def projector_linears(config: LlavaConfig) -> tuple[Linear, Linear]:
    """Return the two linear layers of the projector."""
    width, bias = int(config.text_config.hidden_size), bool(config.multimodal_projector_bias)
    return Linear(int(config.vision_config.hidden_size), width, bias), Linear(width, width, bias)


def _decoder_parameters(config: LlavaConfig) -> int:
    text = config.text_config
    width, linears = int(text.hidden_size), layer_linears(config)
    layer = sum(linear.size for linear in linears.values()) + 2 * width
    return int(text.num_hidden_layers) * layer + width


def lora_parameters(config: LlavaConfig, adapter: AdapterSettings) -> int:
    """Count the parameters of LoRA on the language model: A and B of each adapted layer, plus DoRA's magnitudes."""
    linears = layer_linears(config)
    adapted = [linears[name] for name in adapted_names(adapter.target_modules, set(linears))]
    per_layer = sum(adapter.r * (linear.inputs + linear.outputs) for linear in adapted)
    if adapter.type == "dora":
        per_layer += sum(linear.outputs for linear in adapted)
    return int(config.text_config.num_hidden_layers) * per_layer
