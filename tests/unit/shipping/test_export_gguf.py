"""GGUF: what is in the files, what a reader computes from them alone, and what is refused."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.processor import save_processor
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.export import FORMATS
from lora_llava.shipping.export.gguf import file as gguf_file
from lora_llava.shipping.export.gguf import model as gguf
from lora_llava.shipping.export.gguf.file import as_stored, deinterleave, interleave
from lora_llava.shipping.export.gguf.model import export_gguf
from lora_llava.shipping.export.gguf.text import text_tensors
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import make_artifact
from tests.helpers.gguf_model import GGUFContent, image_features, text_logits
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, tiny_config, tiny_tokenizer

IDS = [1, 40, 41, 90, 17, 200, 33, 286]
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")
TEXT_TENSORS = {"token_embd.weight", "output_norm.weight", "output.weight"}
TEXT_TENSORS |= {f"blk.{number}.{part}.weight" for number in range(2) for part in PARTS}
VISION_TENSORS = {"v.class_embd", "v.patch_embd.weight", "v.position_embd.weight", "v.pre_ln.weight", "v.pre_ln.bias"}
VISION_TENSORS |= {f"mm.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")}
VISION_TENSORS |= {
    f"v.blk.0.{part}.{kind}"
    for part in ("ln1", "ln2", "attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
    for kind in ("weight", "bias")
}


def export(source: Path, output: Path, outtype: str | None = "f32") -> list[str]:
    lines: list[str] = FORMATS["gguf"](source, output, ExportOptions(outtype=outtype))["summary"]
    return lines


def save(directory: Path, config: Any) -> LlavaForConditionalGeneration:
    """Write a random model of a changed configuration."""
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.save_pretrained(directory)
    save_processor(directory, tiny_tokenizer(), config, {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD})
    return model


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf") / "tiny"
    export(tiny_base, directory)
    return directory


def test_the_files_have_what_llama_cpp_asks_for(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {"text.gguf", "mmproj.gguf", "Modelfile"}
    text, mmproj = GGUFContent(whole / "text.gguf"), GGUFContent(whole / "mmproj.gguf")
    assert text.tensors.keys() == TEXT_TENSORS
    # The tower has two blocks; with vision_feature_layer -2 one runs, and post_ln would be applied if it were there.
    assert mmproj.tensors.keys() == VISION_TENSORS
    shape = {key: value for key, value in text.fields.items() if key.startswith(("llama.", "general."))}
    assert shape == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.vocab_size": 304,
        "llama.context_length": 512,
        "llama.embedding_length": 48,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.rope.dimension_count": 12,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.freq_base": 10000,
    }
    assert mmproj.fields == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.use_silu": False,
        "clip.vision.image_size": 28,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.projection_dim": 48,
        "clip.vision.block_count": 1,
        "clip.vision.feature_layer": [1],
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.image_mean": pytest.approx(IMAGE_MEAN),
        "clip.vision.image_std": pytest.approx(IMAGE_STD),
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", **LLAMA3}],
    ids=lambda rope: str(rope["rope_type"]),
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_text_model_computes_the_same(tmp_path: Path, rope: dict[str, Any], tied: bool) -> None:
    config = tiny_config()
    config.text_config.rope_parameters = {"rope_theta": 500.0, **rope}
    config.text_config.attention_bias = config.text_config.mlp_bias = not tied
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = save(tmp_path / "model", config)
    export(tmp_path / "model", tmp_path / "out")
    content = GGUFContent(tmp_path / "out" / "text.gguf")
    assert ("output.weight" in content.tensors) != tied
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS])).logits[0]
    assert torch.allclose(text_logits(content, IDS), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("do_pad", [True, False])
def test_a_model_trained_on_cropped_images_says_that_llama_cpp_pads(tmp_path: Path, do_pad: bool) -> None:
    save(tmp_path / "model", tiny_config())
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "do_pad": do_pad}), encoding="utf-8")
    lines = export(tmp_path / "model", tmp_path / "out")
    assert any("crop images that are not square" in line for line in lines) is not do_pad
    text, mmproj = (tmp_path / "out" / name for name in ("text.gguf", "mmproj.gguf"))
    assert lines[-2:] == [
        f"llama-mtmd-cli --jinja -m {text} --mmproj {mmproj} --image IMAGE -p QUESTION",
        f"ollama create NAME -f {tmp_path / 'out' / 'Modelfile'}",
    ]


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize(("activation", "bias"), [("quick_gelu", True), ("gelu", False)])
def test_the_mmproj_computes_the_image_tokens(tmp_path: Path, layer: int, activation: str, bias: bool) -> None:
    config = tiny_config()
    config.vision_feature_layer, config.multimodal_projector_bias = layer, bias
    config.vision_config.hidden_act = activation
    config.vision_config.num_hidden_layers = 3
    model = save(tmp_path / "model", config)
    export(tmp_path / "model", tmp_path / "out")
    content = GGUFContent(tmp_path / "out" / "mmproj.gguf")
    assert content.fields["clip.vision.block_count"] == {-2: 2, -1: 3, 1: 1}[layer]
    pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        theirs = model.get_image_features(pixels[None]).pooler_output[0]
    assert torch.allclose(image_features(content, pixels), theirs, rtol=1e-4, atol=1e-4)


def test_the_rows_of_a_head_in_ggmls_order() -> None:
    rows = np.arange(16)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert deinterleave(interleave(rows, 2), 2).tolist() == rows.tolist()


@pytest.mark.parametrize(("outtype", "embeddings"), [("f16", "F16"), ("q8_0", "F16"), ("q4_0", "F16")])
def test_the_types_of_the_weights(tiny_base: Path, tmp_path: Path, whole: Path, outtype: str, embeddings: str) -> None:
    """The tiny model's rows of 48 do not divide into blocks, those of 96 do."""
    lines = export(tiny_base, tmp_path / "out", outtype)
    found, exact = GGUFContent(tmp_path / "out" / "text.gguf"), GGUFContent(whole / "text.gguf")
    quantised = outtype.upper()
    for name, kind in found.kinds.items():
        if name.endswith("norm.weight"):
            assert kind == "F32"
        elif name.endswith("ffn_down.weight"):
            assert kind == quantised
            wanted = quantize(exact.tensors[name].numpy(), GGMLQuantizationType[quantised])
            assert np.array_equal(found.raw[name].view(np.uint8), wanted.view(np.uint8))
        else:
            assert kind == embeddings
            assert torch.equal(found.tensors[name], exact.tensors[name].half().float())
    assert any("14 tensors in f16: rows that" in line for line in lines) == outtype.startswith("q")
    assert set(GGUFContent(tmp_path / "out" / "mmproj.gguf").kinds.values()) == {"F32", "F16"}
    error = (text_logits(found, IDS) - text_logits(exact, IDS)).norm() / text_logits(exact, IDS).norm()
    assert error < {"f16": 2e-3, "q8_0": 2e-2, "q4_0": 0.2}[outtype]


def test_q4_0_spares_embeddings_and_head(tmp_path: Path) -> None:
    config = tiny_config()
    config.text_config.hidden_size, config.text_config.head_dim = 64, 16
    save(tmp_path / "model", config)
    assert not any("f16" in line for line in export(tmp_path / "model", tmp_path / "out", "q4_0"))
    kinds = GGUFContent(tmp_path / "out" / "text.gguf").kinds
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == {"token_embd.weight", "output.weight"}
    assert {kind for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_0"}


def test_one_tensor_at_a_time(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, most = WeightFiles.read, weakref.WeakSet[torch.Tensor](), []

    def watched(self: WeightFiles, name: str) -> torch.Tensor:
        most.append(len(alive))
        tensor = read(self, name)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(WeightFiles, "read", watched)
    export(tiny_base, tmp_path / "out")
    assert len(most) > 80
    assert max(most) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "one layer, not of several"),
        ({"vision_feature_layer": 0}, "needs at least one"),
        ({"vision_feature_select_strategy": "full"}, "drops the class token"),
        ({"projector_hidden_act": "linear"}, "mm_projector_type: mlp2x_gelu"),
        ({"vision_config.hidden_act": "relu"}, "no vision tower with relu"),
        ({"text_config.hidden_act": "relu"}, "supports only silu"),
        (
            {"text_config.rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "linear, llama3 only",
        ),
        ({"text_config.vocab_size": 280}, "the embeddings have 280 rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_llama_cpp_does_not_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = tiny_config()
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        setattr(getattr(config, part) if part else config, name, value)
    if isinstance(config.vision_feature_layer, list):
        config.vision_feature_layer = -2
        save(tmp_path / "model", config)
        path = tmp_path / "model" / "config.json"
        path.write_text(path.read_text().replace('"vision_feature_layer": -2', '"vision_feature_layer": [-2, -1]'))
    else:
        save(tmp_path / "model", config)
    with pytest.raises(ModelError, match=message):
        export(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_value_beyond_the_type(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save(directory, tiny_config())
    state = load_file(directory / "model.safetensors")
    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name][0, 0] = 1e6
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite in f16; .* use --outtype f32"):
        export(directory, tmp_path / "out", "f16")
    export(directory, tmp_path / "good", "f32")
    state[name][0, 0] = float("nan")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    for outtype in ("f32", "q8_0"):
        with pytest.raises(ModelError, match="not finite"):
            export(directory, tmp_path / "out", outtype)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError])
def test_an_interrupted_export_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupt(*_: Any) -> int:
        assert list(tmp_path.glob(".lora-llava-*/out/text.gguf"))
        raise error

    monkeypatch.setattr(gguf, "write_mmproj", interrupt)
    with pytest.raises(error):
        export(tiny_base, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fault", ["interleave", "quantize"])
def test_an_export_that_differs_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outtype: str, fault: str
) -> None:
    config = tiny_config()
    config.text_config.hidden_size, config.text_config.head_dim = 64, 16
    save(tmp_path / "model", config)
    right = gguf_file.quantize
    wrong = {
        "interleave": lambda rows, _: rows,
        "quantize": lambda values, kind: right(values * np.float32(1.03 if values.ndim > 1 else 1), kind),
    }
    if (outtype, fault) == ("q4_0", "quantize"):
        wrong["quantize"] = lambda values, kind: right(values * np.float32(1.4), kind)
    monkeypatch.setattr(gguf_file, fault, wrong[fault])
    with pytest.raises(ArtifactError, match=r"text.gguf: .*differs between the file and its source"):
        export(tmp_path / "model", tmp_path / "out", outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_k71_a_quantized_export_says_what_it_does_to_answers(tiny_base: Path, tmp_path: Path) -> None:
    merge_artifact(make_artifact(tiny_base, tmp_path / "instruct"), tmp_path / "merged")
    relative = {}
    for outtype in ("q8_0", "q4_0"):
        lines = export_gguf(tmp_path / "merged", tmp_path / outtype, ExportOptions(outtype=outtype))["summary"]
        [said] = [
            line for line in lines if line.startswith("quantized against the model before, logits of 4 questions")
        ]
        relative[outtype] = float(re.findall(r"relative ([\d.e-]+);", said)[0])
        answers = int(re.findall(r"(\d) of 4 greedy answers", said)[0])
        assert any("quantization changes its answers" in line for line in lines) == (answers < 4)
    assert 0 < relative["q8_0"] < relative["q4_0"]
    # f16 is no quantization, and is not asked about.
    lines = export_gguf(tmp_path / "merged", tmp_path / "f16", ExportOptions())["summary"]
    assert not any("quantized against" in line for line in lines)


def test_k71_the_probe_computes_with_the_values_of_the_file(tiny_base: Path, tmp_path: Path) -> None:
    merge_artifact(make_artifact(tiny_base, tmp_path / "instruct"), tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "out", ExportOptions(outtype="q4_0"))
    files, config = WeightFiles(tmp_path / "merged"), read_config(tmp_path / "merged")
    content = GGUFContent(tmp_path / "out" / "text.gguf")
    for tensor in text_tensors(config, files.read, "q4_0"):
        written = content.tensors[tensor.name]
        if tensor.heads:
            written = torch.from_numpy(deinterleave(written.numpy(), tensor.heads).copy())
        assert torch.equal(as_stored(tensor), written), tensor.name


def test_k71_a_full_disk_names_the_file_and_what_it_needs(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("884736 requested and 169376 written")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ArtifactError, match=r"text\.gguf cannot be written .* needs \d+ MiB, .* MiB left") as caught:
        export_gguf(tiny_base, tmp_path / "out", ExportOptions())
    assert "another disk" in str(caught.value)
    assert not list(tmp_path.iterdir())
