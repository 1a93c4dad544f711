"""The promises of docs/security.md: what strangers' models, adapters and names can do, and what they cannot."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import CLIPVisionModel

import lora_llava
from lora_llava.artifact import load_model
from lora_llava.cli import cli
from lora_llava.errors import ModelError
from lora_llava.modeling.metadata import part_configs
from lora_llava.recipe.settings import BaseModelSettings
from tests.helpers.artifacts import make_artifact
from tests.helpers.broken import Project, command

PACKAGE = Path(lora_llava.__file__).parent
NO_OPTION = {"PeftModel", "LoraConfig"}
"""PEFT's loaders, which know no code of a repository and so no option against it."""
DYNAMIC = ("load_dataset", "load_from_disk", "get_class_from_dynamic_module", "load_custom_generate")
"""Loaders that may run what they load, and are not used."""
CUSTOM = {"auto_map": {"AutoConfig": "c.C", "AutoTokenizer": "c.T", "AutoImageProcessor": "c.P", "AutoModel": "c.M"}}


def loads() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package that loads something by a library, with its file and the class it is called on."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "from_pretrained" or name in DYNAMIC:
                on = node.func.value if isinstance(node.func, ast.Attribute) else None
                calls.append((str(path.relative_to(PACKAGE)), getattr(on, "id", name), node))
    return calls


def test_k46_every_load_says_that_no_code_is_run() -> None:
    assert len(loads()) >= 15
    for file, on, call in loads():
        options = {one.arg: one.value for one in call.keywords}
        said = options.get("trust_remote_code")
        if on in NO_OPTION:
            assert said is None, file
        else:
            assert isinstance(said, ast.Constant) and said.value is False, f"{file}, line {call.lineno}"


def with_code(directory: Path, name: str, **changes: Any) -> Path:
    """Let a file of a model ask for code that lies next to it, and would leave a trace."""
    path = directory / name
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**data, **CUSTOM, **changes}), encoding="utf-8")
    trace = directory.parent / "code-was-run"
    source = f"open({str(trace)!r}, 'w')\nclass C: pass\nclass T: pass\nclass P: pass\nclass M: pass\n"
    (directory / "c.py").write_text(source, encoding="utf-8")
    return trace


@pytest.fixture
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(prompt: str = "") -> str:
        raise AssertionError(f"a question was put to the user: {prompt}")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.usefixtures("_nobody_is_asked")
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"]
)
@pytest.mark.parametrize("verb", ["finetune", "dry run", "check"])
def test_k46_a_base_with_code_is_refused(project: Project, name: str, verb: str) -> None:
    trace = with_code(project.base, name)
    done = command(verb, project)
    assert done.exit_code == 2
    assert f"needs custom code (auto_map in {name})" in done.output
    assert not trace.exists()


@pytest.mark.usefixtures("_nobody_is_asked")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("verb", ["chat", "merge", "export", "eval"])
def test_k46_an_artifact_on_a_base_with_code_is_refused(project: Project, name: str, verb: str) -> None:
    artifact = make_artifact(project.base, project.directory / "artifact")
    trace = with_code(project.base, name)
    rest = {
        "chat": ["hello"],
        "merge": ["out"],
        "export": ["out", "--format", "hf"],
        "eval": ["--data", str(project.directory / "train.json")],
    }
    done = CliRunner().invoke(cli, [verb, str(artifact), *rest[verb]])
    assert done.exit_code != 0
    assert "needs custom code (auto_map" in done.output
    assert not trace.exists()


@pytest.mark.usefixtures("_nobody_is_asked")
def test_k46_parts_with_code_are_refused_by_python_too(tiny_base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    tower = tmp_path / "tower"
    CLIPVisionModel.from_pretrained(tiny_base).save_pretrained(tower)
    trace = with_code(tower, "config.json", model_type="clip_vision_model")
    # An architecture of its own: transformers could not load it without its code.
    with_code(model, "config.json", model_type="unheard_of")
    for parts in ((model, tower), (tiny_base, tower)):
        with pytest.raises(ModelError, match=r"needs custom code \(auto_map\), and the kit runs no code"):
            part_configs(BaseModelSettings(language_model=str(parts[0]), vision_tower=str(parts[1])))
    shutil.copyfile(tiny_base / "config.json", model / "config.json")
    with_code(model, "tokenizer_config.json")
    load_model(model, template="vicuna_v1")
    assert not trace.exists()
