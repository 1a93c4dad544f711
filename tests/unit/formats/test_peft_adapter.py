"""PEFT adapters of other tools: read whatever their names, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from lora_llava.artifact import load_artifact, read_manifest
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.templates import get_template
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import WEIGHTS
from lora_llava.formats.peft_adapter import Adapter, merge_lora
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, logits, plain_peft
from tests.helpers.tiny import save_tiny_base

VISION = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"


def make(base: Path, directory: Path, **how: Any) -> torch.Tensor:
    """Save an adapter made with plain PEFT, and return its logits."""
    model = LlavaForConditionalGeneration.from_pretrained(base)
    return logits(plain_peft(model, directory, **how))


def to_old_names(directory: Path) -> None:
    """Rename to what transformers before 4.52 had: the language model was one level deeper, LLaVA one less."""
    state = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        old = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
        old = old.replace("base_model.model.model.multi_modal", "base_model.model.multi_modal")
        old = old.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
        old = old.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")
        state[old] = tensor
    save_file(state, directory / WEIGHTS)


def bring(source: Path, base: Path) -> Path:
    import_any(source, source.with_name("brought"), ImportOptions(base_model=str(base)))
    return source.with_name("brought")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_half", ["weight", "a", "b", "weight a b"])
def test_k32_lora_is_merged_in_fp32_whatever_the_precision_of_each_part(half: torch.dtype, in_half: str) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"weight": (6, 5), "a": (3, 5), "b": (6, 3)}
    parts = {
        name: torch.randn(shape, generator=random).to(half if name in in_half.split() else torch.float32)
        for name, shape in shapes.items()
    }
    merged = merge_lora(parts["weight"], parts["a"], parts["b"], 0.5)
    weight, a, b = (parts[name].double() for name in shapes)
    assert merged.dtype == torch.float32
    assert torch.allclose(merged.double(), weight + 0.5 * b @ a, rtol=1e-6, atol=1e-6)


def test_k32_an_adapter_in_half_precision_is_read_in_fp32(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path)
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(halves, tmp_path / WEIGHTS)
    adapter = Adapter(tmp_path)
    assert adapter.replaced
    for name, half in halves.items():
        assert torch.equal(adapter.read(name), half.float())
        assert adapter.read(name).dtype == torch.float32
        assert adapter.stored(name).dtype == torch.float16


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"projector": False},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": VISION},
        {"target_modules": r".*(language_model.*q_proj|multi_modal_projector\.linear_\d)", "projector": False},
        {"modules_to_save": ["multi_modal_projector", "lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        {"target_modules": r".*language_model.layers.1.*\.(q_proj|up_proj)"},
    ],
    ids=["both", "lora", "rslora", "dora", "vision", "projector-lora", "head", "patterns", "one-block"],
)
def test_it_loads_merges_and_exports(tiny_base: Path, tmp_path: Path, how: dict[str, Any], old: bool) -> None:
    theirs = make(tiny_base, tmp_path / "theirs", **how)
    if old:
        to_old_names(tmp_path / "theirs")
    brought = bring(tmp_path / "theirs", tiny_base)
    ours = logits(load_artifact(brought, device=CPU, dtype=torch.float32)[0].model)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    report = merge_artifact(brought, tmp_path / "merged")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert float((logits(merged) - theirs).norm() / theirs.norm()) < 1e-5
    assert report["probe"]["relative"] < 1e-5
    before = logits(LlavaForConditionalGeneration.from_pretrained(tiny_base).eval())
    assert not torch.allclose(before, theirs, atol=1e-2)
    # Plain PEFT reads what we write of it.
    base = LlavaForConditionalGeneration.from_pretrained(tiny_base)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, str(brought)).eval()), theirs, atol=2e-5)


def test_the_pictures_are_taken_as_its_processor_says(tiny_base: Path, tmp_path: Path) -> None:
    """Other tools crop unless their processor pads; the kit's artifacts pad."""
    make(tiny_base, tmp_path / "a" / "theirs")
    assert read_manifest(bring(tmp_path / "a" / "theirs", tiny_base)).images["image_aspect_ratio"] == "square"
    make(tiny_base, tmp_path / "b" / "theirs")
    (tmp_path / "b" / "theirs" / "preprocessor_config.json").write_text('{"do_pad": true}')
    assert read_manifest(bring(tmp_path / "b" / "theirs", tiny_base)).images["image_aspect_ratio"] == "pad"


def test_lora_elsewhere_has_no_place_in_the_original_layout(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs", target_modules=VISION)
    brought = bring(tmp_path / "theirs", tiny_base)
    with pytest.raises(ArtifactError, match="Merge it, and export the merged model"):
        export_llava(brought, tmp_path / "llava", ExportOptions(vision_tower="x"))
    assert not (tmp_path / "llava").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LoRA"),
        ({"peft_type": "../../x"}, "only LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"use_dora": True}, "must have lora_A, lora_B, lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_other_forms_are_refused(tiny_base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make(tiny_base, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        bring(tmp_path / "theirs", tiny_base)
    assert not (tmp_path / "brought").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, one: {name.replace("layers.1", "layers.7"): one}, "the base has no .*layers.7"),
        (lambda name, one: {name.replace("q_proj", "q_proj.deep"): one}, "the base has no"),
        (lambda name, one: {name.replace("language_model", "audio_model"): one}, "belongs to no part"),
        (lambda name, one: {name: one.new_zeros(3, 3) if "lora_B" in name else one}, "does not fit"),
        (lambda name, one: {name: one / 0}, "NaN or infinity"),
        (lambda name, one: {} if "linear_2.bias" in name else {name: one}, "the projector is incomplete"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tiny_base: Path, tmp_path: Path, change: Any, message: str) -> None:
    make(tiny_base, tmp_path / "theirs")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "theirs" / WEIGHTS).items():
        state |= change(name, tensor)
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ArtifactError, match=message):
        bring(tmp_path / "theirs", tiny_base)
    assert not (tmp_path / "brought").exists()


def test_another_base_and_none(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, tmp_path / "theirs")
    with pytest.raises(ArtifactError, match="--base-model"):
        import_any(tmp_path / "theirs", tmp_path / "out", ImportOptions())
    brought = bring(tmp_path / "theirs", tiny_base)
    other = save_tiny_base(tmp_path / "other", seed=3)
    with pytest.raises(ArtifactError, match="trained on another base"):
        merge_artifact(brought, tmp_path / "merged", base_model=str(other))


def test_k10_an_adapter_of_others_is_asked_as_its_own_chat_template_says(tiny_base: Path, tmp_path: Path) -> None:
    smol = chat_template(get_template("chatml", "You are Smol"), "</s>")
    llava_hf = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
        "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    cases = {
        "none": (None, {"name": "vicuna_v1", "system": None}, "as in LLaVA-1.5; name another with --template"),
        "smol": (smol, {"name": "chatml", "system": "You are Smol"}, "from its chat template"),
        "hf": (llava_hf, {"name": "vicuna_v1", "system": ""}, "from its chat template"),
        "odd": ("[{{ messages|length }}]", {"name": "vicuna_v1", "system": None}, "is none of the kit's; name one"),
    }
    for name, (jinja, template, reason) in cases.items():
        make(tiny_base, tmp_path / name / "theirs")
        if jinja is not None:
            (tmp_path / name / "theirs" / "chat_template.jinja").write_text(jinja)
        lines = import_any(
            tmp_path / name / "theirs", tmp_path / name / "ours", ImportOptions(base_model=str(tiny_base))
        )
        assert read_manifest(tmp_path / name / "ours").template == template, name
        assert reason in lines[-1]
    chosen = ImportOptions(base_model=str(tiny_base), template="chatml")
    import_any(tmp_path / "odd" / "theirs", tmp_path / "odd" / "named", chosen)
    assert read_manifest(tmp_path / "odd" / "named").template == {"name": "chatml", "system": None}
