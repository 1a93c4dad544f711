"""An evaluation gives the same answers with the adapter merged into dequantized weights as in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.errors import RecipeError
from lora_llava.evaluation import compare
from lora_llava.evaluation.run import evaluate
from tests.helpers.artifacts import make_artifact

COLORS = {"red": (250, 0, 0), "blue": (0, 0, 250), "green": (0, 250, 0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    records = []
    for name, color in COLORS.items():
        Image.new("RGB", (20, 20), color).save(directory / f"{name}.png")
        for text in ("what color is it?", "what is it?", "is it red?"):
            turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": name}]
            records.append({"image": f"{name}.png", "conversations": turns})
    (directory / "test.json").write_text(json.dumps(records), encoding="utf-8")
    return directory / "test.json"


def asked(artifact: Path, data: Path, output: Path, **changes: Any) -> tuple[list[Any], str]:
    """Evaluate an artifact; return its predictions and what was printed."""
    console = Console(record=True, width=200)
    settings = {"data": {"path": str(data)}, "max_new_tokens": 6, "blind_questions": 9, **changes}
    evaluate(artifact, settings, output, console=console)
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], console.export_text()


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_answers_do_not_depend_on_how_they_are_computed(
    tiny_base: Path, tmp_path: Path, data: Path, nf4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=nf4)
    ours, said = asked(artifact, data, tmp_path / "ours")
    assert said.count("evaluation: asked in fp32, with the adapter merged into the weights, as merge does") == 1
    monkeypatch.setattr("lora_llava.modeling.base.free_memory_bytes", lambda _: 1000)
    monkeypatch.setattr("lora_llava.modeling.folded.can_fold", lambda _: False)
    theirs, said = asked(artifact, data, tmp_path / "theirs")
    if nf4:
        assert said.count("evaluation: asked in 4 bits: the dequantized weights would take more than half") == 1
    assert ours == theirs
    # Answers that tell the models apart, or else the equality says little.
    assert len({row[name]["prediction"] for row in ours for name in ("base", "tuned", "blind")}) > 3


def test_answers_do_not_depend_on_how_many_questions_are_asked_at_once(
    tiny_base: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=False)
    generate, rows = compare.generate_answers, []

    def noted(*args: Any, **options: Any) -> Any:
        rows.append(options["max_rows"])
        return generate(*args, **options)

    monkeypatch.setattr(compare, "generate_answers", noted)
    monkeypatch.setattr(compare, "most_rows", lambda _: 5)
    answers = [asked(artifact, data, tmp_path / str(size), batch_size=size)[0] for size in ("auto", 2)]
    assert answers[0] == answers[1]
    assert rows == 3 * [5] + 3 * [2]
    with pytest.raises(RecipeError, match=r"evaluation\.batch_size"):
        asked(artifact, data, tmp_path / "wrong", batch_size="some")
