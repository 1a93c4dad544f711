"""Hash and load the base model, in the precision of the run.

A base is always a directory in the llava-hf layout, which `LlavaForConditionalGeneration.from_pretrained` reads too;
`assemble` writes one from parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.conversation.encode import ImageTokens
from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import open_weights
from lora_llava.formats.names import BUFFERS
from lora_llava.formats.shapes import used_layers
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.weight_files import weight_files
from lora_llava.modeling.identity import Fields, base_fields
from lora_llava.modeling.metadata import hub_errors, image_statistics, read_config
from lora_llava.modeling.structure import (
    LANGUAGE_MODEL,
    LM_HEAD,
    PROJECTOR,
    VISION_TOWER,
    image_tokens,
    linear_weights,
)
from lora_llava.system.device import free_memory_bytes
from lora_llava.system.files import refuse_irregular
from lora_llava.system.progress import Advance, counting
from lora_llava.system.text import listed

_DEQUANTIZED_SHARE = 0.5
"""Share of the free memory that dequantized weights may take; the rest is for other weights, keys and values."""


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What an artifact records of the base it was trained on."""

    name: str
    """Hub id, or the name of the directory; for users to read, never compared."""
    revision: str | None
    weights_sha256: str
    """Hash of all weights by name; it does not depend on how they are sharded."""
    fields: Fields = field(default_factory=dict, compare=False)
    """The rest of its identity, as `modeling.identity` reads it; empty until then."""

    def reference(self, directory: Path) -> str:
        """Return what other software loads the base by: its hub id, or the absolute path of its directory."""
        return str(directory.resolve()) if self.revision is None else self.name


@dataclass(slots=True)
class LoadedModel:
    """A model, with its tokenizer and the statistics of its pixel values."""

    model: Any
    """`LlavaForConditionalGeneration`, or a `PeftModel` around one."""
    tokenizer: Any
    directory: Path
    identity: BaseIdentity
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    config: LlavaConfig

    @property
    def image_size(self) -> int:
        """Side of the vision tower's square input, in pixels."""
        return int(self.config.vision_config.image_size)

    @property
    def image_tokens(self) -> ImageTokens:
        """How `input_ids` represent an image."""
        return image_tokens(self.config)


def hash_weights(directory: Path) -> str:
    """Hash all tensors that transformers loads from a directory: names, dtypes, shapes and bytes, in name order."""
    files = weight_files(directory)
    files_by_name: dict[str, Path] = {}
    for file in files:
        with open_weights(file) as handle:
            files_by_name.update(dict.fromkeys(handle.keys(), file))
    digest = hashlib.sha256()
    total = sum(file.stat().st_size for file in files) // 2**20
    with counting("hashing the weights, MiB", total) as advance:
        _hash_tensors(files_by_name, digest, advance)
    return digest.hexdigest()


def _hash_tensors(files_by_name: dict[str, Path], digest: hashlib._Hash, advance: Advance) -> None:
    hashed = 0
    for name in sorted(files_by_name):
        with open_weights(files_by_name[name]) as handle:
            tensor = handle.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        digest.update(data)
        advance((hashed + data.nbytes) // 2**20 - hashed // 2**20)
        hashed += data.nbytes


def quantization_config(double_quant: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings that quantize only the language model's linear layers to NF4.

    The skip list needs full names: bitsandbytes matches them as a prefix or a suffix, and silently ignores a name that
    matches nothing. `check_stage` counts the quantized layers.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[VISION_TOWER, PROJECTOR, LM_HEAD],
    )


def _check_fast(tokenizer: Any, directory: Path) -> None:
    """Raise ModelError for a tokenizer that is written in Python."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{directory}: no fast tokenizer (tokenizer.json) can be made from its files")


def _leave_tf32(dtype: torch.dtype) -> None:
    """In fp32, keep cuDNN from computing the vision tower's patch embedding in TF32, which rounds by the batch."""
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def load_base(
    directory: Path,
    identity: BaseIdentity,
    *,
    nf4: bool,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
    keep_dequantized: bool | None = False,
) -> LoadedModel:
    """Load a LLaVA directory onto `device`, in `dtype`; with `nf4`, the language model's linear layers in NF4.

    `keep_dequantized`: whether to dequantize them once; None: if they then fit half of the free memory.
    """
    _leave_tf32(dtype)
    config = read_config(directory)
    with hub_errors("base", str(directory)):
        refuse_irregular(directory, ModelError)
        tokenizer = read_tokenizer(directory)
        _check_fast(tokenizer, directory)
        mean, std = image_statistics(ImageProcessingMixin.get_image_processor_dict(directory)[0], directory)
        model, report = LlavaForConditionalGeneration.from_pretrained(
            directory,
            dtype=dtype,
            quantization_config=quantization_config(double_quant, dtype) if nf4 else None,
            # SDPA first; training switches to tree or flex attention later.
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map={"": device},
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_complete(report, directory)
    if nf4:
        disable_cpu_repacking(model)
        if _fits_dequantized(config, dtype, device) if keep_dequantized is None else keep_dequantized:
            dequantize(model)
    drop_unused_layers(model)
    # Keep trainable weights in fp32: loading a trained projector in bf16 would round it.
    model.get_submodule(PROJECTOR).float()
    model.config.use_cache = False
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        directory=directory,
        identity=identity if identity.fields else replace(identity, fields=base_fields(directory)),
        image_mean=mean,
        image_std=std,
        config=config,
    )


def _check_complete(report: Mapping[str, Any], directory: Path) -> None:
    """Raise ModelError for missing tensors, which transformers initializes at random, and for unexpected ones."""
    named = {"is missing": report["missing_keys"], "does not belong to it": report["unexpected_keys"]}
    wrong = [f"{name} {what}" for what, names in named.items() for name in sorted(names) if not name.endswith(BUFFERS)]
    if wrong:
        raise ModelError(f"{directory}: not the weights of its config.json: {listed(wrong, 6, separator='; ')}")


def check_finite(model: nn.Module, directory: Path) -> None:
    """Raise ModelError, with the name of the weight, if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{directory}: {name} holds NaN or infinity; take the model from its source again")


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX512-BF16.

    It would repack them in place and for good at the first evaluation: in further training, gradients would silently
    stop at the first repacked layer, and logits would be off by 0.3 %.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute


def dequantize(model: nn.Module) -> None:
    """Replace each 4-bit layer by a linear layer with its dequantized weights, in the dtype that it computes in.

    The results are the same; this saves dequantizing the weights in every pass.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype)
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear)


def undo_double_quantization(model: nn.Module) -> None:
    """Dequantize the 8-bit scales of 4-bit weights to fp32: 4 bytes per 64 weights instead of 1.

    The weights have the same values; this saves two of three kernels for each of them in every pass.
    """
    for module in model.modules():
        state = module.weight.quant_state if isinstance(module, Linear4bit) else None
        if state is not None and state.nested:
            state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested, state.state2, state.offset = False, None, None


def _fits_dequantized(config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the language model's linear layers, in `dtype`, fit half of the free memory."""
    return linear_weights(config) * dtype.itemsize <= _DEQUANTIZED_SHARE * free_memory_bytes(device.type)


def quantize(model: Any, *, double_quant: bool, dtype: torch.dtype) -> None:
    """Quantize the language model's linear layers to NF4, on their device, as `load_base` has them.

    For a model with random weights; one that is loaded is quantized file by file.
    """
    language_model = model.get_submodule(LANGUAGE_MODEL)
    for name, module in list(language_model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        options = {"compress_statistics": double_quant, "quant_type": "nf4"}
        with torch.device("meta"):
            packed = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, **options)
        weight = Params4bit(module.weight.data, requires_grad=False, module=packed, **options)
        packed.weight, packed.bias = weight.to(module.weight.device), module.bias
        language_model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True
    disable_cpu_repacking(model)


def drop_unused_layers(model: Any) -> None:
    """Remove the vision tower's layers after the one whose output is projected: in CLIP the last one."""
    layers = model.get_submodule(VISION_TOWER).encoder.layers
    used = used_layers(int(model.config.vision_feature_layer), int(model.config.vision_config.num_hidden_layers))
    if used == len(layers):
        return
    del layers[used:]
    model.config.vision_feature_layer = used
