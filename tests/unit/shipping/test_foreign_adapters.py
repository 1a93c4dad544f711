"""Adapters of other tools that train more than LoRA on the language model: read, or refused for the true reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import load_artifact, read_manifest
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import ADAPTER_CONFIG, WEIGHTS
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, logits, plain_peft
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_STD, save_tiny_base

PIXELS = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
WITH_HEAD = r".*(language_model.*\.q_proj|lm_head)"


def tie(base: Path) -> Path:
    """Make the lm_head of a base its embeddings."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = load_file(base / "model.safetensors")
    state = {name: one for name, one in state.items() if "lm_head" not in name}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    return base


# PEFT says that it saves the base's embeddings too, and that they are tied to the lm_head.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]


def make(base: Path, directory: Path, **how: Any) -> torch.Tensor:
    return logits(plain_peft(LlavaForConditionalGeneration.from_pretrained(base), directory, **how))


def bring(source: Path, base: Path) -> Path:
    import_any(source, source.with_name("brought"), ImportOptions(base_model=str(base)))
    return source.with_name("brought")


def test_k60_lora_on_lm_head_is_imported_without_the_copies_that_peft_adds(tiny_base: Path, tmp_path: Path) -> None:
    theirs = make(tiny_base, tmp_path / "theirs", target_modules=WITH_HEAD)
    names = set(load_file(tmp_path / "theirs" / WEIGHTS))
    assert any(name.endswith("lm_head.base_layer.weight") for name in names)
    brought = bring(tmp_path / "theirs", tiny_base)
    assert not any("base_layer" in name or "embed_tokens" in name for name in load_file(brought / WEIGHTS))
    ours = logits(load_artifact(brought, device=CPU, dtype=torch.float32)[0].model)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    assert merge_artifact(brought, tmp_path / "merged")["probe"]["relative"] < 1e-5


def test_k60_on_a_base_with_tied_embeddings_the_reason_is_said(tmp_path: Path) -> None:
    base = tie(save_tiny_base(tmp_path / "base"))
    make(base, tmp_path / "head" / "theirs", target_modules=WITH_HEAD)
    saved = ["multi_modal_projector", "embed_tokens"]
    make(base, tmp_path / "embeddings" / "theirs", modules_to_save=saved)
    for name in ("head", "embeddings"):
        with pytest.raises(ArtifactError, match=r"which this base has as one weight \(tie_word_embeddings\)"):
            bring(tmp_path / name / "theirs", base)
        assert not (tmp_path / name / "brought").exists()


def test_k60_a_copy_that_is_not_the_bases_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs", target_modules=WITH_HEAD)
    state = load_file(tmp_path / "theirs" / WEIGHTS)
    state = {name: one + 1 if name.endswith("base_layer.weight") else one for name, one in state.items()}
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"holds a copy of .*lm_head.* that differs from the base's"):
        bring(tmp_path / "theirs", tiny_base)
    # Of a layer that this base does not have.
    [name] = [name for name in state if name.endswith("lm_head.base_layer.weight")]
    state[name.replace("lm_head", "model.language_model.layers.9.mlp.up_proj")] = state.pop(name) - 1
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"holds a copy of .*layers\.9.* that differs from the base's"):
        bring(tmp_path / "theirs", tiny_base)


def test_images_are_padded_as_the_processor_of_the_adapter_or_of_its_base_does(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    make(base, tmp_path / "theirs")

    def write(directory: Path, do_pad: bool) -> None:
        (directory / "preprocessor_config.json").write_text(json.dumps({"do_pad": do_pad, **PIXELS}))

    def ratio() -> str:
        ratio = read_manifest(bring(tmp_path / "theirs", base)).images["image_aspect_ratio"]
        shutil.rmtree(tmp_path / "brought")
        return str(ratio)

    (base / "processor_config.json").unlink()
    write(base, do_pad=True)
    assert ratio() == "pad"
    write(tmp_path / "theirs", do_pad=False)
    assert ratio() == "square"
    write(base, do_pad=False)
    write(tmp_path / "theirs", do_pad=True)
    assert ratio() == "pad"


def test_what_the_files_do_not_say_is_named_by_options(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs")
    options = ImportOptions(str(tiny_base), template="chatml", image_aspect_ratio="pad", quantization="nf4-double")
    [_, _, line] = import_any(tmp_path / "theirs", tmp_path / "named", options)
    assert line.startswith("template chatml (from --template), images pad, quantization of the base nf4-double;")
    manifest = read_manifest(tmp_path / "named")
    assert manifest.quantization == {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert manifest.images["image_aspect_ratio"] == "pad"
    assert merge_artifact(tmp_path / "named", tmp_path / "merged")["base"] == "dequantized"
    brought = bring(tmp_path / "theirs", tiny_base)
    assert read_manifest(brought).quantization == {"type": "none", "double_quant": False}
    # Why there are options: an edited manifest is not that of the import.
    data = json.loads((brought / "manifest.json").read_text(encoding="utf-8"))
    data["images"]["image_aspect_ratio"] = "pad"
    (brought / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match="image_aspect_ratio is pad"):
        read_manifest(brought)


VISION = ["multi_modal_projector", "vision_tower"]


def test_k60_a_vision_tower_in_modules_to_save_is_imported_and_merged(tiny_base: Path, tmp_path: Path) -> None:
    theirs = make(tiny_base, tmp_path / "theirs", modules_to_save=VISION)
    # A buffer that transformers stored up to 4.30.
    state = load_file(tmp_path / "theirs" / WEIGHTS)
    state["base_model.model.model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    brought = bring(tmp_path / "theirs", tiny_base)
    settings = json.loads((brought / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert settings["modules_to_save"] == ["multi_modal_projector", "model.vision_tower"]
    model = load_artifact(brought, device=CPU, dtype=torch.float32)[0].model
    assert torch.allclose(logits(model), theirs, atol=2e-5, rtol=1e-5)
    # The base under the adapter stays what it was, its class embedding too.
    base = logits(LlavaForConditionalGeneration.from_pretrained(tiny_base))
    with model.disable_adapter():
        assert torch.allclose(logits(model), base, atol=2e-5, rtol=1e-5)
    assert merge_artifact(brought, tmp_path / "merged")["probe"]["relative"] < 1e-5
    merged = logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(merged, theirs, atol=2e-5, rtol=1e-5)


def test_k60_a_part_of_the_vision_tower_is_imported_as_its_modules(tiny_base: Path, tmp_path: Path) -> None:
    saved = ["multi_modal_projector", "vision_tower.encoder.layers.0", "post_layernorm"]
    theirs = make(tiny_base, tmp_path / "theirs", modules_to_save=saved)
    brought = bring(tmp_path / "theirs", tiny_base)
    settings = json.loads((brought / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    modules = ["multi_modal_projector", "model.vision_tower.encoder.layers.0", "model.vision_tower.post_layernorm"]
    assert settings["modules_to_save"] == modules
    ours = logits(load_artifact(brought, device=CPU, dtype=torch.float32)[0].model)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    assert merge_artifact(brought, tmp_path / "merged")["probe"]["relative"] < 1e-5


def test_k60_a_weight_without_the_rest_of_its_module_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs", modules_to_save=VISION)
    state = load_file(tmp_path / "theirs" / WEIGHTS)
    save_file({name: one for name, one in state.items() if "position" not in name}, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"replaces model.vision_tower.embeddings.class_embedding alone"):
        bring(tmp_path / "theirs", tiny_base)
    assert not (tmp_path / "brought").exists()


_LAYER = "model.language_model.layers.{}.self_attn.{}"
_WRITTEN_SINCE = {
    "0.14": {"exclude_modules", "eva_config", "lora_bias"},
    "0.15": {"corda_config", "trainable_token_indices"},
    "0.18": {"peft_version", "alora_invocation_tokens", "arrow_config", "ensure_weight_tying"},
}
"""Settings by the version of PEFT that first wrote them, as read in its source."""


def as_written_by(version: str, directory: Path, **patterns: Any) -> None:
    """Give the settings of an adapter other patterns, and only what a version of PEFT wrote."""
    path = directory / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    for since, names in _WRITTEN_SINCE.items():
        for name in names:
            settings.setdefault(name, None)
            if since > version:
                del settings[name]
    path.write_text(json.dumps({**settings, **patterns}), encoding="utf-8")


Q0, V0, Q1, V1 = (_LAYER.format(number, name) for number in (0, 1) for name in ("q_proj", "v_proj"))
ALTERNATIVES = {"alpha_pattern": {"q_proj|v_proj": 32}}
SHARED = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {Q0.partition(".")[2]: 32}}
ANCHORED = {"alpha_pattern": {"^model.language_model.layers.0.*": 32}}


@pytest.mark.parametrize(
    ("version", "patterns", "alphas"),
    [
        # Up to 0.14 the regular expression is `.*\.q_proj|v_proj$`, whose second alternative begins at the name.
        ("0.13", ALTERNATIVES, {Q0: 32, Q1: 32}),
        ("0.14", ALTERNATIVES, {Q0: 32, Q1: 32}),
        ("0.15", ALTERNATIVES, {Q0: 32, V0: 32, Q1: 32, V1: 32}),
        ("0.18", ALTERNATIVES, {Q0: 32, V0: 32, Q1: 32, V1: 32}),
        # Up to 0.13 `q_proj` is found first, and alpha_pattern has no value for it.
        ("0.13", SHARED, {}),
        ("0.14", SHARED, {Q0: 32}),
        ("0.18", SHARED, {Q0: 32}),
        ("0.15", ANCHORED, {Q0: 32, V0: 32}),
        ("0.18", ANCHORED, {Q0: 32, V0: 32}),
    ],
)
def test_k60_patterns_mean_what_the_peft_that_wrote_them_made_of_them(
    tiny_base: Path, tmp_path: Path, version: str, patterns: dict[str, Any], alphas: dict[str, float]
) -> None:
    ranks = dict.fromkeys((Q0, Q1), 2) if "rank_pattern" in patterns else {}
    theirs = make(tiny_base, tmp_path / "theirs", rank_pattern=ranks, alpha_pattern=alphas)
    as_written_by(version, tmp_path / "theirs", **patterns)
    brought = bring(tmp_path / "theirs", tiny_base)
    ours = logits(load_artifact(brought, device=CPU, dtype=torch.float32)[0].model)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_k60_ranks_that_the_patterns_do_not_give_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    ranks = {"rank_pattern": {"q_proj|v_proj": 2}}
    make(tiny_base, tmp_path / "theirs", **ranks)
    as_written_by("0.14", tmp_path / "theirs", **ranks)
    with pytest.raises(ArtifactError, match=r"v_proj has the rank 2, but r and rank_pattern give it 4"):
        bring(tmp_path / "theirs", tiny_base)
    assert not (tmp_path / "brought").exists()
