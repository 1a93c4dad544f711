"""The package from Python: what docs/python.md shows works, and importing the package is light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

import lora_llava
from tests.helpers.runs import write_data, write_recipe

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_of_the_page_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert re.search(r"validation loss \d+\.\d\d\n", shown)
    assert re.search(r"\d+\.\d% of 8 questions", shown)
    assert (tmp_path / "for-transformers" / "config.json").is_file()
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    # The same refusals as on the command line.
    with pytest.raises(lora_llava.PreflightError, match="output_dir"):
        lora_llava.finetune("tiny.yaml")
    with pytest.raises(lora_llava.RecipeError, match="not empty"):
        lora_llava.evaluate("run/instruct", {"data": {"path": "train.json"}}, output="evaluation")
    with pytest.raises(lora_llava.RecipeError, match=r"evaluation\.max_tokens: unknown key"):
        lora_llava.evaluate("run/instruct", {"data": {"path": "train.json"}, "max_tokens": 3}, output="other")
    with pytest.raises(lora_llava.RecipeError, match="layout 'onnx' is unknown"):
        lora_llava.export("run/instruct", "other", "onnx")


def test_every_public_name_is_there_and_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in lora_llava.__all__:
        assert getattr(lora_llava, name).__doc__
        assert f"`{name}" in page, name
    assert set(lora_llava.__all__) <= set(dir(lora_llava))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        lora_llava.train  # noqa: B018


def test_importing_the_package_is_light() -> None:
    code = "import sys, lora_llava; lora_llava.load_recipe; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
