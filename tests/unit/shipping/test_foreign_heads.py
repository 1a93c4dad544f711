"""Adapters of other tools with lm_head or embeddings among what they train: read, or refused for the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import load_artifact
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import WEIGHTS
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, logits, plain_peft
from tests.helpers.tiny import save_tiny_base

WITH_HEAD = r".*(language_model.*\.q_proj|lm_head)"


def tie(base: Path) -> Path:
    """Make the lm_head of a base its embeddings."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = load_file(base / "model.safetensors")
    state = {name: one for name, one in state.items() if "lm_head" not in name}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    return base


# PEFT says that it saves the base's embeddings too, and that they are tied to the lm_head.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]


def make(base: Path, directory: Path, **how: Any) -> torch.Tensor:
    return logits(plain_peft(LlavaForConditionalGeneration.from_pretrained(base), directory, **how))


def bring(source: Path, base: Path) -> Path:
    import_any(source, source.with_name("brought"), ImportOptions(base_model=str(base)))
    return source.with_name("brought")


def test_k60_lora_on_lm_head_is_imported_without_the_copies_that_peft_adds(tiny_base: Path, tmp_path: Path) -> None:
    theirs = make(tiny_base, tmp_path / "theirs", target_modules=WITH_HEAD)
    names = set(load_file(tmp_path / "theirs" / WEIGHTS))
    assert any(name.endswith("lm_head.base_layer.weight") for name in names)
    brought = bring(tmp_path / "theirs", tiny_base)
    assert not any("base_layer" in name or "embed_tokens" in name for name in load_file(brought / WEIGHTS))
    ours = logits(load_artifact(brought, device=CPU, dtype=torch.float32)[0].model)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    assert merge_artifact(brought, tmp_path / "merged")["probe"]["relative"] < 1e-5


def test_k60_on_a_base_with_tied_embeddings_the_reason_is_said(tmp_path: Path) -> None:
    base = tie(save_tiny_base(tmp_path / "base"))
    make(base, tmp_path / "head" / "theirs", target_modules=WITH_HEAD)
    saved = ["multi_modal_projector", "embed_tokens"]
    make(base, tmp_path / "embeddings" / "theirs", modules_to_save=saved)
    for name in ("head", "embeddings"):
        with pytest.raises(ArtifactError, match=r"which this base has as one weight \(tie_word_embeddings\)"):
            bring(tmp_path / name / "theirs", base)
        assert not (tmp_path / name / "brought").exists()


def test_k60_a_copy_that_is_not_the_bases_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs", target_modules=WITH_HEAD)
    state = load_file(tmp_path / "theirs" / WEIGHTS)
    state = {name: one + 1 if name.endswith("base_layer.weight") else one for name, one in state.items()}
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"holds a copy of .*lm_head.* that differs from the base's"):
        bring(tmp_path / "theirs", tiny_base)
