"""What `check` says about several sources: their part of an epoch, what one holds out and another trains on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_llava.data.load import load_split
from lora_llava.data.stage import plan_records, read_records
from lora_llava.doctor.conversations import encode_sides
from lora_llava.doctor.survey import survey
from lora_llava.errors import DataError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import image_tokens
from lora_llava.recipe.file import load_recipe
from tests.helpers.faulty import entry, sound_data, write_recipe
from tests.unit.doctor.test_doctor import check, found_in, report_in


def write_mix(directory: Path, base: Path, more: list[dict[str, Any]], **options: Any) -> Path:
    """Write a recipe whose stage has a second source, of the entries `more`, with these settings."""
    images, train, tested = sound_data()
    path = write_recipe(directory, base, images, train, tested[12:], group="ward")
    (directory / "more.json").write_text(json.dumps([{**one, "ward": "9"} for one in more]), encoding="utf-8")
    for name in ("train.json", "test.json"):
        entries = json.loads((directory / name).read_text(encoding="utf-8"))
        (directory / name).write_text(json.dumps([{**one, "ward": name} for one in entries]), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    instruct = recipe["stages"]["instruct"]
    second = {"path": "more.json", "image_root": "images", "group": "ward", **options}
    instruct["data"] = [instruct["data"], second]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [{"share": 0.4, "source": "replay"}, {"weight": 0.5}, {"max_records": 4, "weight": 3.5}, {"merge_turns": 2}],
)
def test_the_mix_and_the_plan_are_those_of_a_run(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_mix(tmp_path, tiny_base, sound_data()[2][:9], **options)
    result = check(str(path))
    assert result.exit_code == 0, result.output
    report = report_in(tmp_path / "run" / "check")

    recipe = load_recipe(path)
    config, tokenizer = describe_base(recipe.base)
    stage = recipe.stage("instruct")
    records = read_records(stage, tokenizer, image_tokens(config), recipe.seed)
    counts = Counter(record.source for record in records.train.records)
    tokens = Counter[str]()
    for record, number in zip(records.train.records, records.train.num_supervised, strict=True):
        tokens[record.source] += number
    mix = report["mixes"]["instruct"]
    assert [one["source"] for one in mix] == list(counts) == ["train.json", options.get("source", "more.json")]
    for one in mix:
        name = one["source"]
        assert (one["records_of_epoch"], one["supervised_tokens"]) == (counts[name], tokens[name])
        assert one["share_of_records"] == pytest.approx(counts[name] / counts.total(), abs=1e-4)
        assert one["share_of_supervised_tokens"] == pytest.approx(tokens[name] / tokens.total(), abs=1e-4)
        assert f"{one['share_of_records']:.1%}" in result.output
    assert [one["records"] for one in mix] == [
        24,
        4 if "max_records" in options else 6 if "merge_turns" in options else 9,
    ]
    planned = plan_records(records, stage, 500, recipe.seed)
    plan = report["plans"]["instruct"]
    assert plan["conversations"] == len(records.train)
    assert plan["computed_tokens"] == planned.plan.num_computed_tokens
    assert plan["supervised_tokens"] == sum(step.supervised_tokens for step in planned.counts)
    page = (tmp_path / "run/check/check.html").read_text(encoding="utf-8")
    assert "An epoch of instruct" in page
    assert f"<td>{mix[1]['source']}</td>" in page


def test_a_single_source_has_no_mix(tiny_base: Path, tmp_path: Path) -> None:
    result = check(str(write_recipe(tmp_path, tiny_base, *sound_data())))
    assert "mixes" not in report_in(tmp_path / "run" / "check")
    assert "An epoch of" not in result.output
    assert "An epoch of" not in (tmp_path / "run/check/check.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("image", "ward", "said"),
    [("0.png", "8", "image 0.png is held out here"), ("15.png", "train.json", "group train.json is held out here")],
)
def test_what_one_source_holds_out_and_another_trains_on_stops_a_run(
    tiny_base: Path, tmp_path: Path, image: str, ward: str, said: str
) -> None:
    tested = sound_data()[2]
    held = [{**tested[0], "ward": "8"}, {**entry("twice", image, "Why?", "because"), "ward": ward}]
    path = write_mix(tmp_path, tiny_base, tested[3:9], validation={"path": "held.json"})
    (tmp_path / "held.json").write_text(json.dumps([*held, {**held[1], "id": "again"}]), encoding="utf-8")
    result = check(str(path), "evaluation=null")
    assert result.exit_code == 1, result.output
    report = report_in(tmp_path / "run" / "check")
    # Once, and by no other name.
    leaks = {found for found in found_in(report) if found[0].endswith("leak")}
    assert leaks == {("source_leak", "instruct.1.validation", "twice")}
    assert f"held.json, record 2 (id twice): {said}, and trained on in train.json, record 1" in result.output
    with pytest.raises(DataError, match=r"held\.json, record 2 \(id twice\): is held out .* trained on in train\.json"):
        load_split(load_recipe(path, ["evaluation=null"]).stage("instruct").data, 42)


def test_every_source_of_an_evaluation_is_checked(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    path = write_recipe(tmp_path, tiny_base, images, train, tested[:12])
    second = [*tested[12:20], {**tested[20], "conversations": tested[20]["conversations"][:1]}, train[0]]
    second[0] = entry("void", "15.png", "What?", "?")
    (tmp_path / "second.json").write_text(json.dumps([{**one, "ward": "2"} for one in second]), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["evaluation"]["data"] = [recipe["evaluation"]["data"], {"path": "second.json", "image_root": "images"}]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    # The key need not be in both sources.
    result = check(str(path), "evaluation.by=[ward]")
    assert result.exit_code == 0, result.output
    assert found_in(report_in(tmp_path / "run" / "check")) == {
        ("no_answer", "evaluation.1", str(tested[20]["id"])),
        ("void_reference", "evaluation.1", "void"),
        ("image_leak", "evaluation.1", str(train[0]["id"])),
    }
    assert report_in(tmp_path / "run" / "check")["sides"]["evaluation"]["records"] == 12 + 9
    assert check(str(path), "evaluation.by=[wart]").exit_code == 1


def test_the_validation_share_is_that_of_a_run_which_skips_records_that_cannot_be_encoded(
    tiny_base: Path, tmp_path: Path
) -> None:
    images, train, tested = sound_data()
    train[3:3] = [entry(f"long-{number}", f"{number + 8}.png", "why " * 200, "because") for number in range(5)]
    path = write_recipe(tmp_path, tiny_base, images, train, tested, on_bad_record="skip")
    recipe = load_recipe(path, ["evaluation=null", "stages.instruct.data.validation={share: 0.3}"])
    surveyed = survey(recipe, 1)
    encode_sides(surveyed, 1)
    config, tokenizer = describe_base(recipe.base)
    records = read_records(recipe.stage("instruct"), tokenizer, image_tokens(config), recipe.seed)
    assert len(records.skipped) == 5
    run = [[record.id for record in part.records] for part in (records.train, records.validation)]
    assert [[record.id for record in side.records] for side in surveyed.sides] == run
    assert [len(source.bad.records) for source in surveyed.sources] == [5]
