"""Publishing to a hub on this machine: what arrives is what is here, once, private, and without secrets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from lora_llava.cli import cli
from tests.e2e.test_commands import write_data
from tests.helpers.artifacts import logits
from tests.helpers.loopback_hub import TOKEN, LoopbackHub
from tests.helpers.publishing import ARTIFACT_FILES, REPO, USER, push


def download(hub: LoopbackHub, directory: Path) -> Path:
    return Path(snapshot_download(REPO, endpoint=hub.url, token=TOKEN, local_dir=directory))


def test_what_arrives_is_what_is_here(
    hub: LoopbackHub, artifact: Path, home: Path, tmp_path: Path, waits: list[float]
) -> None:
    result = push(artifact)
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/{REPO}: 11 files, private" in result.stdout
    for name in ("optimizer.pt", "rng_state.pth", ".env", "notes.txt", "checkpoint-3/"):
        assert name in result.stdout.partition("not uploaded: ")[2]
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.files.keys() == ARTIFACT_FILES
    copy = download(hub, tmp_path / "copy")
    for name, content in repo.files.items():
        assert (copy / name).read_bytes() == content
    changed = {"README.md", "adapter_config.json", "manifest.json", "recipe.yaml", ".gitattributes"}
    for name in ARTIFACT_FILES - changed:
        assert (copy / name).read_bytes() == (artifact / name).read_bytes(), name
    assert not waits
    # Loaded by PEFT, and by the kit's own merge, the copy computes what was trained.
    base = home / "models" / "base"
    theirs, ours = (
        logits(PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), one).eval())
        for one in (artifact, copy)
    )
    assert torch.equal(ours, theirs)
    command = ["merge", str(copy), str(tmp_path / "merged"), "--base-model", str(base)]
    assert CliRunner().invoke(cli, command).exit_code == 0


def test_no_secret_is_sent_or_told(hub: LoopbackHub, artifact: Path, home: Path) -> None:
    result = push(artifact)
    assert result.exit_code == 0, result.output
    assert b"adapter_model" in hub.received
    for secret in (TOKEN, USER, str(home), "/home/", "/models/"):
        assert secret.encode() not in hub.received, secret
        assert all(secret.encode() not in content for content in hub.repos[REPO].files.values())
    for secret in (TOKEN, USER, str(home)):
        assert secret not in result.output, secret
    files = hub.repos[REPO].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny-llava"
    assert json.loads(files["manifest.json"])["base"]["path"] is None
    assert b"path: ./train.json" in files["recipe.yaml"]
    card = files["README.md"].decode()
    assert "base_model:" not in card
    assert "it was a local directory" in card


def test_pushing_again_sends_nothing(hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    assert push(artifact).exit_code == 0
    uploads = hub.count("/v1/xorbs")
    again = push(artifact)
    assert again.exit_code == 0
    assert "nothing to do, its 11 files are there already (private, commit " in again.stdout
    assert len(hub.repos[REPO].commits) == 2
    assert hub.count("/v1/xorbs") == uploads == 1
    assert hub.count("POST /api/models/.*/commit") == 1
    # One file more is one commit with it alone.
    copied = shutil.copytree(artifact, tmp_path / "run" / "instruct")
    (copied / "LICENSE").write_text("terms", encoding="utf-8")
    more = push(copied)
    assert "12 files, private, commit" in more.stdout
    assert len(hub.repos[REPO].commits) == 3
    assert hub.count("/v1/xorbs") == uploads


def test_a_dry_run_sends_nothing(hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    result = push(artifact, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not hub.requests
    for name in ARTIFACT_FILES - {".gitattributes"}:
        assert name in result.stdout
    assert "library_name: peft" in result.stdout
    assert "Dry run: nothing was uploaded" in result.stdout


def test_public_if_asked(hub: LoopbackHub, artifact: Path) -> None:
    assert push(artifact, "--public").exit_code == 0
    assert not hub.repos[REPO].private
    assert push(artifact, "--public").exit_code == 0


def test_a_card_that_was_edited_is_kept(hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    assert push(artifact).exit_code == 0
    repo = hub.repos[REPO]
    edited = repo.files["README.md"] + b"\nMy words.\n"
    repo.commit({**repo.files, "README.md": edited})
    kept = push(artifact)
    assert "kept: README.md on the Hub, which was edited there" in kept.stdout
    assert repo.files["README.md"] == edited
    copied = shutil.copytree(artifact, tmp_path / "run" / "instruct")
    (copied / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    assert push(copied).exit_code == 0
    assert repo.files["README.md"] == (copied / "README.md").read_bytes()


def test_a_merged_model_replaces_an_adapter(hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    """Left next to it, the adapter would be applied to the merged model by whoever loads that."""
    assert push(artifact).exit_code == 0
    merged = tmp_path / "merged"
    assert CliRunner().invoke(cli, ["merge", str(artifact), str(merged), "--max-shard-size", "100KB"]).exit_code == 0
    result = push(merged, "--run", str(artifact.parent))
    assert result.exit_code == 0, result.output
    assert (
        "removed, from an earlier push: adapter_config.json, adapter_model.safetensors, manifest.json" in result.stdout
    )
    files = hub.repos[REPO].files
    assert "recipe.yaml" not in files
    assert {"config.json", "model.safetensors.index.json", "merge_report.json"} <= files.keys()
    assert "library_name: transformers" in files["README.md"].decode()
    copy = download(hub, tmp_path / "copy")
    models = [LlavaForConditionalGeneration.from_pretrained(one).eval() for one in (copy, merged)]
    assert torch.equal(*(logits(model) for model in models))
    write_data(tmp_path, 9)
    asked = CliRunner().invoke(cli, ["chat", str(copy), "--image", str(tmp_path / "0.png"), "color?"])
    assert asked.exit_code == 0, asked.output
