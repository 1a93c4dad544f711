"""Several sources of a stage: their shares of an epoch, what is held out, and losses by source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from lora_llava.data.load import fingerprint, load_split
from lora_llava.data.mixing import source_names, split_leaks
from lora_llava.data.packing import PlanItem
from lora_llava.data.record import Record
from lora_llava.data.rows import PackedRows
from lora_llava.data.stage import EncodedRecords, _validation_rows
from lora_llava.errors import DataError, RecipeError
from lora_llava.planning.preflight.data import sources
from lora_llava.recipe.file import dump_resolved, load_recipe
from lora_llava.recipe.stages import DataSettings, InstructSettings
from lora_llava.training.validation import HeldOutLoss


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("own", 10), ("general", 40)):
        rows = [{"id": f"{name}{index}", "conversations": turns(f"{name} {index}?")} for index in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def turns(question: str, image: bool = False) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{'<image>' * image}{question}"}, {"from": "gpt", "value": "yes"}]


def settings(folder: Path, *given: dict[str, Any]) -> DataSettings:
    return DataSettings.model_validate([{**one, "path": str(folder / one["path"])} for one in given])


def counts(records: list[Record]) -> Counter[str]:
    return Counter(record.source for record in records)


@pytest.mark.parametrize(
    ("own", "general", "expected"),
    [
        ({}, {}, (10, 40)),
        ({"weight": 2.5}, {}, (25, 40)),
        ({}, {"share": 0.2}, (10, 2)),
        ({"weight": 2.0}, {"share": 0.5}, (20, 20)),
        ({}, {"share": 0.9}, (10, 90)),
        ({}, {"max_records": 3}, (10, 3)),
        ({}, {"weight": 0.25}, (10, 10)),
        ({}, {"weight": 0.001}, (10, 1)),
    ],
)
def test_sources_make_up_their_part_of_an_epoch(
    folder: Path, own: dict[str, Any], general: dict[str, Any], expected: tuple[int, int]
) -> None:
    train, validation = load_split(
        settings(folder, {"path": "own.json", **own}, {"path": "general.json", **general}), 1
    )
    assert counts(train) == {"own.json": expected[0], "general.json": expected[1]}
    assert not validation
    # Records are repeated as evenly as they can be.
    times = Counter(record.id for record in train if record.source == "general.json")
    assert max(times.values()) - min(times.values()) <= 1


def test_an_epoch_is_a_function_of_data_and_seed(folder: Path) -> None:
    mix = settings(folder, {"path": "own.json"}, {"path": "general.json", "share": 0.5})
    first, again, other = (fingerprint(load_split(mix, seed)[0]) for seed in (1, 1, 2))
    assert first == again != other


def test_one_source_in_a_list_is_that_source(folder: Path) -> None:
    alone = settings(folder, {"path": "own.json"})
    assert alone == DataSettings(path=str(folder / "own.json"))
    assert {record.source for record in load_split(alone, 1)[0]} == {""}


def test_each_source_holds_out_its_own_validation(folder: Path) -> None:
    own = {"path": "own.json", "validation": {"share": 0.2}}
    train, validation = load_split(settings(folder, own, {"path": "general.json", "weight": 0.5}), 1)
    assert counts(train) == {"own.json": 8, "general.json": 20}
    assert counts(validation) == {"own.json": 2}


def test_an_image_on_both_sides_of_the_split_is_named_with_both_records(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"x")
    (folder / "b.png").write_bytes(b"x")
    rows = [{"id": name, "image": f"{name}.png", "conversations": turns("Q?", image=True)} for name in "ab"]
    for name in ("x", "y"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    held_out = {"path": "x.json", "validation": {"share": 0.5}}
    with pytest.raises(
        DataError, match=r"x\.json, record . \(id .\): is held out .* its image is trained on in y\.json, r"
    ):
        load_split(settings(folder, held_out, {"path": "y.json"}), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"path": "a.json", "share": 0.5}, {"path": "b.json", "share": 0.5}], "the sources have 1 in all"),
        ([{"path": "a.json", "share": 0.1}, {"path": "b.json", "share": 0.1}], "leave a rest to one without a share"),
        ([{"path": "a.json"}, {"path": "b.json", "share": 0.1, "weight": 2.0}], "weight and share exclude each other"),
        ([{"path": "a.json"}, {"path": "b.json", "window": [0, 9]}], "window must be the same for all sources"),
        ([{"path": "a.json", "others": [{"path": "c.json"}]}, {"path": "b.json"}], "Extra|others"),
        ([], "valid dictionary"),
        ([{"path": "a.json"}, 3], "valid dictionary"),
    ],
)
def test_mixes_without_meaning_are_refused(given: list[Any], message: str) -> None:
    if given and isinstance(given[0], dict) and "others" in given[0]:
        # The list is the one way to write several sources: its own rest replaces what the first brought.
        assert [one.path for one in DataSettings.model_validate(given).sources] == ["a.json", "b.json"]
        return
    with pytest.raises(ValidationError, match=message):
        DataSettings.model_validate(given)


def test_a_share_of_one_source_is_refused() -> None:
    for key, value in (("share", 0.5), ("weight", 2.0), ("source", "replay")):
        with pytest.raises(ValidationError, match=rf"data\.{key} is for one of several sources; write data as a list"):
            InstructSettings.model_validate({"data": {"path": "a.json", key: value}})


RECIPE = """
name: mix
base: {model_name_or_path: some/llava}
stages:
  instruct:
    data:
      - {path: own.json, image_root: images, validation: {path: held.json}}
      - {path: general.json, share: 0.2, exclude: bad.jsonl}
"""


def test_a_list_of_sources_is_read_and_written_with_its_paths(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    first, second = recipe.stage("instruct").data.sources
    assert (first.path, first.image_root) == (str(tmp_path / "own.json"), str(tmp_path / "images"))
    assert (second.path, second.share, second.exclude) == (
        str(tmp_path / "general.json"),
        0.2,
        str(tmp_path / "bad.jsonl"),
    )
    assert [key.removeprefix("stages.instruct.") for key, _ in sources(recipe)] == ["data", "data.validation", "data.1"]

    written = dump_resolved(recipe, tmp_path / "run")
    assert [one["path"] for one in yaml.safe_load(written)["stages"]["instruct"]["data"]] == [
        "../own.json",
        "../general.json",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(written)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").stages == recipe.stages
    assert "others" not in written

    with pytest.raises(RecipeError, match=r"data is a list of sources; write the whole list, as data=\[\.\.\.\]"):
        load_recipe(tmp_path / "recipe.yaml", ["stages.instruct.data.path=x.json"])


def test_a_single_source_is_written_without_the_keys_of_a_mix(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.partition("      -")[0].replace("data:\n", "data: {path: own.json}\n"))
    written = yaml.safe_load(dump_resolved(load_recipe(tmp_path / "recipe.yaml"), tmp_path))
    assert written["stages"]["instruct"]["data"].keys().isdisjoint({"others", "weight", "share"})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a.json}, {path: b.json, share: 1.3}]", r"data\.1\.share: must be a number greater than 0 and less"),
        ("[{path: a.json, share: 1.3}, {path: b.json}]", r"data\.share: must be a number greater than 0 and less"),
        ("[{path: a.json}, {path: b.json, wieght: 2}]", r"data\.1\.wieght: unknown key\. Did you mean weight\?"),
        ("[{path: a.json}, {path: b.json}, {share: 0.1}]", r"data\.2\.path: is missing; write "),
        ("[{path: a.json}, {path: b.json, validation: {share: 2}}]", r"data\.1\.validation\.share: must be a number"),
    ],
)
def test_an_error_in_one_of_several_sources_names_its_index_and_key(tmp_path: Path, sources: str, message: str) -> None:
    text = f"version: 1\nname: a\nbase: {{model_name_or_path: ./base}}\nstages: {{instruct: {{data: {sources}}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=rf"stages\.instruct\.{message}") as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert "others" not in str(refused.value)


def test_names_of_sources_differ() -> None:
    paths = ["/x/a.json", "/y/a.json", "org/set", "/z/a.json"]
    assert source_names([DataSettings(path=path) for path in paths]) == [
        "a.json",
        "a.json (2)",
        "org/set",
        "a.json (3)",
    ]
    named = [
        DataSettings(path="/x/a.json"),
        DataSettings(path="/y/b.json", source="a.json"),
        DataSettings(path="b.json"),
    ]
    assert source_names(named) == ["a.json (2)", "a.json", "b.json"]


def test_a_window_for_all_data_is_that_of_each_source(tmp_path: Path) -> None:
    text = RECIPE + "images: {window: full}\nevaluation: {data: [{path: a.json}, {path: b.json}]}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.evaluation is not None
    everything = [*recipe.stage("instruct").data.sources, *recipe.evaluation.data.sources]
    assert [source.window for source in everything] == ["full"] * 4
    assert [source.window for source in recipe.evaluation.data.with_window([0, 5]).sources] == [[0, 5]] * 2


def test_settings_without_effect_are_named_in_every_source(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("exclude: bad.jsonl", "max_bad_records: 3"))
    with pytest.raises(RecipeError, match=r"instruct\.data\.1\.max_bad_records: 3 has no effect"):
        load_recipe(tmp_path / "recipe.yaml")


def test_any_source_may_hold_out_validation_records(tmp_path: Path) -> None:
    text = RECIPE.replace(", validation: {path: held.json}", "").replace(
        "exclude: bad.jsonl", "validation: {share: 0.1}"
    )
    (tmp_path / "recipe.yaml").write_text(text.replace("    data:", "    early_stopping_patience: 2\n    data:"))
    assert load_recipe(tmp_path / "recipe.yaml").stage("instruct").data.holds_out


def test_validation_rows_hold_one_source_and_their_losses_are_told_apart() -> None:
    records = [Record(str(index), None, (), "", source=name) for index, name in enumerate("abab")]
    encoded: Any = EncodedRecords.__new__(EncodedRecords)
    encoded.records, encoded.items = records, [PlanItem(5, 0, -1)] * 4
    rows = _validation_rows(encoded, 100)
    assert sorted(rows) == [((0,), (2,)), ((1,), (3,))]

    class Rows(PackedRows):
        def __getitem__(self, index: int) -> Any:
            return self.rows[index]

    packed = Rows(rows, records, [], lambda _: None)  # type: ignore[arg-type,return-value]
    loss = HeldOutLoss(lambda row: torch.tensor(float(sum(tree[0] for tree in row))), lambda row: len(row))
    assert loss.mean(packed, [packed[index] for index in range(2)]) == 1.5
    assert loss.by_source(packed) == {"eval_loss/a": 1.0, "eval_loss/b": 2.0}
    for record in records:
        object.__setattr__(record, "source", "")
    assert loss.by_source(packed) == {}


def test_a_leak_to_another_source_is_seen_behind_one_in_the_source_itself() -> None:
    own, other = (Record(name, None, (), f"{name}.json", group="p1", source=name) for name in ("own", "other"))
    for trained in ([own, other], [other, own]):
        assert list(split_leaks(trained, [own, own])) == [(own, other, "group")]
    assert list(split_leaks([own], [own])) == []
