"""How a stage turns images into tokens."""

from __future__ import annotations

from typing import Any

from lora_llava.data.rows import ImageTransform
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageSettings


def image_transform(recipe: Recipe, settings: StageSettings, loaded: LoadedModel) -> ImageTransform:
    """Make the image transform of a stage."""
    return ImageTransform(
        size=loaded.image_size,
        mean=loaded.image_mean,
        std=loaded.image_std,
        aspect_ratio=settings.image_aspect_ratio or recipe.images.image_aspect_ratio,
    )


def image_facts(recipe: Recipe, settings: StageSettings, loaded: LoadedModel) -> dict[str, Any]:
    """Describe, for the manifest, how images are turned into tokens."""
    transform = image_transform(recipe, settings, loaded)
    return {
        "size": transform.size,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "image_aspect_ratio": transform.aspect_ratio,
        "window": settings.data.window,
        "vision_feature_layer": loaded.config.vision_feature_layer,
        "vision_feature_select_strategy": loaded.config.vision_feature_select_strategy,
        "num_image_tokens": loaded.num_image_tokens,
    }
