"""A project that runs, and thirty and more ways to break it, each with words of how it is then refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from lora_llava.cli import cli
from lora_llava.system.files import file_sha256
from tests.helpers.artifacts import make_artifact

INSTRUCT = "stages.instruct"


@dataclass(frozen=True, slots=True)
class Project:
    """A directory with data, a base and a recipe that runs."""

    directory: Path
    recipe: Path

    @property
    def base(self) -> Path:
        """The base, a copy that may be damaged."""
        return self.directory / "base"

    def edit(self, place: str, **changes: object) -> None:
        """Change keys of a JSON file below the directory; None removes one."""
        path = self.directory / place
        data = json.loads(path.read_text(encoding="utf-8"))
        for key, value in changes.items():
            data.pop(key, None) if value is None else data.update({key: value})
        path.write_text(json.dumps(data), encoding="utf-8")


COMMANDS = {"finetune": ["finetune"], "dry run": ["finetune", "--dry-run"], "check": ["check"]}


def command(name: str, project: Project, *overrides: str) -> Result:
    """Run a command on the recipe of a project."""
    return CliRunner().invoke(cli, [*COMMANDS[name], str(project.recipe), *overrides])


def remove(place: str) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        path = project.directory / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return []

    return break_it


def override(*overrides: str) -> Callable[[Project], list[str]]:
    return lambda _: list(overrides)


def text(place: str, content: str) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        (project.directory / place).write_text(content, encoding="utf-8")
        return []

    return break_it


def edited(place: str, **changes: object) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        project.edit(place, **changes)
        return []

    return break_it


def part(name: str, **changes: object) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        config = json.loads((project.base / "config.json").read_text(encoding="utf-8"))
        project.edit("base/config.json", **{name: {**config[name], **changes}})
        return []

    return break_it


def pickled(project: Project) -> list[str]:
    (project.base / "model.safetensors").rename(project.base / "pytorch_model.bin")
    return []


def cut_off(project: Project) -> list[str]:
    os.truncate(project.base / "model.safetensors", 400_000)
    return []


def as_type(dtype: str) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        path = project.base / "model.safetensors"
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = path.read_bytes()[8 : 8 + length].replace(b'"F32"', f'"{dtype}" '.encode(), 1)
        path.write_bytes(length.to_bytes(8, "little") + header + path.read_bytes()[8 + length :])
        return []

    return break_it


def without_token(token: str) -> Callable[[Project], list[str]]:
    def break_it(project: Project) -> list[str]:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = project.base / name
            path.write_text(path.read_text(encoding="utf-8").replace(token, "<gone>"), encoding="utf-8")
        return []

    return break_it


def artifact(project: Project) -> list[str]:
    make_artifact(project.base, project.directory / "earlier")
    return ["stages.align=null", "start_from=./earlier"]


def damaged_artifact(project: Project) -> list[str]:
    overrides = artifact(project)
    with (project.directory / "earlier" / "adapter_model.safetensors").open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"!")
    return overrides


def artifact_of_rank_2(project: Project) -> list[str]:
    return [*artifact(project), "adapter.r=2"]


def artifact_of_wider_base(project: Project) -> list[str]:
    return rewrite(project, lambda name, tensor: (name, tensor[:, :-2] if "lora_A" in name else tensor))


def artifact_outside(project: Project) -> list[str]:
    return rewrite(
        project, lambda name, tensor: (name.replace("language_model.layers", "vision_tower.encoder.layers"), tensor)
    )


def artifact_with_tower(project: Project) -> list[str]:
    old, new = "language_model.layers.0.self_attn.q_proj.lora_A", "vision_tower.post_layernorm"
    return rewrite(project, lambda name, tensor: (name.replace(old, new), tensor))


def rewrite(project: Project, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> list[str]:
    """Make an artifact to start from, its tensors changed, and its manifest with the hash of that."""
    overrides = artifact(project)
    path = project.directory / "earlier" / "adapter_model.safetensors"
    changed = dict(change(name, tensor) for name, tensor in load_file(path).items())
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path)
    project.edit("earlier/manifest.json", adapter_sha256=file_sha256(path))
    return overrides


def dangling(project: Project) -> list[str]:
    (project.directory / "train.json").unlink()
    (project.directory / "train.json").symlink_to("nowhere.json")
    return []


def occupied(project: Project) -> list[str]:
    (project.directory / "run" / "instruct").mkdir(parents=True)
    (project.directory / "run" / "instruct" / "notes.txt").write_text("mine", encoding="utf-8")
    return []


BROKEN: dict[str, tuple[Callable[[Project], list[str]], str]] = {
    "base misspelled": (override("base.model_name_or_path=./bsae"), "does not exist. Did you mean base?"),
    "base without config": (remove("base/config.json"), "holds no config.json"),
    "config not JSON": (text("base/config.json", "{"), "not valid JSON"),
    "config a list": (text("base/config.json", "[]"), "contains a list"),
    "base not a LLaVA": (edited("base/config.json", model_type="bert"), "model_type is 'bert', needed 'llava'"),
    "custom code": (edited("base/config.json", auto_map={"AutoConfig": "c.C"}), "it needs custom code (auto_map"),
    "base in bitsandbytes": (
        edited("base/config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}),
        "it is quantized already (bitsandbytes)",
    ),
    "base in GPTQ": (part("text_config", quantization_config={"quant_method": "gptq"}), "quantized already (gptq)"),
    "base in AWQ": (part("text_config", quantization_config={"quant_method": "awq"}), "quantized already (awq)"),
    "base in FP8": (edited("base/config.json", quantization_config={"quant_method": "fp8"}), "already (fp8)"),
    "quantized weights": (as_type("U8"), "it is quantized already: its weights are of type U8"),
    "language model of another kind": (part("text_config", model_type="qwen2"), "the language model is 'qwen2'"),
    "SigLIP tower": (part("vision_config", model_type="siglip_vision_model"), "tower is 'siglip_vision_model'"),
    "feature layer out of range": (edited("base/config.json", vision_feature_layer=-4), "allowed are -3 to 2"),
    "features of several layers": (edited("base/config.json", vision_feature_layer=[-2, -1]), "only of one"),
    "patch above image": (part("vision_config", patch_size=56), "patch_size 56 is above its image_size 28"),
    "weights missing": (remove("base/model.safetensors"), "holds no weights"),
    "weights pickled": (pickled, "holds only pickled weights (pytorch_model.bin)"),
    "weights empty": (text("base/model.safetensors", ""), "model.safetensors is empty"),
    "weights cut off": (cut_off, "model.safetensors is damaged or cut off"),
    "shard missing": (
        text("base/model.safetensors.index.json", '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        "model-00002-of-00002.safetensors of its index is missing",
    ),
    "weights of another config": (
        part("text_config", num_hidden_layers=3),
        "layers.2.input_layernorm.weight is missing",
    ),
    "tokenizer missing": (remove("base/tokenizer.json"), "holds no tokenizer"),
    "tokenizer with code": (
        edited("base/tokenizer_config.json", auto_map={"AutoTokenizer": "t.T"}),
        "its tokenizer needs custom code",
    ),
    "image token elsewhere": (edited("base/config.json", image_token_index=5), "is 4 in its tokenizer, but 5 in its"),
    "image token missing": (without_token("<image>"), "its tokenizer has no token <image>"),
    "template's token missing": (
        lambda project: [*without_token("<|im_start|>")(project), f"{INSTRUCT}.template=chatml"],
        "chatml needs the tokens <|im_start|>",
    ),
    "image mean missing": (edited("base/preprocessor_config.json", image_mean=None), "how images are normalized"),
    "no room for text": (override("stages.align.max_length=4"), "an image alone takes 4 tokens"),
    "longer than the context": (
        override(f"{INSTRUCT}.max_length=600", f"{INSTRUCT}.tokens_per_micro_batch=600"),
        "above the 512 tokens",
    ),
    "start_from missing": (override("start_from=./run/instrct"), "start_from: "),
    "start_from no artifact": (override("start_from=./images"), "is not an artifact: it has no manifest.json"),
    "start_from damaged": (damaged_artifact, "was altered: its sha256 is"),
    "start_from of another base": (artifact_of_wider_base, "was trained on a base of another shape"),
    "start_from with LoRA outside": (artifact_outside, "has LoRA outside the language model"),
    "start_from with a tower": (artifact_with_tower, "replaces weights (vision_tower.vision_model.post_layernorm"),
    "start_from of another rank": (artifact_of_rank_2, "adapter.r: is 2, but the LoRA in start_from"),
    "bf16 on a CPU": (override("precision=bf16"), "bf16 cannot be computed on this machine"),
    "fp16 on a CPU": (override("precision=fp16"), "fp16 cannot be computed on this machine, which has no CUDA device"),
    "flex_attention on a CPU": (override("attn_implementation=flex_attention"), "has no backward pass on a CPU"),
    "layer misspelled": (
        override("adapter.target_modules=[q_porj]"),
        "the language model has no linear layer q_porj. Did you mean q_proj?",
    ),
    "output_dir occupied": (occupied, "which no run of the kit wrote"),
    "output_dir a file": (override("output_dir=./train.json"), "train.json cannot be created: train.json is a file"),
    "tracker misspelled": (override("report_to=wandbb"), "no tracker is called wandbb. Did you mean wandb?"),
    "tracker not installed": (override("report_to=[swanlab]"), "swanlab is not installed. Install it: pip install"),
    "data file missing": (remove("train.json"), f"{INSTRUCT}.data.path: "),
    "data file empty": (text("train.json", ""), "train.json is empty"),
    "data file a directory": (override(f"{INSTRUCT}.data.path=images/d.json"), "images/d.json does not exist"),
    "data file a link to nothing": (dangling, "train.json is a link to nowhere.json, which is not there"),
    "image root missing": (override(f"{INSTRUCT}.data.image_root=image"), "Did you mean images?"),
    "exclude missing": (override(f"{INSTRUCT}.data.exclude=bad.jsonl"), f"{INSTRUCT}.data.exclude: "),
    "validation missing": (
        override(f"{INSTRUCT}.data.validation={{path: valid.json}}"),
        f"{INSTRUCT}.data.validation.path: ",
    ),
    "evaluation missing": (
        override("evaluation={data: {path: ./tset.json, image_root: images}}"),
        "evaluation.data.path: ",
    ),
}
"""How a set-up is broken (returning overrides for the command line), and words of the refusal."""
