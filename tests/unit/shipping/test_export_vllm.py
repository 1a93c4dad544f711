"""The form for vLLM: its own checks accept the adapter, and base + adapter compute what the artifact computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava.artifact import load_artifact
from lora_llava.cli import cli
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.shipping.export import export as export_model
from lora_llava.shipping.export import vllm as vllm_export
from lora_llava.shipping.export.options import ExportOptions
from tests.helpers.artifacts import CPU, logits, make_artifact, plain_peft
from tests.helpers.tiny import tiny_llava

# What get_supported_lora_modules finds in vLLM's Llama and CLIP, with the parts of its packed layers.
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2"}
# vllm/model_executor/models/llava.py, hf_to_vllm_mapper
MAPPER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def vllm_accepts(directory: Path, max_lora_rank: int) -> dict[str, float]:
    """vLLM's checks of an adapter, restated: its modules with the scale that vLLM takes for each; AssertionError.

    vllm/lora/peft_helper.py (PEFTHelper, validate_legal), vllm/lora/utils.py (parse_fine_tuned_lora_name) and
    vllm/lora/lora_model.py (check_unexpected_modules), as of vLLM 0.33.
    """
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert 0 < config["r"] <= max_lora_rank
    assert config.get("bias", "none") == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("trainable_token_indices")
    assert isinstance(config["target_modules"], list)
    assert all(name.rsplit(".", 1)[-1] in LINEAR for name in config["target_modules"])
    # What vLLM does not read, and so must not be there: it would be silently left out.
    for name in ("rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "alora_invocation_tokens"):
        assert not config.get(name), name
    assert config.get("init_lora_weights", True) is True
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    modules: dict[str, set[str]] = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        plain = name.removeprefix("base_model.model.")
        assert plain != name
        for old, new in MAPPER.items():
            if plain.startswith(old):
                plain = new + plain.removeprefix(old)
        module, part, weight = plain.rsplit(".", 2)
        assert weight == "weight"
        assert part in ("lora_A", "lora_B")
        assert module.rsplit(".", 1)[-1] in LINEAR
        assert module.startswith("language_model.model.layers.")
        assert tensor.shape[0 if part == "lora_A" else 1] == config["r"]
        modules.setdefault(module, set()).add(part)
    assert all(parts == {"lora_A", "lora_B"} for parts in modules.values())
    return dict.fromkeys(modules, scale)


def export(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return export_model(source, output, "vllm", ExportOptions(**options))


def load_pair(directory: Path) -> Any:
    """As anyone loads it; a missing key would be a warning, and so an error."""
    base, report = LlavaForConditionalGeneration.from_pretrained(directory / "base", output_loading_info=True)
    assert not any(report.values()), report
    return PeftModel.from_pretrained(base, directory / "adapter").eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("kind", "nf4"), [("lora", False), ("rslora", False), ("lora", True), ("rslora", True)], ids=str
)
def test_base_and_adapter_equal_the_artifact(tiny_base: Path, tmp_path: Path, kind: str, nf4: bool) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", kind=kind, nf4=nf4)
    report = export(made, tmp_path / "out")
    assert len(vllm_accepts(tmp_path / "out" / "adapter", 8)) == 14
    loaded, _ = load_artifact(made, device=CPU, dtype=torch.float32)
    theirs = logits(loaded.model)
    pair = load_pair(tmp_path / "out")
    assert relative(logits(pair), theirs) < 1e-5
    # Neither half alone is the artifact, so that neither could be left out unseen.
    with pair.disable_adapter():
        assert relative(logits(pair), theirs) > 1e-3
    del pair
    on_base = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(tiny_base), made).eval()
    assert (relative(logits(on_base), theirs) > 1e-3) is nf4
    assert report["base"] == ("dequantized" if nf4 else "original")
    assert report["probe"]["relative"] < 1e-5
    assert report["probe"]["answers_equal"] == report["probe"]["answers"] == 4


def test_the_exact_files_and_names(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "run" / "instruct")
    result = CliRunner().invoke(cli, ["export", str(made), str(tmp_path / "out"), "--format", "vllm"])
    assert result.exit_code == 0, result.output
    assert "4 of 4 greedy answers the same" in result.stdout
    assert "--enable-lora --max-lora-rank 8 --lora-modules" in result.stdout
    out = tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "base/chat_template.jinja",
        "base/config.json",
        "base/generation_config.json",
        "base/model.safetensors",
        "base/preprocessor_config.json",
        "base/processor_config.json",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "export_report.json",
    }
    stored = load_file(out / "base" / "model.safetensors")
    assert set(WeightFiles(out / "base")) == set(stored)
    assert any(name.startswith("vision_tower.vision_model.") for name in stored)
    assert AutoProcessor.from_pretrained(out / "base").image_processor.do_pad
    for path in out.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


def test_the_base_can_be_chosen(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    report = export(made, tmp_path / "out", base="original")
    assert report["base"] == "original"
    assert report["probe"]["relative"] < 1e-5 < report["distance_from_trained"]["relative"]
    untouched = load_file(tiny_base / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / "base" / "model.safetensors")[name], untouched[name])
    plain = make_artifact(tiny_base, tmp_path / "plain")
    with pytest.raises(ArtifactError, match="there is no dequantized base"):
        export(plain, tmp_path / "none", base="dequantized")
    assert not (tmp_path / "none").exists()


def test_ranks_and_scales_that_differ_become_one(tiny_base: Path, tmp_path: Path) -> None:
    """vLLM reads neither PEFT's rank_pattern nor its alpha_pattern; LoRA on the tower goes into the base."""
    wrapped = plain_peft(
        tiny_llava(),
        tmp_path / "theirs",
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"model\.language_model\.layers\.0\.self_attn\.q_proj": 6},
        alpha_pattern={r"model\.language_model\.layers\.1\.self_attn\.v_proj": 32},
    )
    imported = ["import", str(tmp_path / "theirs"), str(tmp_path / "mine"), "--base-model", str(tiny_base)]
    result = CliRunner().invoke(cli, imported)
    assert result.exit_code == 0, result.output
    export(tmp_path / "mine", tmp_path / "out")
    assert len(vllm_accepts(tmp_path / "out" / "adapter", 8)) == 4
    assert relative(logits(load_pair(tmp_path / "out")), logits(wrapped.eval())) < 1e-5


def test_what_vllm_refuses_is_refused_here(tiny_base: Path, tmp_path: Path) -> None:
    dora = make_artifact(tiny_base, tmp_path / "dora", kind="dora")
    align = make_artifact(tiny_base, tmp_path / "align", "align")
    for source, match in ((dora, "DoRA, which vLLM"), (align, "no LoRA"), (tiny_base, "vLLM serves it directly")):
        with pytest.raises(ArtifactError, match=match):
            export(source, tmp_path / "out")
    for setting, value in (("init_lora_weights", "pissa"), ("lora_bias", True)):
        made = make_artifact(tiny_base, tmp_path / setting)
        path = made / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}), encoding="utf-8")
        with pytest.raises(ArtifactError, match=setting):
            export(made, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(AssertionError):
        vllm_accepts(dora, 8)


@pytest.mark.parametrize("how", ["interrupted", "scale", "tensor"])
def test_nothing_stays_of_an_export_that_fails(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct")
    original = vllm_export._tensors

    def spoilt(*args: Any) -> Any:
        for name, tensor in original(*args):
            if how == "interrupted":
                raise KeyboardInterrupt
            yield name, 1.5 * tensor if how == "scale" or "layers.1.mlp.up_proj.lora_B" in name else tensor

    monkeypatch.setattr(vllm_export, "_tensors", spoilt)
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else ArtifactError, match=None):
        export(made, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"instruct"}
