"""Export of a model in the llava-hf layout to the same layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_llava.shipping.export.hf import export_hf
from lora_llava.shipping.export.options import ExportOptions


def test_an_index_of_other_files_is_not_copied(tiny_base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_base, source)
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    export_hf(source, tmp_path / "out", ExportOptions())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".index.json")]
