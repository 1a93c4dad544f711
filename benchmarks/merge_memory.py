"""Measure the peak memory of merging: the bound is 1.3 times the largest file plus the work on one layer.

    python -m benchmarks.merge_memory [--layers 26] [--shard 1GB] [--directory DIR]

Makes a base of about 3 GB in fp16 and an adapter as if trained on it in NF4, merges it in another process, with the
check that follows, and prints the peak memory of that process.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, PreTrainedTokenizerFast

from lora_llava.artifact import library_versions
from lora_llava.cli.common import file_size
from lora_llava.formats.llava_hf import expected_shapes, write_json, write_weights
from lora_llava.formats.manifest import MANIFEST
from lora_llava.formats.names import WEIGHTS, memory_name
from lora_llava.formats.processor import save_processor
from lora_llava.modeling.assemble import save_config
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions

_MERGE = """
import json, sys
from pathlib import Path
from lora_llava.shipping.merge.run import merge_artifact
from lora_llava.system.device import peak_memory_bytes
from lora_llava.shipping.merge import run
loaded = peak_memory_bytes()
verify, merged = run.verify, []
def watched(*args):
    merged.append(peak_memory_bytes())
    return verify(*args)
run.verify = watched
report = merge_artifact(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3]))
print(json.dumps({"imports": loaded, "merged": merged[0], "peak": peak_memory_bytes(), "probe": report["probe"],
                  "distance": report["distance_from_trained"]}))
"""


def make_config(layers: int) -> LlavaConfig:
    """Describe a language model of width 2048 with LLaVA-1.5's vocabulary and a small vision tower."""
    return LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_index=32000,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def make_base(directory: Path, config: LlavaConfig) -> None:
    """Write a base with random weights in fp16."""
    generator = torch.Generator().manual_seed(0)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in sorted(expected_shapes(config).items()):
            if "norm" in name:
                yield name, torch.full(shape, float(name.endswith("weight"))).half()
            else:
                yield name, (torch.randn(shape, generator=generator) * 0.02).half()

    directory.mkdir(parents=True)
    write_weights(directory, weights(), 10**9)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(33 + n): 3 + n for n in range(90)}}
    vocab |= {f"t{n}": n for n in range(len(vocab), 32000)} | {"<image>": 32000}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    save_processor(directory, fast, config, {"image_mean": [0.5] * 3, "image_std": [0.3] * 3})
    save_config(directory, config, torch.float16)


def make_artifact(directory: Path, base: Path, config: LlavaConfig) -> None:
    """Write an artifact with LoRA of rank 16 on every linear layer, as trained on NF4 in fp32."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, (out, width) in ((n, s) for n, s in expected_shapes(config).items() if n.endswith("_proj.weight")):
        if name.startswith("language_model."):
            module = f"base_model.model.{memory_name(name).removesuffix('.weight')}"
            state[f"{module}.lora_A.weight"] = torch.randn(16, width, generator=generator) * 0.02
            state[f"{module}.lora_B.weight"] = torch.randn(out, 16, generator=generator) * 0.02
    source = directory.with_name("peft")
    source.mkdir()
    save_file(state, source / WEIGHTS)
    LoraConfig(r=16, lora_alpha=32, target_modules="made below").save_pretrained(source)
    import_any(source, directory, ImportOptions(base_model=str(base)))
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    manifest["quantization"] = {"type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    write_json(directory / MANIFEST, manifest)


def measure(directory: Path, layers: int, shard: int) -> dict[str, Any]:
    """Make the model, merge, and return bytes and seconds."""
    config = make_config(layers)
    make_base(directory / "base", config)
    make_artifact(directory / "artifact", directory / "base", config)
    clock = time.monotonic()
    command = [sys.executable, "-c", _MERGE, str(directory / "artifact"), str(directory / "merged"), str(shard)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    files = [path.stat().st_size for path in (directory / "merged").glob("*.safetensors")]
    return {
        "machine": platform.processor() or platform.machine(),
        "versions": library_versions(),
        "seconds": round(time.monotonic() - clock, 1),
        "model_bytes": sum(files),
        "largest_file_bytes": max(files),
        **facts,
        "times_largest_file": round((facts["peak"] - facts["imports"]) / max(files), 3),
    }


@click.command()
@click.option("--layers", type=int, default=26, show_default=True)
@click.option("--shard", type=file_size, default="1GB", show_default=True, help="Largest file to write.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Existing directory to work in [for temporary files].",
)
def main(layers: int, shard: int, directory: Path | None) -> None:
    """Measure once and print the figures as JSON."""
    # A directory of its own, also in a given one, which may hold other files.
    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=directory) as models:
        click.echo(json.dumps(measure(Path(models), layers, shard), indent=2))


if __name__ == "__main__":
    main()
