"""The model card: it says what the run says, in a form that the Hub reads, and its code loads the model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_llava.artifact import MANIFEST, load_model, template_to_ask
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.record import ImageSource, Record
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import ADAPTER_CONFIG, WEIGHTS
from lora_llava.generation.answers import PromptFormat, generate_answers, image_tensor, last_question
from lora_llava.modeling.base import disable_cpu_repacking
from lora_llava.recipe.file import bundled_recipes, dump_portable, dump_resolved, load_recipe
from lora_llava.shipping.hub.card import check_card, is_unedited, make_card
from lora_llava.shipping.hub.content import collect
from lora_llava.shipping.hub.facts import gather
from lora_llava.shipping.hub.licenses import LICENSES
from lora_llava.shipping.hub.prepare import prepare
from lora_llava.shipping.hub.usage import vllm_commands
from lora_llava.shipping.merge.run import merge_artifact
from lora_llava.system.files import file_sha256
from tests.helpers.artifacts import CPU, as_earlier, logits, make_artifact
from tests.helpers.card_rules import card_errors

PICTURES = Path(__file__).parents[3] / "docs" / "results" / "quickstart"
SUMMARY = Path(__file__).parents[2] / "fixtures" / "quickstart_run" / "summary.json"
"""Of one run of the quickstart; the figures below are its."""
REPO = "someone/shapes"


def make_run(
    base: Path, directory: Path, recipe: str = "quickstart", *, base_id: str | None = None, **how: Any
) -> Path:
    """A run as `finetune` leaves it, with a tiny model in it and the quickstart's results; returns its artifact."""
    made = make_artifact(base, directory / "instruct", **how)
    (made / "recipe.yaml").write_text(dump_resolved(load_recipe(bundled_recipes()[recipe]), made), encoding="utf-8")
    if base_id:
        change(made / MANIFEST, lambda data: data["base"].update(name=base_id, revision="a" * 40, path=None))
    (directory / "evaluation").mkdir()
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    summary["hardware"] = "CPU (x86_64), 2 threads"
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (directory / "evaluation" / "accuracy.json").write_text(json.dumps(summary["evaluation"]), encoding="utf-8")
    shutil.copy(PICTURES / "loss.png", directory)
    shutil.copy(PICTURES / "samples.png", directory / "evaluation")
    return made


def change(path: Path, alter: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    alter(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_the_card_of_a_run(tiny_base: Path, tmp_path: Path) -> None:
    facts = gather(make_run(tiny_base, tmp_path / "run", nf4=True), None)
    text = make_card(facts, REPO)
    card = ModelCard(text)
    # Through the Hub's own reader and back, nothing changes.
    assert str(card) == text
    assert card_errors(text) == []
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "image-text-to-text", "apache-2.0")
    assert {"llava", "lora", "qlora"} <= set(data["tags"])
    assert "base_model" not in data
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == 0.862
    assert metrics[0]["name"] == "exact match, all, 2,000 questions (95 % interval 84.6 to 87.6 %)"
    for said in (
        "| all             |      2000 | 0.0 (0.0-1.3) | 86.2 (84.6-87.6) |",
        "| all             |       955 | 87.3 (85.1-89.3) | 67.4 (64.4-70.3) |",
        "2,000 questions about 204 images of `test.json`",
        "![questions about test images, with the answers](samples.png)",
        "![loss by optimizer step](loss.png)",
        "**The base is not on the Hub:** it was a local directory",
        "easy-VQA, MIT",
        "Hardware: CPU (x86_64), 2 threads",
        "Time: 16 min",
        "Peak memory: 2.8 GiB",
        "torch 2.",
        "| learning rate | 0.001 | 0.0007 |",
        "NF4, double quantized, computed in float32",
        "--format vllm --base-model path/to/the/base",
        "--format gguf",
    ):
        assert said in text, said
    assert str(tmp_path) not in text
    assert {file.name for file in collect(facts).files} >= {"loss.png", "samples.png"}


@pytest.mark.parametrize(("metric", "expected"), [("exact_match", "accuracy"), ("token_f1", "f1")])
def test_the_metadata_name_the_metric(tiny_base: Path, tmp_path: Path, metric: str, expected: str) -> None:
    made = make_run(tiny_base, tmp_path / "run")
    change(tmp_path / "run/evaluation/accuracy.json", lambda data: data.update(metric=metric))
    data = ModelCard(make_card(gather(made, None), REPO)).data.to_dict()
    assert data["metrics"] == [expected]
    [kind] = {result["metrics"][0]["type"] for result in data["model-index"][0]["results"]}
    assert kind == expected


def test_results_without_a_metric_are_those_of_vqa_v2(tiny_base: Path, tmp_path: Path) -> None:
    artifact = make_run(tiny_base, tmp_path / "run")
    change(tmp_path / "run/evaluation/accuracy.json", lambda data: data.pop("metric"))
    text = make_card(gather(artifact, None), REPO)
    names = [result["metrics"][0]["name"] for result in ModelCard(text).data.to_dict()["model-index"][0]["results"]]
    assert {name.partition(",")[0] for name in names} == {"VQA v2"}
    assert "exact match after the normalization of VQA v2" in text


def test_the_command_for_vllm_has_room_for_the_largest_rank(tiny_base: Path, tmp_path: Path) -> None:
    facts = gather(make_run(tiny_base, tmp_path / "run"), None)
    assert "--max-lora-rank 8 " in vllm_commands(facts, REPO)
    ranks = {r"layers\.0\..*q_proj": 2, r"layers\.1\..*q_proj": 40}
    change(facts.directory / ADAPTER_CONFIG, lambda data: data.update(rank_pattern=ranks))
    assert "--max-lora-rank 64 " in vllm_commands(facts, REPO)
    change(facts.directory / ADAPTER_CONFIG, lambda data: data["rank_pattern"].update({r"layers\.1\..*q_proj": 600}))
    assert "lora-llava merge" in vllm_commands(facts, REPO)


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json"])
def test_an_adapter_is_not_published_without_a_file_that_it_needs(tiny_base: Path, tmp_path: Path, name: str) -> None:
    facts = gather(make_run(tiny_base, tmp_path / "run"), None)
    (facts.directory / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing; the model cannot be used without it"):
        collect(facts)


def test_a_base_on_the_hub_is_named(tiny_base: Path, tmp_path: Path) -> None:
    made = make_run(tiny_base, tmp_path / "run", "medical_vqa", base_id="llava-hf/llava-1.5-7b-hf", nf4=True)
    text = make_card(gather(made, None), REPO)
    data = ModelCard(text).data.to_dict()
    assert card_errors(text) == []
    assert (data["base_model"], data["base_model_relation"]) == ("llava-hf/llava-1.5-7b-hf", "adapter")
    assert data["datasets"] == ["flaviagiammarino/vqa-rad"]
    found = data["model-index"][0]["results"][0]["dataset"]
    assert found == {"name": "flaviagiammarino/vqa-rad", "type": "flaviagiammarino/vqa-rad", "split": "test"}
    assert "medical" in data["tags"]
    assert "NOT FOR CLINICAL USE" in text
    assert f'revision="{"a" * 40}"' in text


def test_the_card_of_a_merged_model(tiny_base: Path, tmp_path: Path) -> None:
    made = make_run(tiny_base, tmp_path / "run", nf4=True)
    merge_artifact(made, tmp_path / "merged")
    alone = make_card(gather(tmp_path / "merged", None), REPO)
    assert "Results" not in alone
    text = make_card(gather(tmp_path / "merged", tmp_path / "run"), REPO)
    assert card_errors(text) == card_errors(alone) == []
    assert ModelCard(text).data.library_name == "transformers"
    assert "86.2 (84.6-87.6)" in text
    assert f"vllm serve {REPO}" in text
    assert "Merged into the dequantized base" in text
    # A model that is not of the kit's making has a card too, which claims nothing.
    (tmp_path / "merged" / "merge_report.json").unlink()
    config = tmp_path / "merged" / "config.json"
    change(config, lambda data: data["text_config"].update(_name_or_path="/data/secret/vicuna"))
    change(config, lambda data: data["vision_config"].update(_name_or_path="openai/clip"))
    sent = {file.name: file.content for file in prepare(tmp_path / "merged", REPO).files}["config.json"]
    assert isinstance(sent, bytes)
    assert b"secret" not in sent
    assert b"openai/clip" in sent
    bare = make_card(gather(tmp_path / "merged", None), REPO)
    assert card_errors(bare) == []
    assert "does not record how it was trained" in bare


def test_an_earlier_stage_has_no_results_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    made = make_run(tiny_base, tmp_path / "run")
    align = make_artifact(tiny_base, tmp_path / "run" / "align", "align")
    shutil.copy(made / "recipe.yaml", align)
    facts = gather(align, None)
    assert not facts.accuracy
    assert set(facts.pictures) == {"loss.png"}
    text = make_card(facts, REPO)
    assert "86.2" not in text
    assert "instruct" not in text
    assert "lora-llava merge shapes shapes-merged" in text


def test_the_results_of_another_run_are_not_taken(tiny_base: Path, tmp_path: Path) -> None:
    """A run is known by the weights it holds: an artifact copied next to its files is not part of it."""
    made = make_run(tiny_base, tmp_path / "run")
    assert gather(made, None).summary
    moved = tmp_path / "run" / "mine"
    shutil.copytree(made, moved)
    assert gather(moved, None).summary
    weights = moved / WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    as_earlier(moved, adapter_sha256=file_sha256(weights))
    facts = gather(moved, None)
    assert not (facts.summary or facts.accuracy or facts.pictures)
    with pytest.raises(ArtifactError, match="was not written by the run"):
        gather(moved, tmp_path / "run")


@pytest.mark.parametrize(("merged", "nf4"), [(False, False), (False, True), (True, False)])
def test_k69_its_code_loads_the_model_and_gives_the_kits_answer(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: bool, nf4: bool
) -> None:
    source = made = make_run(tiny_base, tmp_path / "run", nf4=nf4)
    if merged:
        source = tmp_path / "merged"
        merge_artifact(made, source)
    base = None if merged else str(tiny_base)
    # Loaded first: on some CPUs, bitsandbytes repacks 4-bit weights once the card's model has answered.
    loaded, usage = load_model(source, device=CPU, dtype=torch.float32, base=base)
    text = make_card(gather(source, None), REPO)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    code = code.replace(REPO, str(source)).replace("path/to/the/base", str(tiny_base))
    monkeypatch.chdir(tmp_path)
    pattern = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pattern.numpy()).save("image.png")
    # The card's own calls, with its 4-bit layers as they compute on every CPU.
    code = code.replace("inputs = ", "disable_cpu_repacking(model)\ninputs = ")
    asked: dict[str, Any] = {"disable_cpu_repacking": disable_cpu_repacking}
    exec(code, asked)  # the code of the card is what is tested
    template = template_to_ask(usage, source)
    image = ImageSource("image.png", Path("image.png"), None)
    record = Record("image", image, (Turn("user", f"{IMAGE_PLACEHOLDER}\n{asked['question']}"),), asked["question"])
    prompt = last_question(
        loaded, record, template, lambda picture: image_tensor(loaded, picture, usage.image_aspect_ratio)
    )
    assert asked["inputs"]["input_ids"][0].tolist() == prompt.input_ids
    ours = logits(loaded.model)
    assert float((logits(asked["model"]) - ours).norm() / ours.norm()) < 1e-5
    [answer] = generate_answers(loaded, [record], PromptFormat(template, usage.image_aspect_ratio), max_new_tokens=64)
    generated = asked["output"][0, len(prompt.input_ids) :]
    assert asked["processor"].decode(generated, skip_special_tokens=True).strip() == answer


def test_a_license_must_be_one_that_the_hub_knows(tiny_base: Path, tmp_path: Path) -> None:
    made = make_run(tiny_base, tmp_path / "run")
    recipe = made / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    for license_id, message in (("Apache 2", "is not a license id of the Hub"), ("other", "card.license_name")):
        recipe.write_text(text.replace("license: apache-2.0", f"license: {license_id}"), encoding="utf-8")
        with pytest.raises(ArtifactError, match=message):
            make_card(gather(made, None), REPO)
    recipe.write_text(text.replace("license: apache-2.0", "license: null"), encoding="utf-8")
    card = make_card(gather(made, None), REPO)
    assert "No license is stated for these weights" in card
    assert card_errors(card) == []
    for license_id in ("apache-2.0", "mit", "llama2", "cc-by-nc-4.0", "other"):
        assert license_id in LICENSES
    check_card("no metadata at all", "README.md")


@pytest.mark.parametrize("path", bundled_recipes().values(), ids=lambda path: path.stem)
def test_every_recipe_says_its_licenses(path: Path) -> None:
    card = load_recipe(path).card
    assert card.license in LICENSES
    assert card.base_license
    assert card.data_license
    assert card.intended_use
    assert ("NOT FOR CLINICAL USE" in card.intended_use) is (path.stem == "medical_vqa")


def test_k72_images_of_the_data_stay_here_unless_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    made = make_run(tiny_base, tmp_path / "run")
    usual, asked = prepare(made, REPO), prepare(made, REPO, samples=True)
    assert {file.name for file in asked.files} - {file.name for file in usual.files} == {"samples.png"}
    assert "samples.png" not in usual.card
    assert "loss.png" in usual.card
    assert "samples.png" in asked.card
    assert (usual.withheld, asked.withheld) == (["samples.png"], [])
    # The list says which files show data: those alone.
    assert [file.name for file in asked.files if file.shows_data] == ["samples.png"]
    assert [file.name for file in usual.files if file.shows_data] == []
    (tmp_path / "run" / "evaluation" / "samples.png").unlink()
    with pytest.raises(
        ArtifactError, match=r"--samples has no effect: the run of .* has no samples\.png; name its run"
    ):
        prepare(made, REPO, samples=True)


def test_an_edited_card_is_known(tiny_base: Path, tmp_path: Path) -> None:
    text = make_card(gather(make_run(tiny_base, tmp_path / "run"), None), REPO)
    assert is_unedited(text)
    assert not is_unedited(text.replace("apache-2.0", "mit"))
    assert not is_unedited(text + "more\n")
    assert not is_unedited("---\nlicense: mit\n---\n")


def test_a_published_recipe_has_names_and_no_places(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "version: 1\nname: a\noutput_dir: /home/me/run\nstart_from: ../../me/align\n"
        "base: {model_name_or_path: org/model}\n"
        "stages: {instruct: {data: {path: /home/me/train.json, image_root: ../.., validation: {path: ~/v.json}}}}\n"
        "evaluation: {data: {path: org/set, exclude: ./skip.jsonl}}\n",
        encoding="utf-8",
    )
    text = dump_portable(path)
    assert "me" not in text.replace("name", "")
    for said in ("start_from: ./align", "org/model", "path: ./train.json", "./v.json", "org/set", "./skip.jsonl"):
        assert said in text, said
