"""What a stage leaves on disk: complete, readable by plain PEFT, and tied to its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from lora_llava.artifact import FORMAT, MANIFEST, Manifest, load_artifact, read_manifest
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import ADAPTER_CONFIG, WEIGHTS
from lora_llava.modeling.base import LoadedModel, hash_weights
from lora_llava.modeling.structure import PROJECTOR
from lora_llava.recipe.stages import StageName
from lora_llava.training.start import load_projector
from tests.helpers.artifacts import CPU, FILES, logits, save, train
from tests.helpers.tiny import save_tiny_base, tiny_llava


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "instruct"
    save(train(tiny_base, "instruct"), directory)
    return directory


@pytest.fixture
def copied(artifact: Path) -> Any:
    """A copy to damage, next to the original so that its relative paths hold."""
    directory = artifact.with_name("copied")
    shutil.copytree(artifact, directory)
    yield directory
    shutil.rmtree(directory)


def load(directory: Path, **changes: Any) -> tuple[LoadedModel, Manifest]:
    return load_artifact(directory, device=CPU, dtype=torch.float32, **changes)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_exact_files(tiny_base: Path, tmp_path: Path, stage: StageName) -> None:
    save(train(tiny_base, stage), tmp_path / stage, stage)
    assert {path.name for path in tmp_path.iterdir()} == {stage}
    assert {path.name for path in (tmp_path / stage).iterdir()} == FILES
    names = load_file(tmp_path / stage / WEIGHTS)
    lora = [name for name in names if "lora_" in name]
    projector = [name for name in names if f".{PROJECTOR}." in name]
    assert len(lora) == (28 if stage == "instruct" else 0)
    assert len(projector) == 4
    assert len(names) == len(lora) + len(projector)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_plain_peft_loads_it(tiny_base: Path, tmp_path: Path, stage: StageName, kind: str) -> None:
    loaded = train(tiny_base, stage, kind=kind)
    save(loaded, tmp_path / "artifact", stage)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_base)
    before = logits(base.eval())
    theirs = logits(PeftModel.from_pretrained(base, str(tmp_path / "artifact")).eval())
    assert torch.equal(theirs, logits(loaded.model))
    assert not torch.allclose(theirs, before, atol=1e-2)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_kit_loads_it(tiny_base: Path, tmp_path: Path, stage: StageName, nf4: bool) -> None:
    trained = train(tiny_base, stage, nf4=nf4)
    saved = save(trained, tmp_path / "artifact", stage, nf4=nf4)
    loaded, manifest = load(tmp_path / "artifact")
    assert torch.equal(logits(loaded.model), logits(trained.model))
    assert manifest == saved
    assert manifest.base["weights_sha256"] == hash_weights(tiny_base)
    assert not loaded.model.training


def test_processor_and_tokenizer_load_from_it(artifact: Path, tiny_base: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(artifact), AutoTokenizer.from_pretrained(tiny_base)
    assert ours("what is <image>?").input_ids == theirs("what is <image>?").input_ids
    processor = AutoProcessor.from_pretrained(artifact)
    assert processor.patch_size == 14


def test_nothing_in_it_names_a_place_of_this_machine(artifact: Path, tiny_base: Path) -> None:
    for file in artifact.iterdir():
        if file.suffix in (".json", ".yaml"):
            text = file.read_text(encoding="utf-8")
            if file.name == ADAPTER_CONFIG:
                # PEFT takes a relative path from the current directory, so that of the base is absolute; push drops it.
                text = text.replace(json.dumps(str(tiny_base.resolve())), "null", 1)
            assert str(artifact.parent) not in text, file.name
            assert str(tiny_base) not in text, file.name


def test_it_finds_a_local_base_from_where_it_lies(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "here" / "base")
    save(train(tmp_path / "here" / "base", "align"), tmp_path / "here" / "run" / "align", "align")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded, manifest = load(tmp_path / "there" / "run" / "align")
    assert manifest.base["path"] == "../../base"
    assert loaded.directory.resolve() == tmp_path / "there" / "base"


def test_another_base_is_refused_with_both_hashes(artifact: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError) as caught:
        load(artifact, base=str(other))
    assert hash_weights(tiny_base) in str(caught.value)
    assert hash_weights(other) in str(caught.value)
    assert "--base" in str(caught.value)


def test_a_manifest_that_was_changed_to_name_other_weights_is_refused(copied: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    content = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))
    content["base"]["weights_sha256"] = hash_weights(other)
    (copied / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArtifactError, match="was altered: base weights: sha256 is not what the adapter was trained"):
        load(copied, base=str(other))


def test_the_same_base_elsewhere_is_taken(artifact: Path, tiny_base: Path, tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path / "moved", max_shard_size="50KB")
    for file in tiny_base.glob("*.json"):
        if not (tmp_path / "moved" / file.name).exists():
            shutil.copy(file, tmp_path / "moved")
    loaded, _ = load(artifact, base=str(tmp_path / "moved"))
    assert torch.equal(logits(loaded.model), logits(load(artifact)[0].model))


def test_altered_weights_are_refused(copied: Path) -> None:
    state = load_file(copied / WEIGHTS)
    next(iter(state.values())).view(-1)[0] += 1e-3
    save_file(state, copied / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors was altered: its sha256 is .*source again"):
        load(copied)


def test_missing_weights_are_refused(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors is missing; take"):
        load(copied)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"format": 1}', '{"format": "x"}', '{"format": 1, "surprise": 2}', "\udcff"],
)
def test_a_damaged_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        load(copied)


@pytest.mark.parametrize("value", [3, None, {}])
@pytest.mark.parametrize("key", ["base", "quantization", "template", "images"])
def test_a_manifest_with_a_field_of_the_wrong_kind_is_refused(copied: Path, key: str, value: Any) -> None:
    data = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))
    (copied / MANIFEST).write_text(json.dumps({**data, key: value}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"manifest.json is damaged .*{key}"):
        load(copied)


def test_a_newer_format_is_refused(copied: Path) -> None:
    data = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))
    (copied / MANIFEST).write_text(json.dumps({**data, "format": FORMAT + 1, "new": 1}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=f"format {FORMAT + 1} is newer than this program's {FORMAT}"):
        load(copied)


def test_a_directory_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest.json"):
        load(tmp_path)


def test_a_manifest_on_disk_is_the_one_returned(artifact: Path) -> None:
    assert json.loads((artifact / MANIFEST).read_text(encoding="utf-8")) == asdict(read_manifest(artifact))


def test_an_interrupted_save_leaves_no_artifact(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = train(tiny_base, "align")

    def interrupt(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_llava.artifact.file_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(loaded, tmp_path / "align", "align")
    assert not (tmp_path / "align").exists()
    monkeypatch.undo()
    save(loaded, tmp_path / "align", "align")
    assert {path.name for path in tmp_path.iterdir()} == {"align"}


def test_load_projector_copies_exactly(artifact: Path, tiny_base: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_base)
    load_projector(artifact, model)
    wanted = load_file(artifact / WEIGHTS)
    for name, tensor in model.get_submodule(PROJECTOR).state_dict().items():
        assert torch.equal(tensor, wanted[f"base_model.model.{PROJECTOR}.{name}"])
