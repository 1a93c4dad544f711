"""A disk that takes no more while a result is written: one line with the file, what is free and what to do."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import save_tensors
from lora_llava.planning.preflight.shipping import refuse_model
from lora_llava.shipping.export import export
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact
from lora_llava.system.files import staged_result
from tests.helpers.artifacts import make_artifact, plain_peft
from tests.helpers.tiny import tiny_llava


@contextmanager
def small_disk() -> Iterator[None]:
    """Files can have 4,096 bytes: the system's error then comes from where the file is written, in Rust too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


CLIP = ExportOptions(vision_tower="openai/clip-vit-large-patch14-336")
WRITERS: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "merge": (lambda artifact, _, out: merge_artifact(artifact, out), "model.safetensors"),
    "hf": (lambda _, model, out: export(model, out, "hf"), "model.safetensors"),
    "llava": (lambda _, model, out: export(model, out, "llava"), "model.safetensors"),
    "llava adapter": (lambda artifact, _, out: export(artifact, out, "llava", CLIP), "adapter_model.safetensors"),
    "vllm": (lambda artifact, _, out: export(artifact, out, "vllm"), "model.safetensors"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_k71_a_full_disk_is_one_line_with_the_file(tiny_base: Path, tmp_path: Path, name: str) -> None:
    write, file = WRITERS[name]
    artifact = make_artifact(tiny_base, tmp_path / "artifact")
    with small_disk(), pytest.raises(ArtifactError) as caught:
        write(artifact, tiny_base, tmp_path / "results" / "out")
    said = str(caught.value)
    assert said.startswith(f"{file} cannot be written to ")
    assert "File too large (" in said and " MiB are free there). Nothing was written; free some space" in said
    assert "os error" not in said
    assert not (tmp_path / "results").exists()


def test_a_disk_without_room_for_the_weights_is_refused_before_they_are_read(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_base / "model.safetensors").stat().st_size
    artifact, out = make_artifact(tiny_base, tmp_path / "artifact"), tmp_path / "results" / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    for model in (artifact, tiny_base):
        refuse_model(model, None, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    for command in ("merge", "export --format hf", "export --format vllm"):
        refused = CliRunner().invoke(cli, [*command.split(), str(artifact), str(out)])
        assert refused.exit_code == 1, refused.output
        assert re.search(r"out takes 0\.0 GiB, as the weights in .*; free some space", refused.stderr), refused.stderr


def test_k71_a_full_disk_while_an_adapter_is_imported(tiny_base: Path, tmp_path: Path) -> None:
    plain_peft(tiny_llava(), tmp_path / "peft")
    with small_disk(), pytest.raises(ArtifactError, match=r"^adapter_model\.safetensors cannot be written to "):
        import_any(tmp_path / "peft", tmp_path / "out", ImportOptions(base_model=str(tiny_base)))
    assert not (tmp_path / "out").exists()


def test_k71_an_error_of_other_files_names_the_result(tmp_path: Path) -> None:
    refused = pytest.raises(ArtifactError, match=r"^out cannot be written to .*: File too large")
    with small_disk(), refused, staged_result(tmp_path / "out") as staging:
        (staging / "card.md").write_text("x" * 9_999, encoding="utf-8")


def test_k71_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_result(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(ValueError, match="not of the disk"), staged_result(tmp_path / "out"):
        raise ValueError("not of the disk")
    with pytest.raises(OSError, match=r"No such file or directory: 'x\.safetensors'"):
        save_tensors({}, tmp_path / "nowhere" / "x.safetensors")
