"""Settings of a stranger's adapter: what PEFT could not use within bounds is refused before PEFT reads it."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.artifact import add_adapter, load_artifact
from lora_llava.errors import ArtifactError
from lora_llava.formats.adapter_config import is_quick, read_adapter_config
from lora_llava.formats.names import ADAPTER_CONFIG
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.shipping.merge.run import open_source
from tests.helpers.artifacts import CPU, as_earlier, make_artifact

SLOW = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*b",
    ".*.*.*.*x",
    "(x?){40}",
    "(a|aa)(a|aa)(a|aa)$",
    "a?" * 30 + "a" * 30,
    "([a-z.]+)*!",
]
"""Patterns whose matching grows with a high power of the name's length, or exponentially."""
QUICK = [
    r"model\.language_model\..*\.(q_proj|v_proj)",
    r".*\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    r"^(?!.*vision_tower).*(?:q_proj|k_proj|v_proj)",
    "q_proj",
    "|".join(re.escape(f"model.language_model.layers.{n}.mlp.up_proj") for n in range(80)),
]
"""Patterns of the kit and of other tools."""
NAME = "base_model.model.model.language_model.layers.31.self_attn.q_proj.lora_A.default"


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact; not to be written to."""
    return make_artifact(tiny_base, tmp_path_factory.mktemp("adapters") / "artifact")


def changed(artifact: Path, directory: Path, **changes: Any) -> Path:
    """Return a copy of the artifact next to the original, with other settings of its LoRA."""
    copy = artifact.parent / directory.name
    shutil.copytree(artifact, copy, dirs_exist_ok=True)
    data = json.loads((artifact / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    (copy / ADAPTER_CONFIG).write_text(json.dumps({**data, **changes}), encoding="utf-8")
    as_earlier(copy)
    return copy


@pytest.mark.parametrize("pattern", QUICK)
def test_k48_the_patterns_of_today_are_read(pattern: str) -> None:
    assert is_quick(pattern)


@pytest.mark.parametrize("pattern", [*SLOW, "(", "[", "*", "(?P<x>a)" * 200])
def test_k48_a_pattern_without_end_is_told(pattern: str) -> None:
    assert not is_quick(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*!", r"(.|.|.|.)(.|.|.|.).*.*!", r"(?!.*!).*(a|b|c|.)x*!"])
def test_k48_what_is_read_ends(pattern: str) -> None:
    assert is_quick(pattern)
    begin = time.perf_counter()
    for _ in range(3):
        re.fullmatch(rf"(.*\.)?({pattern})$", NAME)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(.*a)*(.*b)*!"),
        ("target_modules", ["q_proj", "(x+)+!"]),
        ("exclude_modules", "([a-z_.]+)+!"),
        ("modules_to_save", ["multi_modal_projector", "(a|a)*!"]),
        ("rank_pattern", {"(.*)*!": 4}),
        ("alpha_pattern", {"(.*)*!": 4}),
        ("layers_pattern", "(x?){60}"),
    ],
)
def test_k48_a_pattern_without_end_stops_chat_and_merge(
    artifact: Path, tmp_path: Path, tiny_base: Path, key: str, value: Any
) -> None:
    copy = changed(artifact, tmp_path, **{key: value})
    begin = time.perf_counter()
    for load in (lambda: open_source(copy, None), lambda: load_artifact(copy, device=CPU, dtype=torch.float32)):
        with pytest.raises(ArtifactError, match=rf"adapter_config\.json: {key}.*could take forever to match"):
            load()
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "r is 1000000000, must be an integer of 1 to 100,000"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', must be a number"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e\\+300"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, must be a number of 0 to below 1"),
        ({"use_dora": "yes"}, "use_dora is 'yes', must be true or false"),
        ({"target_modules": 7}, "target_modules is 7, must be a list of at most 2,000 names"),
        ({"target_modules": ["x"] * 2001}, "target_modules is .*, must be a list of at most 2,000 names"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern is .*, must map at most 2,000 layers to numbers"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LoRA, rsLoRA and DoRA are read"),
        ({"peft_type": "UNHEARD"}, "peft_type 'UNHEARD'"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "megatron_config cannot be read"),
        ({"init_lora_weights": "pissa"}, "which changes the base"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_k49_settings_that_cannot_be_used_are_named(
    artifact: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_adapter_config(changed(artifact, tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged"),
        (b"[]", "contains a list, not a mapping"),
        (b"null", "contains null, not a mapping"),
        (b"\xff\xfe{}", "is damaged"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_k49_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"adapter_config\.json .*{message}.*take it from its source again"):
        read_adapter_config(tmp_path)


def test_k49_another_rank_than_that_of_the_weights_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = changed(artifact, tmp_path, r=90_000)
    for load in (lambda: open_source(copy, None), lambda: load_artifact(copy, device=CPU, dtype=torch.float32)):
        with pytest.raises(ArtifactError, match="has the rank 4, the adapter's settings have 90000"):
            load()
    loaded, _ = load_artifact(artifact, device=CPU, dtype=torch.float32)
    with pytest.raises(ArtifactError, match="has the rank 4, the adapter's settings have 90000"):
        add_adapter(loaded, copy, "start")


def test_k49_patterns_that_are_null_are_empty(artifact: Path, tmp_path: Path) -> None:
    config = read_adapter_config(changed(artifact, tmp_path, rank_pattern=None, alpha_pattern=None))
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    assert Adapter(changed(artifact, tmp_path, rank_pattern=None, alpha_pattern=None)).layers
