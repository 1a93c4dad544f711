"""Check the base and its parts: available, complete, and of a kind that training, merge and export support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_llava.formats.shapes import (
    LINEAR_LAYERS,
    LlavaShape,
    Shape,
    text_config,
    text_tensors,
    tower_tensors,
    vision_config,
)
from lora_llava.formats.sizes import TEXT_SIZES, VISION_SIZES, wrong_sizes
from lora_llava.formats.weight_files import INDEX, has_safetensors, pickled_files
from lora_llava.planning.preflight.findings import Finding, Problem
from lora_llava.planning.preflight.model import weights
from lora_llava.planning.preflight.model.files import ModelFiles
from lora_llava.planning.preflight.setup import LANGUAGE_MODEL, LLAVA, VISION_TOWER, Setup
from lora_llava.recipe.stages import trains_lora
from lora_llava.system.names import did_you_mean, similar

_LLAMA = "the kit trains language models of the Llama architecture: Llama, Vicuna, TinyLlama, SmolLM2"
_TOWERS = "the kit reads CLIP vision towers, such as openai/clip-vit-large-patch14-336"
_UNQUANTIZED = "Name the unquantized model that it was made from; quantization.type: nf4 quantizes it as it is loaded."
_OTHER_LLAVAS = {
    "llava_llama": "It is an original LLaVA checkpoint: bring it in with lora-llava import, then name the result.",
    "llava_next": "LLaVA-NeXT (1.6) cuts images into tiles, which the kit does not; name a LLaVA-1.5.",
}
_A_LLAVA = (
    "Name a converted LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf; or the parts in base.language_model and "
    "base.vision_tower."
)
_A_WHOLE_LLAVA = "It is a whole LLaVA: name it in base.model_name_or_path, without language_model and vision_tower."


def base_can_be_used(setup: Setup) -> Iterator[Finding]:
    """Every model that the recipe names is available, complete, and of a supported kind."""
    for key, model in setup.models.items():
        yield from model_problems(key, model)


def features_can_be_read(setup: Setup) -> Iterator[Finding]:
    """The vision tower of a base to assemble has the layer that the recipe projects."""
    if setup.shape is not None and LLAVA not in setup.models:
        for what, _ in _features(setup.shape.whole, setup.shape.vision, ""):
            yield Problem("base.vision_feature_layer", what.partition(" ")[2], "Set it to -2, as in LLaVA-1.5.")


def adapter_has_its_layers(setup: Setup) -> Iterator[Finding]:
    """Every layer in adapter.target_modules is a linear layer of the language model."""
    targets = setup.recipe.adapter.target_modules
    if isinstance(targets, str) or not any(trains_lora(stage) for stage in setup.recipe.stage_names):
        return
    layers = [name.partition(".")[2] for name in LINEAR_LAYERS]
    for name in targets:
        if name not in layers:
            fix = did_you_mean(similar(name, layers), f"There are {', '.join(layers)}.")
            yield Problem("adapter.target_modules", f"the language model has no linear layer {name}", fix)


def model_problems(key: str, model: ModelFiles) -> Iterator[Problem]:
    """Yield why a model cannot be used for the recipe key `key`, judging by its files alone."""
    if model.problem is not None:
        yield Problem(key, *model.problem)
        return
    if model.gguf_file is not None:
        return
    problems = [*_unfit(key, model)]
    yield from (Problem(key, f"{model.name}: {what}", fix) for what, fix in problems)
    # A model of another kind has other tensors, too.
    if not problems:
        yield from (Problem(key, what, fix) for what, fix in _weights(key, model))


def _unfit(key: str, model: ModelFiles) -> Iterator[tuple[str, str]]:
    """Yield what in config.json makes the model unfit."""
    config = model.config
    problems = list(unreadable(config))
    yield from problems
    if not problems:
        yield from {LLAVA: _llava, LANGUAGE_MODEL: _language_model, VISION_TOWER: _tower}[key](config)


def unreadable(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield why the weights of a model of any architecture cannot be read: custom code, quantization."""
    if (key := _custom_code(config)) is not None:
        yield (
            f"it needs custom code ({key} in config.json), and the kit runs no code that comes with a model",
            "Name a model that transformers knows by itself.",
        )
        return
    if (method := quantized(config)) is not None:
        yield f"it is quantized already ({method}), so it can be neither trained by LoRA here nor merged", _UNQUANTIZED


def _custom_code(config: dict[str, Any]) -> str | None:
    """Return the key that asks for custom code; None if there is none."""
    parts = {"": config, "text_config.": config.get("text_config"), "vision_config.": config.get("vision_config")}
    return next(
        (f"{name}auto_map" for name, part in parts.items() if isinstance(part, dict) and "auto_map" in part), None
    )


def quantized(config: dict[str, Any]) -> str | None:
    """Return the quantization method in a config.json; None if there is none."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            if method is None and isinstance(settings, dict):
                method = (
                    "bitsandbytes"
                    if any(key.startswith(("load_in_", "bnb_", "_load_in")) for key in settings)
                    else None
                )
            return str(method or "by an unknown method")
    return None


def _llava(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (kind := config.get("model_type")) != "llava":
        yield f"model_type is {kind!r}, needed 'llava'", _OTHER_LLAVAS.get(str(kind), _A_LLAVA)
        return
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict | None):
            yield f"{part} in config.json is not a mapping", "Download the model again."
            return
    problems = [*_language_model(config.get("text_config") or {}), *_tower(config.get("vision_config") or {})]
    yield from problems
    if not problems:
        yield from _features(LlavaShape.of(config).whole, LlavaShape.of(config).vision, "Correct config.json.")


def _language_model(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (kind := config.get("model_type", "llama")) != "llama":
        fix = _A_WHOLE_LLAVA if kind == "llava" else "Name one of these."
        yield f"the language model is {kind!r}, needed 'llama': {_LLAMA}", fix
        return
    yield from _sizes(config, TEXT_SIZES, "language model")


def _tower(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    inner = config.get("vision_config")
    kind = (inner if isinstance(inner, dict) else config).get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", *(["clip"] if inner is None else [])) or config.get("model_type") == "siglip":
        yield f"the vision tower is {kind!r}, needed 'clip_vision_model': {_TOWERS}", "Name one of these."
        return
    yield from _sizes(vision_config(config), VISION_SIZES, "vision tower")


def _sizes(config: dict[str, Any], names: tuple[str, ...], part: str) -> Iterator[tuple[str, str]]:
    """Yield the sizes in a config that are invalid or do not fit each other."""
    if wrong := wrong_sizes(config, names):
        yield (
            f"the {part}'s {', '.join(wrong)} in config.json: needed is an integer, above 0 and of no absurd size",
            "Download the model again.",
        )
    elif part == "vision tower" and config["patch_size"] > config["image_size"]:
        yield (
            f"the vision tower's patch_size {config['patch_size']} is above its image_size {config['image_size']}",
            "Download the model again.",
        )


def _features(whole: dict[str, Any], vision: dict[str, Any], fix: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the choice of the vision tower's features."""
    layers, layer = int(vision["num_hidden_layers"]), whole["vision_feature_layer"]
    if isinstance(layer, list):
        yield f"vision_feature_layer is {layer}: features of several layers are not supported, only of one", fix
    elif not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        yield (
            f"vision_feature_layer is {layer}, allowed are {-layers - 1} to {layers} for a tower of {layers} layers",
            fix,
        )
    if (strategy := whole["vision_feature_select_strategy"]) not in ("default", "full"):
        yield f"vision_feature_select_strategy is {strategy!r}, allowed are default and full", fix


def _weights(key: str, model: ModelFiles) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the weights, judging by their headers."""
    assert model.directory is not None
    fetched = has_safetensors(model.directory)
    if key != LLAVA and not fetched and not (model.directory / INDEX).is_file() and pickled_files(model.directory):
        return
    files = weights.read_weights(model.directory)
    if not files.tensors and model.from_hub and not fetched:
        yield from _not_fetched(model)
        return
    if files.problem is not None:
        yield files.problem
        return
    if (dtype := weights.odd_type(files.tensors)) is not None:
        yield f"{model.name}: it is quantized already: its weights are of type {dtype}", _UNQUANTIZED
        return
    expected, prefix = _expected(key, model.config)
    if wrong := weights.wrong_tensors(files.tensors, expected, prefix=prefix, extra=key != LLAVA):
        yield (
            f"{model.directory} does not hold the weights of its config.json: {weights.shown(wrong)}",
            ("Download the whole model again."),
        )


def _not_fetched(model: ModelFiles) -> Iterator[tuple[str, str]]:
    from lora_llava.system.hub.network import offline

    if offline():
        what = f"the weights of {model.name} are not in the Hub's cache, and the Hub cannot be reached"
        yield what, "Connect, or give the directory of a copy."


def _expected(key: str, config: dict[str, Any]) -> tuple[dict[str, Shape], str]:
    """Return the shapes of the tensors that a model must have, by canonical name, and the prefix its names lack."""
    if key == LLAVA:
        return dict(LlavaShape.of(config).tensors()), ""
    if key == VISION_TOWER:
        return dict(tower_tensors(vision_config(config))), "vision_tower."
    text = text_config(config)
    tensors = dict(text_tensors(text))
    if text.tie_word_embeddings:
        tensors = {name: shape for name, shape in tensors.items() if not name.endswith("lm_head.weight")}
    return tensors, "language_model."
