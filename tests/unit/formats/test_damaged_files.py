"""Damaged weights and absurd sizes: one line with the file's name, from commands and from Python."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_llava.artifact import load_artifact, load_model
from lora_llava.errors import LoraLlavaError, ModelError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.formats.llava_original import read_tensors
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.modeling.base import hash_weights
from lora_llava.modeling.metadata import read_config
from lora_llava.planning.preflight.shipping import refuse_base
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from tests.helpers.artifacts import CPU, make_artifact


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for name, value in header.items() if name != "__metadata__")
    return entry


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: data[:0],
    "four bytes": lambda data: data[:4],
    "header cut off": lambda data: data[:100],
    "tensors cut off": lambda data: data[:-100],
    "longer": lambda data: data + b"x",
    "header of 2^60 bytes": lambda data: (2**60).to_bytes(8, "little") + data[8:],
    "header not JSON": lambda data: data[:8] + b"{{{" + data[11:],
    "header a list": lambda data: (2).to_bytes(8, "little") + b"[]" + data[8:],
    "unknown type": lambda data: with_header(data, lambda header: first(header).update(dtype="X9")),
    "another shape": lambda data: with_header(data, lambda header: first(header).update(shape=[7])),
    "negative shape": lambda data: with_header(data, lambda header: first(header).update(shape=[-1])),
    "offsets beyond the end": lambda data: with_header(
        data, lambda header: first(header).update(data_offsets=[0, 2**62])
    ),
    "offsets the wrong way": lambda data: with_header(data, lambda header: first(header).update(data_offsets=[8, 4])),
    "infinite offsets": lambda data: with_header(data, lambda header: first(header).update(data_offsets=[0, 1e999])),
    "another format": lambda data: b"PK\3\4" + data[4:],
}
"""Ways to damage a safetensors file."""


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("form", FORMS)
def test_k49_damaged_safetensors_are_named(base: Path, form: str) -> None:
    path = base / "model.safetensors"
    path.write_bytes(FORMS[form](path.read_bytes()))
    for read in (
        lambda: WeightFiles(base).check(read_config(base)),
        lambda: hash_weights(base),
        lambda: load_model(base, device=CPU, dtype=torch.float32, template="vicuna_v1"),
        lambda: refuse_base(str(base)),
    ):
        with pytest.raises(LoraLlavaError) as caught:
            read()
        assert str(base) in str(caught.value)
        assert "ownload" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("form", FORMS)
def test_k49_a_damaged_adapter_is_named(tiny_base: Path, tmp_path: Path, form: str) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "artifact")
    path = artifact / "adapter_model.safetensors"
    path.write_bytes(FORMS[form](path.read_bytes()))
    for read in (lambda: Adapter(artifact), lambda: load_artifact(artifact, device=CPU, dtype=torch.float32)):
        with pytest.raises(LoraLlavaError, match=r"adapter_model\.safetensors"):
            read()


NO_CONFIG = ["[]", "null", "{", "3", '"x"', "[" * 99_999, '{"model_type": ' + "9" * 5_000 + "}"]


@pytest.mark.parametrize("content", NO_CONFIG)
def test_k49_a_config_that_is_no_mapping_is_named(base: Path, content: str) -> None:
    (base / "config.json").write_text(content, encoding="utf-8")
    for read in (lambda: read_config(base), lambda: refuse_base(str(base))):
        with pytest.raises(LoraLlavaError, match=r"config\.json is damaged"):
            read()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "num_hidden_layers", 10**6),
        ("vision_config", "num_hidden_layers", 10**6),
        ("text_config", "hidden_size", 10**12),
        ("text_config", "vocab_size", -1),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "head_dim", 1e300),
        ("vision_config", "image_size", 10**9),
        ("vision_config", "patch_size", "14"),
        ("text_config", "intermediate_size", True),
    ],
)
def test_k48_sizes_without_bound_are_refused(base: Path, part: str, key: str, value: Any) -> None:
    data = json.loads((base / "config.json").read_text(encoding="utf-8"))
    data[part][key] = value
    (base / "config.json").write_text(json.dumps(data), encoding="utf-8")
    begin = time.process_time()
    for read in (
        lambda: refuse_base(str(base)),
        lambda: read_config(base),
        lambda: load_model(base, device=CPU, dtype=torch.float32, template="vicuna_v1"),
    ):
        with pytest.raises(LoraLlavaError, match=rf"{key} .*above 0 and of no absurd size"):
            read()
    assert time.process_time() - begin < 5


def test_k48_a_compressed_pickle_is_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.bin", tmp_path / "packed.bin"
    torch.save({"x": torch.zeros(2**20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert packed.stat().st_size < plain.stat().st_size / 100
    with pytest.raises(ModelError, match=r"packed\.bin: .* is compressed, which torch\.save never does"):
        read_tensors(packed)
    assert read_tensors(plain)["x"].shape == (2**20,)


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"PK\3\4" + b"x" * 50, b"\x80\2}q\0.", b"\x80\4N."])
def test_k49_a_pickle_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.bin") as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)


def test_k49_weights_in_a_type_that_is_not_read_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors")["a"].dtype == torch.int64


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "no activation"), ("dtype", "no type")])
def test_k49_a_tower_of_an_original_checkpoint_that_cannot_be_built_is_named(
    base: Path, tmp_path: Path, key: str, value: str
) -> None:
    export_llava(base, tmp_path / "llava", ExportOptions(template="vicuna_v1"))
    config = tmp_path / "llava" / "vision_tower" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        import_any(tmp_path / "llava", tmp_path / "imported", ImportOptions())
    assert not (tmp_path / "imported").exists()
