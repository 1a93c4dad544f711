"""Values of a manifest that a stranger wrote: each is what it must be, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # their way to export

from lora_llava.artifact import MANIFEST, MERGE_REPORT, merged_manifest, read_manifest
from lora_llava.errors import ArtifactError
from lora_llava.formats.manifest import is_hub_id, is_revision
from tests.helpers.artifacts import make_artifact


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tiny_base, tmp_path_factory.mktemp("manifests") / "artifact")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("format", "stage", "base", "base.name", "base.weights_sha256", "adapter_sha256",
          "quantization", "quantization.type", "quantization.double_quant", "template", "template.name", "images",
          "images.image_aspect_ratio", "data", "seen", "metrics", "versions")),
        ("format", "1"), ("stage", "evil"), ("base.name", 7), ("base.name", "x\0"), ("base.name", "x" * 100_001),
        ("base.path", ["."]), ("base.path", "a\0b"), ("base.weights_sha256", {}), ("quantization.type", "int8"),
        ("quantization.compute_dtype", 'float32"); print("x") #'), ("template.system", 5), ("images.window", "ab"),
        ("images.window", [1, 0]), ("images.window", [0, 1e999]), ("data.answer_prompt", ["x"]),
        ("metrics", {"train_loss": "x"}), ("versions", {"torch": 2}), ("versions", []), ("parent_sha256", 1),
    ],
)  # fmt: skip
def test_k49_a_value_that_cannot_be_used_is_named(artifact: Path, tmp_path: Path, key: str, value: Any) -> None:
    data = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    holder = data
    *sections, name = key.split(".")
    for section in sections:
        holder = holder[section]
    holder[name] = value
    (tmp_path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"manifest\.json is damaged \({key} is .*must be .*take the artifact"):
        read_manifest(tmp_path)
    (tmp_path / MERGE_REPORT).write_text(json.dumps({"artifact": data}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"merge_report\.json is damaged \({key} is"):
        merged_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"format": 1}', '{"artifact": null}', '{"a": "\\ud800"}', "{" * 9999, "[" * 99999]
)
def test_k49_a_file_that_is_no_manifest_is_named(tmp_path: Path, content: str) -> None:
    for name, read in ((MANIFEST, read_manifest), (MERGE_REPORT, merged_manifest)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/base", 'main"); print("x") #', "base.revision is .*, must be a revision of the Hub"),
        ("someone/base", "../../x", "base.revision is"),
        ('x"); import os #', "main", "base.name is .*, which is not an id of the Hub"),
        ("../../etc", "main", "base.name is"),
        ("a/b/c", "main", "base.name is"),
    ],
)
def test_k47_the_base_has_an_id_and_a_revision_of_the_hub(
    artifact: Path, tmp_path: Path, name: str, revision: str, message: str
) -> None:
    data = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    data["base"].update(name=name, revision=revision, path=None)
    (tmp_path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path)


NAMES = ["a", "a/b", "llava-hf/llava-1.5-7b-hf", "a_b/c.d", "a/b/c", "-a/b", "a/b-", "a/.b", "a--b/c", "a..b", "a.git",
         "a/b.git", "", "/a", "a/", "a b", "a/\u00e9", "x" * 97, "x" * 96, 'a";', "a\n", "..", "."]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_k47_an_id_is_one_by_the_rule_of_the_hub(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_hub_id(name)
    else:
        assert is_hub_id(name)


@pytest.mark.parametrize("name", ["main", "refs/pr/1", "v1.0", "a" * 40])
def test_k47_revisions_of_today_are_taken(name: str) -> None:
    assert is_revision(name)
