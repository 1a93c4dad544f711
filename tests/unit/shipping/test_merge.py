"""Merging: the model that is written computes what base and adapter compute, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import MANIFEST, load_artifact
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.names import WEIGHTS, memory_name
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.modeling.base import BaseIdentity, dequantize, hash_weights, load_base
from lora_llava.modeling.metadata import read_config
from lora_llava.modeling.stages import is_quantized
from lora_llava.shipping.merge import run as merge_run
from lora_llava.shipping.merge.run import merge_artifact
from lora_llava.shipping.merge.stream import through_nf4
from lora_llava.system.files import file_sha256
from tests.helpers.artifacts import CPU, as_earlier, logits, make_artifact
from tests.helpers.tiny import save_tiny_base

FP32 = torch.float32


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def load_plain(directory: Path, **how: Any) -> Any:
    """As anyone loads it, with nothing missing and nothing too much."""
    model, report = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True, **how)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tiny_base, tmp_path_factory.mktemp("run") / "instruct")


@pytest.fixture
def copied(artifact: Path) -> Any:
    """A copy to damage, next to the original so that its relative paths hold."""
    directory = artifact.with_name("copied")
    shutil.copytree(artifact, directory)
    yield directory
    shutil.rmtree(directory)


def change_weights(directory: Path, change: Any) -> None:
    """Alter the adapter and make the manifest agree, as a faulty tool would leave it."""
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS)
    as_earlier(directory, adapter_sha256=file_sha256(directory / WEIGHTS))


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_merged_equals_base_and_adapter(tiny_base: Path, tmp_path: Path, kind: str, nf4: bool) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", nf4=nf4, kind=kind)
    report = merge_artifact(made, tmp_path / "merged")
    loaded, _ = load_artifact(made, device=CPU, dtype=FP32)
    theirs = logits(loaded.model)
    ours = logits(load_plain(tmp_path / "merged"))
    assert relative(ours, theirs) < 1e-5
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert report["base"] == ("dequantized" if nf4 else "original")
    assert report["probe"]["relative"] < 1e-5
    assert report["probe"]["answers_equal"] == report["probe"]["answers"] == 4
    base = logits(load_plain(tiny_base))
    assert relative(ours, base) > 0.1, "the adapter changes nothing, so nothing was shown"


def test_the_projector_is_merged_without_lora(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "align", "align")
    merge_artifact(made, tmp_path / "merged")
    loaded, _ = load_artifact(made, device=CPU, dtype=FP32)
    assert relative(logits(load_plain(tmp_path / "merged")), logits(loaded.model)) < 1e-5
    before, after = WeightFiles(tiny_base), WeightFiles(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before.read(name), after.read(name))}
    assert changed == {f"multi_modal_projector.linear_{n}.{key}" for n in (1, 2) for key in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_through_nf4_is_what_a_quantised_layer_computes_with(
    tiny_base: Path, dtype: torch.dtype, double_quant: bool
) -> None:
    identity = BaseIdentity("tiny", None, "")
    quantized = load_base(tiny_base, identity, nf4=True, double_quant=double_quant, dtype=dtype, device=CPU).model
    names = [name for name, parameter in quantized.named_parameters() if is_quantized(parameter)]
    dequantize(quantized)
    files = WeightFiles(tiny_base)
    memory = dict(quantized.named_parameters())
    canonical = [name for name in files if memory_name(name) in names]
    assert len(canonical) == len(names) == 14
    for name in canonical:
        ours = through_nf4(files.read(name), dtype=dtype, double_quant=double_quant)
        theirs = memory[memory_name(name)]
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours.float(), files.read(name)), name


def test_both_bases_are_measured(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    faithful = merge_artifact(made, tmp_path / "faithful")["distance_from_trained"]
    other = merge_artifact(made, tmp_path / "other", base="original")
    assert faithful["dequantized"]["relative"] < 1e-5
    assert faithful["original"]["relative"] > 0.01
    distance = other["distance_from_trained"]
    assert distance["original"]["relative"] == pytest.approx(faithful["original"]["relative"], rel=0.1)
    assert distance["dequantized"]["relative"] < 1e-5
    assert other["probe"]["relative"] < 1e-5
    assert "chosen" in other["reason"]
    # And it is what PEFT computes on the base.
    base = LlavaForConditionalGeneration.from_pretrained(tiny_base)
    theirs = logits(PeftModel.from_pretrained(base, str(made)).eval())
    assert relative(logits(load_plain(tmp_path / "other")), theirs) < 1e-5


def test_a_base_in_another_precision(tmp_path: Path) -> None:
    """Trained in bf16 on NF4 from a base stored in fp16, as on a card: what was trained is what is written."""
    base = save_tiny_base(tmp_path / "base", dtype=torch.float16)
    made = make_artifact(base, tmp_path / "instruct", nf4=True, dtype=torch.bfloat16)
    assert json.loads((made / MANIFEST).read_text())["quantization"]["compute_dtype"] == "bfloat16"
    exact = merge_artifact(made, tmp_path / "exact", dtype=FP32)
    assert exact["probe"]["relative"] < 1e-5
    report = merge_artifact(made, tmp_path / "merged")
    assert report["dtype"] == "float16"
    assert 1e-5 < report["probe"]["relative"] < 1e-2
    loaded, _ = load_artifact(made, device=CPU, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = logits(loaded.model).float()
    assert relative(logits(load_plain(tmp_path / "exact")), theirs) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_can_be_chosen(artifact: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    report = merge_artifact(artifact, tmp_path / "merged", dtype=dtype)
    assert {load_file(tmp_path / "merged" / "model.safetensors")[name].dtype for name in Adapter(artifact)} == {dtype}
    assert load_plain(tmp_path / "merged").dtype == dtype
    assert 1e-5 < report["probe"]["relative"] < report["tolerance"]


def test_shards(artifact: Path, tmp_path: Path) -> None:
    limit = 60_000
    merge_artifact(artifact, tmp_path / "whole")
    report = merge_artifact(artifact, tmp_path / "parts", max_shard_bytes=limit)
    assert len(report["files"]) > 3
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    sizes = {}
    for file in report["files"]:
        with safe_open(tmp_path / "parts" / file, framework="pt") as handle:
            assert all(index["weight_map"][name] == file for name in handle.keys())  # noqa: SIM118
        state = load_file(tmp_path / "parts" / file)
        sizes[file] = sum(one.numel() * one.element_size() for one in state.values())
        assert sizes[file] <= limit or len(state) == 1
    assert set(index["weight_map"].values()) == set(report["files"])
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    whole, parts = load_plain(tmp_path / "whole").state_dict(), load_plain(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_wrong_base_is_refused_with_both_hashes(artifact: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="--base-model") as caught:
        merge_artifact(artifact, tmp_path / "merged", base_model=str(other))
    assert hash_weights(tiny_base) in str(caught.value)
    assert hash_weights(other) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_B", "multi_modal_projector"])
def test_nan_is_refused(copied: Path, tmp_path: Path, part: str, value: float) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[next(name for name in state if part in name)].view(-1)[0] = value

    change_weights(copied, spoil)
    with pytest.raises(ArtifactError, match=rf"{part}.*NaN or infinity"):
        merge_artifact(copied, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("multi_modal_projector", "the projector is missing"),
        ("linear_2.bias", "the projector is missing: multi_modal_projector.linear_2.bias"),
        ("layers.0.mlp.up_proj.lora_B", "up_proj.weight has lora_A, must have lora_A, lora_B"),
    ],
)
def test_missing_keys_are_refused(copied: Path, tmp_path: Path, lost: str, message: str) -> None:
    def lose(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if lost in name]:
            del state[name]

    change_weights(copied, lose)
    with pytest.raises(ArtifactError, match=message):
        merge_artifact(copied, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_key_of_no_layer_is_refused(copied: Path, tmp_path: Path) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if ".layers.0.mlp.up_proj." in name]:
            state[name.replace("layers.0", "layers.9")] = state[name].clone()

    change_weights(copied, add)
    with pytest.raises(ArtifactError, match=r"the base has no language_model.model.layers.9.mlp.up_proj.weight"):
        merge_artifact(copied, tmp_path / "merged")


def test_existing_output_is_refused_and_kept(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="already exists"):
        merge_artifact(artifact, tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def test_a_merge_that_differs_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is wrong by a tenth is found, whatever went wrong."""
    scaling = Adapter._scaling
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "_scaling", lambda self, name: 1.1 * scaling(self, name))
        with pytest.raises(ArtifactError, match=r"not base \+ adapter: logits differ by largest"):
            merge_artifact(artifact, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write_weights", "save_surroundings", "verify", "write_config"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError])
def test_an_interrupted_merge_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, how: type[BaseException]
) -> None:
    original = getattr(merge_run, where)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise how

    with monkeypatch.context() as patch:
        patch.setattr(merge_run, where, interrupt)
        with pytest.raises(how):
            merge_artifact(artifact, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_merge_leaves_is_no_model(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed outright, it cannot clean up; what lies there does not load, and the next run does not mind it."""

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_llava.system.files.shutil.rmtree", lambda *_args, **_options: None)
        patch.setattr(merge_run, "write_config", kill)
        with pytest.raises(KeyboardInterrupt):
            merge_artifact(artifact, tmp_path / "merged")
    [staging] = tmp_path.iterdir()
    left = staging / "merged"
    assert (left / "model.safetensors").is_file()
    assert not (left / "config.json").exists()
    with pytest.raises(ModelError):
        read_config(left)
    merge_artifact(artifact, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_dequantized_needs_nf4(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="trained on the unquantized base"):
        merge_artifact(artifact, tmp_path / "merged", base="dequantized")
