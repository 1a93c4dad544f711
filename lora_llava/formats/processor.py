"""Tokenizer and processor files, as `AutoProcessor.from_pretrained` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaProcessor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.endings import write_generation_config
from lora_llava.conversation.templates import Template
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.formats.transformers_4 import add_old_files
from lora_llava.recipe.stages import AspectRatio


def clip_image_settings(image_size: int, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an image processor for squares of `image_size` pixels.

    `pixels` holds `image_mean` and `image_std`, as the vision tower's own image processor does.
    """
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": list(pixels["image_mean"]),
        "image_std": list(pixels["image_std"]),
    }


def save_processor(
    directory: Path,
    tokenizer: Any,
    config: LlavaConfig,
    pixels: Mapping[str, Any],
    *,
    aspect_ratio: AspectRatio = "square",
    jinja: str | None = None,
    is_model: bool = True,
) -> None:
    """Write tokenizer and processor files next to a model or an adapter, so that `AutoProcessor` loads them.

    With `pad` the processor pads images to a square as `preprocess` does; llava-hf's own processor crops.
    `jinja`: a chat template that replaces the tokenizer's. `is_model`: the directory gets a config.json too.
    """
    settings = clip_image_settings(int(config.vision_config.image_size), pixels)
    pad = aspect_ratio == "pad"
    image_processor = LlavaImageProcessorPil(do_pad=True, **settings) if pad else CLIPImageProcessorPil(**settings)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=int(config.vision_config.patch_size),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=jinja or tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    add_old_files(directory, is_model=is_model)


def save_surroundings(
    directory: Path,
    base: Path,
    config: LlavaConfig,
    template: Template,
    aspect_ratio: AspectRatio,
    *,
    is_model: bool = True,
) -> dict[str, Any]:
    """Write tokenizer, processor and generation settings of `base` to `directory`, for prompts as in training.

    `is_model`: the directory gets a config.json too. Returns the base's settings of pixel values, such as `image_mean`
    and `image_std`.
    """
    tokenizer = read_tokenizer(base)
    pixels: dict[str, Any]
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(base)
    jinja = chat_template(template, tokenizer.eos_token)
    save_processor(directory, tokenizer, config, pixels, aspect_ratio=aspect_ratio, jinja=jinja, is_model=is_model)
    write_generation_config(directory, base, template, tokenizer)
    return pixels
