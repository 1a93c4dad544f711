"""What the preflight passes, the run, merge, export and push pass: every kind of base with every set of stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.cli import cli
from lora_llava.formats.processor import save_processor
from tests.helpers.runs import write_data, write_recipe
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_STD, save_tiny_base, tiny_config, tiny_tokenizer
from tests.unit.modeling.test_assemble import save_language_model, save_vision_tower

Changes = Callable[[LlavaConfig], None]


def llava(directory: Path, change: Changes | None = None) -> dict[str, Any]:
    """Write a LLaVA, its configuration changed."""
    config = tiny_config()
    if change is None:
        save_tiny_base(directory / "base")
    else:
        change(config)
        LlavaForConditionalGeneration(config).save_pretrained(directory / "base")
        save_processor(directory / "base", tiny_tokenizer(), config, {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD})
    return {"model_name_or_path": "./base"}


def parts(directory: Path, *, tied: bool = False, **settings: Any) -> dict[str, Any]:
    """Write a language model and a tower, from which the run assembles its base."""
    save_language_model(directory / "llama", tied=tied)
    save_vision_tower(directory / "tower")
    return {"language_model": "./llama", "vision_tower": "./tower", **settings}


def with_biases(config: LlavaConfig) -> None:
    config.text_config.attention_bias = config.text_config.mlp_bias = True


def without_projector_bias(config: LlavaConfig) -> None:
    config.multimodal_projector_bias = False


def gelu_tower(config: LlavaConfig) -> None:
    config.vision_config.hidden_act = "gelu"
    config.vision_feature_layer = -1


BASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "llava": llava,
    "biases": lambda directory: llava(directory, with_biases),
    "no projector bias": lambda directory: llava(directory, without_projector_bias),
    "gelu tower": lambda directory: llava(directory, gelu_tower),
    "parts": parts,
    "tied": lambda directory: parts(directory, tied=True),
    "linear projector": lambda directory: parts(directory, mm_projector_type="linear"),
    "class token": lambda directory: parts(directory, vision_feature_select_strategy="full"),
}
STAGES = {"instruct": ["instruct"], "both": ["align", "instruct"]}
ADAPTERS = ("lora", "rslora", "dora")
CASES = [
    # Every base with every set of stages; the artifact of `align` is that of the first of both. Quantization, kind of
    # adapter, and which of the two exports that merge an artifact themselves gets one, and which the merged model, take
    # turns.
    (base, stages, ("none", "nf4")[(row + column) % 2], ADAPTERS[(row + 2 * column) % 3], (row // 2 + column) % 2 == 0)
    for row, base in enumerate(BASES)
    for column, stages in enumerate(STAGES, start=1)
]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def well(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def prepared(directory: Path, base: str, stages: str, quantization: str, adapter: str) -> Path:
    """Write data, a base and a recipe of one or two steps."""
    write_data(directory)
    path = write_recipe(directory, BASES[base](directory), STAGES[stages])
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["quantization"] = {"type": quantization}
    recipe["adapter"]["type"] = adapter
    for settings in recipe["stages"].values():
        settings |= {"max_steps": 2, "num_sample_answers": 0} if "eval_steps" in settings else {"max_steps": 2}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(("base", "stages", "quantization", "adapter", "gguf_of_artifact"), CASES)
def test_k11_what_the_preflight_passes_runs_merges_exports_and_is_published(
    base: str,
    stages: str,
    quantization: str,
    adapter: str,
    gguf_of_artifact: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = prepared(tmp_path, base, stages, quantization, adapter)
    said = {STAGES[stages][-1]: well(run("finetune", recipe, "--dry-run")).stdout}
    if stages == "both":
        said["align"] = well(run("finetune", recipe, "stages.instruct=null", "--dry-run")).stdout
    well(run("finetune", recipe))
    for stage, shown in said.items():
        leaves_in_every_form(tmp_path / "run" / stage, tmp_path / f"of {stage}", gguf_of_artifact, shown)


def leaves_in_every_form(artifact: Path, out: Path, gguf_of_artifact: bool, dry_run: str) -> None:
    """Merge and export an artifact and show its card; what is refused must be what the dry run says."""
    said, merged = " ".join(dry_run.split()), out / "merged"
    well(run("merge", artifact, merged))
    LlavaForConditionalGeneration.from_pretrained(merged)
    AutoTokenizer.from_pretrained(merged)
    of_gguf, of_hf = (artifact, merged) if gguf_of_artifact else (merged, artifact)
    well(run("export", of_hf, out / "hf", "--format", "hf"))
    llava = run("export", merged, out / "llava", "--format", "llava")
    assert (llava.exit_code != 0) == ("cannot be exported with --format llava" in said), llava.output
    gguf = run("export", of_gguf, out / "gguf", "--format", "gguf")
    assert (gguf.exit_code != 0) == ("cannot be exported with --format gguf" in said), gguf.output
    if artifact.name != "align":
        vllm = run("export", artifact, out / "vllm", "--format", "vllm")
        assert (vllm.exit_code != 0) == ("vLLM cannot serve the adapter" in said), vllm.output
    for model in (artifact, merged):
        shown = well(run("push", model, "someone/model", "--dry-run")).stdout
        assert "nothing was uploaded" in shown
    assert json.loads((merged / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava"
