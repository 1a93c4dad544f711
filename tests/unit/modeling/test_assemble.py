"""A LLaVA made of parts: what plain transformers loads is what was put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_llava.errors import ModelError
from lora_llava.modeling.assemble import assemble, part_configs, vision_tower_source
from lora_llava.modeling.base import BaseIdentity, hash_weights, load_base
from lora_llava.recipe.settings import BaseModelSettings
from tests.helpers.tiny import (
    IM_END_ID,
    IMAGE_MEAN,
    IMAGE_SIZE,
    IMAGE_STD,
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE,
    tiny_config,
    tiny_llava,
    tiny_tokenizer,
)


def tokenizer_without_image() -> PreTrainedTokenizerFast:
    """As language models have it: no `<image>`, no padding token."""
    text = tiny_tokenizer().backend_tokenizer.to_str().replace("<image>", "<spare>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_language_model(directory: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    config = tiny_config().text_config
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    tokenizer_without_image().save_pretrained(directory)
    return directory


def save_vision_tower(directory: Path) -> Path:
    torch.manual_seed(2)
    CLIPVisionModel(tiny_config().vision_config).save_pretrained(directory)
    save_image_processor(directory)
    return directory


def save_image_processor(directory: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parts")
    return save_language_model(root / "lm"), save_vision_tower(root / "tower")


def settings(parts: tuple[Path, Path], **changes: Any) -> BaseModelSettings:
    return BaseModelSettings(language_model=str(parts[0]), vision_tower=str(parts[1]), **changes)


@pytest.fixture(scope="module")
def made(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "base"
    assemble(settings(parts), directory, seed=7)
    return directory


def plain(directory: Path) -> Any:
    model, report = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def test_the_weights_are_those_of_the_parts(parts: tuple[Path, Path], made: Path) -> None:
    model = plain(made)
    language_model = LlamaForCausalLM.from_pretrained(parts[0])
    for name, theirs in language_model.model.state_dict().items():
        ours = model.model.language_model.state_dict()[name]
        assert torch.equal(ours[: len(theirs)], theirs), name
    assert torch.equal(model.lm_head.weight[:VOCAB_SIZE], language_model.lm_head.weight)
    tower = CLIPVisionModel.from_pretrained(parts[1]).state_dict()
    ours_tower = model.model.vision_tower.state_dict()
    assert tower.keys() == ours_tower.keys()
    assert all(torch.equal(tower[name], ours_tower[name]) for name in tower)


def test_the_vocabulary_is_padded_and_holds_the_image_token(made: Path) -> None:
    model, tokenizer = plain(made), AutoTokenizer.from_pretrained(made)
    before = tokenizer_without_image()
    assert tokenizer.convert_tokens_to_ids("<image>") == len(before) == model.config.image_token_id
    assert tokenizer("a<image>b", add_special_tokens=False).input_ids[1] == model.config.image_token_id
    assert tokenizer("what is it?").input_ids == before("what is it?").input_ids
    # Markers of a chat template stay special.
    assert tokenizer.decode([IM_END_ID], skip_special_tokens=True) == ""
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == 320
    assert torch.allclose(rows[VOCAB_SIZE], rows[:VOCAB_SIZE].mean(dim=0), atol=1e-6)
    assert torch.equal(rows[VOCAB_SIZE], rows[-1])
    assert tokenizer.pad_token is not None


def test_plain_transformers_runs_it(made: Path) -> None:
    model, processor = plain(made), AutoProcessor.from_pretrained(made)
    inputs = processor(images=Image.new("RGB", (40, 20), "red"), text="<image>\nWhat?", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == NUM_IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert tuple(processor.image_processor.image_mean) == IMAGE_MEAN


def test_the_kit_loads_it(made: Path) -> None:
    loaded = load_base(
        made,
        BaseIdentity("made", None, hash_weights(made)),
        nf4=True,
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert (loaded.image_mean, loaded.image_std, loaded.image_size) == (IMAGE_MEAN, IMAGE_STD, IMAGE_SIZE)
    assert loaded.image_tokens.count == NUM_IMAGE_TOKENS
    assert loaded.config.image_seq_length == NUM_IMAGE_TOKENS


def test_no_path_of_the_parts_is_left_in_it(parts: tuple[Path, Path], made: Path) -> None:
    for file in made.glob("*.json"):
        assert str(parts[0].parent) not in file.read_text(encoding="utf-8"), file.name


def test_the_seed_decides_the_projector(parts: tuple[Path, Path], made: Path, tmp_path: Path) -> None:
    assemble(settings(parts), tmp_path / "same", seed=7)
    assemble(settings(parts), tmp_path / "other", seed=8)
    assert hash_weights(tmp_path / "same") == hash_weights(made) != hash_weights(tmp_path / "other")


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_a_projector_can_start_among_the_word_embeddings(parts: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    language_model = LlamaForCausalLM.from_pretrained(parts[0])
    with torch.no_grad():
        words = language_model.get_input_embeddings().weight
        words.mul_(0.3).add_(torch.linspace(-1, 1, words.shape[1]))
    directory = save_language_model(tmp_path / "lm")
    language_model.save_pretrained(directory)
    assemble(
        settings((directory, parts[1]), mm_projector_type=kind, projector_init="embeddings"), tmp_path / "base", seed=7
    )
    projector = plain(tmp_path / "base").model.multi_modal_projector
    outputs = projector(torch.randn(20_000, projector.linear_1.in_features)).detach()
    assert outputs.std(dim=0).mean() == pytest.approx(words.std(dim=0).mean().item(), rel=0.05)
    torch.testing.assert_close(outputs.mean(dim=0), words.mean(dim=0), atol=0.1 * words.std().item(), rtol=0)


def test_half_precision_tied_embeddings_and_a_linear_projector(tmp_path: Path) -> None:
    language_model = save_language_model(tmp_path / "lm", tied=True, dtype=torch.bfloat16)
    made = settings((language_model, save_vision_tower(tmp_path / "tower")), mm_projector_type="linear")
    assemble(made, tmp_path / "base", seed=0)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    projector = model.model.multi_modal_projector
    assert torch.equal(projector.linear_2.weight, torch.eye(48, dtype=torch.bfloat16))
    features = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(projector(features), projector.linear_1(features))


def test_part_configs_says_what_would_be_made(parts: tuple[Path, Path], made: Path) -> None:
    config, tokenizer, _ = part_configs(settings(parts))
    model = plain(made)
    assert config.text_config.vocab_size == model.config.text_config.vocab_size
    assert config.image_token_id == model.config.image_token_id
    assert config.image_seq_length == NUM_IMAGE_TOKENS
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(made))


@pytest.mark.parametrize("whole", [True, False])
def test_other_architectures_are_refused(parts: tuple[Path, Path], tmp_path: Path, whole: bool) -> None:
    def call(one: BaseModelSettings, directory: Path) -> None:
        if whole:
            assemble(one, directory, seed=0)
        else:
            part_configs(one)

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer_without_image().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"is a 'gpt2' model; needed: one of the Llama architecture"):
        call(settings((tmp_path / "gpt2", parts[1])), tmp_path / "base")
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    save_image_processor(tmp_path / "siglip")
    with pytest.raises(ModelError, match=r"siglip' is not a CLIP vision tower"):
        call(settings((parts[0], tmp_path / "siglip")), tmp_path / "base")
    with pytest.raises(ModelError, match=r"vision tower .*nothing' cannot be loaded"):
        call(settings((parts[0], tmp_path / "nothing")), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_an_unknown_packaged_tower_is_refused() -> None:
    assert vision_tower_source("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    with pytest.raises(ModelError, match="package has no tower 'package:nonsense'"):
        vision_tower_source("package:nonsense")


def test_the_hash_does_not_depend_on_the_shards(tiny_base: Path, tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert hash_weights(tmp_path / "shards") == hash_weights(tiny_base)


def test_the_hash_sees_every_weight(tiny_base: Path, tmp_path: Path) -> None:
    state = load_file(tiny_base / "model.safetensors")
    hashes = {hash_weights(tiny_base)}
    for name, tensor in state.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1e-3
        save_file({**state, name: changed}, tmp_path / "model.safetensors")
        hashes.add(hash_weights(tmp_path))
    assert len(hashes) == len(state) + 1


def test_the_hash_sees_names_shapes_and_types(tmp_path: Path) -> None:
    tensors = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
    ]
    hashes = set()
    for state in tensors:
        save_file(state, tmp_path / "model.safetensors")
        hashes.add(hash_weights(tmp_path))
    assert len(hashes) == len(tensors)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"holds only pickled weights \(pytorch_model.bin\); they can run code and are not read"
    ):
        hash_weights(tmp_path)
