"""The identity of a merged model: the commands load what was merged, or name what was changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from lora_llava.artifact import load_model
from lora_llava.cli import cli
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import write_weights
from lora_llava.shipping.export import export
from lora_llava.shipping.hub.prepare import prepare
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, make_artifact
from tests.helpers.changed import Change, State, edited, exchanged_ids, images, one_weight, weights, written
from tests.helpers.runs import write_data

MODEL = "merged"
WEIGHTS = f"{MODEL}/model.safetensors"
REPORT = f"{MODEL}/merge_report.json"


def nan_in(state: State) -> None:
    state[min(state)].fill_(float("nan"))


CHANGED: dict[str, tuple[Change, str]] = {
    "config field": (
        edited(f"{MODEL}/config.json", "text_config", "rms_norm_eps", value=1e-5),
        "config: text_config.rms_norm_eps is 1e-05, it was merged with 1e-06",
    ),
    "feature layer": (edited(f"{MODEL}/config.json", "vision_feature_layer", value=-1), "vision_feature_layer is -1"),
    "image mean": (
        images("image_mean", [0.5, 0.5, 0.5], MODEL),
        "image processor: image_mean is [0.5, 0.5, 0.5], it was merged with [0.48, 0.46, 0.41]",
    ),
    "token id": (exchanged_ids(MODEL), "tokenizer: vocabulary is not what it was merged with"),
    "weight": (weights(WEIGHTS, one_weight), "weights: sha256 is not what it was merged with"),
    "NaN": (weights(WEIGHTS, nan_in), "weights: sha256 is not what"),
    "chat template": (written(f"{MODEL}/chat_template.jinja", "{{ 1 }}"), "chat template: text is not what"),
    "ends": (edited(f"{MODEL}/generation_config.json", "eos_token_id", value=5), "eos_token_id is [5], it was merged"),
    "template": (
        edited(REPORT, "artifact", "template", "name", value="chatml"),
        "artifact: template: name is chatml, it was merged with vicuna_v1",
    ),
    "answer prompt": (
        edited(REPORT, "artifact", "data", "answer_prompt", value="Briefly."),
        "artifact: answer prompt is Briefly., it was merged with none",
    ),
    "recorded identity": (
        edited(REPORT, "identity", "fields", "config: text_config.rms_norm_eps", value=1e-5),
        "merge_report.json: the identity in it was altered; merge the artifact again",
    ),
}
"""Changes to a merged model, with words of how every command refuses it."""


def sharded(project: Path) -> None:
    state = load_file(project / WEIGHTS)
    (project / WEIGHTS).unlink()
    write_weights(project / MODEL, iter(state.items()), max_shard_bytes=50_000)


TAKEN: dict[str, Change] = {
    "nothing": lambda _: None,
    "comment": edited(f"{MODEL}/config.json", "_comment", value="made on a Tuesday"),
    "shards": sharded,
    "temperature": edited(f"{MODEL}/generation_config.json", "temperature", value=0.2),
    "card": written(f"{MODEL}/README.md", "# A model"),
    "figures of the report": edited(REPORT, "probe", value={}),
}


@pytest.fixture(scope="module")
def merged(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with data and a merged model."""
    directory = tmp_path_factory.mktemp("merged") / "project"
    directory.mkdir()
    write_data(directory)
    merge_artifact(make_artifact(tiny_base, directory / "artifact"), directory / MODEL)
    return directory


@pytest.fixture
def project(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "project"))


def run(project: Path, command: str) -> Result:
    model, data = str(project / MODEL), str(project / "train.json")
    arguments = {
        "chat": ["chat", model, "What?"],
        "eval": ["eval", model, "--data", data, "--image-root", str(project / "images"), "--max-records", "1"],
        "export": ["export", model, str(project / "exported"), "--format", "hf"],
    }
    arguments["eval"] += ["--output", str(project / "eval")]
    return CliRunner().invoke(cli, arguments[command])


@pytest.mark.parametrize("name", CHANGED)
def test_k34_a_merged_model_that_was_changed_is_refused_by_name(project: Path, name: str) -> None:
    change, reason = CHANGED[name]
    change(project)
    for command in ("chat", "eval", "export"):
        done = run(project, command)
        assert done.exit_code == 1, f"{command}: {done.output}"
        assert reason in done.stderr, f"{command}: {done.output}"
        assert not any((project / made).exists() for made in ("exported", "eval"))
    for form in ("llava", "gguf"):
        with pytest.raises(ArtifactError):
            export(project / MODEL, project / "exported", form)
    with pytest.raises(ArtifactError):
        prepare(project / MODEL, "someone/model")


@pytest.mark.parametrize("name", TAKEN)
def test_k34_a_merged_model_with_a_change_that_decides_nothing_is_taken(project: Path, name: str) -> None:
    TAKEN[name](project)
    done = run(project, "export")
    assert done.exit_code == 0, done.output
    assert "Note" not in done.output


def test_k34_what_is_exported_from_a_merged_model_has_its_own_identity(project: Path) -> None:
    export(project / MODEL, project / "hf", "hf")
    export(project / MODEL, project / "llava", "llava")
    done = CliRunner().invoke(cli, ["import", str(project / "llava"), str(project / "back")])
    assert done.exit_code == 0, done.output
    for made in ("hf", "back"):
        load_model(project / made, device=CPU)
        edited(f"{made}/config.json", "text_config", "rms_norm_eps", value=1e-5)(project)
        with pytest.raises(ArtifactError, match="rms_norm_eps is 1e-05, it was merged with 1e-06"):
            load_model(project / made, device=CPU)


def test_k34_an_earlier_merged_model_loads_with_a_line_on_what_is_not_compared(project: Path) -> None:
    report = json.loads((project / REPORT).read_text(encoding="utf-8"))
    del report["identity"]
    (project / REPORT).write_text(json.dumps(report), encoding="utf-8")
    for command in ("chat", "export"):
        done = run(project, command)
        assert done.exit_code == 0, done.output
        assert "was merged by an earlier version, which did not record what it wrote" in done.output
    weights(WEIGHTS, nan_in)(project)
    assert "holds NaN or infinity" in run(project, "chat").output
