"""Vision tower and projector as GGUF: the `mmproj` that llama.cpp's mtmd reads.

Keys and tensor names: `clip-impl.h` and `clip.cpp` of llama.cpp. There is no post_ln: it would be applied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import expected_shapes
from lora_llava.formats.names import PROJECTOR_PREFIX
from lora_llava.shipping.export.gguf.file import (
    F32,
    Fields,
    OutType,
    Tensor,
    boolean,
    check_gguf,
    general_fields,
    integer,
    integers,
    kind_of,
    real,
    reals,
    string,
    write_gguf,
)
from lora_llava.shipping.merge.stream import Read

ARCHITECTURE = "clip"
FILE = "mmproj.gguf"

KNOWN_DEFECT = (
    "images: llama.cpp, as of build 10257, puts the class token last and reads positions as if it came first "
    "(its issue #25814, fix #25844), so it sees every image wrongly. This file is right, and so will answers about "
    "images be once that is mended: docs/shipping.md"
)
"""What a user must know of llama.cpp before trusting an answer about an image."""

_TOWER = "vision_tower.vision_model."
_LAYER = f"{_TOWER}encoder.layers."
_WHOLE = {
    f"{_TOWER}embeddings.class_embedding": "v.class_embd",
    f"{_TOWER}embeddings.patch_embedding.weight": "v.patch_embd.weight",
    f"{_TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
    f"{_TOWER}pre_layrnorm.weight": "v.pre_ln.weight",
    f"{_TOWER}pre_layrnorm.bias": "v.pre_ln.bias",
    f"{PROJECTOR_PREFIX}linear_1.weight": "mm.0.weight",
    f"{PROJECTOR_PREFIX}linear_2.weight": "mm.2.weight",
}
_BIASES = {
    f"{PROJECTOR_PREFIX}linear_1.bias": "mm.0.bias",
    f"{PROJECTOR_PREFIX}linear_2.bias": "mm.2.bias",
}
_IN_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_KEPT_F32 = ("v.position_embd.weight",)
_ACTIVATIONS = {"quick_gelu": False, "gelu": True}
"""The tower's activations, and `use_gelu`; with neither that nor use_silu llama.cpp takes quick_gelu."""


def used_blocks(config: LlavaConfig) -> int:
    """Count the tower's blocks up to the one whose output is projected. Raises ModelError if llama.cpp cannot."""
    layer, total = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
    if not isinstance(layer, int):
        raise ModelError(f"vision_feature_layer {layer}: of several layers no GGUF is written; one is needed")
    # Hidden state 0 is that of the embeddings, before the first block.
    used = layer if layer >= 0 else total + 1 + layer
    if not 1 <= used <= total:
        raise ModelError(f"vision_feature_layer {layer}: of a tower of {total} blocks llama.cpp needs at least one")
    return used


def check_vision(config: LlavaConfig) -> None:
    """Raise ModelError for a tower or projector that llama.cpp computes otherwise."""
    used_blocks(config)
    if config.vision_feature_select_strategy != "default":
        raise ModelError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}: llama.cpp always leaves the "
            "class token out (default)"
        )
    if config.projector_hidden_act != "gelu":
        raise ModelError(
            f"projector_hidden_act {config.projector_hidden_act!r}: llama.cpp's projector has a GELU in it; only "
            "mm_projector_type mlp2x_gelu can be exported"
        )
    if config.vision_config.hidden_act not in _ACTIVATIONS:
        raise ModelError(f"the vision tower's hidden_act {config.vision_config.hidden_act!r}: llama.cpp has none such")


def mmproj_fields(config: LlavaConfig, processor: Path, name: str, outtype: OutType) -> Fields:
    """Metadata of tower and projector; `processor` is the directory that says how pixels are normalised."""
    vision = config.vision_config
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(processor)
    used = used_blocks(config)
    return {
        **general_fields(name, "mmproj", outtype),
        "clip.has_vision_encoder": boolean(True),
        "clip.has_llava_projector": boolean(True),
        "clip.projector_type": string("mlp"),
        "clip.use_gelu": boolean(_ACTIVATIONS[vision.hidden_act]),
        "clip.use_silu": boolean(False),
        "clip.vision.image_size": integer(vision.image_size),
        "clip.vision.patch_size": integer(vision.patch_size),
        "clip.vision.embedding_length": integer(vision.hidden_size),
        "clip.vision.feed_forward_length": integer(vision.intermediate_size),
        "clip.vision.projection_dim": integer(config.text_config.hidden_size),
        # Without feature_layer llama.cpp runs one block less than block_count; with it, exactly that many.
        "clip.vision.block_count": integer(used),
        "clip.vision.feature_layer": integers([used]),
        "clip.vision.attention.head_count": integer(vision.num_attention_heads),
        "clip.vision.attention.layer_norm_epsilon": real(vision.layer_norm_eps),
        "clip.vision.image_mean": reals(pixels["image_mean"]),
        "clip.vision.image_std": reals(pixels["image_std"]),
    }


def mmproj_tensors(config: LlavaConfig, read: Read, outtype: OutType) -> list[Tensor]:
    """List the tensors of tower and projector; blocks behind the projected one are left out."""
    named = dict(_WHOLE) | _BIASES
    for number in range(used_blocks(config)):
        for theirs, ours in _IN_LAYER.items():
            for kind in ("weight", "bias"):
                named[f"{_LAYER}{number}.{theirs}.{kind}"] = f"v.blk.{number}.{ours}.{kind}"
    shapes = expected_shapes(config)
    # A projector without biases; llama.cpp asks for them.
    zeros = torch.zeros(int(config.text_config.hidden_size))
    tensors = []
    for canonical, name in named.items():
        if canonical not in shapes:
            tensors.append(Tensor(name, tuple(zeros.shape), F32, lambda: zeros))
            continue
        shape = shapes[canonical]
        kind = F32 if name in _KEPT_F32 else kind_of(shape, outtype)
        tensors.append(Tensor(name, shape, kind, _reader(read, canonical)))
    return tensors


def _reader(read: Read, name: str) -> Callable[[], torch.Tensor]:
    return lambda: read(name)


def write_mmproj(path: Path, config: LlavaConfig, read: Read, processor: Path, name: str, outtype: OutType) -> int:
    """Write tower and projector to `path`, read them back and compare; return the number of tensors.

    Both are kept in 16 bits (of `f32` in 32): they are a small part of a model, and see everything. Raises ModelError
    for what llama.cpp cannot compute.
    """
    check_vision(config)
    outtype = "f32" if outtype == "f32" else "f16"
    fields = mmproj_fields(config, processor, name, outtype)
    tensors = mmproj_tensors(config, read, outtype)
    write_gguf(path, ARCHITECTURE, fields, tensors)
    check_gguf(path, ARCHITECTURE, fields, tensors)
    return len(tensors)
