"""Import an original LLaVA-1.5 checkpoint as a model in the llava-hf layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.artifact import read_usage
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.conversation.endings import write_generation_config
from lora_llava.conversation.templates import get_template
from lora_llava.errors import ModelError, RecipeError
from lora_llava.formats.llava_hf import WeightFiles, expected_shapes, open_weights, read_tensor, write_weights
from lora_llava.formats.llava_original import (
    check_original_config,
    from_original_config,
    from_original_name,
    identity_layer,
    is_linear,
    read_tensors,
)
from lora_llava.formats.names import EMBEDDINGS, HEAD, MERGE_REPORT, TOWER_PREFIX, canonical_name
from lora_llava.formats.processor import save_processor
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.weight_files import has_safetensors, pickled_files, weight_files
from lora_llava.modeling.assemble import pad_rows, save_config
from lora_llava.modeling.merged import update_identity
from lora_llava.modeling.metadata import VOCABULARY_MULTIPLE, hub_errors, read_any_config, refuse_wrong_sizes
from lora_llava.modeling.structure import num_image_tokens
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.system.files import read_json, staged_result

_PAD = "<pad>"

_Read = Callable[[], torch.Tensor]
"""Reads one tensor."""


def import_checkpoint(source: Path, output: Path, options: ImportOptions) -> list[str]:
    """Write an original LLaVA-1.5 checkpoint in the llava-hf layout, with bit-identical weights.

    Missing vocabulary rows (`<image>`, `<pad>`, up to a multiple of 64) are the mean of the others. The vision tower is
    cast to the language model's dtype, as in llava-hf's models. Raises ModelError, and RecipeError for an option that
    would contradict the report of a merge.
    """
    data = read_json(source / "config.json")
    check_original_config(data, source / "config.json")
    _refuse_contradiction(source, options)
    readers = _tensor_readers(source)
    tower = options.vision_tower or _tower_source(source, data)
    with hub_errors("vision tower", tower):
        vision_config = read_any_config(tower)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    refuse_wrong_sizes(data, source / "config.json")
    with hub_errors("configuration", str(source)):
        config = from_original_config(data, getattr(vision_config, "vision_config", vision_config))
    with hub_errors("tokenizer", str(source)):
        tokenizer = read_tokenizer(source, config=config)
    _add_tokens(config, tokenizer)
    dtype = readers[EMBEDDINGS]().dtype
    _complete(readers, config, dtype, None if any(name.startswith(TOWER_PREFIX) for name in readers) else tower)
    with hub_errors("configuration", str(source)):
        names = sorted(expected_shapes(config))
    if wrong := set(names) ^ readers.keys():
        raise ModelError(f"{source}: missing, or not part of LLaVA-1.5: {', '.join(sorted(wrong)[:6])}")
    aspect_ratio = options.image_aspect_ratio or data.get("image_aspect_ratio")
    with staged_result(output) as staging:
        write_weights(staging, ((name, readers[name]()) for name in names))
        WeightFiles(staging).check(config)
        # First: the tokenizer's class is named by tokenizer.model.
        for name in ("tokenizer.model", MERGE_REPORT):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        with hub_errors("tokenizer", str(source)):
            save_processor(
                staging,
                tokenizer,
                config,
                pixels,
                aspect_ratio="pad" if aspect_ratio == "pad" else "square",
                jinja=_chat_template(tokenizer, options.template),
            )
        save_config(staging, config, dtype)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", staging / "generation_config.json")
        write_generation_config(staging, staging, read_usage(staging).prompt_template, tokenizer)
        update_identity(staging)
    return [f"{source}: an original LLaVA-1.5; written in the llava-hf layout: {output}", f"vision tower: {tower}"]


def _refuse_contradiction(source: Path, options: ImportOptions) -> None:
    """Raise RecipeError for an option that the report of a merge already answers."""
    if (source / MERGE_REPORT).is_file() and (options.template or options.image_aspect_ratio):
        raise RecipeError(
            f"{source / MERGE_REPORT} says how the model was trained; leave --template and --image-aspect-ratio out"
        )


def _tensor_readers(source: Path) -> dict[str, _Read]:
    """Return a reader for every tensor, by canonical name; pickled files are memory-mapped, not loaded."""
    readers: dict[str, _Read] = {}
    pickled = [] if has_safetensors(source) else pickled_files(source)
    for file in [] if pickled else weight_files(source):
        with open_weights(file) as handle:
            stored = list(handle.keys())
        for name in stored:
            if canonical := from_original_name(name):
                readers[canonical_name(canonical)] = partial(read_tensor, file, name)
    # Next to safetensors files, pickled ones hold the same weights again.
    for file in pickled:
        for name, tensor in read_tensors(file).items():
            if canonical := from_original_name(name):
                readers[canonical_name(canonical)] = _held(tensor)
    if EMBEDDINGS not in readers:
        raise ModelError(f"{source}: no model.embed_tokens.weight; this is not a complete checkpoint")
    return readers


def _held(tensor: torch.Tensor) -> _Read:
    return lambda: tensor


def _tower_source(source: Path, data: dict[str, Any]) -> str:
    """Return the vision tower of a checkpoint: a directory inside it, or the name in its configuration."""
    # Never a directory elsewhere on this machine: the name comes from a downloaded file.
    name = str(data["mm_vision_tower"])
    if not name.isprintable():
        raise ModelError(f"{source / 'config.json'}: mm_vision_tower is {name!r:.80}, which is no name of a model")
    inside = (source / name).resolve()
    return str(inside) if inside.is_dir() and inside.is_relative_to(source.resolve()) else name


def _add_tokens(config: LlavaConfig, tokenizer: Any) -> None:
    """Add llava-hf's tokens to tokenizer and configuration: `<image>`, then `<pad>`."""
    rows = int(config.text_config.vocab_size)
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
        tokenizer.add_special_tokens({"pad_token": _PAD})
        config.text_config.pad_token_id = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config.text_config.vocab_size = rows
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    config.image_seq_length = num_image_tokens(config)


def _complete(readers: dict[str, _Read], config: LlavaConfig, dtype: torch.dtype, tower: str | None) -> None:
    """Add what the original leaves out: vocabulary rows, a named tower, the second layer of a linear projector."""
    size = int(config.text_config.vocab_size)
    if config.tie_word_embeddings:
        readers.pop(HEAD, None)
    for name in (EMBEDDINGS, HEAD):
        if read := readers.get(name):
            readers[name] = _padded(read, size)
    if is_linear(config):
        bias = "multi_modal_projector.linear_1.bias" in readers
        width = int(config.text_config.hidden_size)
        for name, tensor in identity_layer(width, dtype, bias=bias).items():
            readers[name] = _held(tensor)
    if tower is not None:
        with hub_errors("vision tower", tower):
            model = CLIPVisionModel.from_pretrained(tower, dtype=dtype, trust_remote_code=False)
        for name, tensor in model.state_dict().items():
            readers[canonical_name(TOWER_PREFIX + name)] = _held(tensor)


def _padded(read: _Read, size: int) -> _Read:
    def padded() -> torch.Tensor:
        rows = read()
        if rows.dim() != 2:
            raise ModelError(f"the embeddings or the head have the shape {tuple(rows.shape)}; download the files again")
        return pad_rows(rows, size)

    return padded


def _chat_template(tokenizer: Any, name: str | None) -> str:
    """Return the chat template to write: the named one, the checkpoint's own, or LLaVA-1.5's."""
    if name is None and tokenizer.chat_template:
        return str(tokenizer.chat_template)
    return chat_template(get_template(name or "vicuna_v1"), tokenizer.eos_token)
