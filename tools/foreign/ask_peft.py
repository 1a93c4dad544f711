"""Ask an artifact with plain PEFT, loaded by the code of docs/artifact.md: ARTIFACT BASE QUESTIONS OUTPUT."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from tools.foreign.ask_transformers import ask

PAGE = Path(__file__).parents[2] / "docs" / "artifact.md"
_NAMED_BASE, _NAMED_ARTIFACT = "llava-hf/llava-1.5-7b-hf", "runs/medical_vqa/instruct"


def documented_code(artifact: str, base: str, dtype: str = "float32") -> str:
    """Return the page's code that loads an artifact, with these names, and fp32 for bf16: a CPU rounds otherwise."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    code: str = next(block for block in blocks if "PeftModel.from_pretrained" in block)
    assert _NAMED_BASE in code
    assert _NAMED_ARTIFACT in code
    return (
        code.replace(_NAMED_BASE, base).replace(_NAMED_ARTIFACT, artifact).replace("torch.bfloat16", f"torch.{dtype}")
    )


def main(artifact: str, base: str, questions: str, output: str) -> None:
    """Run the code, and ask the model that it made."""
    names: dict[str, Any] = {}
    exec(documented_code(artifact, base), names)  # noqa: S102 - the page's own code
    # On some CPUs bitsandbytes rounds activations to bf16 in evaluation, and fails on layers as small as a test's.
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ask(names["model"], AutoProcessor.from_pretrained(artifact), questions, output, generation_config=names["ends"])


if __name__ == "__main__":
    main(*sys.argv[1:])
