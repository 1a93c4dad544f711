"""Dry run, check and inspect without PyTorch: the same numbers and ids, in a fraction of the time and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlavaConfig, PreTrainedTokenizerFast

from lora_llava.cli import cli
from lora_llava.data.stage import read_records
from lora_llava.formats.llava_hf import meta_model
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.base import drop_unused_layers
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.stages import build_stage, parameter_table
from lora_llava.modeling.structure import BF16, FP32, PROJECTOR, image_tokens, stage_parameters
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import AdapterSettings
from tests.helpers.artifacts import make_artifact
from tests.helpers.runs import write_data, write_recipe
from tests.helpers.tiny import tiny_config, tiny_tokenizer

VICUNA = Path(__file__).parents[2] / "fixtures" / "llava_v15_encoding" / "tokenizer"
MEMORY, SECONDS = 250e6, 5.0
"""Bytes at the peak, and seconds of CPU time; without other work on two cores 1.7 were measured."""

Change = Callable[[LlavaConfig], Any]


def tie(config: LlavaConfig) -> None:
    for part in (config, config.text_config):
        part.tie_word_embeddings = True


CHANGES: dict[str, Change] = {
    "unchanged": lambda config: config,
    "tied": tie,
    "biases": lambda config: config.text_config.update({"attention_bias": True, "mlp_bias": True}),
    "linear": lambda config: config.update({"projector_hidden_act": "linear"}),
    "no projector bias": lambda config: config.update({"multimodal_projector_bias": False}),
    "last layer": lambda config: config.update({"vision_feature_layer": -1}),
    "first layer": lambda config: config.update({"vision_feature_layer": 1}),
    "embeddings": lambda config: config.update({"vision_feature_layer": 0}),
    "class token": lambda config: config.update({"vision_feature_select_strategy": "full"}),
    "wide heads": lambda config: config.text_config.update({"head_dim": 20, "num_key_value_heads": 1}),
    "larger": lambda config: config.vision_config.update({"num_hidden_layers": 5, "image_size": 56, "num_channels": 4}),
}
ADAPTERS = [
    {"r": 4},
    {"r": 3, "type": "rslora", "target_modules": ["q_proj", "down_proj"]},
    {"r": 2, "type": "dora"},
]


def built(config: LlavaConfig, stage: Any, adapter: AdapterSettings, dtype: torch.dtype) -> Any:
    model: Any = meta_model(config).to(dtype)
    model.get_submodule(PROJECTOR).float()
    drop_unused_layers(model)
    return parameter_table(build_stage(model, stage, adapter))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("adapter", [None, *ADAPTERS], ids=["align", "lora", "rslora", "dora"])
def test_k26_parameters_by_formula_are_those_of_a_built_model(name: str, adapter: dict[str, Any] | None) -> None:
    stage: Any = "align" if adapter is None else "instruct"
    settings = AdapterSettings(**(adapter or {}))
    for ours, theirs in ((FP32, torch.float32), (BF16, torch.bfloat16)):
        config = tiny_config(layers=3)
        CHANGES[name](config)
        expected = stage_parameters(LlavaShape.of(config.to_dict()), stage, settings, ours)
        assert expected == stage_parameters(LlavaShape.of(config.to_dict()), stage, settings, theirs)
        assert expected == built(config, stage, settings, theirs)


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer of pieces with a space mark and byte fallback, as Llama's fast ones."""
    pieces = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abeinorstuy"]
    merges = [("\u2581", "a"), ("i", "s"), ("\u2581", "is"), ("t", "o")]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama3() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits digits and words as Llama 3's."""
    made = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


TEXTS = [
    "What is it?",
    "  two  spaces",
    "\nline\n\n",
    "1,234.5 cm",
    "</s> <image> <s>",
    "ä\u00df \U0001f600 \u4e2d",
    "",
]
ASK = """
import json, sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
from lora_llava.conversation.templates import tokenize
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = json.loads(sys.argv[1])
    print(json.dumps([tokenize(tokenizer, texts, trusted=trusted) for trusted in (True, False)]))
"""


def test_k26_every_kind_of_tokenizer_gives_the_same_ids_without_torch(tmp_path: Path) -> None:
    from lora_llava.conversation.templates import tokenize

    directories = [VICUNA]
    for name, made in (("bytes", tiny_tokenizer()), ("metaspace", metaspace()), ("llama3", llama3())):
        directories.append(tmp_path / name)
        made.save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(TEXTS), *map(str, directories)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == len(directories)
    for directory, line in zip(directories, done.stdout.splitlines(), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert json.loads(line) == [tokenize(tokenizer, TEXTS, trusted=trusted) for trusted in (True, False)], directory


RUN = """
import re, resource, sys
from pathlib import Path
from lora_llava.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
    assert "torch" not in sys.modules
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss: it begins with what the process that started this one held.
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print("USED", used.ru_utime + used.ru_stime, 1024 * int(peak[1]))
"""


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("light")
    write_data(directory)
    write_recipe(directory, {"model_name_or_path": str(tiny_base)})
    return directory


def costs(project: Path, *args: str) -> tuple[float, float]:
    """Run a command in a separate process; returns its CPU time and its peak memory."""
    command = [sys.executable, "-c", RUN, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    [used] = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("USED")]
    return float(used[0]), float(used[1])


@pytest.mark.parametrize(
    "args",
    [
        ["finetune", "tiny.yaml", "--dry-run"],
        ["check", "tiny.yaml", "--output", "check"],
        ["inspect", "tiny.yaml"],
    ],
    ids=lambda args: "-".join(args[::2]),
)
def test_k26_commands_that_look_ahead_do_without_torch(project: Path, args: list[str]) -> None:
    seconds, memory = costs(project, *args)
    assert seconds < SECONDS
    assert memory < MEMORY


AGAIN = """
from lora_llava.cli import cli
cli(["inspect", "tiny.yaml"], standalone_mode=False)
from transformers.utils import is_torch_available
assert is_torch_available()
"""


def test_k26_what_follows_a_command_in_its_process_has_torch(project: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr


def said_by(*args: str) -> str:
    """Run a command in this process; returns its output."""
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    return done.output


def test_k62_check_and_dry_run_say_the_same(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    memory = ["stages.align.tokens_per_micro_batch=auto", "stages.instruct.tokens_per_micro_batch=auto"]
    planned = said_by("finetune", "tiny.yaml", *memory, "--dry-run")
    checked = said_by("check", "tiny.yaml", *memory, "--output", "same")
    plans = json.loads((project / "same" / "check.json").read_text(encoding="utf-8"))["plans"]
    for stage in ("align", "instruct"):
        plan = plans[stage]
        tokens, saved = f"{plan['computed_tokens']:,} tokens", f"{plan['share_saved_by_packing']:.0%} saved by packing"
        assert f"{tokens}, {saved}" in planned
        assert f"{tokens}, {saved}" in checked
    assert plans["instruct"]["share_saved_by_packing"] > 0.4


def changed(project: Path, **settings: object) -> str:
    recipe = yaml.safe_load((project / "tiny.yaml").read_text(encoding="utf-8"))
    recipe["stages"]["instruct"] |= settings
    path = project / "changed.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path.name


def test_k62_a_micro_batch_is_compared_with_the_longest_conversation(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    recipe = changed(project, max_length=2048, tokens_per_micro_batch=200)
    said_by("finetune", recipe, "--dry-run")
    said_by("check", recipe, "--output", "fits")


@pytest.mark.parametrize("args", [["finetune", "--dry-run"], ["finetune"], ["check", "--output", "small"]])
def test_k62_a_micro_batch_too_small_names_both_lengths(
    project: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(project, max_length=2048, tokens_per_micro_batch=20)
    monkeypatch.chdir(project)
    done = CliRunner().invoke(cli, [args[0], recipe, "stages.align=null", *args[1:]])
    said = " ".join(done.output.split())
    assert done.exit_code != 0
    assert "stages.instruct.tokens_per_micro_batch: is 20, but train.json, record" in said
    settings = load_recipe(project / recipe)
    config, tokenizer = describe_base(settings.base)
    longest = read_records(settings.stage("instruct"), tokenizer, image_tokens(config), settings.seed).longest
    assert f"{longest.where} has {longest.length} tokens" in said


REFUSED = """
import json, sys
from click.testing import CliRunner
from lora_llava.cli import cli
for args in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, args)
    assert done.exit_code in (1, 2), done.output
    assert not {"torch", "transformers", "peft"} & sys.modules.keys(), args
    print(done.stderr)
"""


def test_a_model_that_does_not_fit_its_command_is_refused_before_torch(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(made, tmp_path / "elsewhere/deep")
    base, whole = ["--base-model", tiny_base], ["export", tiny_base, "out", "--format"]
    cases = {
        "instructs does not exist. Did you mean": ["merge", tmp_path / "instructs", "out"],
        "is not an artifact: it has no manifest.json": ["merge", tiny_base, "out"],
        "was moved away from its base": ["merge", moved, "out"],
        "--base-model typo: the directory does not exist": ["merge", moved, "out", "--base-model", "typo"],
        "is neither an artifact (it has no manifest.json) nor": ["export", tmp_path, "out", "--format", "hf"],
        "--outtype has no effect on --format hf": ["export", moved, "out", *base, "--format", "hf", "--outtype", "f16"],
        "of gguf-lora f32 or f16": ["export", moved, "out", *base, "--format", "gguf-lora", "--outtype", "q8_0"],
        "is a whole model and needs no base": [*whole, "hf", *base],
        "has no adapter; export it with --format gguf": [*whole, "gguf-lora"],
        "has no adapter; vLLM serves it directly": [*whole, "vllm"],
        "whole model and needs no base; leave --base-model out": ["chat", tiny_base, "How many?", *base],
    }
    (tmp_path / "instruct").mkdir()
    arguments = json.dumps([[str(part) for part in args] for args in cases.values()])
    command = [sys.executable, "-c", REFUSED, arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().split("\n\n")
    assert len(said) == len(cases)
    assert [message for message, line in zip(cases, said, strict=True) if message not in line] == []
