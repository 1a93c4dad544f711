"""What is written loads in transformers 4 too: its rules restated. `make foreign` asks transformers 4 itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.artifact import read_usage
from lora_llava.formats.transformers_4 import add_old_files, with_old_names
from lora_llava.modeling.assemble import save_config
from lora_llava.shipping.export.hf import export_hf
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import logits, make_artifact
from tests.helpers.tiny import save_tiny_base, tiny_config

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CLASSES = {"PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"}
"""Tokenizers that transformers 4.37 to 5 know by name."""


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def check_tokenizer(directory: Path) -> None:
    """Raise AssertionError for what transformers 4.48 fails on, or reads otherwise."""
    settings = read(directory / "tokenizer_config.json")
    assert settings["tokenizer_class"] in CLASSES
    # `SpecialTokensMixin` there calls `.items()` on it.
    assert isinstance(settings.get("extra_special_tokens", {}), dict)
    assert "<image>" in settings["additional_special_tokens"]
    # The default there has token_type_ids, which `generate` refuses.
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    added = read(directory / "tokenizer.json")["added_tokens"]
    assert {str(token["id"]): token["content"] for token in added} == {
        index: token["content"] for index, token in settings["added_tokens_decoder"].items()
    }


def check_processor(directory: Path, *, named: bool) -> None:
    # LlavaProcessor there takes the image processor by position, and fails on a second one by keyword.
    assert "image_processor" not in read(directory / "processor_config.json")
    images = read(directory / "preprocessor_config.json")
    assert {"image_mean", "image_std", "size", "crop_size", "do_pad"} <= images.keys()
    assert ("image_processor_type" in images) is named


def check_config(config: dict[str, Any]) -> None:
    rope = config["text_config"]["rope_parameters"]
    assert config["text_config"]["rope_theta"] == rope["rope_theta"]
    assert config["torch_dtype"] == config["dtype"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a rotary base that is not the default of transformers."""
    directory = save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    config = read(directory / "config.json")
    config["text_config"]["rope_parameters"]["rope_theta"] = 123.0
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.mark.parametrize("form", ["merged", "hf", "llava"])
def test_k57_models_have_what_transformers_4_reads(base: Path, tmp_path: Path, form: str) -> None:
    made = make_artifact(base, tmp_path / "instruct")
    merge_artifact(made, tmp_path / "merged")
    if form == "hf":
        export_hf(tmp_path / "merged", tmp_path / "hf", ExportOptions())
    if form == "llava":
        export_llava(tmp_path / "merged", tmp_path / "llava", ExportOptions())
        check_tokenizer(tmp_path / "llava")
        assert read(tmp_path / "llava" / "config.json")["rope_theta"] == 123.0
        tower = read(tmp_path / "llava" / "vision_tower" / "config.json")
        assert tower["torch_dtype"] == tower["dtype"] == "float32"
        return
    check_tokenizer(tmp_path / form)
    # No class: transformers 4.48 does not have the one that pads, and takes that of the model.
    check_processor(tmp_path / form, named=False)
    check_config(read(tmp_path / form / "config.json"))
    processor = AutoProcessor.from_pretrained(tmp_path / form, backend="pil")
    assert (type(processor.image_processor).__name__, processor.image_processor.do_pad) == (
        "LlavaImageProcessorPil",
        True,
    )
    assert processor(images=Image.new("RGB", (40, 20)), text="<image>", return_tensors="pt").keys() == {
        "input_ids",
        "attention_mask",
        "pixel_values",
    }
    assert read_usage(tmp_path / form).image_aspect_ratio == "pad"
    theirs = logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval())
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / form).eval()), theirs)


def test_k57_an_artifact_names_its_image_processor(base: Path, tmp_path: Path) -> None:
    made = make_artifact(base, tmp_path / "instruct")
    check_tokenizer(made)
    check_processor(made, named=True)
    assert AutoProcessor.from_pretrained(made, backend="pil").image_processor.do_pad


def test_k57_a_model_of_an_earlier_version_is_exported_with_both_names(base: Path, tmp_path: Path) -> None:
    """It had TokenizersBackend, a nested image processor, and no old name."""
    made = make_artifact(base, tmp_path / "instruct")
    merge_artifact(made, old := tmp_path / "merged")
    config = read(old / "config.json")
    del config["torch_dtype"], config["text_config"]["rope_theta"]
    (old / "config.json").write_text(json.dumps(config), encoding="utf-8")
    images = read(old / "preprocessor_config.json") | {"image_processor_type": "LlavaImageProcessor"}
    (old / "preprocessor_config.json").unlink()
    processor = read(old / "processor_config.json") | {"image_processor": images}
    (old / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    settings = read(old / "tokenizer_config.json")
    settings |= {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": settings.pop("additional_special_tokens"),
    }
    for name in ("added_tokens_decoder", "model_input_names"):
        del settings[name]
    (old / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert read_usage(old).image_aspect_ratio == "pad"
    before = AutoTokenizer.from_pretrained(old)
    export_hf(old, tmp_path / "hf", ExportOptions())
    check_tokenizer(tmp_path / "hf")
    check_processor(tmp_path / "hf", named=False)
    check_config(read(tmp_path / "hf" / "config.json"))
    after = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert after.special_tokens_map == before.special_tokens_map
    assert set(after.all_special_tokens) == set(before.all_special_tokens)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 123.0}, LLAMA_3], ids=["default", "llama3"])
def test_k57_both_names_are_one_setting_for_transformers_5(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = tiny_config()
    config.text_config.rope_parameters = dict(rope)
    save_config(tmp_path, config, torch.float16)
    written = read(tmp_path / "config.json")
    check_config(written)
    text = written["text_config"]
    # Frequencies as transformers 4 computes them, from rope_theta and rope_scaling alone.
    assert text.get("rope_scaling", {}) == (
        {} if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    assert with_old_names(written) == written
    alone = json.loads(json.dumps(written))
    del alone["torch_dtype"], alone["text_config"]["rope_theta"]
    alone["text_config"].pop("rope_scaling", None)
    assert LlavaConfig.from_dict(written).to_dict() == LlavaConfig.from_dict(alone).to_dict()


def test_k57_a_sentencepiece_model_keeps_its_class(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    settings = read(tmp_path / "tokenizer_config.json") | {"tokenizer_class": "TokenizersBackend"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    add_old_files(tmp_path, is_model=True)
    assert read(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"


def test_k57_a_square_processor_is_not_taken_for_one_that_pads(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    check_processor(tmp_path, named=True)
    assert read(tmp_path / "preprocessor_config.json")["image_processor_type"] == "CLIPImageProcessor"
    assert read_usage(tmp_path).image_aspect_ratio == "square"
    # Published models of llava-hf have no such key.
    images = read(tmp_path / "preprocessor_config.json")
    del images["do_pad"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    assert read_usage(tmp_path).image_aspect_ratio == "pad"
