"""The names of tensors on disk: just those that llava-hf publishes, however the model came about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.errors import ModelError
from lora_llava.formats.llava_hf import WeightFiles, expected_shapes, meta_model, write_weights
from lora_llava.formats.names import canonical_name, memory_name
from lora_llava.modeling.assemble import assemble
from lora_llava.recipe.settings import BaseModelSettings
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import make_artifact
from tests.helpers.tiny import tiny_config
from tests.unit.modeling.test_assemble import save_language_model, save_vision_tower

KEYS_7B = Path(__file__).parents[2] / "fixtures" / "llava_hf_layout" / "keys_7b.txt"
BYTES_7B = 14_126_854_144


def published() -> set[str]:
    return set(KEYS_7B.read_text(encoding="utf-8").split())


def published_for(language_layers: int, vision_layers: int) -> set[str]:
    """The published names, of a model with fewer layers."""
    keep = {"language_model.model": language_layers, "vision_tower.vision_model.encoder": vision_layers}

    def kept(name: str) -> bool:
        match = re.match(r"(.+?)\.layers\.(\d+)\.", name)
        return match is None or int(match[2]) < keep[match[1]]

    return {name for name in published() if kept(name)}


def names_in(directory: Path) -> set[str]:
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def config_7b() -> LlavaConfig:
    """As llava-hf/llava-1.5-7b-hf publishes it."""
    return LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
        tie_word_embeddings=False,
    )


def test_names_and_size_of_the_published_7b() -> None:
    shapes = expected_shapes(config_7b())
    assert len(published()) == 686
    assert set(shapes) == published()
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == BYTES_7B


def test_names_go_to_memory_and_back() -> None:
    in_memory = set(meta_model(config_7b()).state_dict())
    assert {memory_name(name) for name in published()} == in_memory
    assert {canonical_name(name) for name in in_memory} == published()
    assert {canonical_name(name) for name in published()} == published()
    assert canonical_name("vision_tower.encoder.layers.0.layer_norm1.bias") in published()
    with pytest.raises(ModelError, match="belongs to no part"):
        canonical_name("model.mm_projector.0.weight")


def test_a_merged_checkpoint_has_the_published_names(tiny_base: Path, tmp_path: Path) -> None:
    # transformers wrote the short names of the vision tower: the model was built from a configuration.
    assert any(name.startswith("vision_tower.embeddings.") for name in names_in(tiny_base))
    merge_artifact(make_artifact(tiny_base, tmp_path / "instruct"), tmp_path / "merged")
    assert names_in(tmp_path / "merged") == published_for(2, 2)
    merge_artifact(make_artifact(tmp_path / "merged", tmp_path / "again"), tmp_path / "twice")
    assert names_in(tmp_path / "twice") == published_for(2, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_parts_has_the_published_names(tmp_path: Path, tied: bool) -> None:
    parts = save_language_model(tmp_path / "lm", tied=tied), save_vision_tower(tmp_path / "tower")
    assemble(BaseModelSettings(language_model=str(parts[0]), vision_tower=str(parts[1])), tmp_path / "base", seed=1)
    wanted = published_for(2, 2) - ({"language_model.lm_head.weight"} if tied else set())
    assert names_in(tmp_path / "base") == wanted
    report = merge_artifact(make_artifact(tmp_path / "base", tmp_path / "instruct"), tmp_path / "merged")
    assert names_in(tmp_path / "merged") == wanted
    assert report["probe"]["relative"] < 1e-5
    model, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_weights_that_are_not_the_configurations_are_refused(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    state = load_file(tiny_base / "model.safetensors")
    name = "language_model.model.norm.weight"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        state["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    else:
        state[name] = torch.zeros(7)
    save_file(state, tmp_path / "model.safetensors")
    message = {"missing": "is missing", "extra": "does not belong to it", "shape": "must be"}[fault]
    with pytest.raises(ModelError, match=message):
        WeightFiles(tmp_path).check(tiny_config())


def test_computed_buffers_of_old_files_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    state = load_file(tiny_base / "model.safetensors")
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, tmp_path / "model.safetensors")
    WeightFiles(tmp_path).check(tiny_config())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(100), "c": torch.ones(4), "d": torch.ones(4)}
    files = write_weights(tmp_path, iter(tensors.items()), max_shard_bytes=32)
    assert [set(load_file(tmp_path / file)) for file in files] == [{"a"}, {"b"}, {"c", "d"}]
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
