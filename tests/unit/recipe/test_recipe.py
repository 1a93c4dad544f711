"""Recipes: what is read, what is refused and in which words, and that a resolved recipe runs again unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_llava.errors import RecipeError
from lora_llava.recipe.file import dump_portable, dump_resolved, load_recipe

MINIMAL = """\
name: small
base: {model_name_or_path: some/llava}
stages:
  instruct:
    data: {path: data/train.json}
    learning_rate: 1e-4
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "small.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def refused(directory: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(directory, text), overrides)
    return str(caught.value)


def test_a_minimal_recipe_has_the_settings_of_llava(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    stage = recipe.stages.instruct
    assert stage is not None
    assert stage.learning_rate == 1e-4
    assert (stage.batch_size, stage.mm_projector_lr, stage.template) == ("auto", 2e-5, "vicuna_v1")
    assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.quantization.type) == (128, 256.0, "nf4")
    assert recipe.stage_names == ["instruct"]


@pytest.mark.fault("recipe: `1e-4`, which YAML 1.1 reads as text")
@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, number: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("1e-4", number)))
    assert recipe.stage("instruct").learning_rate == pytest.approx(1e-4)


@pytest.mark.fault("recipe: an unknown key")
@pytest.mark.fault("recipe: a misspelled key, however deep")
def test_every_problem_is_reported_at_once_with_its_path(tmp_path: Path) -> None:
    text = MINIMAL.replace("learning_rate", "lerning_rate").replace("name: small", "name: small\nseed: -1\nadaptor: {}")
    message = refused(tmp_path, text)
    assert "stages.instruct.lerning_rate: unknown key. Did you mean learning_rate?" in message
    assert "adaptor: unknown key. Did you mean adapter?" in message
    assert "seed:" in message
    assert message.count("\n") == 2


@pytest.mark.fault("recipe: text where a boolean belongs")
@pytest.mark.fault("recipe: a learning rate that is negative, zero, NaN or infinite")
@pytest.mark.fault("recipe: a LoRA rank of 0")
@pytest.mark.fault("recipe: settings that exclude each other")
@pytest.mark.fault("recipe: a version from the future")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("1e-4", "0"), "greater than 0"),
        (("1e-4", "-1"), "greater than 0"),
        (("1e-4", ".nan"), "finite"),
        (("1e-4", ".inf"), "finite"),
        (("1e-4", "fast"), "number"),
        (("1e-4", "1e-4\n    gradient_checkpointing: 'yes'"), "a boolean (true or false)"),
        (("1e-4", "1e-4\n    packing: trees"), "'tree' or 'none'"),
        (("1e-4", "1e-4\n    max_steps: 0"), "max_steps"),
        (("1e-4", "1e-4\n    max_steps: 1000001"), "max_steps 1,000,001 is more than 1,000,000; remove it"),
        (("1e-4", "1e-4\n    template: plain"), "'vicuna_v1' or "),
        (("name: small", "name: small\nadapter: {r: 0}"), "adapter.r"),
        (("name: small", "name: Not a name"), "name:"),
        (("name: small", "name: small\nversion: 2"), "version"),
        (("some/llava", "some/llava, vision_tower: x"), "exclude each other"),
        (("{model_name_or_path: some/llava}", "{language_model: some/lm}"), "vision_tower"),
        (("data/train.json", "train.csv, revision: x, columns: {question: q, answer: a}"), "revision apply to Hub"),
        (("data/train.json", "data/train.json, validation: {share: 1.0}"), "less than 1"),
        (("data/train.json", "data/train.json, validation: {}"), "give path or share"),
        (("  instruct:", "  tune:"), "unknown key"),
        (("data/train.json", "data/train.json, name: x"), "name and revision apply to Hub datasets"),
        (
            ("model_name_or_path: some/llava", "language_model: a, vision_tower: b, revision: c"),
            "revision needs model_name_or_path",
        ),
        (
            ("name: small", "name: small\nadapter: {target_modules: []}"),
            "such as [q_proj, v_proj], not []",
        ),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in MINIMAL
    assert words in refused(tmp_path, MINIMAL.replace(*change))


@pytest.mark.fault("recipe: a key that occurs twice")
@pytest.mark.fault("recipe: an empty file, or one of comments only")
@pytest.mark.fault("recipe: a list instead of a mapping")
@pytest.mark.fault("recipe: YAML anchors and aliases, and the bombs made of them")
@pytest.mark.fault("recipe: a YAML tag that would run Python")
@pytest.mark.fault("recipe: tabs, bytes that are not UTF-8, a byte order mark")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains nothing"),
        ("# only a comment\n", "contains nothing"),
        ("- a\n- b\n", "contains a list"),
        ("name: a\nname: b\n", "'name' occurs twice"),
        ("a: {b: 1, b: 2}\n", "'b' occurs twice"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a:\n\t- b\n", "not valid YAML"),
        ("a: [1, 2\n", "not valid YAML"),
        ("? [a, b]\n: c\n", "simple word"),
        ("a: " + "[" * 5000 + "\n", "not valid YAML"),
        ("name: \udcff\n", "not UTF-8"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    message = refused(tmp_path, text)
    assert words in message
    assert "\n" not in message


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="at most"):
        load_recipe(write(tmp_path, "#" * (1 << 21)))


@pytest.mark.fault("recipe: tabs, bytes that are not UTF-8, a byte order mark")
def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "\ufeff" + MINIMAL)).name == "small"


@pytest.mark.fault("recipe: types of overridden values")
def test_overrides_are_yaml_and_typed(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        ["seed=7", "stages.instruct.learning_rate=3e-5", "name='x1'", "adapter.target_modules=[q_proj, v_proj]"],
    )
    assert (recipe.seed, recipe.name, recipe.adapter.target_modules) == (7, "x1", ["q_proj", "v_proj"])
    assert recipe.stage("instruct").learning_rate == 3e-5


@pytest.mark.fault("recipe: a path with # on the command line")
@pytest.mark.parametrize("name", ["scans #2", "#2", "a # b # c", "a#b"])
def test_an_override_has_no_comments(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), [f"output_dir={tmp_path / 'x'}{name}", f"card.limits={name}"])
    assert (recipe.output_dir, recipe.card.limits) == (tmp_path / f"x{name}", name)


@pytest.mark.fault("recipe: an override of an unknown key, without a value, or without `=`")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key.sub=value"),
        ("=3", "key.sub=value"),
        ("stages..x=3", "key.sub=value"),
        ("sed=3", "Did you mean seed?"),
        ("stages.instruct.lr=3", "unknown key stages.instruct.lr"),
        ("seed.deep=3", "unknown key seed.deep"),
        ("seed=[1", "not valid YAML"),
        ("seed=", "seed"),
        ("seed=x", "seed"),
        # Found by fuzzing.
        (f"base.language_model={'a' * 300}", "override base.language_model: language_model: 'aaa"),
        (f"stages.instruct.data.path={'a' * 300}", "is not a valid path: File name too long"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, MINIMAL, override)


@pytest.mark.fault("recipe: relative paths in the file, in an override, and through a symbolic link")
def test_paths_start_at_the_recipe_and_those_of_overrides_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = MINIMAL.replace("data/train.json", "data/train.json, image_root: ../images")
    path = write(tmp_path, "output_dir: out\n" + text)
    recipe = load_recipe(path)
    data = recipe.stage("instruct").data
    assert (recipe.output_dir, data.path) == (tmp_path / "out", str(tmp_path / "data/train.json"))
    assert data.image_root == str(tmp_path.parent / "images")
    assert load_recipe(path, ["output_dir=out"]).output_dir == here / "out"


def test_a_name_is_a_path_only_if_it_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path).base.model_name_or_path == "some/llava"
    (tmp_path / "some/llava").mkdir(parents=True)
    assert load_recipe(path).base.model_name_or_path == str(tmp_path / "some/llava")


@pytest.mark.fault("recipe: `${HOME}`, which is not expanded")
def test_variables_are_not_expanded(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("data/train.json", "'${HOME}/train.json'")))
    assert "${HOME}" in recipe.stage("instruct").data.path


@pytest.mark.fault("recipe: a resolved recipe that runs again")
def test_a_resolved_recipe_is_the_same_recipe_and_holds_no_absolute_path(tmp_path: Path) -> None:
    text = "output_dir: runs/x\n" + MINIMAL.replace("train.json", "train.json, validation: {path: data/val.json}")
    recipe = load_recipe(write(tmp_path, text))
    directory = tmp_path / "runs/x"
    directory.mkdir(parents=True)
    dumped = dump_resolved(recipe, directory)
    assert str(tmp_path) not in dumped
    (directory / "recipe.yaml").write_text(dumped, encoding="utf-8")
    assert load_recipe(directory / "recipe.yaml") == recipe


@pytest.mark.parametrize("number", ["1:30", "010", "1_000", "0x10", "2026-01-01", "yes"])
def test_the_numbers_of_old_yaml_are_words(tmp_path: Path, number: str) -> None:
    assert "seed: must be an integer of at least 0" in refused(tmp_path, f"seed: {number}\n{MINIMAL}")


@pytest.mark.fault("recipe: text where a boolean belongs")
@pytest.mark.parametrize("word", ["yes", "no", "on", "Off", "y"])
def test_only_true_and_false_are_booleans(tmp_path: Path, word: str) -> None:
    assert "double_quant: must be a boolean (true or false)" in refused(
        tmp_path, f"quantization: {{double_quant: {word}}}\n{MINIMAL}"
    )


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "\0", "{r: 1, r: 2}"])
def test_broken_override_values_are_refused_in_one_line(tmp_path: Path, value: str) -> None:
    message = refused(tmp_path, MINIMAL, f"adapter={value}")
    assert message.startswith("override adapter")
    assert "\n" not in message


def test_every_wrong_override_is_reported_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL, "sed=1", "seed=2", "nam=x")
    assert [line.split(":")[0] for line in message.splitlines()] == ["override sed", "override nam"]


def test_paths_inside_an_override_start_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe(write(tmp_path, MINIMAL), ["stages.instruct.data={path: x.json, image_root: ../images}"])
    data = recipe.stage("instruct").data
    assert (data.path, data.image_root) == (str(here / "x.json"), str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("value", "words"), [("~nobody-of-this-name/x", "no home directory"), ("''", "is empty; give a path")]
)
def test_wrong_paths_are_refused_where_they_stand(tmp_path: Path, value: str, words: str) -> None:
    message = refused(tmp_path, f"start_from: {value}\n{MINIMAL}")
    assert f"{tmp_path / 'small.yaml'}: start_from: " in message
    assert words in message
    assert f"override start_from: start_from: {value}"[:32] in refused(tmp_path, MINIMAL, f"start_from={value}")


def test_one_wrong_value_is_one_problem_at_its_own_place(tmp_path: Path) -> None:
    message = refused(tmp_path, f"adapter: {{target_modules: all}}\n{MINIMAL}")
    assert message.startswith(f"{tmp_path / 'small.yaml'}: adapter.target_modules: ")
    assert "\n" not in message


@pytest.mark.fault("recipe: relative paths in the file, in an override, and through a symbolic link")
def test_a_resolved_recipe_in_a_linked_directory_finds_its_data(tmp_path: Path) -> None:
    disk, project = tmp_path / "disk", tmp_path / "home/me/project"
    disk.mkdir()
    project.mkdir(parents=True)
    (project / "runs").symlink_to(disk)
    recipe = load_recipe(write(project, "output_dir: runs/x\n" + MINIMAL))
    directory = recipe.resolved_output_dir
    directory.mkdir()
    (directory / "recipe.yaml").write_text(dump_resolved(recipe, directory), encoding="utf-8")
    assert load_recipe(directory / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "text", ["1e5", "1E-3", ".5e1", "yes", "1:20", "010", "0o7", "null", "<<", "=", "a: b # c", "\u2028"]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, "output_dir: x\n" + MINIMAL), [f"stages.instruct.system='{text}'"])
    assert recipe.stage("instruct").system == text
    assert load_recipe(write(tmp_path, dump_resolved(recipe, tmp_path))) == recipe


def test_every_path_of_a_list_is_relative_to_the_recipe(tmp_path: Path) -> None:
    data = {"path": "a.json", "image_roots": ["../archive", "/mnt/scans"]}
    content = {"name": "r", "base": {"model_name_or_path": "x/y"}, "stages": {"instruct": {"data": data}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.stage("instruct").data.image_roots == [str(tmp_path.parent / "archive"), "/mnt/scans"]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "r.yaml").write_text(dump_resolved(recipe, tmp_path / "copy"), encoding="utf-8")
    assert load_recipe(tmp_path / "copy" / "r.yaml").stage("instruct").data == recipe.stage("instruct").data
    published = yaml.safe_load(dump_portable(tmp_path / "r.yaml"))["stages"]["instruct"]["data"]
    assert published["image_roots"] == ["./archive", "./scans"]
