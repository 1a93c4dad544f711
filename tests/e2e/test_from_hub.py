"""Models of the Hub by name: downloaded once, only what is needed, and recorded in what is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from lora_llava.artifact import load_model
from lora_llava.cli import cli
from lora_llava.errors import HubError
from lora_llava.recipe.file import dump_resolved, load_recipe
from lora_llava.shipping.export import export
from lora_llava.system.hub.artifact import hub_source, located
from lora_llava.system.hub.network import offline
from tests.e2e.test_commands import write_data
from tests.helpers.loopback_hub import LoopbackHub
from tests.helpers.publishing import REPO, push


@pytest.fixture
def published(hub: LoopbackHub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A hub with an artifact and things of other kinds in one repository; the current directory has images."""
    assert push(artifact).exit_code == 0
    repo = hub.repos[REPO]
    others = ("optimizer.pt", "pytorch_model.bin", "more.safetensors", "checkpoint-1/adapter_model.safetensors")
    repo.commit({**repo.files, **dict.fromkeys(others, b"not to be fetched")})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 3)
    hub.requests.clear()
    return hub


def ask(model: str | Path, base: Path) -> Result:
    command = ["chat", str(model), "--image", "0.png", "--base-model", str(base), "--max-new-tokens", "4", "color?"]
    return CliRunner().invoke(cli, command)


def test_k55_chat_downloads_once_and_only_what_it_needs(
    published: LoopbackHub, artifact: Path, tiny_base: Path
) -> None:
    local, remote = ask(artifact, tiny_base), ask(REPO, tiny_base)
    assert remote.exit_code == 0, remote.output
    assert remote.stdout == local.stdout
    fetched = [line.rpartition("/")[2] for line in published.requests if line.startswith("GET") and "/resolve/" in line]
    assert sorted(fetched) == sorted(set(fetched))
    assert {"manifest.json", "adapter_model.safetensors", "tokenizer.json"} <= set(fetched)
    assert not {"optimizer.pt", "pytorch_model.bin", "more.safetensors", "README.md"} & set(fetched)
    assert len([name for name in fetched if name == "adapter_model.safetensors"]) == 1
    published.requests.clear()
    assert ask(REPO, tiny_base).stdout == local.stdout
    assert not published.count("GET .*/resolve/")


def test_k55_a_revision_stays_and_needs_no_hub_again(
    published: LoopbackHub, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = published.repos[REPO]
    commit = repo.head
    first = located(f"{REPO}@{commit}")
    repo.commit({**repo.files, "generation_config.json": b"{}"})
    assert located(REPO) != first
    published.requests.clear()
    assert located(f"{REPO}@{commit}") == first
    assert published.requests == []
    source = hub_source(first)
    assert source is not None
    assert (source.repo_id, source.revision, str(source)) == (REPO, commit, f"{REPO}@{commit}")
    # Offline: what is whole in the cache is used, anything else is refused at once.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline.cache_clear()
    assert located(f"{REPO}@{commit}") == first
    assert ask(f"{REPO}@{commit}", tiny_base).exit_code == 0
    with pytest.raises(HubError, match="neither a directory nor whole in the Hub's cache, and HF_HUB_OFFLINE is set"):
        located("canary-org/other")
    assert published.requests == []


def test_k55_what_is_made_of_it_records_the_commit(published: LoopbackHub, tiny_base: Path, tmp_path: Path) -> None:
    recorded = {"repo_id": REPO, "revision": published.repos[REPO].head}
    run = CliRunner()
    base = ["--base-model", str(tiny_base)]
    merged = run.invoke(cli, ["merge", REPO, "merged", *base])
    assert merged.exit_code == 0, merged.output
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["hub"] == recorded
    for layout in ("vllm", "gguf", "gguf-lora", "llava"):
        tower = ["--vision-tower", "some/tower"] if layout == "llava" else []
        exported = run.invoke(cli, ["export", f"{REPO}@main", layout, "--format", layout, *base, *tower])
        assert exported.exit_code == 0, exported.output
        assert json.loads((tmp_path / layout / "export_report.json").read_text())["hub"] == recorded
    evaluated = run.invoke(cli, ["eval", REPO, "--data", "data.json", "--output", "out", "--no-base", *base])
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["hub"] == recorded
    # A model is taken as well as an artifact.
    assert push(tmp_path / "merged", repo="canary-org/merged").exit_code == 0
    loaded, _ = load_model("canary-org/merged")
    assert hub_source(loaded.directory) is not None
    for layout in ("hf", "gguf", "llava"):
        output = tmp_path / f"model-{layout}"
        export("canary-org/merged", output, layout)
        report = json.loads((output / "export_report.json").read_text())
        assert report["hub"] == {"repo_id": "canary-org/merged", "revision": loaded.directory.name}
        # What is made of a directory has no commit to record.
        export(tmp_path / "merged", tmp_path / f"local-{layout}", layout)
        assert not (tmp_path / f"local-{layout}" / "export_report.json").exists()


def test_k55_a_run_that_starts_from_it(published: LoopbackHub, tiny_base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "more.yaml"
    stage = "{data: {path: data.json}, max_length: 256, tokens_per_micro_batch: 256, batch_size: 3, max_steps: 1}"
    recipe.write_text(
        f"name: more\noutput_dir: more\nbase: {{model_name_or_path: {tiny_base}}}\nstart_from: {REPO}\n"
        f"quantization: {{type: none}}\nstages: {{instruct: {stage}}}\n",
        encoding="utf-8",
    )
    planned = CliRunner().invoke(cli, ["finetune", str(recipe), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    done = CliRunner().invoke(cli, ["finetune", str(recipe)])
    assert done.exit_code == 0, done.output
    commit = published.repos[REPO].head
    manifest = json.loads((tmp_path / "more" / "instruct" / "manifest.json").read_text())
    assert manifest["parent_hub"] == {"repo_id": REPO, "revision": commit}
    for written in (tmp_path / "more" / "recipe.yaml", tmp_path / "more" / "instruct" / "recipe.yaml"):
        assert f"start_from: {REPO}@{commit}\n" in written.read_text(encoding="utf-8")
    again = load_recipe(tmp_path / "more" / "recipe.yaml")
    assert again.start_from is not None
    assert again.start_from.name == commit
    assert "models--" not in dump_resolved(again, tmp_path)
    resumed = CliRunner().invoke(cli, ["finetune", str(recipe), "--resume"])
    assert resumed.exit_code == 0, resumed.output


def test_k55_a_directory_of_that_name_wins(published: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / REPO)
    assert located(REPO) == Path(REPO)
    assert not published.requests


def test_k53_k55_what_the_hub_does_not_give_is_said(published: LoopbackHub, tiny_base: Path) -> None:
    published.repos[REPO].gated = True
    gated = ask(REPO, tiny_base)
    assert gated.exit_code == 1
    assert f"{REPO} is gated: the Hub gives it to users who accepted its terms. Ask for access at " in gated.stderr
    assert f"{published.url}/{REPO}, then log in: hf auth login" in gated.stderr
    published.repos[REPO].gated = False
    missing = ask("canary-org/none", tiny_base)
    assert "canary-org/none does not exist, or the token may not read it" in missing.stderr
    assert "has no such revision" in ask(f"{REPO}@v9", tiny_base).stderr
    published.add_repo("canary-org/empty")
    assert "is neither an artifact (it has no manifest.json) nor a model" in ask("canary-org/empty", tiny_base).stderr
    # The base of an artifact, too.
    published.repos[REPO].gated = True
    base = CliRunner().invoke(cli, ["merge", str(tiny_base), "out", "--base-model", REPO])
    assert base.exit_code != 0


def test_k53_a_gated_base_says_where_to_ask(published: LoopbackHub, artifact: Path) -> None:
    published.add_repo("canary-org/base").gated = True
    result = CliRunner().invoke(cli, ["chat", str(artifact), "--base-model", "canary-org/base", "color?"])
    assert result.exit_code == 1
    assert f"Ask for access at {published.url}/canary-org/base, then log in: hf auth login" in result.stderr
    assert "Check the name" not in result.stderr
