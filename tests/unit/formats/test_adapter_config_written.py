"""adapter_config.json is read by PEFT from 0.10 on, from any current directory. `make foreign` asks PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig

from lora_llava.artifact import load_artifact
from lora_llava.formats.adapter_config import write_adapter_config
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.export.vllm import export_vllm
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from tests.helpers.artifacts import CPU, logits, make_artifact, plain_peft
from tests.helpers.tiny import tiny_llava

PEFT_0_10 = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config
    megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type use_dora use_rslora
""".split()
)
"""The fields of LoraConfig in PEFT 0.10.0, which raises TypeError for any other."""


def read(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_k58_an_artifact_has_only_settings_that_old_versions_of_peft_know(
    tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    for stage in ("align", "instruct"):
        config = read(make_artifact(tiny_base, tmp_path / stage, stage, kind=kind))
        assert config.keys() <= PEFT_0_10
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert (config.get("use_dora", False), config.get("use_rslora", False)) == (kind == "dora", kind == "rslora")


def test_k58_so_have_adapters_of_imports_and_exports(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct")
    export_vllm(made, tmp_path / "vllm", ExportOptions())
    export_llava(made, tmp_path / "llava-lora", ExportOptions(vision_tower="x"))
    plain_peft(tiny_llava(), tmp_path / "theirs", rank_pattern={"q_proj": 2})
    import_any(tmp_path / "theirs", tmp_path / "imported", ImportOptions(base_model=str(tiny_base)))
    for directory in ("vllm/adapter", "llava-lora", "imported"):
        assert read(tmp_path / directory).keys() <= PEFT_0_10, directory
    # For the original code, whose models are text models to PEFT.
    assert read(tmp_path / "llava-lora")["task_type"] == "CAUSAL_LM"
    assert len(read(tmp_path / "imported")["rank_pattern"]) == 2


def test_k58_nothing_that_matters_is_left_out(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["b", "a"], rank_pattern={"a": 2}, use_rslora=True)
    write_adapter_config(tmp_path, config, "someone/base", "main")
    read_back = LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    changed = {
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "target_modules",
        "peft_version",
    }
    assert {k: v for k, v in read_back.items() if k not in changed} == {
        k: v for k, v in config.to_dict().items() if k not in changed
    }
    assert (read_back["base_model_name_or_path"], read_back["revision"]) == ("someone/base", "main")
    assert read(tmp_path)["target_modules"] == ["a", "b"]
    # Values of defaults, but looked up by others without one.
    assert {"r", "lora_alpha", "bias"} <= read(tmp_path).keys()


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_k59_auto_peft_model_loads_it_from_any_directory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any
) -> None:
    made = make_artifact(tiny_base, tmp_path / stage, stage)
    ours = logits(load_artifact(made, device=CPU, dtype=torch.float32)[0].model)
    monkeypatch.chdir(tmp_path)
    theirs = AutoPeftModel.from_pretrained(made, dtype=torch.float32).eval()
    assert torch.allclose(logits(theirs), ours, atol=1e-5)
    assert read(made)["base_model_name_or_path"] == str(tiny_base.resolve())


def test_k59_so_it_does_an_imported_adapter(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = logits(plain_peft(tiny_llava(), tmp_path / "theirs"))
    import_any(tmp_path / "theirs", tmp_path / "imported", ImportOptions(base_model=str(tiny_base)))
    monkeypatch.chdir(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path / "imported", dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded), theirs, atol=1e-5)
