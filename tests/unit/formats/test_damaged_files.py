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
from click.testing import CliRunner
from safetensors.torch import save_file

from lora_llava.artifact import load_artifact, load_model
from lora_llava.cli import cli
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


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def panicking(base: Path, directory: Path) -> Path:
    """A copy of a base with a tokenizer of which the library in Rust panics: a prefix longer than a merge."""
    shutil.copytree(base, directory)
    path = directory / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    edited(path, model={**model, "continuing_subword_prefix": "longer than any merge"})
    return directory


def test_k49_a_tokenizer_that_panics_is_named(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damaged = panicking(base, tmp_path / "damaged")
    with pytest.raises(
        ModelError, match=r"damaged: its tokenizer cannot be read \(range end index .*download it again"
    ):
        load_model(damaged, device=CPU, dtype=torch.float32, template="vicuna_v1")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("verb", ["chat", "export"])
def test_k49_a_tokenizer_that_panics_is_one_line_of_a_command(base: Path, tmp_path: Path, verb: str) -> None:
    damaged = panicking(base, tmp_path / "damaged")
    rest = {"chat": ["hello", "--template", "vicuna_v1"], "export": [str(tmp_path / "out"), "--format", "gguf"]}
    done = CliRunner().invoke(cli, [verb, str(damaged), *rest[verb]])
    assert done.exit_code in (1, 2)
    assert "its tokenizer cannot be read" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_k49_a_panic_while_a_command_works_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What a library in Rust raises; it is no Exception."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("lora_llava.planning.preflight.shipping.refuse_model", panic)
    done = CliRunner().invoke(cli, ["chat", str(base), "hello"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: PanicException: index out of bounds (run again with --debug")


def test_k50_an_unknown_option_of_a_token_is_not_printed(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    edited(copy / "tokenizer_config.json", added_tokens_decoder={"5": {"content": "<|im_start|>", "\x1b[2J": True}})
    loaded, _ = load_model(copy, device=CPU, dtype=torch.float32, template="vicuna_v1")
    assert len(loaded.tokenizer) > 0
    # The bar of loading weights is on stderr.
    assert capfd.readouterr().out == ""


HALF = "\ud800"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_k49_half_a_surrogate_pair_in_a_model_is_named(base: Path, tmp_path: Path, name: str) -> None:
    """transformers takes it, and nothing could write it again."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    edited(copy / name, another_key=["one", {"two": f"x{HALF}"}])
    with pytest.raises(ModelError, match=rf"{name} is damaged \(it contains 'x\\ud800', half of a surrogate pair"):
        load_model(copy, device=CPU, dtype=torch.float32, template="vicuna_v1")
    edited(copy / name, another_key="\N{GRINNING FACE}")
    load_model(copy, device=CPU, dtype=torch.float32, template="vicuna_v1")


def test_k49_an_original_checkpoint_with_a_key_that_is_no_part_is_imported(base: Path, tmp_path: Path) -> None:
    export_llava(base, tmp_path / "llava", ExportOptions(template="vicuna_v1"))
    edited(tmp_path / "llava" / "vision_tower" / "config.json", megatron_config="llama")
    import_any(tmp_path / "llava", tmp_path / "imported", ImportOptions())
    load_model(tmp_path / "imported", device=CPU, dtype=torch.float32, template="vicuna_v1")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vision_tower/config.json", {"another_key": HALF}, r"config\.json is damaged \(it contains '\\ud800'"),
        ("config.json", {"mm_projector_type": {}}, r"config\.json: mm_projector_type \{\}, known: mlp2x_gelu, linear"),
    ],
)
def test_k49_a_value_of_an_original_checkpoint_is_named(
    base: Path, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    export_llava(base, tmp_path / "llava", ExportOptions(template="vicuna_v1"))
    edited(tmp_path / "llava" / name, **changes)
    with pytest.raises(ModelError, match=reason):
        import_any(tmp_path / "llava", tmp_path / "imported", ImportOptions())
    assert not (tmp_path / "imported").exists()
