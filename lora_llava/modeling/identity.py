"""The identity of a model: everything in its files that decides an answer, as named fields with a canonical hash.

A field is named as a user finds it: `base config: text_config.rms_norm_eps`. Fields are read with the defaults of
transformers filled in, so that a spelling, a comment, or a key that decides nothing changes none of them. Weights have
hashes of their own: `hash_weights` for a base, sha256 of the file for an adapter. Without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin

from lora_llava.conversation.endings import stated_ends
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.manifest import BASE_OPTION
from lora_llava.formats.names import ADAPTER_CONFIG
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.modeling.metadata import hub_errors, read_config
from lora_llava.system.files import file_sha256, json_text, read_json, refuse_irregular
from lora_llava.system.progress import note
from lora_llava.system.text import printable

Fields = Mapping[str, Any]
"""Values of an identity by name; JSON values only."""

BASE = "base "
"""Precedes the names of the fields of an artifact's base; those of the artifact's own files have no prefix."""
_CONFIG, _PROCESSOR, _TOKENIZER, _GENERATION = "config", "image processor", "tokenizer", "generation config"
_USED_BY_THE_KIT = tuple(f"{BASE}{_PROCESSOR}: {name}" for name in ("image_mean", "image_std"))
"""Of the image processor. The kit's own transform has the rest: bicubic, by 1/255, to the size of the vision tower."""

_WHOLE = (
    "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias",
    "tie_word_embeddings",
)  # fmt: skip
_TEXT = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout", "mlp_bias",
    "tie_word_embeddings",
)  # fmt: skip
_VISION = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
_QUANTIZATION = ("type", "double_quant", "compute_dtype")
_EARLIER = {
    "size": f"{BASE}{_CONFIG}: vision_config.image_size",
    "mean": f"{BASE}{_PROCESSOR}: image_mean",
    "std": f"{BASE}{_PROCESSOR}: image_std",
    "vision_feature_layer": f"{BASE}{_CONFIG}: vision_feature_layer",
    "vision_feature_select_strategy": f"{BASE}{_CONFIG}: vision_feature_select_strategy",
}
"""What a manifest's `images` holds of the base, by field; manifests of earlier versions hold nothing else of it."""
_ROPES_OF_ANY_LENGTH = ("default", "linear", "llama3")
"""Types of rope that do not depend on `max_position_embeddings`."""

_IMAGES: dict[str, Any] = {
    "do_resize": True, "size": None, "resample": 3, "do_center_crop": True, "crop_size": None, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": None, "image_std": None, "do_convert_rgb": True,
    "do_pad": False,
}  # fmt: skip
"""Settings of CLIP's image processor, with its defaults."""

_LORA: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "modules_to_save": None,
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
}  # fmt: skip
"""Settings of PEFT's LoRA, with its defaults."""
_LORA_DECIDES_NOTHING = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "init_lora_weights",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
)  # fmt: skip

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SMALL_FILES = (
    "adapter_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
)  # fmt: skip
_MAX_SHOWN = 100
_AS_TRAINED = "the adapter was trained with"


def identity_of(fields: Fields) -> dict[str, Any]:
    """Return an identity for a file: its fields, and their canonical sha256 (hexadecimal) in any order."""
    fields = json.loads(json_text(dict(fields)))
    return {"sha256": _hash(fields), "fields": fields}


def recorded_fields(identity: Any) -> Fields | None:
    """Return the fields of an identity in a file; None unless they have the recorded hash."""
    fields = identity.get("fields") if isinstance(identity, dict) else None
    return fields if isinstance(fields, dict) and _hash(fields) == identity.get("sha256") else None


def base_fields(directory: Path) -> Fields:
    """Return the identity of a base, without its weights: config, image processor, tokenizer, ends of an answer.

    Raises ModelError if a file cannot be read.
    """
    return _base_fields(_Files.of(directory))


def tower_fields(vision: Any) -> Fields:
    """Return the fields of a vision tower's configuration that decide its features."""
    return {f"vision_config.{name}": getattr(vision, name, None) for name in _VISION}


def _config_fields(config: LlavaConfig) -> Fields:
    """Return the fields of a LLaVA's configuration that decide an answer."""
    text = config.text_config
    rope = dict(getattr(text, "rope_parameters", None) or {})
    fields = {name: getattr(config, name, None) for name in _WHOLE}
    fields["image_token_index"] = config.image_token_id
    fields |= {f"text_config.{name}": getattr(text, name, None) for name in _TEXT}
    fields["text_config.rope_theta"] = rope.pop("rope_theta", None)
    fields["text_config.rope_type"] = kind = rope.pop("rope_type", "default")
    fields["text_config.rope_scaling"] = rope or None
    if kind not in _ROPES_OF_ANY_LENGTH:
        fields["text_config.max_position_embeddings"] = text.max_position_embeddings
    return {**fields, **tower_fields(config.vision_config)}


def artifact_fields(directory: Path) -> Fields:
    """Return the identity of an artifact's own files: adapter config, tokenizer, image processor, template, ends.

    Raises ModelError if a file cannot be read.
    """
    return _artifact_fields(_Files.of(directory))


def record(manifest: Mapping[str, Any], directory: Path, base: Fields) -> dict[str, Any]:
    """Return the identity for a manifest: of the base, of the artifact's files in `directory`, and its own values."""
    return identity_of({**base, **artifact_fields(directory), **stated_fields(manifest)})


def check_unchanged(manifest: Mapping[str, Any], directory: Path) -> None:
    """Raise ArtifactError if an artifact's files or the values of its manifest are not those that were recorded.

    An artifact of an earlier version records none.
    """
    if manifest.get("identity") is None:
        return
    recorded = _recorded(manifest, directory)
    stated = json.loads(json_text(stated_fields(manifest)))
    now = {**artifact_fields(directory), **stated}
    # The files of the base are compared when it is loaded; the hash of its weights is a value of the manifest.
    own = [name for name in recorded if name in stated or not name.startswith(BASE)]
    if wrong := [difference(name, recorded[name], now.get(name)) for name in own if recorded[name] != now.get(name)]:
        raise ArtifactError(f"{directory} was altered: {'; '.join(wrong)}. Take the artifact from its source again.")


def _recorded(manifest: Mapping[str, Any], directory: Path) -> Fields:
    """Return the recorded fields; ArtifactError unless they have the recorded hash."""
    if (fields := recorded_fields(manifest["identity"])) is None:
        raise ArtifactError(
            f"{directory}: the identity in its manifest.json was altered; take the artifact from its source again"
        )
    return fields


def stated_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a manifest that decide an answer."""
    fields = {"base weights: sha256": manifest["base"]["weights_sha256"], "stage": manifest["stage"]}
    fields["adapter weights: sha256"] = manifest["adapter_sha256"]
    fields |= {f"quantization: {name}": manifest["quantization"].get(name) for name in _QUANTIZATION}
    fields |= {f"template: {name}": manifest["template"].get(name) for name in ("name", "system")}
    fields |= {f"images: {name}": value for name, value in manifest["images"].items()}
    return fields | {"answer prompt": manifest["data"].get("answer_prompt")}


def compare_base(manifest: Mapping[str, Any], artifact: Path, now: Fields, *, training: bool = False) -> Comparison:
    """Compare the identity of a base with the one that an artifact was trained on.

    An artifact of an earlier version records little of its base; what it does not is in `not_compared`.
    """
    if manifest.get("identity") is not None:
        return compare(_recorded(manifest, artifact), now, training=training)
    images = manifest["images"]
    trained = {field: images[name] for name, field in _EARLIER.items() if name in images}
    if not training:
        # Written from the base's tokenizer.
        own = {f"{BASE}{name}": value for name, value in artifact_fields(artifact).items()}
        trained |= {name: value for name, value in own.items() if name.startswith(f"{BASE}{_TOKENIZER}: ")}
    return compare(trained, now, training=training)


def check_base_files(
    manifest: Mapping[str, Any], now: Fields, found_at: str, artifact: Path, *, training: bool = False
) -> Comparison:
    """Compare the files of a base, without its weights, with those of training; say what differs and decides nothing.

    `training`: the base will be trained on, with its own tokenizer. Raises ArtifactError, with the name of each field,
    if the base would give other answers.
    """
    comparison = compare_base(manifest, artifact, now, training=training)
    if comparison.decisive:
        lines = "".join(f"\n  {line}" for line in comparison.decisive)
        how = "name that base in base.model_name_or_path" if training else f"give that base with {BASE_OPTION} DIR"
        raise ArtifactError(
            f"{artifact} was trained on another base than {found_at}:{lines}\nPut its files back as they were in "
            f"training, or {how}."
        )
    if comparison.harmless:
        used = "" if training else ", and the artifact's own files are used"
        note(f"{found_at} differs from the base of training: {'; '.join(comparison.harmless)}{used}")
    if comparison.not_compared:
        note(
            f"{artifact} is from an earlier version, which did not record everything of its base: these are not fully "
            f"compared with {found_at}: {', '.join(comparison.not_compared)}"
        )
    return comparison


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between the identity that an adapter was trained with and that of the files now, for users."""

    decisive: list[str]
    """Differences that change answers."""
    harmless: list[str]
    """Differences that change no answer of the kit, but may those of other software."""
    not_compared: list[str]
    """Kinds of files that were not recorded."""

    @property
    def text_side(self) -> bool:
        """Whether the base's tokenizer, or its ends of an answer, differ; those of training are in the artifact."""
        names = (f"{BASE}{_TOKENIZER}: ", f"{BASE}{_GENERATION}: ")
        return any(line.startswith(names) for line in self.harmless)


def compare(trained: Fields, now: Fields, *, training: bool = False) -> Comparison:
    """Compare the identity of a base with the one that an adapter was trained with.

    `training`: the base will be trained on, so its tokenizer decides, too; otherwise the artifact's own is used.
    """
    decisive: list[str] = []
    harmless: list[str] = []
    for name in differing(trained, now):
        line = difference(name, trained[name], now[name])
        decides = name.startswith(f"{BASE}{_CONFIG}: ") or name in _USED_BY_THE_KIT
        by_training = training and name.startswith(f"{BASE}{_TOKENIZER}: ")
        (decisive if decides or by_training else harmless).append(line)
    missing = dict.fromkeys(name.partition(": ")[0] for name in now if name not in trained)
    return Comparison(decisive, harmless, list(missing))


def differing(then: Fields, now: Fields) -> list[str]:
    """Return the names of the fields in both identities whose values differ."""
    return [name for name in now if name in then and then[name] != now[name]]


def difference(name: str, then: Any, now: Any, origin: str = _AS_TRAINED) -> str:
    """Describe a field that differs from its `origin`; hashes are not shown."""
    if _is_hash(then) or _is_hash(now):
        return f"{name} is not what {origin}"
    return f"{name} is {_shown(now)}, {origin} {_shown(then)}"


@dataclass(frozen=True, slots=True)
class _Files:
    """The small files of a directory by their content, so that equal ones are read once, wherever they are."""

    contents: tuple[tuple[str, str], ...]
    directory: Path = field(compare=False)

    @classmethod
    def of(cls, directory: Path) -> _Files:
        refuse_irregular(directory, ModelError)
        paths = [path for name in _SMALL_FILES if (path := directory / name).is_file()]
        return cls(tuple((path.name, file_sha256(path)) for path in paths), directory)


@lru_cache(maxsize=8)
def _base_fields(files: _Files) -> Fields:
    sections = {_CONFIG: _config_fields(read_config(files.directory)), **_sections(files.directory)}
    return {f"{BASE}{section}: {name}": value for section, part in sections.items() for name, value in part.items()}


@lru_cache(maxsize=8)
def _artifact_fields(files: _Files) -> Fields:
    with hub_errors("artifact", str(files.directory)):
        adapter = _lora_fields(read_json(files.directory / ADAPTER_CONFIG))
    sections = {"adapter config": adapter, **_sections(files.directory)}
    return {f"{section}: {name}": value for section, part in sections.items() for name, value in part.items()}


def _sections(directory: Path) -> dict[str, Fields]:
    """Return the fields of the files that a base and an artifact both have, by section."""
    with hub_errors("model", str(directory)):
        tokenizer = read_tokenizer(directory)
        images, _ = ImageProcessingMixin.get_image_processor_dict(directory)
        template = tokenizer.chat_template
        return {
            _PROCESSOR: _image_fields(images),
            _TOKENIZER: _tokenizer_fields(tokenizer),
            "chat template": {"text": None if template is None else _hash(template)},
            _GENERATION: {"eos_token_id": stated_ends(directory)},
        }


def _image_fields(settings: Mapping[str, Any]) -> Fields:
    fields = {name: _or_default(settings.get(name), default) for name, default in _IMAGES.items()}
    for name, keys in {"size": ("shortest_edge",), "crop_size": ("height", "width")}.items():
        value = fields[name]
        sides = value if isinstance(value, dict) else {} if value is None else dict.fromkeys(keys, value)
        fields[name] = {key: side for key, side in sorted(sides.items()) if side is not None} or None
    return fields


def _tokenizer_fields(tokenizer: Any) -> Fields:
    """Return what decides the ids of a text, and the text of ids; empty for a tokenizer that the kit cannot use."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return {}
    content = json.loads(backend.to_str())
    model = {name: value for name, value in content["model"].items() if name != "vocab" or isinstance(value, list)}
    # Earlier releases write a merge as one string.
    model["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or ()]
    added = [[index, *_added(token)] for index, token in sorted(tokenizer.added_tokens_decoder.items())]
    return {
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items())),
        "number of tokens": len(tokenizer),
        "added tokens": _hash(added),
        **{name: getattr(tokenizer, name, None) for name in _SPECIAL_TOKENS},
        "model": _hash(_significant(model)),
        **{name: _hash(part) if (part := _significant(content.get(name))) else None for name in _PIPELINE},
        "clean_up_tokenization_spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    }


def _added(token: Any) -> Iterator[Any]:
    for name in ("content", "special", "lstrip", "rstrip", "normalized", "single_word"):
        yield getattr(token, name)


def _lora_fields(config: Mapping[str, Any]) -> Fields:
    fields = {name: _or_default(config.get(name), default) for name, default in _LORA.items()}
    for name in ("target_modules", "modules_to_save"):
        # PEFT keeps sets, which it writes in any order.
        fields[name] = sorted(fields[name]) if isinstance(fields[name], list) else fields[name]
    others = {name for name in config if name not in _LORA and name not in _LORA_DECIDES_NOTHING}
    return fields | {"other settings": _significant({name: config[name] for name in sorted(others)})}


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _significant(value: Any) -> Any:
    """Leave out what is unset, false or empty: newer releases write more of it."""
    if isinstance(value, dict):
        items = {key: _significant(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item not in (None, False, {}, [])}
    return [_significant(item) for item in value] if isinstance(value, list) else value


def _hash(value: Any) -> str:
    """Return the sha256 of a value as canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _shown(value: Any) -> str:
    return "none" if value is None else printable(str(value), _MAX_SHOWN)
