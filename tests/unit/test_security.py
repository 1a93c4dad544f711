"""The promises of docs/security.md: what strangers' models, adapters and names can do, and what they cannot."""

from __future__ import annotations

import ast
import builtins
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import CLIPVisionModel

import lora_llava
from lora_llava.artifact import load_model, read_manifest
from lora_llava.cli import cli
from lora_llava.cli.chat import write_piece
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.modeling.metadata import part_configs
from lora_llava.recipe.settings import BaseModelSettings
from lora_llava.shipping.hub.card import make_card
from lora_llava.shipping.hub.content import RepoFile, check_private, collect
from lora_llava.shipping.hub.facts import Facts
from lora_llava.shipping.hub.usage import python_code, vllm_commands
from lora_llava.system.files import refuse_existing
from lora_llava.system.text import markdown
from lora_llava.training.checkpoints.files import find_latest
from tests.helpers.artifacts import make_artifact
from tests.helpers.broken import Project, command
from tests.helpers.card_rules import card_errors

PACKAGE = Path(lora_llava.__file__).parent
NO_OPTION = {"PeftModel", "LoraConfig"}
"""PEFT's loaders, which know no code of a repository and so no option against it."""
DYNAMIC = ("load_dataset", "get_class_from_dynamic_module", "load_custom_generate")
"""Loaders that may run what they load, and are not used."""
CUSTOM = {"auto_map": {"AutoConfig": "c.C", "AutoTokenizer": "c.T", "AutoImageProcessor": "c.P", "AutoModel": "c.M"}}


@cache
def loads() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package that loads something by a library, with its file and the class it is called on."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("from_pretrained", "load_from_disk", *DYNAMIC):
                on = node.func.value if isinstance(node.func, ast.Attribute) else None
                calls.append((str(path.relative_to(PACKAGE)), getattr(on, "id", name), node))
    return calls


def test_k46_every_load_says_that_no_code_is_run() -> None:
    known = {"AutoConfig", "AutoTokenizer", "CLIPVisionModel", "LlavaForConditionalGeneration", *NO_OPTION}
    assert {on for _, on, _ in loads()} >= known
    # It has no such option: it reads Arrow files and JSON, of names that are checked before.
    assert [file for file, on, _ in loads() if on == "datasets"] == ["data/sources/saved.py"]
    for file, on, call in loads():
        options = {one.arg: one.value for one in call.keywords}
        said = options.get("trust_remote_code")
        if on in (*NO_OPTION, "datasets"):
            assert said is None, file
        else:
            assert isinstance(said, ast.Constant) and said.value is False, f"{file}, line {call.lineno}"


def test_k49_tokenizers_are_loaded_where_panics_are_caught() -> None:
    """And where nothing of what the library prints reaches a terminal."""
    assert {file for file, on, _ in loads() if on == "AutoTokenizer"} == {"formats/tokenizer.py"}


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
    # An unknown architecture: transformers could not load it without its code.
    with_code(model, "config.json", model_type="unheard_of")
    for parts in ((model, tower), (tiny_base, tower)):
        with pytest.raises(ModelError, match=r"needs custom code \(auto_map\), and the kit runs no code"):
            part_configs(BaseModelSettings(language_model=str(parts[0]), vision_tower=str(parts[1])))
    shutil.copyfile(tiny_base / "config.json", model / "config.json")
    with_code(model, "tokenizer_config.json")
    load_model(model, template="vicuna_v1")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "README.md", "tokenizer_config.json", "recipe.yaml"])
def test_k44_a_link_out_of_the_directory_is_not_followed(tiny_base: Path, tmp_path: Path, name: str) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "artifact")
    private = tmp_path / "private.txt"
    original = artifact / name
    private.write_bytes(original.read_bytes() if original.is_file() else b"mine alone")
    original.unlink(missing_ok=True)
    original.symlink_to(private)
    facts = Facts(artifact, read_manifest(artifact), None)
    with pytest.raises(ArtifactError, match=rf"{name} is a link to .*private\.txt, outside of its directory; nothing"):
        collect(facts)


def test_k44_a_picture_of_the_run_is_not_read_through_a_link(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "run" / "instruct")
    (tmp_path / "private.png").write_bytes(b"mine alone")
    (tmp_path / "run" / "loss.png").symlink_to(tmp_path / "private.png")
    facts = Facts(artifact, read_manifest(artifact), None, pictures={"loss.png": tmp_path / "run" / "loss.png"})
    with pytest.raises(ArtifactError, match=r"loss\.png is a link to .*private\.png"):
        collect(facts)


def test_k44_links_inside_of_a_directory_and_of_the_cache_are_followed(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "made")
    (made / "LICENSE.txt").write_text("MIT", encoding="utf-8")
    (made / "LICENSE").symlink_to("LICENSE.txt")
    assert "LICENSE" in {file.name for file in collect(Facts(made, read_manifest(made), None)).files}
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    names = {file.name for file in collect(Facts(snapshot, read_manifest(snapshot), None)).files}
    assert names >= {"adapter_model.safetensors", "LICENSE"}


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"])
@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, "/home/somebody/data"])
def test_k44_texts_of_the_license_are_scanned_for_secrets(tmp_path: Path, name: str, secret: str) -> None:
    (tmp_path / name).write_bytes(b"Licensed to \xff\n" + f"text, {secret}\n".encode())
    with pytest.raises(ArtifactError, match=rf"{name}, line 2, contains .*nothing was uploaded"):
        check_private([RepoFile(name, tmp_path / name)], None)


HOSTILE = 'main"); print("x") #'
HOSTILE_MARKDOWN = "</code><script>alert(1)</script> [x](javascript:1) ![y](http://z) | `a`\n# heading"


@pytest.fixture
def published(tiny_base: Path, tmp_path: Path) -> Facts:
    """What is known of an artifact in NF4 on a base of the Hub."""
    artifact = make_artifact(tiny_base, tmp_path / "artifact", nf4=True)
    facts = Facts(artifact, read_manifest(artifact), None)
    assert facts.manifest is not None
    base = {**facts.manifest.base, "name": "someone/base", "revision": "a" * 40, "path": None}
    return replace(facts, manifest=replace(facts.manifest, base=base))


def test_k47_a_value_of_the_manifest_is_never_code(published: Facts) -> None:
    manifest = published.manifest
    assert manifest is not None
    expected = calls_in(python_code(published, "u/m"))
    for value in (HOSTILE, "'''\"\"\"\\", "a\nimport os", "```\n", "{repo}", "\u2028$(id)", "\\"):
        for key in ("name", "revision", "answer_prompt", "compute_dtype", "double_quant"):
            hostile = replace(
                manifest,
                base={**manifest.base, **({key: value} if key in manifest.base else {})},
                data={**manifest.data, key: value},
                quantization={**manifest.quantization, **({key: value} if "d" in key else {})},
            )
            code = python_code(replace(published, manifest=hostile), "u/m")
            assert calls_in(code) == expected
            assert "\n```" not in code


def calls_in(code: str) -> list[str]:
    """Return the functions that Python code calls."""
    return sorted(ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))


def test_k47_the_name_of_a_repository_is_one_word_of_a_command(published: Facts) -> None:
    merged = replace(published, merge={}, recipe={"adapter": {"type": "lora"}})
    assert shlex.split(vllm_commands(merged, "u/$(id); rm -rf x")) == ["vllm", "serve", "u/$(id); rm -rf x"]


def test_k47_values_in_the_card_are_shown_literally(published: Facts) -> None:
    assert published.manifest is not None
    hostile = replace(
        published,
        manifest=replace(published.manifest, versions={"torch": HOSTILE_MARKDOWN}),
        summary={"hardware": HOSTILE_MARKDOWN},
    )
    card = make_card(hostile, "someone/model")
    assert card_errors(card) == []
    assert card.count(markdown(HOSTILE_MARKDOWN)) == 2
    body = card.replace(markdown(HOSTILE_MARKDOWN), "")
    assert "<script>" not in body
    assert "](javascript" not in body
    assert "# heading" not in body


ESCAPES = "\x1b[2J\x1b]0;x\x07[red]"
SHOWN = r"\e[2J\e]0;x\x07[red]"


def test_k50_escapes_in_an_unknown_key_are_shown(project: Project) -> None:
    for verb, overrides in (("check", [f"{ESCAPES}=1"]), ("finetune", [f"stages.{ESCAPES}=1"])):
        done = command(verb, project, *overrides)
        assert done.exit_code == 2
        assert SHOWN in done.output
        assert done.output.replace("\n", "").isprintable()
    text = project.recipe.read_text(encoding="utf-8")
    project.recipe.write_text(text + '"\\e[2J\\e]0;x\\x07[red]": 1\n', encoding="utf-8")
    done = command("check", project)
    assert SHOWN in done.output
    assert done.output.replace("\n", "").isprintable()


def test_k50_escapes_in_an_answer_are_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_piece(f"a\n{ESCAPES}")
    assert capsys.readouterr().out == f"a\n{SHOWN}"


def test_k50_a_directory_named_like_markup_is_written_and_shown(project: Project) -> None:
    artifact = make_artifact(project.base, project.directory / "artifact")
    options = ["--data", "train.json", "--image-root", "images", "--max-records", "4", "--output", "ev[/x]"]
    done = CliRunner().invoke(cli, ["eval", str(artifact), *options])
    assert done.exit_code == 0, done.output
    assert "samples are in ev[/x]" in done.output
    assert (project.directory / "ev[" / "x]").is_dir()


def test_k49_a_nul_in_a_path_is_named(project: Project, tmp_path: Path) -> None:
    done = command("finetune", project, 'output_dir="a\\0b"')
    assert done.exit_code == 2
    assert r"output_dir: a\x00b contains a NUL character" in done.output
    with pytest.raises(ArtifactError, match="contains a NUL character"):
        refuse_existing(tmp_path / "a\0b")


def test_k49_every_promise_has_its_tests() -> None:
    page = (PACKAGE.parent / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\*\*.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert len(rows) >= 13
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE.parent / "tests").rglob("test_*.py"))
    for promise, tests in rows:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names, promise
        assert [name for name in names if f"def {name}(" not in sources] == [], promise


@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.bin", "rng_state.pth"])
def test_k49_a_stray_pickle_in_a_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    stopped = PACKAGE.parent / "tests" / "fixtures" / "earlier_run" / "stopped" / "checkpoints" / "instruct"
    shutil.copytree(stopped, tmp_path / "instruct")
    newest = find_latest(tmp_path / "instruct", lambda _: None)
    assert newest is not None
    (newest.directory / name).write_bytes(b"cos\nsystem\n")
    said: list[str] = []
    older = find_latest(tmp_path / "instruct", said.append)
    assert older is not None
    assert older.directory != newest.directory
    assert f"it holds {name}, which the kit did not write; remove that file" in said[0]
