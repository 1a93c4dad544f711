"""Which weight files are read: those that transformers loads, by every function alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import load_model
from lora_llava.errors import LoraLlavaError, ModelError
from lora_llava.formats.llava_hf import WeightFiles, each_tensor
from lora_llava.formats.names import EMBEDDINGS
from lora_llava.formats.weight_files import INDEX, SINGLE, weight_files
from lora_llava.modeling.base import hash_weights
from lora_llava.planning.preflight.model.weights import read_weights
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, logits, make_artifact
from tests.helpers.tiny import tiny_llava

READERS: dict[str, Callable[[Path], object]] = {
    "hash": hash_weights,
    "merge": WeightFiles,
    "export": lambda directory: dict(each_tensor(directory)),
}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def other_weights(base: Path) -> dict[str, torch.Tensor]:
    """Weights of the same names and shapes with other values."""
    return {name: tensor + 1 for name, tensor in load_file(base / SINGLE).items()}


def test_k35_a_stray_file_changes_nothing(base: Path, tmp_path: Path) -> None:
    hashed = hash_weights(base)
    artifact = make_artifact(base, tmp_path / "clean")
    merge_artifact(artifact, tmp_path / "merged")
    save_file(other_weights(base), base / "zzz_old.safetensors")
    save_file(other_weights(base), base / "old.safetensors")
    assert weight_files(base) == [base / SINGLE]
    assert hash_weights(base) == hashed
    merge_artifact(artifact, tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / SINGLE) for name in ("again", "merged"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = LlavaForConditionalGeneration.from_pretrained(base).eval()
    assert torch.equal(WeightFiles(base).read(EMBEDDINGS), loaded.get_input_embeddings().weight)


def test_k35_shards_of_another_save_change_nothing(base: Path) -> None:
    """Shards of the index are loaded; those that an earlier save left are not."""
    hashed = hash_weights(base)
    state = other_weights(base)
    tiny_llava().save_pretrained(base, max_shard_size="50KB")
    (base / SINGLE).unlink(missing_ok=True)
    assert len(weight_files(base)) > 3
    save_file(state, base / "model-00001-of-00002.safetensors")
    assert hash_weights(base) == hashed
    assert read_weights(base).problem is None


@pytest.mark.parametrize("reader", READERS)
def test_k35_a_decoy_next_to_pickled_weights_is_refused(base: Path, reader: str) -> None:
    torch.save(load_file(base / SINGLE), base / "pytorch_model.bin")
    (base / SINGLE).rename(base / "decoy.safetensors")
    with pytest.raises(
        ModelError, match=r"holds decoy\.safetensors, but neither .*, but pytorch_model\.bin, which is "
    ):
        READERS[reader](base)
    problem = read_weights(base).problem
    assert problem is not None and "decoy.safetensors" in problem[0]


def test_k35_pickled_weights_are_never_loaded(base: Path) -> None:
    torch.save(load_file(base / SINGLE), base / "pytorch_model.bin")
    (base / SINGLE).unlink()
    with pytest.raises(LoraLlavaError, match=r"model\.safetensors"):
        load_model(base, device=CPU, template="vicuna_v1")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"adapter_config.json": "{}"}, r"holds adapter_config\.json, so transformers would load an adapter"),
        ({"config.json": '{"transformers_weights": "old.safetensors"}'}, r"names other weights .*old\.safetensors"),
        ({INDEX: "{"}, "is damaged: it names no files"),
        ({INDEX: json.dumps({"weight_map": {"a": "../a.safetensors"}})}, "outside its directory"),
        ({INDEX: json.dumps({"weight_map": {"a": "b.safetensors"}})}, r"b\.safetensors of its index is missing"),
    ],
    ids=["adapter", "other file", "damaged index", "outside", "missing shard"],
)
def test_k35_what_would_load_anything_else_is_refused(base: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        (base / name).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=reason):
        weight_files(base)


def test_k35_what_is_hashed_is_what_answers(base: Path, tmp_path: Path) -> None:
    """Of a single file and an index with its shards, transformers loads the file."""
    reference = logits(load_model(base, device=CPU, template="vicuna_v1")[0].model)
    names = list(load_file(base / SINGLE))
    save_file(other_weights(base), base / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    assert weight_files(base) == [base / SINGLE]
    assert torch.equal(logits(load_model(base, device=CPU, template="vicuna_v1")[0].model), reference)
