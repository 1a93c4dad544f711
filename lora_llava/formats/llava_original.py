"""The layout of haotian-liu/LLaVA (v1.2.2): tensor names, configuration, and pickled files.

Source: `llava/model/llava_arch.py`, `llava/model/language_model/llava_llama.py` and `llava/model/builder.py` there.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlavaConfig

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import open_weights
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS
from lora_llava.system.text import dtype_name, printable

_ARCHITECTURE = "LlavaLlamaForCausalLM"
TOWER_DIRECTORY = "vision_tower"
MM_PROJECTOR = "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"

_PREFIXES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_LINEAR = re.compile(r"^model\.mm_projector\.(weight|bias)$")
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_WRAPPING = re.compile(r"^(base_model\.model\.)?(?=(model\.|lm_head\.))")

_FEATURES = {"patch": "default", "cls_patch": "full"}
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "attention_dropout", "mlp_bias",
    "pretraining_tp", "tie_word_embeddings",
)  # fmt: skip


def original_name(canonical: str, *, linear: bool) -> str:
    """Return the original code's name of a tensor; `linear`: the projector is one linear layer."""
    if linear and canonical.startswith("multi_modal_projector.linear_1."):
        return canonical.replace("multi_modal_projector.linear_1.", "model.mm_projector.")
    for theirs, ours in _PREFIXES:
        if canonical.startswith(ours):
            return theirs + canonical.removeprefix(ours)
    raise ModelError(f"{canonical!r} does not exist in the original layout")


def from_original_name(name: str) -> str | None:
    """Return the canonical name of a tensor of the original code, with or without PEFT's prefix; None for a buffer."""
    name = _WRAPPING.sub("", name)
    if _COMPUTED.search(name):
        return None
    if match := _LINEAR.match(name):
        return f"multi_modal_projector.linear_1.{match[1]}"
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ModelError(f"a tensor {name!r} belongs to no part of the original LLaVA-1.5")


def is_linear(config: LlavaConfig) -> bool:
    """Tell whether the projector is one linear layer, followed by an identity."""
    return bool(config.projector_hidden_act == "linear")


def identity_layer(width: int, dtype: torch.dtype, *, bias: bool) -> dict[str, torch.Tensor]:
    """Return the second layer of a linear projector by canonical names: weight (width, width), bias (width,)."""
    state = {"multi_modal_projector.linear_2.weight": torch.eye(width, dtype=dtype)}
    if bias:
        state["multi_modal_projector.linear_2.bias"] = torch.zeros(width, dtype=dtype)
    return state


def to_original_config(config: LlavaConfig, dtype: torch.dtype, tower: str, aspect_ratio: str) -> dict[str, Any]:
    """Return the configuration that the original code saves for a model that it can express."""
    text = config.text_config.to_dict()
    rope = text.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "llava_llama",
        **{key: text[key] for key in _TEXT_KEYS if text.get(key) is not None},
        "rope_theta": rope.get("rope_theta", 10000.0),
        # transformers 4.37.2, which the original runs on, takes exactly these two keys.
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": float(rope["factor"])},
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": next(
            name for name, activation in PROJECTOR_ACTIVATIONS.items() if activation == config.projector_hidden_act
        ),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": {ours: theirs for theirs, ours in _FEATURES.items()}[
            config.vision_feature_select_strategy
        ],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": aspect_ratio,
        "image_grid_pinpoints": None,
    }


def check_original_config(data: dict[str, Any], where: Path) -> None:
    """Raise ModelError unless this is the configuration of a LLaVA-1.5 of the original code."""
    if not isinstance(data.get("mm_vision_tower"), str) or data.get("architectures", [_ARCHITECTURE]) != [
        _ARCHITECTURE
    ]:
        raise ModelError(
            f"{where}: not an original LLaVA-1.5 ({data.get('architectures')}, model_type {data.get('model_type')!r}); "
            f"needed: {_ARCHITECTURE} with mm_vision_tower"
        )
    # As a list: a value of another type, such as a mapping, cannot be looked up.
    if data.get("mm_projector_type", "linear") not in list(PROJECTOR_ACTIVATIONS):
        raise ModelError(
            f"{where}: mm_projector_type {data['mm_projector_type']!r:.80}, known: {', '.join(PROJECTOR_ACTIVATIONS)}"
        )
    check_original_images(data, where)


def check_original_images(data: dict[str, Any], where: Path) -> None:
    """Raise ModelError for a model or an adapter that was trained with images in another form than LLaVA-1.5's."""
    if data.get("mm_use_im_start_end"):
        raise ModelError(f"{where}: mm_use_im_start_end puts tokens around the image; LLaVA-1.5 has none")
    if data.get("mm_patch_merge_type", "flat") != "flat" or data.get("image_aspect_ratio") == "anyres":
        raise ModelError(f"{where}: image_aspect_ratio anyres is LLaVA-NeXT's; only LLaVA-1.5 is read")


def from_original_config(data: dict[str, Any], vision_config: Any) -> LlavaConfig:
    """Return the configuration of an original LLaVA-1.5, without `image_token_index` and added vocabulary."""
    text = {key: data[key] for key in _TEXT_KEYS if data.get(key) is not None}
    text["rope_theta"] = data.get("rope_theta") or 10000.0
    if data.get("rope_scaling"):
        text["rope_scaling"] = data["rope_scaling"]
    return LlavaConfig(
        vision_config=vision_config,
        text_config=LlamaConfig.from_dict(text),
        projector_hidden_act=PROJECTOR_ACTIVATIONS[data.get("mm_projector_type", "linear")],
        vision_feature_layer=int(data.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy=_FEATURES[data.get("mm_vision_select_feature", "patch")],
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
    )


_MORE_THAN_TENSORS = re.compile("global|unsupported|not allowed|blocklist", re.IGNORECASE)
"""In torch's refusals of a pickle that calls or builds what no tensor needs."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors or pickled file of named tensors; a pickled one is memory-mapped if possible.

    A pickle that holds anything but tensors is refused, and no code in it is run (`weights_only`). Raises ModelError.
    """
    if path.suffix == ".safetensors":
        with open_weights(path) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file; give a file of tensors")
    try:
        _refuse_compressed(path)
        # torch's warnings about old pickles do not help the user: the file is read or refused.
        with warnings.catch_warnings(action="ignore"):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except pickle.UnpicklingError as error:
        # torch advises to load it without this protection, which nobody should.
        if not _MORE_THAN_TENSORS.search(str(error)):
            raise ModelError(f"{path} is damaged: it is no file of tensors; download it again") from error
        raise ModelError(
            f"{path}: holds more than tensors, and was refused; nothing in it was run. Take the file from a source "
            "you trust, as safetensors"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # the unpickler of a damaged file raises anything
        if isinstance(error, MemoryError):
            raise
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged; download it again, as safetensors"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise ModelError(f"{path}: not a file of named tensors; give one that holds a model or an adapter")
    return data


def _refuse_compressed(path: Path) -> None:
    """Raise ModelError for a zip with compressed members: torch writes none, and they could fill the memory."""
    if _can_be_mapped(path):
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if member.file_size > member.compress_size]
        if names:
            raise ModelError(
                f"{path}: {printable(names[0], 60)} in it is compressed, which torch.save never does; take the file "
                "from a source you trust, as safetensors"
            )


def _can_be_mapped(path: Path) -> bool:
    """Tell whether a file is a zip of torch 1.6 or later, which can be memory-mapped."""
    with path.open("rb") as handle:
        return handle.read(2) == b"PK"
