"""Check what turns data into model inputs: tokenizer, image processor, template tokens and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.conversation.templates import get_template
from lora_llava.errors import LoraLlavaError
from lora_llava.planning.preflight.findings import Finding, Notice, Problem
from lora_llava.planning.preflight.model.files import ModelFiles
from lora_llava.planning.preflight.setup import LANGUAGE_MODEL, LLAVA, VISION_TOWER, Setup
from lora_llava.recipe.stages import InstructSettings
from lora_llava.system.files import find_json
from lora_llava.system.text import listed

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_READERS = {
    "tokenizer_config.json": "tokenizer",
    "preprocessor_config.json": "image processor",
    "processor_config.json": "processor",
}
_WITHOUT_DEFAULTS = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
"""Tokenizer classes that have no end token unless their files name one."""
_MAX_LENGTH = InstructSettings.model_fields["max_length"].default


def tokenizer_can_be_read(setup: Setup) -> Iterator[Finding]:
    """The files of the tokenizer and of the image processor exist, and need no custom code."""
    for key, model in setup.usable():
        if key != VISION_TOWER:
            yield from (Problem(key, *problem) for problem in _tokenizer_problems(model))
        if key != LANGUAGE_MODEL:
            yield from (Problem(key, *problem) for problem in _processor_problems(model))
        if model.directory is not None:
            yield from (Problem(key, f"{model.name}: {what}", fix) for what, fix in custom_readers(model.directory))


def image_token_is_known(setup: Setup) -> Iterator[Finding]:
    """A LLaVA's tokenizer has the image token, under the id that config.json gives it."""
    model = dict(setup.usable()).get(LLAVA)
    tokens = None if model is None else _known_tokens(model)
    if model is None or tokens is None or setup.shape is None:
        return
    in_config, in_tokenizer = setup.shape.whole["image_token_index"], tokens.get(IMAGE_PLACEHOLDER)
    if IMAGE_PLACEHOLDER not in tokens:
        what = f"{model.name}: its tokenizer has no token {IMAGE_PLACEHOLDER}, which represents an image"
        yield Problem(LLAVA, what, "Take the tokenizer files that were published with the model.")
    elif in_tokenizer is not None and in_tokenizer != in_config:
        ids = f"{in_tokenizer} in its tokenizer, but {in_config} in its config.json"
        what = f"{model.name}: the id of {IMAGE_PLACEHOLDER} is {ids}"
        yield Problem(LLAVA, what, "Take tokenizer and config.json of one model.")
    elif not isinstance(in_config, int) or not 0 <= in_config < setup.shape.text.vocab_size:
        vocabulary = f"its vocabulary of {setup.shape.text.vocab_size:,}"
        what = f"{model.name}: image_token_index {in_config} is outside {vocabulary}"
        yield Problem(LLAVA, what, "Download the model again.")


def template_can_be_written(setup: Setup) -> Iterator[Finding]:
    """The tokenizer has the special tokens of every stage's template."""
    model = next((model for key, model in setup.usable() if key in (LLAVA, LANGUAGE_MODEL)), None)
    tokens = None if model is None or model.gguf_file else _known_tokens(model)
    if model is None or tokens is None:
        return
    for stage in setup.recipe.stage_names:
        template = get_template(setup.recipe.stage(stage).template)
        key = f"stages.{stage}.template"
        if missing := [marker for marker in template.markers if marker not in tokens]:
            what = f"{template.name} needs the tokens {listed(missing)}, which the tokenizer of {model.name} lacks"
            yield Problem(key, what, "Set template: vicuna_v1, which needs none.")
        elif template.end is None and not _has_end(model):
            what = f"{template.name} ends an answer with the end token, and the tokenizer of {model.name} names none"
            yield Problem(key, what, "Set eos_token in its tokenizer_config.json.")


def template_is_the_bases(setup: Setup) -> Iterator[Finding]:
    """Give a notice if a stage's template differs from the chat template that the base was trained with."""
    from lora_llava.conversation.chat_template import template_difference

    model = next((model for key, model in setup.usable() if key in (LLAVA, LANGUAGE_MODEL)), None)
    if model is None or model.directory is None:
        return
    # The template of start_from is compared where the recipe is read.
    first = setup.recipe.stage_names[0] if setup.recipe.start_from is not None else None
    for stage in setup.recipe.stage_names:
        if stage == first:
            continue
        settings = setup.recipe.stage(stage)
        try:
            difference = template_difference(model.directory, get_template(settings.template, settings.system))
        except LoraLlavaError as error:
            difference = str(error)
        if difference is not None:
            yield Notice(f"stages.{stage}.template", difference)


def lengths_fit(setup: Setup) -> Iterator[Finding]:
    """`max_length` has room for an image and text, and is within what the language model was trained for."""
    shape = setup.shape
    if shape is None:
        return
    images, context = shape.num_image_tokens, int(shape.text.max_position_embeddings)
    for stage in setup.recipe.stage_names:
        length, key = setup.recipe.stage(stage).max_length, f"stages.{stage}.max_length"
        if length <= images:
            what = f"is {length:,}, but an image alone takes {images:,} tokens, so none of the text is left"
            yield Problem(key, what, f"Set it above {images:,} by the length of your texts, such as {images + 256:,}.")
        elif length > context and length != _MAX_LENGTH and setup.start != "resume":
            what = (
                f"is {length:,}, above the {context:,} tokens that the language model takes (max_position_embeddings)"
            )
            yield Problem(key, what, f"Set it to at most {context:,}.")
        elif length > context:
            yield Notice(
                key,
                f"is {length:,}; longer texts exceed the {context:,} tokens that the language model was trained for.",
            )


def _known_tokens(model: ModelFiles) -> dict[str, int | None] | None:
    """Return the tokens of a model with their ids (None: not assigned yet); None if its files do not tell."""
    try:
        return _tokens_in(model)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # Not a tokenizer file; its reader reports that.


def _tokens_in(model: ModelFiles) -> dict[str, int | None] | None:
    assert model.directory is not None
    file = find_json(model.directory / "tokenizer.json")
    if file is None:
        return None
    inner = file.get("model")
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    tokens: dict[str, int | None] = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    tokens |= {str(token.get("content")): token.get("id") for token in file.get("added_tokens") or ()}
    tokens |= find_json(model.directory / "added_tokens.json") or {}
    config = find_json(model.directory / "tokenizer_config.json") or {}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        tokens.setdefault(str(token.get("content")), int(index))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        named = config.get(key) or ()
        for token in named.values() if isinstance(named, dict) else named:
            tokens.setdefault(str(token["content"] if isinstance(token, dict) else token), None)
    return tokens


def _tokenizer_problems(model: ModelFiles) -> Iterator[tuple[str, str]]:
    assert model.directory is not None
    if not any((model.directory / name).is_file() for name in _TOKENIZERS):
        yield f"{model.directory} holds no tokenizer ({', '.join(_TOKENIZERS)})", "Download the whole model."
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = model.directory / name
        if path.is_file() and find_json(path) is None:
            yield f"{path} cannot be read as JSON", "Download the file again."


def custom_readers(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield which files of a model ask for code that comes with it, to read texts or images."""
    for name, what in _READERS.items():
        if "auto_map" in (find_json(directory / name) or {}):
            yield (
                f"its {what} needs custom code (auto_map in {name}), which is not run",
                f"Name a model whose {what} transformers knows by itself.",
            )


def reader_problems(model: ModelFiles) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the tokenizer and image processor of a model, judging by their files."""
    assert model.directory is not None
    yield from _tokenizer_problems(model)
    yield from _processor_problems(model)
    yield from ((f"{model.name}: {what}", fix) for what, fix in custom_readers(model.directory))


def _processor_problems(model: ModelFiles) -> Iterator[tuple[str, str]]:
    assert model.directory is not None
    processor = find_json(model.directory / "preprocessor_config.json")
    if processor is None:
        processor = (find_json(model.directory / "processor_config.json") or {}).get("image_processor")
    for name in ("image_mean", "image_std"):
        values = processor.get(name) if isinstance(processor, dict) else None
        if not isinstance(values, list) or len(values) != 3:
            what = f"{model.directory} does not say how images are normalized: no {name} in preprocessor_config.json"
            yield what, "Take the file that was published with the model."
            return


def _has_end(model: ModelFiles) -> bool:
    assert model.directory is not None
    config = find_json(model.directory / "tokenizer_config.json") or {}
    special = find_json(model.directory / "special_tokens_map.json") or {}
    return bool(
        config.get("eos_token")
        or special.get("eos_token")
        or config.get("tokenizer_class", "LlamaTokenizer") not in _WITHOUT_DEFAULTS
    )
