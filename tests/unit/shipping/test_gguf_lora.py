"""The adapter as llama.cpp's LoRA: base and adapter's files give what PEFT gives."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.artifact import load_model
from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.shipping.export import export as export_model
from lora_llava.shipping.export.gguf import lora as gguf_lora
from lora_llava.shipping.export.gguf.file import deinterleave
from lora_llava.shipping.export.options import ExportOptions
from tests.helpers.artifacts import CPU, make_artifact, save, train
from tests.helpers.changed import BASE, exchanged_ids
from tests.helpers.gguf_model import GGUFContent, image_features, text_logits
from tests.helpers.tiny import IMAGE_SIZE, tiny_config
from tests.unit.shipping.test_export_gguf import IDS


def export(source: Path, output: Path, layout: str = "gguf-lora", **options: Any) -> list[str]:
    lines: list[str] = export_model(source, output, layout, ExportOptions(**options))["summary"]
    return lines


@pytest.fixture(scope="module")
def base_text(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "out"
    export(tiny_base, directory, "gguf", outtype="f32")
    return directory / "text.gguf"


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_base_and_lora_compute_what_was_trained(tiny_base: Path, base_text: Path, tmp_path: Path, kind: str) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", kind=kind)
    lines = export(artifact, tmp_path / "out", outtype="f32")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lora.gguf", "mmproj.gguf", "chat_template.jinja"}
    assert "#25814" in lines[-1]
    lora = GGUFContent(tmp_path / "out" / "lora.gguf")
    assert lora.fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "out",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "adapter.type": "lora",
        # Rank 4: rsLoRA divides by its root, llama.cpp by the rank itself.
        "adapter.lora.alpha": 8.0 if kind == "lora" else 16.0,
    }
    loaded, _ = load_model(artifact, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        theirs = loaded.model(input_ids=torch.tensor([IDS])).logits[0]
    plain = text_logits(GGUFContent(base_text), IDS)
    ours = text_logits(GGUFContent(base_text).with_lora(lora), IDS)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, theirs, rtol=1e-2, atol=1e-2)
    pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        tokens = loaded.model.get_base_model().get_image_features(pixels[None]).pooler_output[0]
    tuned = image_features(GGUFContent(tmp_path / "out" / "mmproj.gguf"), pixels)
    assert torch.allclose(tuned, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factors", [(1.0, 3.0), (0.0, 3.0), (0.0, 0.0)], ids=["all", "some", "none"])
def test_layers_with_scales_of_their_own(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: tuple[float, float]
) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct")
    original = Adapter._scaling

    def scaling(self: Adapter, name: str) -> float:
        return original(self, name) * factors[".mlp." in name]

    monkeypatch.setattr(Adapter, "_scaling", scaling)
    export(artifact, tmp_path / "out")
    lora, adapter = GGUFContent(tmp_path / "out" / "lora.gguf"), Adapter(artifact)
    # llama.cpp reads an alpha of 0 as none, and then adds B A unscaled.
    assert lora.fields["adapter.lora.alpha"]
    for name, keys in adapter.layers.items():
        place = gguf_lora.gguf_name(name, tiny_config())
        a, b = lora.tensors[f"{place}.lora_a"], lora.tensors[f"{place}.lora_b"]
        if heads := {"attn_q": 4, "attn_k": 2}.get(place.split(".")[2], 0):
            b = torch.from_numpy(deinterleave(b.numpy(), heads).copy())
        theirs = keys.scaling * adapter.read(keys.b) @ adapter.read(keys.a)
        assert torch.allclose(lora.fields["adapter.lora.alpha"] / 4 * b @ a, theirs, rtol=1e-5, atol=1e-6), name
    assert len(lora.tensors) == 2 * len(adapter.layers) == 28


def test_what_has_no_place_in_it(tiny_base: Path, tmp_path: Path) -> None:
    dora = make_artifact(tiny_base, tmp_path / "dora", kind="dora")
    with pytest.raises(ArtifactError, match=r"is DoRA, .* Export it with --format gguf, which merges it"):
        export(dora, tmp_path / "out")
    aligned = make_artifact(tiny_base, tmp_path / "align", stage="align")
    with pytest.raises(ArtifactError, match="holds no LoRA on the language model"):
        export(aligned, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is a whole model and has no adapter"):
        export(tiny_base, tmp_path / "out")
    plain = make_artifact(tiny_base, tmp_path / "lora")
    with pytest.raises(RecipeError, match="--outtype q8_0: of gguf-lora f32 or f16"):
        export(plain, tmp_path / "out", outtype="q8_0")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert export(dora, tmp_path / "whole", "gguf", outtype="f32")


def test_an_adapter_of_four_bits_says_so(tiny_base: Path, tmp_path: Path) -> None:
    loaded = train(tiny_base, "instruct", nf4=True)
    save(loaded, tmp_path / "instruct", nf4=True)
    lines = export(tmp_path / "instruct", tmp_path / "out", outtype="f16")
    assert any("NF4" in line for line in lines)
    assert {kind for name, kind in GGUFContent(tmp_path / "out" / "lora.gguf").kinds.items()} == {"F16"}


def test_an_artifact_is_merged_as_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    lines = export(artifact, tmp_path / "a" / "out", "gguf", outtype="q8_0")
    assert any("base: dequantized" in line for line in lines)
    lines = export(artifact, tmp_path / "original", "gguf", outtype="f32", base="original")
    assert any("base: original (chosen with --onto" in line for line in lines)
    export(artifact, tmp_path / "merged", "hf")
    export(tmp_path / "merged", tmp_path / "b" / "out", "gguf", outtype="q8_0")
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / one / "out").iterdir()} for one in "ab")
    assert ours == theirs
    assert ours.keys() == {"text.gguf", "mmproj.gguf", "Modelfile"}


def test_an_interrupted_export_leaves_nothing(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct")

    def interrupt(*_: Any) -> int:
        assert list(tmp_path.glob(".lora-llava-*/out/lora.gguf"))
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_lora, "write_mmproj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(artifact, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["instruct"]


def test_k70_the_base_that_an_adapter_of_nf4_fits_is_written_with_it(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    lines = export(artifact, tmp_path / "out", outtype="f32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"lora.gguf", "mmproj.gguf", "chat_template.jinja", "text.gguf"}
    assert any("dequantized" in line and "text.gguf" in line for line in lines)
    loaded, _ = load_model(artifact, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        theirs = loaded.model(input_ids=torch.tensor([IDS])).logits[0]
    base, lora = GGUFContent(tmp_path / "out" / "text.gguf"), GGUFContent(tmp_path / "out" / "lora.gguf")
    assert torch.allclose(text_logits(base.with_lora(lora), IDS), theirs, rtol=1e-4, atol=1e-4)
    # The stored base, which was what users were told to take.
    export(tiny_base, tmp_path / "stored", "gguf", outtype="f32")
    stored = text_logits(GGUFContent(tmp_path / "stored" / "text.gguf").with_lora(lora), IDS)
    assert float((stored - theirs).norm() / theirs.norm()) > 1e-2


def test_k70_without_that_base_the_difference_is_measured_and_said(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    lines = export(artifact, tmp_path / "out", base="original")
    assert "text.gguf" not in {path.name for path in (tmp_path / "out").iterdir()}
    [said] = [line for line in lines if "On the stored weights" in line]
    assert float(re.findall(r"relative ([\d.e-]+);", said)[0]) > 1e-2
    assert re.search(r"\d of 4 greedy answers the same", said)
    plain = make_artifact(tiny_base, tmp_path / "plain")
    with pytest.raises(ArtifactError, match="there is no dequantized base"):
        export(plain, tmp_path / "none", base="dequantized")


def test_the_dequantized_base_has_the_tokenizer_of_training(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / BASE)
    artifact = make_artifact(tmp_path / BASE, tmp_path / "run/instruct", nf4=True)
    export(artifact, tmp_path / "before" / "out")
    exchanged_ids(BASE)(tmp_path)
    export(artifact, tmp_path / "after" / "out")
    before, after = (GGUFContent(tmp_path / state / "out/text.gguf").fields for state in ("before", "after"))
    assert after["tokenizer.ggml.tokens"] == before["tokenizer.ggml.tokens"]
