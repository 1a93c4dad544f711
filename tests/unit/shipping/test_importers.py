"""The original layout there and back, bit by bit; files of others are read for tensors alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from lora_llava.artifact import load_artifact, load_model, read_manifest, read_usage
from lora_llava.cli import cli
from lora_llava.errors import ArtifactError, LoraLlavaError, ModelError, RecipeError
from lora_llava.formats.llava_hf import WeightFiles, write_weights
from lora_llava.formats.llava_original import from_original_name
from lora_llava.formats.names import EMBEDDINGS, HEAD, WEIGHTS
from lora_llava.formats.transformers_4 import join_merges
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, logits, make_artifact
from tests.helpers.tiny import save_tiny_base, tiny_tokenizer

NAMED = ExportOptions(vision_tower="some/tower")


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(directory)
    return {name: files.read(name) for name in files}


@pytest.fixture(scope="module")
def merged(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merged")
    merge_artifact(make_artifact(tiny_base, root / "instruct"), root / "model", dtype=torch.float16)
    return root / "model"


@pytest.fixture(scope="module")
def original(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "llava"
    export_llava(merged, directory, ExportOptions())
    return directory


def test_the_original_names_and_configuration(merged: Path, original: Path) -> None:
    state = load_file(original / "model.safetensors")
    outside = {name for name in state if not name.startswith("model.layers.")}
    projector = {f"model.mm_projector.{place}.{key}" for place in (0, 2) for key in ("weight", "bias")}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *projector}
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    wanted = {
        "model_type": "llava_llama",
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "vocab_size": 304,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
    }
    assert {key: config[key] for key in wanted} == wanted
    tower, report = CLIPVisionModel.from_pretrained(original / "vision_tower", output_loading_info=True)
    assert not any(report.values())
    assert tower.config.image_size == 28
    assert not (original / "processor_config.json").exists()


def test_k57_merges_are_in_the_form_that_old_tokenizers_read(merged: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(merged, source)
    pairs = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "<unk>": 3},
        "merges": [["a", "b"]],
        "unk_token": "<unk>",
    }
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**data, "model": pairs}), encoding="utf-8")
    join_merges(path)
    assert json.loads(path.read_text(encoding="utf-8"))["model"]["merges"] == ["a b"]
    # A space in a token would make them ambiguous.
    ambiguous = {**pairs, "merges": [["a", "b"], ["a b", "b"]]}
    path.write_text(json.dumps({**data, "model": ambiguous}), encoding="utf-8")
    join_merges(path)
    assert json.loads(path.read_text(encoding="utf-8"))["model"]["merges"] == ambiguous["merges"]
    ours = load_model(source, device=CPU, dtype=torch.float32)[0].tokenizer
    export_llava(source, tmp_path / "llava", ExportOptions())
    written = json.loads((tmp_path / "llava" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert written["merges"]
    assert all(isinstance(merge, str) for merge in written["merges"])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "llava" / "tokenizer.json"))
    text = "a <image> of 3 Apples, ASSISTANT: ab"
    assert theirs(text).input_ids == ours(text).input_ids


def test_a_model_there_and_back(merged: Path, original: Path, tmp_path: Path) -> None:
    lines = import_any(original, tmp_path / "back", ImportOptions())
    assert "llava-hf layout" in lines[0]
    same_bits(weights(tmp_path / "back"), weights(merged))
    assert {path.name for path in tmp_path.iterdir()} == {"back"}
    ours, theirs = (load_model(one, device=CPU, dtype=torch.float32) for one in (tmp_path / "back", merged))
    assert torch.equal(logits(ours[0].model), logits(theirs[0].model))
    assert ours[1] == theirs[1]
    assert ours[0].tokenizer("a<image>b").input_ids == theirs[0].tokenizer("a<image>b").input_ids
    before, after = read_config(merged), read_config(tmp_path / "back")
    assert after.text_config.rope_parameters == before.text_config.rope_parameters
    for name in ("image_token_id", "image_seq_length", "vision_feature_layer", "projector_hidden_act"):
        assert getattr(after, name) == getattr(before, name), name
    text = (tmp_path / "back" / "chat_template.jinja").read_text(encoding="utf-8")
    assert text == (merged / "chat_template.jinja").read_text(encoding="utf-8")


def test_pickled_shards_and_a_tower_elsewhere(
    merged: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original was published: pickles, computed buffers in them, the tower by name."""
    source = tmp_path / "original"
    shutil.copytree(original, source)
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    (source / "vision_tower").rename(tmp_path / "tower")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: state[name] for name in part}, source / f"pytorch_model-{number:05}-of-00002.bin")
    options = ImportOptions(vision_tower=str(tmp_path / "tower"), image_aspect_ratio="square")
    with pytest.raises(RecipeError, match=r"merge_report.json says how the model was trained; leave --template and"):
        import_any(source, tmp_path / "back", options)
    (source / "merge_report.json").unlink()
    import_any(source, tmp_path / "back", options)
    same_bits(weights(tmp_path / "back"), weights(merged))
    assert [read_usage(one).image_aspect_ratio for one in (merged, tmp_path / "back")] == ["pad", "square"]
    # Else the name is looked up on the Hub, again and again where there is no network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="vision tower 'vision_tower' cannot be loaded"):
        import_any(source, tmp_path / "again", ImportOptions())


def test_a_vocabulary_without_image_and_padding_grows(merged: Path, original: Path, tmp_path: Path) -> None:
    """Original rows stay as they are; `<image>`, `<pad>` and rows up to a multiple of 64 are added."""
    source = tmp_path / "original"
    shutil.copytree(original, source)
    words = tiny_tokenizer()
    text = words.backend_tokenizer.to_str().replace("<image>", "<spare>").replace("<pad>", "<spare2>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(source)
    rows = len(words)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": rows}), encoding="utf-8")
    state = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows].clone()
    save_file(state, source / "model.safetensors")
    import_any(source, tmp_path / "back", ImportOptions())
    after = read_config(tmp_path / "back")
    assert (after.image_token_id, after.text_config.pad_token_id) == (rows, rows + 1)
    assert after.text_config.vocab_size == 320
    ours = weights(tmp_path / "back")
    for name, theirs in ((EMBEDDINGS, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        assert torch.equal(ours[name][:rows], state[theirs])
        assert torch.equal(ours[name][rows], ours[name][-1])
        assert torch.allclose(ours[name][rows].float(), state[theirs].float().mean(0), atol=1e-3)
    loaded, _ = load_model(tmp_path / "back", device=CPU, dtype=torch.float32)
    assert loaded.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [rows, rows + 1]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_lora_there_and_back(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct", kind=kind)
    export_llava(artifact, tmp_path / "llava-lora", NAMED)
    state = load_file(tmp_path / "llava-lora" / WEIGHTS)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in state
    assert not any("language_model" in name or "projector" in name for name in state)
    rest = torch.load(tmp_path / "llava-lora" / "non_lora_trainables.bin", weights_only=True)
    assert sorted(rest)[0] == "base_model.model.model.mm_projector.0.bias"
    assert json.loads((tmp_path / "llava-lora" / "config.json").read_text())["mm_vision_tower"] == "some/tower"
    import_any(tmp_path / "llava-lora", tmp_path / "back", ImportOptions(base_model=str(tiny_base)))
    same_bits(load_file(tmp_path / "back" / WEIGHTS), load_file(artifact / WEIGHTS))
    ours, theirs = (load_artifact(one, device=CPU, dtype=torch.float32)[0] for one in (tmp_path / "back", artifact))
    assert torch.equal(logits(ours.model), logits(theirs.model))


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("instruct", {"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ("instruct", {"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ("align", {"mm_use_im_start_end": True}, "mm_use_im_start_end puts tokens around the image"),
    ],
)
def test_an_adapter_trained_with_other_images_is_refused(
    tiny_base: Path, tmp_path: Path, stage: Any, change: dict[str, Any], message: str
) -> None:
    """Its tensors fit the base, so only its config.json tells."""
    export_llava(make_artifact(tiny_base, tmp_path / "artifact", stage), tmp_path / "llava-lora", NAMED)
    config = json.loads((tmp_path / "llava-lora" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "llava-lora" / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        import_any(tmp_path / "llava-lora", tmp_path / "back", ImportOptions(base_model=str(tiny_base)))
    assert not (tmp_path / "back").exists()


def test_the_old_pickled_lora(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "instruct")
    export_llava(artifact, tmp_path / "old", NAMED)
    torch.save(load_file(tmp_path / "old" / WEIGHTS), tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / WEIGHTS).unlink()
    import_any(tmp_path / "old", tmp_path / "back", ImportOptions(base_model=str(tiny_base)))
    same_bits(load_file(tmp_path / "back" / WEIGHTS), load_file(artifact / WEIGHTS))


def test_a_projector_there_and_back(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "align", "align")
    export_llava(artifact, tmp_path / "llava", NAMED)
    assert {path.name for path in (tmp_path / "llava").iterdir()} == {"config.json", "mm_projector.bin"}
    stored = torch.load(tmp_path / "llava" / "mm_projector.bin", weights_only=True)
    assert {from_original_name(name) for name in stored} == {
        f"multi_modal_projector.linear_{n}.{key}" for n in (1, 2) for key in ("weight", "bias")
    }
    for source in (tmp_path / "llava", tmp_path / "llava" / "mm_projector.bin"):
        back = tmp_path / f"back-{source.name}"
        import_any(source, back, ImportOptions(base_model=str(tiny_base)))
        same_bits(load_file(back / WEIGHTS), load_file(artifact / WEIGHTS))
        assert read_manifest(back).stage == "align"


def test_a_linear_projector(tmp_path: Path) -> None:
    """LLaVA's first projector: one layer there, that and the identity here."""
    base = save_tiny_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "projector_hidden_act": "linear"}), encoding="utf-8")
    state = {name: one.clone() for name, one in weights(base).items()}
    state["multi_modal_projector.linear_2.weight"] = torch.eye(48)
    state["multi_modal_projector.linear_2.bias"] = torch.zeros(48)
    (base / "model.safetensors").unlink()
    write_weights(base, iter(state.items()))
    export_llava(base, tmp_path / "llava", ExportOptions())
    names = {name for name in load_file(tmp_path / "llava" / "model.safetensors") if "mm_projector" in name}
    assert names == {"model.mm_projector.weight", "model.mm_projector.bias"}
    import_any(tmp_path / "llava", tmp_path / "back", ImportOptions())
    same_bits(weights(tmp_path / "back"), state)
    state["multi_modal_projector.linear_2.bias"] += 1
    write_weights(base, iter(state.items()))
    with pytest.raises(ArtifactError, match="not the identity"):
        export_llava(base, tmp_path / "refused", ExportOptions())
    assert not (tmp_path / "refused").exists()


def base_with(directory: Path, **text: Any) -> Path:
    """Write a tiny base with other settings of its language model."""
    base = save_tiny_base(directory)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= text
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return base


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaled_rotary_positions_are_in_the_form_that_the_original_reads(tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "factor": 4, "rope_theta": 5000.0}
    base = base_with(tmp_path / "base", rope_parameters=rope)
    export_llava(base, tmp_path / "llava", ExportOptions())
    written = json.loads((tmp_path / "llava" / "config.json").read_text(encoding="utf-8"))
    # LlamaConfig._rope_scaling_validation of transformers 4.37.2: two fields, the factor a float.
    assert written["rope_scaling"] == {"type": kind, "factor": 4.0}
    assert isinstance(written["rope_scaling"]["factor"], float)
    assert written["rope_theta"] == 5000.0
    import_any(tmp_path / "llava", tmp_path / "back", ImportOptions())
    ours, theirs = (read_config(one).text_config.rope_parameters for one in (tmp_path / "back", base))
    assert {key: ours[key] for key in rope} == {key: theirs[key] for key in rope} == rope


def test_what_the_original_would_load_differently_is_refused(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 1e4,
    }  # fmt: skip
    base = base_with(tmp_path / "base", rope_parameters=llama3, mlp_bias=True)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "multimodal_projector_bias": False}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        export_llava(base, tmp_path / "llava", ExportOptions())
    assert [reason.partition(":")[0] for reason in str(caught.value).split("; ")] == [
        "multimodal_projector_bias false", "mlp_bias true", "rope_type llama3",
    ]  # fmt: skip
    assert not (tmp_path / "llava").exists()


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("place", ["mm_projector.bin", "adapter_model.bin", "non_lora_trainables.bin", "checkpoint"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(
    tiny_base: Path, original: Path, tmp_path: Path, place: str, old: bool
) -> None:
    source = tmp_path / "source"
    if place == "checkpoint":
        shutil.copytree(original, source)
        (source / "model.safetensors").unlink()
        file = source / "pytorch_model.bin"
    else:
        export_llava(make_artifact(tiny_base, tmp_path / "a", "instruct"), source, NAMED)
        file = source / place
        if place == "adapter_model.bin":
            (source / WEIGHTS).unlink()
    mark = tmp_path / "it-ran"
    data = {"model.mm_projector.0.weight": Malicious(mark)}
    file.unlink(missing_ok=True)
    if old:
        file.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, file)
    target = file if place == "mm_projector.bin" else source
    with pytest.raises(LoraLlavaError, match=r"holds more than tensors, and was refused; nothing in it was run"):
        import_any(target, tmp_path / "out", ImportOptions(None if place == "checkpoint" else str(tiny_base)))
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(data))
    assert mark.exists(), "it would not have run anyway, so nothing was shown"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "not an original LLaVA-1.5"),
        ({"mm_projector_type": "mlp4x_gelu"}, "mm_projector_type 'mlp4x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
    ],
)
def test_other_models_of_the_original_code_are_refused(
    original: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = tmp_path / "original"
    shutil.copytree(original, source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        import_any(source, tmp_path / "out", ImportOptions())
    assert not (tmp_path / "out").exists()


def test_what_needs_no_import(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_base, tmp_path / "align", "align")
    for source, message in ((artifact, "is already an artifact"), (tiny_base, "already in the llava-hf layout")):
        with pytest.raises(ArtifactError, match=message):
            import_any(source, tmp_path / "out", ImportOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="nothing that can be imported"):
        import_any(tmp_path / "empty", tmp_path / "out", ImportOptions())
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (1, f"Error: {tmp_path / 'nowhere'} does not exist\n")
