"""Mistakes in a recipe: the nearest valid key, and never a word of the library that checks the types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_llava.errors import RecipeError
from lora_llava.recipe import file as file_module
from lora_llava.recipe.errors import allowed
from lora_llava.recipe.fields import settings_of
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.names import _KEY_OF, _REPLACED, _SYNONYMS, _TEXT_OF, all_keys
from lora_llava.recipe.settings import Recipe

STAGE = {"data": {"path": "data/train.json"}, "batch_size": 4, "learning_rate": 0.1}
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 1.5, -0.5, float("nan"), float("inf"), "", "x y", "yes", "0.1", [], [1], ["a", "b"],
    [[1]], {}, {"a": 1}, {"path": 3},
)  # fmt: skip
FOREIGN = re.compile(
    r"Input|[Ss]hould|valid (dictionary|string|number|integer|boolean|list)|instance of|Settings|Value error|pydantic|"
    r"pattern|<class|Annotated|Literal|NoneType|type=|None\b"
)
"""Words of pydantic, and of Python, that mean nothing to who wrote a recipe."""


def plain_recipe() -> dict[str, Any]:
    return {"name": "small", "base": {"model_name_or_path": "some/llava"}, "stages": {"instruct": dict(STAGE)}}


def problems(directory: Path, recipe: dict[str, Any], *overrides: str) -> list[str]:
    """Load a recipe; return the lines of the refusal, without the path of the file."""
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return refusal(path, *overrides)


def refusal(path: Path, *overrides: str) -> list[str]:
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        return str(error).replace(f"{path}: ", "").splitlines()
    return []


def with_value(key: str, value: Any) -> dict[str, Any]:
    """Set a dotted key of the plain recipe; sections on the way are made."""
    recipe = plain_recipe()
    holder: dict[str, Any] = recipe
    *above, last = key.split(".")
    for name in above:
        holder[name] = dict(holder[name]) if isinstance(holder.get(name), dict) else {}
        holder = holder[name]
        if name == "data":
            holder.setdefault("path", "data/train.json")
    if above in (["evaluation"], ["stages", "align"], ["stages", "prefer"]):
        holder["data"] = {"path": "data/test.json"}
    holder[last] = value
    return recipe


@pytest.mark.parametrize("key", all_keys())
def test_k23_no_setting_answers_with_words_of_the_library(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    refused = 0
    for value in VALUES:
        # The values are those that a file would give; to write and to parse 20 files for each setting takes longest.
        monkeypatch.setattr(file_module, "_read", lambda _, value=value: with_value(key, value))
        lines = refusal(Path("small.yaml"))
        refused += bool(lines)
        for line in lines:
            assert not FOREIGN.search(line.replace("Validation", "")), (value, line)
            assert len(line) < 400, line
        # What the values of a section together mean is told at the section.
        named = [line.partition(":")[0] for line in lines]
        # An item of `others` is named by its index in the list of all sources.
        names = (key, f"{key.removesuffix('others')}1") if key.endswith(".others") else (key,)
        assert not lines or any(
            name.startswith(one) or one.startswith(name) or name.endswith(one) for name in names for one in named
        ), lines
    assert refused


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("stages.instruct.learning_rate", "0.1", "must be a number greater than 0, not '0.1'; remove the quotes"),
        ("stages.instruct.learning_rate", float("nan"), "a number greater than 0, not NaN; it must be finite"),
        ("stages.instruct.max_length", 0, "must be an integer of at least 1, not 0"),
        ("stages.instruct.packing", "trees", "must be 'tree' or 'none', not 'trees'. Did you mean tree?"),
        ("stages.instruct.data.validation", 0.1, "write {share: 0.1} or {path: FILE}, not 0.1"),
        ("stages.instruct.data.validation", "val.json", "write {share: 0.1} or {path: FILE}, not 'val.json'"),
        ("evaluation", "test.json", "write {data: {path: FILE}}, not 'test.json'"),
        ("base", "some/llava", "write {model_name_or_path: DIRECTORY}"),
        ("name", "My model", "must be a name of a-z, 0-9, _ and -, such as my-model_2, not 'My model'"),
        ("adapter.target_modules", "q_proj", "such as [q_proj, v_proj], not 'q_proj'; write [q_proj]"),
        ("quantization.double_quant", "yes", "a boolean (true or false), not 'yes'; write true, without quotes"),
        ("quantization.double_quant", "true", "a boolean (true or false), not 'true'; remove the quotes"),
        ("start_from", 3, "start_from: must be a path or null, not 3"),
        ("seed", None, "must be an integer of at least 0 and less than 4,294,967,296, not null"),
    ],
)
def test_k23_a_wrong_value_is_told_with_what_is_allowed(tmp_path: Path, key: str, value: Any, words: str) -> None:
    (line,) = problems(tmp_path, with_value(key, value))
    assert line.startswith(f"{key}: ")
    assert words in line


@pytest.mark.parametrize("missing", ["name", "base", "stages", "stages.instruct.data", "stages.instruct.data.path"])
def test_k23_what_is_missing_is_told_with_how_to_write_it(tmp_path: Path, missing: str) -> None:
    recipe = with_value(missing, None)
    holder: Any = recipe
    for name in missing.split(".")[:-1]:
        holder = holder[name]
    del holder[missing.rpartition(".")[2]]
    (line,) = problems(tmp_path, recipe)
    assert line.startswith(f"{missing}: is missing; write ")


def test_k23_one_tracker_needs_no_list(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**plain_recipe(), "report_to": "wandb"}), encoding="utf-8")
    assert load_recipe(path).report_to == ["wandb"]
    assert load_recipe(path, ["report_to=none"]).report_to == "none"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "stages.instruct.learning_rate"),
        ("learning_rate", "stages.instruct.learning_rate"),
        ("learning-rate", "stages.instruct.learning_rate"),
        ("stages.instruct.lr", "learning_rate"),
        ("stages.align.lr", "learning_rate"),
        ("stages.train", "instruct"),
        ("stages.instruct.epochs", "num_train_epochs"),
        ("epochs", "stages.instruct.num_train_epochs"),
        ("batch", "stages.instruct.batch_size"),
        ("batch_size", "stages.instruct.batch_size"),
        ("per_device_train_batch_size", "stages.instruct.batch_size"),
        ("lora_r", "adapter.r"),
        ("stages.instruct.lora_alpha", "adapter.lora_alpha"),
        ("adapter.rank", "r"),
        ("max_seq_length", "stages.instruct.max_length"),
        ("cutoff_len", "stages.instruct.max_length"),
        ("model", "base.model_name_or_path"),
        ("base.model", "model_name_or_path"),
        ("dataset", "stages.instruct.data"),
        ("stages.instruct.image_folder", "data.image_root"),
        ("val_set_size", "stages.instruct.data.validation.share"),
        ("load_in_4bit", "quantization.type"),
        ("bf16", "precision"),
        ("flash_attn", "attn_implementation"),
        ("wandb", "report_to"),
        ("eval", "evaluation"),
        ("revision", "base.revision"),
        ("lerning_rate", "stages.instruct.learning_rate"),
        ("evaluation.path", "data.path"),
        ("stages.instruct.validation", "data.validation"),
        ("sed", "seed"),
    ],
)
def test_k23_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path, key: str, meant: str) -> None:
    for lines in (problems(tmp_path, with_value(key, 1)), problems(tmp_path, plain_recipe(), f"{key}=1")):
        assert any(re.search(rf"unknown key.*\. Did you mean {re.escape(meant)}\?$", line) for line in lines), lines


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "stages.instruct.gradient_accumulation_steps",
            "batch_size counts the conversations of a whole optimizer step",
        ),
        ("augment", "images are not augmented"),
        ("warmup_steps", "set stages.instruct.warmup_ratio"),
        ("gpus", "the number of GPUs on the command line"),
        ("deepspeed", "set distributed: {engine: deepspeed, offload: true}, which is ZeRO-2"),
        ("zero_stage", "the rest of a DeepSpeed configuration follows from the recipe"),
        ("zero3", "ZeRO-3 is refused: it replaces the frozen weights"),
    ],
)
def test_k23_what_is_done_otherwise_here_is_explained(tmp_path: Path, key: str, words: str) -> None:
    (line,) = problems(tmp_path, plain_recipe(), f"{key}=1")
    assert words in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("distributed.engine=deepspeed",), "engine: deepspeed needs offload: true"),
        (("distributed.offload=true",), "offload: true needs engine: deepspeed"),
        (
            ("distributed.engine=deepspeed", "distributed.offload=true", "distributed.shard=true"),
            "shard: true and engine: deepspeed cannot be combined",
        ),
        (
            ("distributed.engine=deepspeed", "distributed.offload=true", "stages.instruct.optim=adamw_8bit"),
            "stages.instruct.optim is adamw_8bit, but distributed.engine: deepspeed updates the weights with",
        ),
    ],
)
def test_what_deepspeed_does_not_do_here_is_refused(tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    (line,) = problems(tmp_path, plain_recipe(), *more)
    assert words in line


@pytest.mark.parametrize("key", ["xyzzy", "stages.instruct.xyzzy", "stages.xyzzy", "adapter.xyzzy", "card.xyzzy.deep"])
def test_k23_no_unknown_key_lists_more_names_than_one_reads(tmp_path: Path, key: str) -> None:
    (line,) = problems(tmp_path, plain_recipe(), f"{key}=1")
    assert line.count(",") <= 8
    assert "docs/settings.md" in line or " has " in line


def test_k23_other_kits_names_lead_to_settings_that_there_are() -> None:
    assert set(_SYNONYMS) <= set(all_keys())
    names = [name for texts in (_SYNONYMS.values(), _REPLACED) for text in texts for name in text.split()]
    assert len(names) == len(set(names)) == len(_KEY_OF) + len(_TEXT_OF)
    own = {key.rpartition(".")[2] for key in all_keys()}
    assert not own & set(names), "a setting of the recipe is found by its name before the table is asked"


@pytest.mark.parametrize("key", ["stages.instruct.data", "stages.instruct.data.path", "evaluation.data.path"])
def test_k20_several_files_are_named_for_what_they_are(tmp_path: Path, key: str) -> None:
    (line,) = problems(tmp_path, with_value(key, ["a.json", "b.json"]))
    assert line.startswith(f"{key}: ")
    assert "For several files, write a source for each: data: [{path: a.json}, {path: b.json}]" in line
    assert '["a.json", "b.json"]' in line


def test_every_setting_says_in_words_what_it_takes() -> None:
    for setting in settings_of(Recipe):
        assert not FOREIGN.search(allowed(setting.field)), setting.key


NUMBERS = [
    setting.key for setting in settings_of(Recipe) if re.search(r"\b(int|float)\b", str(setting.field.annotation))
]


@pytest.mark.parametrize("key", NUMBERS)
def test_k48_every_number_of_a_recipe_has_a_bound(tmp_path: Path, key: str) -> None:
    if key.startswith("base."):
        return
    for value in (10**18, 1e300):
        lines = problems(tmp_path, with_value(key, value))
        assert any(key.rpartition(".")[2] in line for line in lines), lines


def test_k48_there_are_numbers() -> None:
    assert {"adapter.r", "stages.instruct.num_train_epochs", "stages.instruct.learning_rate", "seed"} <= set(NUMBERS)
    assert len(NUMBERS) > 40
