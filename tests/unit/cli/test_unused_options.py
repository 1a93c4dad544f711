"""An option without an effect on what it is given with is refused, with what takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.data.convert.run import convert
from lora_llava.data.convert.writer import ConvertOptions
from lora_llava.errors import LoraLlavaError, RecipeError
from lora_llava.shipping.export import FORMATS, export
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions

PREDICT = ["predict", "m", "--output", "a.csv"]
PAIRS = ["pairs", "m", "--data", "d.json", "--output", "p.json"]
IMAGES = [*PREDICT, "--images", "photos", "--question", "What?"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*IMAGES, "--max-bad-records", "10"], "--max-bad-records has no effect: --on-bad-record error stops at"),
        ([*PREDICT, "--data", "d.csv", "--split", "test"], "--split has no effect: d.csv is without splits"),
        ([*PAIRS, "--split", "train"], "--split has no effect: d.json is without splits"),
        ([*PAIRS, "--max-bad-records", "3"], "--max-bad-records has no effect"),
        (["eval", "m", "--data", "d.parquet", "--split", "test"], "--split has no effect"),
        (
            ["eval", "m", "--data", "d.parquet", "--data", "e.csv", "--split", "test"],
            "--split has no effect: d.parquet and e.csv are without splits",
        ),
        (
            ["eval", "m", "--data", "d", "--no-base", "--base-questions", "9"],
            "--base-questions has no effect: --no-base",
        ),
    ],
)
def test_options_that_exclude_each_other(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_an_option_with_an_effect_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (
        [*IMAGES, "--max-bad-records", "3", "--on-bad-record", "skip"],
        [*PAIRS, "--max-bad-records", "3", "--on-bad-record", "skip"],
        ["eval", "m", "--data", "d", "--split", "test", "--base-questions", "9"],
        # A slice of a parquet file is read.
        ["eval", "m", "--data", "d.parquet", "--split", "train[:9]"],
        ["eval", "m", "--data", "d.csv", "--data", "d", "--split", "test"],
    ):
        assert "has no effect" not in CliRunner().invoke(cli, args).output


TAKEN = {
    "hf": {"base"},
    "llava": {"vision_tower"},
    "gguf": {"base", "outtype"},
    "gguf-lora": {"base", "outtype"},
    "vllm": {"base"},
}
VALUES = {"base": ("--onto", "original"), "vision_tower": ("--vision-tower", "x"), "outtype": ("--outtype", "f16")}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("layout", FORMATS)
def test_a_format_takes_its_options_alone(layout: str, name: str, tmp_path: Path) -> None:
    option, value = VALUES[name]
    with pytest.raises(LoraLlavaError) as caught:
        export(tmp_path, tmp_path / "out", layout, ExportOptions(**{name: value}))
    is_refused = isinstance(caught.value, RecipeError)
    assert is_refused is (name not in TAKEN[layout])
    if is_refused:
        assert str(caught.value).startswith(f"{option} has no effect on --format {layout}, only on ")


def test_a_whole_model_has_no_base(tiny_base: Path, tmp_path: Path) -> None:
    for options in (ExportOptions(base_model="b"), ExportOptions(base="original")):
        with pytest.raises(RecipeError, match="is a whole model and needs no base; leave --base-model and --onto out"):
            export(tiny_base, tmp_path / "out", "hf", options)
    (tmp_path / "llava").mkdir()
    for name, text in (("config.json", '{"architectures": ["LlavaLlamaForCausalLM"]}'), ("pytorch_model.bin", "")):
        (tmp_path / "llava" / name).write_text(text, encoding="utf-8")
    for unused in (ImportOptions(base_model="b"), ImportOptions(quantization="nf4")):
        with pytest.raises(RecipeError, match="needs no base; leave --base-model and --quantization out"):
            import_any(tmp_path / "llava", tmp_path / "out", unused)


@pytest.mark.parametrize("name", ["adapter_config.json", "mm_projector.bin"])
def test_an_adapter_has_the_tower_of_its_base(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    sources = [tmp_path] if name.endswith(".json") else [tmp_path, tmp_path / name]
    for source in sources:
        with pytest.raises(
            RecipeError, match=r"--vision-tower applies to an original checkpoint; the tower of .* is its"
        ):
            import_any(source, tmp_path / "out", ImportOptions(base_model="b", vision_tower="x"))


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        ("coco", ("table", "window")),
        ("labelstudio", ("table", "window")),
        ("visual-genome", ("question", "table", "window")),
        ("rsvqa", ("seed", "per_image", "question", "table", "window")),
        ("r2gen", ("seed", "per_image", "table", "window")),
        ("cvat", ("question", "table", "window")),
        ("dicom", ("images", "seed", "per_image")),
    ],
)
def test_a_converter_takes_its_options_alone(kind: str, unused: tuple[str, ...], tmp_path: Path) -> None:
    given = {"images": tmp_path, "seed": 1, "per_image": 5, "question": "?", "table": Path("t"), "window": (0.0, 1.0)}
    refused = []
    for name, value in given.items():
        options = ConvertOptions(**{name: value})  # type: ignore[arg-type]
        # Without data, one that is taken ends in another error.
        with pytest.raises(LoraLlavaError) as caught:
            convert(kind, tmp_path / "nothing", tmp_path / "out", options)
        if f"--{name.replace('_', '-')} has no effect on {kind}, only on " in str(caught.value):
            refused.append(name)
    assert tuple(refused) == unused
