"""The code that README and docs show loads an artifact as it was trained: the same answers, not only no error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import load_artifact
from lora_llava.modeling.base import disable_cpu_repacking
from tests.helpers.artifacts import CPU, logits, make_artifact
from tools.foreign.ask_peft import PAGE, documented_code

ROOT = PAGE.parents[1]


def test_k69_the_documented_code_loads_the_base_as_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    ours = logits(load_artifact(made, device=CPU, dtype=torch.float32)[0].model)
    names: dict[str, Any] = {}
    exec(documented_code(str(made), str(tiny_base)), names)
    disable_cpu_repacking(names["model"])
    theirs = logits(names["model"])
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5
    assert names["ends"].eos_token_id is not None
    # What it is for: the same adapter on the unquantized base computes something else.
    plain = names["PeftModel"].from_pretrained(LlavaForConditionalGeneration.from_pretrained(tiny_base), made).eval()
    assert float((logits(plain) - ours).norm() / ours.norm()) > 1e-2


def test_k69_every_page_with_code_has_a_test_that_runs_it() -> None:
    """docs/python.md is run by test_python.py, the card by test_card.py; CONTRIBUTING shows parts of modules."""
    pages = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("```python")
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    }
    assert {name: count for name, count in pages.items() if count} == {"docs/artifact.md": 1, "docs/python.md": 2}
