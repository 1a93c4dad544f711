"""Changes to a base and an artifact: those that decide an answer, and those that decide nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_llava.formats.llava_hf import write_weights
from lora_llava.formats.names import ADAPTER_CONFIG, WEIGHTS
from tests.helpers.tiny import save_tiny_base

BASE, ARTIFACT = "base", "run/instruct"
"""Directories of a project."""
Change = Callable[[Path], object]
"""Changes the files of a project."""
State = dict[str, torch.Tensor]


def edited(path: str, *keys: str, value: Any) -> Change:
    """Set a value inside a JSON file."""

    def change(project: Path) -> None:
        content = inner = json.loads((project / path).read_text(encoding="utf-8"))
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        (project / path).write_text(json.dumps(content), encoding="utf-8")

    return change


def config(*keys: str, value: Any) -> Change:
    return edited("base/config.json", *keys, value=value)


def images(key: str, value: Any, where: str = BASE) -> Change:
    return edited(f"{where}/preprocessor_config.json", key, value=value)


def lora(key: str, value: Any) -> Change:
    return edited(f"{ARTIFACT}/{ADAPTER_CONFIG}", key, value=value)


def manifest(*keys: str, value: Any) -> Change:
    return edited(f"{ARTIFACT}/manifest.json", *keys, value=value)


def exchanged_ids(where: str) -> Change:
    """Exchange the ids of two letters in the tokenizer."""

    def change(project: Path) -> None:
        path = project / where / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def added_token(project: Path) -> None:
    path = project / BASE / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    token = {**content["added_tokens"][-1], "id": 287, "content": "<new>", "special": False}
    content["added_tokens"].append(token)
    path.write_text(json.dumps(content), encoding="utf-8")


def no_start_token(project: Path) -> None:
    edited("base/tokenizer.json", "post_processor", value=None)(project)


def written(path: str, text: str) -> Change:
    def change(project: Path) -> None:
        (project / path).write_text(text, encoding="utf-8")

    return change


def weights(path: str, change_state: Callable[[State], object]) -> Change:
    """Change the tensors of a safetensors file."""

    def change(project: Path) -> None:
        state = load_file(project / path)
        change_state(state)
        save_file(state, project / path, metadata={"format": "pt"})

    return change


def first(state: State, part: str = "q_proj") -> str:
    return next(name for name in sorted(state) if part in name)


def one_weight(state: State) -> None:
    state[first(state)][0, 0] += 1e-3


def renamed(part: str, to: str) -> Callable[[State], object]:
    def change(state: State) -> None:
        name = first(state, part)
        state[name.replace(part, to)] = state.pop(name)

    return change


def nan(state: State) -> None:
    state[first(state, "lora_B")][0, 0] = float("nan")


def other_base(project: Path) -> None:
    shutil.rmtree(project / BASE)
    save_tiny_base(project / BASE, seed=1)


MODEL, ADAPTER = "base/model.safetensors", f"{ARTIFACT}/{WEIGHTS}"
TEXT, VISION = "text_config", "vision_config"
CUT = r"model\.language_model\..*\.(q_proj|v_proj)"

REFUSED: dict[str, tuple[Change, str]] = {
    "rms_norm_eps": (
        config(TEXT, "rms_norm_eps", value=1e-5),
        "base config: text_config.rms_norm_eps is 1e-05, the adapter was trained with 1e-06",
    ),
    "rope theta": (config(TEXT, "rope_parameters", "rope_theta", value=5e5), "rope_theta is 500000.0, the adapter was"),
    "rope type": (
        config(TEXT, "rope_parameters", value={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        "rope_type is linear, the adapter was trained with default",
    ),
    "hidden_act": (config(TEXT, "hidden_act", value="gelu"), "text_config.hidden_act is gelu"),
    "layers": (config(TEXT, "num_hidden_layers", value=1), "text_config.num_hidden_layers is 1"),
    "heads": (config(TEXT, "num_attention_heads", value=2), "text_config.num_attention_heads is 2"),
    "key-value heads": (config(TEXT, "num_key_value_heads", value=4), "text_config.num_key_value_heads is 4"),
    "attention dropout": (config(TEXT, "attention_dropout", value=0.5), "text_config.attention_dropout is 0.5"),
    "feature layer": (config("vision_feature_layer", value=-1), "config: vision_feature_layer is -1"),
    "select strategy": (
        config("vision_feature_select_strategy", value="full"),
        "vision_feature_select_strategy is full",
    ),
    "image token": (config("image_token_index", value=5), "config: image_token_index is 5"),
    "projector": (config("projector_hidden_act", value="relu"), "config: projector_hidden_act is relu"),
    "image size": (config(VISION, "image_size", value=42), "vision_config.image_size is 42"),
    "patch size": (config(VISION, "patch_size", value=7), "vision_config.patch_size is 7"),
    "tower's norm": (config(VISION, "layer_norm_eps", value=1e-6), "vision_config.layer_norm_eps is 1e-06"),
    "tower's activation": (config(VISION, "hidden_act", value="gelu"), "vision_config.hidden_act is gelu"),
    "image mean": (images("image_mean", [0.5, 0.5, 0.5]), "base image processor: image_mean is [0.5, 0.5, 0.5]"),
    "image std": (images("image_std", [0.5, 0.5, 0.5]), "base image processor: image_std is [0.5, 0.5, 0.5]"),
    "one weight": (weights(MODEL, one_weight), "weights"),
    "tensor renamed": (weights(MODEL, renamed("q_proj", "p_proj")), "weights"),
    "missing key": (weights(MODEL, lambda state: state.pop(first(state))), "weights"),
    "unexpected key": (weights(MODEL, lambda state: state.update(extra=torch.zeros(1))), ""),
    "another base": (other_base, "weights"),
    "lora_alpha": (lora("lora_alpha", 16), "adapter config: lora_alpha is 16, the adapter was trained with 8.0"),
    "r": (lora("r", 8), "adapter config: r is 8, the adapter was trained with 4"),
    "target modules cut": (lora("target_modules", CUT), "adapter config: target_modules is model"),
    "rslora": (lora("use_rslora", True), "adapter config: use_rslora is True"),
    "dora": (lora("use_dora", True), "adapter config: use_dora is True"),
    "rank pattern": (lora("rank_pattern", {"q_proj": 2}), "adapter config: rank_pattern is {'q_proj': 2}"),
    "another form": (lora("use_qalora", True), "adapter config: other settings is {'use_qalora': True}"),
    "lora_A renamed": (weights(ADAPTER, renamed("lora_A", "lora_X")), "was altered"),
    "NaN": (weights(ADAPTER, nan), "was altered"),
    "artifact's tokenizer": (exchanged_ids(ARTIFACT), "tokenizer: vocabulary is not what the adapter was trained with"),
    "artifact's chat template": (written(f"{ARTIFACT}/chat_template.jinja", "{{ 1 }}"), "chat template: text is not"),
    "artifact's image mean": (
        images("image_mean", [0.5] * 3, ARTIFACT),
        "image processor: image_mean is [0.5, 0.5, 0.5]",
    ),
    "artifact's ends": (edited(f"{ARTIFACT}/generation_config.json", "eos_token_id", value=5), "eos_token_id is [5]"),
    "template": (
        manifest("template", "name", value="chatml"),
        "template: name is chatml, the adapter was trained with v",
    ),
    "system text": (
        manifest("template", "system", value="Hi."),
        "template: system is Hi., the adapter was trained with",
    ),
    "quantization": (manifest("quantization", "type", value="nf4"), "quantization: type is nf4"),
    "aspect ratio": (manifest("images", "image_aspect_ratio", value="square"), "images: image_aspect_ratio is square"),
    "answer prompt": (manifest("data", "answer_prompt", value="Briefly."), "answer prompt is Briefly."),
    "recorded identity": (
        manifest("identity", "fields", "base config: text_config.rms_norm_eps", value=1e-5),
        "the identity in its manifest.json was altered",
    ),
}
"""Changes to the base or the artifact that every command refuses, with words of the reason."""

SAID: dict[str, tuple[Change, str]] = {
    "rescale factor": (images("rescale_factor", 1.0), "base image processor: rescale_factor is 1.0"),
    "resample": (images("resample", 2), "base image processor: resample is 2"),
    "size": (images("size", {"shortest_edge": 56}), "base image processor: size is {'shortest_edge': 56}"),
    "crop size": (images("crop_size", 56), "base image processor: crop_size is {'height': 56, 'width': 56}"),
    "no crop": (images("do_center_crop", value=False), "base image processor: do_center_crop is False"),
    "chat template": (
        written("base/chat_template.jinja", "{{ 1 }}"),
        "base chat template: text is not what the adapter",
    ),
    "end token": (edited("base/generation_config.json", "eos_token_id", value=5), "eos_token_id is [5], the adapter"),
}
"""Changes to the base that no answer of the kit depends on; every command says them."""

TOKENIZER: dict[str, tuple[Change, str]] = {
    "ids exchanged": (exchanged_ids(BASE), "base tokenizer: vocabulary is not what the adapter was trained with"),
    "token added": (added_token, "base tokenizer: number of tokens is 288, the adapter was trained with 287"),
    "end token": (
        edited("base/tokenizer_config.json", "eos_token", value="<|im_end|>"),
        "base tokenizer: eos_token is <|im_end|>, the adapter was trained with </s>",
    ),
    "no start token": (no_start_token, "base tokenizer: post_processor is not what the adapter was trained with"),
}
"""Changes to the base's tokenizer: said where the artifact's own is used, refused where training would go on."""


def reordered(project: Path) -> None:
    path = project / BASE / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(content.items()))), encoding="utf-8")


def sharded(project: Path) -> None:
    state = load_file(project / MODEL)
    (project / MODEL).unlink()
    assert len(write_weights(project / BASE, iter(state.items()), max_shard_bytes=50_000)) > 3


def older_spelling(project: Path) -> None:
    path = project / BASE / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["torch_dtype"] = content.pop("dtype")
    path.write_text(json.dumps(content), encoding="utf-8")


def defaults_left_out(project: Path) -> None:
    path = project / BASE / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("rms_norm_eps", "attention_bias", "hidden_act"):
        del content[TEXT][key]
    path.write_text(json.dumps(content), encoding="utf-8")


def touched(project: Path) -> None:
    for path in (*(project / BASE).iterdir(), *(project / ARTIFACT).iterdir()):
        os.utime(path, (1, 1))
        path.chmod(0o640)


TAKEN: dict[str, Change] = {
    "comment": config("_comment", value="made on a Tuesday"),
    "key order": reordered,
    "shards": sharded,
    "version of transformers": config("transformers_version", value="4.40.0"),
    "torch_dtype": older_spelling,
    "_name_or_path": config("_name_or_path", value="/home/somebody/llava"),
    "temperature": edited("base/generation_config.json", "temperature", value=0.2),
    "README": written("base/README.md", "# A model"),
    "additional file": written("base/notes.txt", "notes"),
    "times and modes": touched,
    "defaults left out": defaults_left_out,
    "processor's name": images("image_processor_type", "CLIPImageProcessorFast"),
    "where the base was": lora("base_model_name_or_path", "somewhere/else"),
    "version of PEFT": lora("peft_version", "0.10.0"),
    "card": written(f"{ARTIFACT}/README.md", "# An adapter"),
}
"""Changes that decide nothing."""
