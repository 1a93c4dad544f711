"""Vision tower and projector as GGUF: the `mmproj` that llama.cpp's mtmd reads.

Metadata keys and tensor names are those of the `gguf` library. No post_ln is written: llama.cpp would apply it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gguf import MODEL_ARCH, Keys, get_tensor_name_map
from transformers import LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.names import PROJECTOR_PREFIX, TOWER_PREFIX
from lora_llava.formats.shapes import LlavaShape, hidden_state_index
from lora_llava.planning.preflight.shipping import no_gguf
from lora_llava.recipe.stages import AspectRatio
from lora_llava.shipping.export.gguf.file import (
    F32,
    Fields,
    OutType,
    Tensor,
    general_fields,
    kind_of,
    write_gguf,
)
from lora_llava.shipping.merge.stream import Read

_ARCHITECTURE = "clip"
FILE = "mmproj.gguf"

_CROPPED = (
    "images: llama.cpp pads an image to a square, and this model was trained on the center square of each image "
    "(image_aspect_ratio: square): crop images that are not square before asking about them"
)
_KNOWN_DEFECT = (
    "images: llama.cpp, as of build 10257, puts the class token last and reads positions as if it came first "
    "(its issue #25814, fix #25844), so it sees every image wrongly. This file is correct; answers about images "
    "will be too, once that is fixed: docs/shipping.md"
)

_MODEL = f"{TOWER_PREFIX}vision_model."
_TENSORS = (
    f"{_MODEL}embeddings.class_embedding",
    f"{_MODEL}embeddings.patch_embedding.weight",
    f"{_MODEL}embeddings.position_embedding.weight",
    f"{_MODEL}pre_layrnorm.weight",
    f"{_MODEL}pre_layrnorm.bias",
    f"{PROJECTOR_PREFIX}linear_1.weight",
    f"{PROJECTOR_PREFIX}linear_2.weight",
    f"{PROJECTOR_PREFIX}linear_1.bias",
    f"{PROJECTOR_PREFIX}linear_2.bias",
)
"""In the order of the file; the blocks follow."""
_BLOCK_MODULES = (
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
# The library's name is mm.1, from other projectors; llama.cpp reads LLaVA's layers as mm.0 and mm.2.
_OVERRIDES = {f"{PROJECTOR_PREFIX}linear_1": "mm.0"}
_ALWAYS_F32 = ("v.position_embd.weight",)
_ACTIVATIONS = {"quick_gelu": False, "gelu": True}
"""Values of `use_gelu` by the tower's activation; with neither use_gelu nor use_silu llama.cpp uses quick_gelu."""


def image_notes(aspect_ratio: AspectRatio) -> list[str]:
    """Return what a user must know before trusting an answer about an image; shown after each export."""
    return [_CROPPED, _KNOWN_DEFECT] if aspect_ratio == "square" else [_KNOWN_DEFECT]


def check_gguf_support(config: LlavaConfig) -> None:
    """Raise ModelError for a model that llama.cpp does not compute as transformers does."""
    if reasons := list(no_gguf(LlavaShape.of(config.to_dict()))):
        raise ModelError("; ".join(reasons))


def _used_blocks(config: LlavaConfig) -> int:
    """Count the tower's blocks up to the one whose output is projected."""
    return hidden_state_index(int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers))


def _mmproj_fields(config: LlavaConfig, processor: Path, name: str, outtype: OutType) -> Fields:
    """Return the metadata of tower and projector; `processor`: directory with the mean and std of pixel values."""
    vision = config.vision_config
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(processor)
    used = _used_blocks(config)
    return {
        **general_fields(name, "mmproj", outtype),
        Keys.Clip.HAS_VISION_ENCODER: True,
        Keys.Clip.HAS_LLAVA_PROJECTOR: True,
        Keys.Clip.PROJECTOR_TYPE: "mlp",
        Keys.ClipVision.USE_GELU: _ACTIVATIONS[vision.hidden_act],
        Keys.ClipVision.USE_SILU: False,
        Keys.ClipVision.IMAGE_SIZE: int(vision.image_size),
        Keys.ClipVision.PATCH_SIZE: int(vision.patch_size),
        Keys.ClipVision.EMBEDDING_LENGTH: int(vision.hidden_size),
        Keys.ClipVision.FEED_FORWARD_LENGTH: int(vision.intermediate_size),
        Keys.ClipVision.PROJECTION_DIM: int(config.text_config.hidden_size),
        # Without feature_layer (which gguf.Keys lacks) llama.cpp runs one block less than block_count; with it, all.
        Keys.ClipVision.BLOCK_COUNT: used,
        "clip.vision.feature_layer": [used],
        Keys.ClipVision.Attention.HEAD_COUNT: int(vision.num_attention_heads),
        Keys.ClipVision.Attention.LAYERNORM_EPS: float(vision.layer_norm_eps),
        Keys.ClipVision.IMAGE_MEAN: [*map(float, pixels["image_mean"])],
        Keys.ClipVision.IMAGE_STD: [*map(float, pixels["image_std"])],
    }


def _mmproj_tensors(config: LlavaConfig, read: Read, outtype: OutType) -> list[Tensor]:
    """List the tensors of tower and projector, without the blocks after the projected one."""
    shapes = expected_shapes(config)
    # For a projector without biases: llama.cpp requires them.
    zeros = torch.zeros(int(config.text_config.hidden_size))
    tensors = []
    for canonical, name in _gguf_names(_used_blocks(config)):
        if canonical not in shapes:
            tensors.append(Tensor(name, tuple(zeros.shape), F32, lambda: zeros))
            continue
        shape = shapes[canonical]
        kind = F32 if name in _ALWAYS_F32 else kind_of(shape, outtype)
        tensors.append(Tensor(name, shape, kind, partial(read, canonical)))
    return tensors


def _gguf_names(blocks: int) -> Iterator[tuple[str, str]]:
    """Yield the canonical name and llama.cpp's name of each tensor, in the order of the file."""
    # The library numbers the projector's layers as it does blocks: linear_2 needs at least three.
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, max(blocks, 3))
    modules = [f"{_MODEL}encoder.layers.{index}.{module}" for index in range(blocks) for module in _BLOCK_MODULES]
    for canonical in [*_TENSORS, *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]:
        module, _, kind = canonical.rpartition(".")
        name = names.get_name(canonical, try_suffixes=(".weight", ".bias"))
        if module in _OVERRIDES:
            name = f"{_OVERRIDES[module]}.{kind}"
        assert name is not None, canonical
        yield canonical, name


def write_mmproj(path: Path, config: LlavaConfig, read: Read, processor: Path, name: str, outtype: OutType) -> int:
    """Write tower and projector to `path`, read them back and compare; return the number of tensors.

    Stored in f16, or in f32 for `f32`, and never quantized: they are a small part of a model, and every answer depends
    on them.
    """
    outtype = "f32" if outtype == "f32" else "f16"
    fields = _mmproj_fields(config, processor, name, outtype)
    tensors = _mmproj_tensors(config, read, outtype)
    write_gguf(path, _ARCHITECTURE, fields, tensors)
    return len(tensors)
