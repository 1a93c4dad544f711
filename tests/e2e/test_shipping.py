"""merge, export and import through the command line; what comes out is used like any model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava.artifact import Usage, load_model, read_usage, template_to_ask
from lora_llava.cli import cli
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.encode import ImageTokens, Turn, encode, encode_prompt
from lora_llava.conversation.templates import get_template
from lora_llava.data.images.read import preprocess
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import WeightFiles
from lora_llava.shipping.export import FORMATS, hf
from lora_llava.shipping.export import llava as llava_export
from lora_llava.shipping.export.options import ExportOptions
from tests.e2e.test_commands import write_data
from tests.helpers.artifacts import CPU, logits, make_artifact
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, tiny_tokenizer

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merge_report.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tiny_base, tmp_path_factory.mktemp("run") / "instruct", nf4=True)


@pytest.fixture(scope="module")
def merged(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merged") / "model"
    result = run("merge", artifact, directory)
    assert result.exit_code == 0, result.output
    assert "base: dequantized (the adapter was trained on the base in NF4" in result.stdout
    assert "4 of 4 greedy answers the same" in result.stdout
    assert "merged into the original base: largest" in result.stdout
    return directory


def test_the_files_and_the_report(merged: Path, artifact: Path, tiny_base: Path) -> None:
    assert {path.name for path in merged.iterdir()} == MODEL_FILES
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    assert report["probe"]["relative"] < 1e-5 < report["distance_from_trained"]["original"]["relative"]
    assert report["artifact"]["adapter_sha256"]
    for path in merged.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(artifact.parent) not in text, path.name
        assert str(tiny_base) not in text, path.name


def test_merge_fails_with_one_message(artifact: Path, merged: Path, tmp_path: Path) -> None:
    again = run("merge", artifact, merged)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "already exists and is not overwritten" in again.stderr
    wrong = run("merge", merged, tmp_path / "out")
    assert wrong.exit_code == 1
    assert "is not an artifact" in wrong.stderr
    assert run("merge", artifact, tmp_path / "out", "--max-shard-size", "3").exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (28, 28), (33, 61)])
def test_its_processor_makes_the_pixels_of_training(merged: Path, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    theirs = AutoProcessor.from_pretrained(merged, backend="pil")(images=image, text="<image>", return_tensors="pt")
    ours = preprocess(image, size=IMAGE_SIZE, mean=IMAGE_MEAN, std=IMAGE_STD, aspect_ratio="pad")
    assert torch.allclose(theirs["pixel_values"][0], ours, atol=1e-6)


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
@pytest.mark.parametrize("image", [True, False])
def test_its_chat_template_writes_what_was_trained(tiny_base: Path, tmp_path: Path, name: str, image: bool) -> None:
    template = get_template(name, "Be brief." if name == "chatml" else None)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template(template, tokenizer.eos_token)
    first = [{"type": "image"}, {"type": "text", "text": "What is it?"}] if image else "What is it?"
    messages = [{"role": "user", "content": first}]
    turns = [Turn("user", "<image>\nWhat is it?" if image else "What is it?")]
    counts = {"image_tokens": ImageTokens(4, 1), "where": "test"}
    for answer, question in ((None, None), ("a red thing", "Is it red?"), ("yes", "no?")):
        if answer is not None and question is not None:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
            turns += [Turn("assistant", answer), Turn("user", question)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text).input_ids == encode_prompt(turns, template, tokenizer, **counts).input_ids
    messages.append({"role": "assistant", "content": "it is"})
    turns.append(Turn("assistant", "it is"))
    whole = encode(turns, template, tokenizer, max_length=1000, **counts)
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    # Without BOS: a tokenizer adds none to a chat. A processor does, as the next test shows.
    assert made["input_ids"] == whole.input_ids[1:]
    assert sum(made["assistant_masks"]) == whole.num_supervised
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Mine."}, *messages[:1]], tokenize=False)
    assert "Mine." in own
    assert template.system not in own


def test_the_processor_writes_the_prompt_of_training(merged: Path) -> None:
    processor = AutoProcessor.from_pretrained(merged)
    image = Image.new("RGB", (20, 30), "red")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "color?"}]}]
    made = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    loaded, usage = load_model(merged, device=CPU, dtype=torch.float32)
    ours = encode_prompt(
        [Turn("user", "<image>\ncolor?")],
        get_template(**usage.template),
        loaded.tokenizer,
        image_tokens=loaded.image_tokens,
        where="test",
    )
    assert made["input_ids"][0].tolist() == ours.input_ids
    model = LlavaForConditionalGeneration.from_pretrained(merged)
    assert model.generate(**made, max_new_tokens=3, do_sample=False).shape[1] <= len(ours.input_ids) + 3


def test_eval_and_chat_take_a_merged_model(artifact: Path, merged: Path, tmp_path: Path) -> None:
    write_data(tmp_path, 9)
    options = ["--data", tmp_path / "data.json", "--max-new-tokens", "3"]
    for model, output in ((artifact, "a"), (merged, "b")):
        result = run("eval", model, *options, "--no-base", "--output", tmp_path / output)
        assert result.exit_code == 0, result.output
    ours, theirs = ((tmp_path / name / "predictions.jsonl").read_text(encoding="utf-8") for name in ("b", "a"))
    assert ours == theirs
    # A merged model has no base, and says nothing of one.
    assert run("eval", merged, *options, "--output", tmp_path / "c").exit_code == 0
    assert "base" not in json.loads((tmp_path / "c" / "accuracy.json").read_text(encoding="utf-8"))
    chats = [run("chat", model, "--image", tmp_path / "0.png", "color?") for model in (artifact, merged)]
    assert chats[0].exit_code == chats[1].exit_code == 0
    assert chats[0].stdout == chats[1].stdout
    refused = run("eval", merged, *options, "--base", tmp_path, "--output", tmp_path / "d")
    assert "needs no base" in refused.stderr
    nothing = run("chat", tmp_path, "--image", tmp_path / "0.png", "color?")
    assert "neither an artifact" in nothing.stderr


def test_how_a_model_wants_to_be_asked(artifact: Path, merged: Path, tiny_base: Path) -> None:
    assert read_usage(merged) == read_usage(artifact) == Usage({"name": "vicuna_v1", "system": None}, "pad", None)
    # Neither a manifest nor a chat template: nothing is guessed.
    assert read_usage(tiny_base) == Usage(None, "square", None)
    with pytest.raises(ArtifactError, match=r"does not name its template.*--template"):
        template_to_ask(read_usage(tiny_base), tiny_base)
    assert template_to_ask(read_usage(tiny_base, "chatml"), tiny_base) == get_template("chatml")


def test_export_hf(artifact: Path, merged: Path, tiny_base: Path, tmp_path: Path) -> None:
    for source, output in ((artifact, "a"), (merged, "b"), (tiny_base, "c")):
        result = run("export", source, tmp_path / output, "--format", "hf")
        assert result.exit_code == 0, result.output
    wanted = load_file(merged / "model.safetensors")
    for name in ("a", "b"):
        state = load_file(tmp_path / name / "model.safetensors")
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    # A base with short names is written with llava-hf's, and computes the same.
    assert set(WeightFiles(tmp_path / "c")) == set(load_file(tmp_path / "c" / "model.safetensors"))
    models = [LlavaForConditionalGeneration.from_pretrained(one).eval() for one in (tmp_path / "c", tiny_base)]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_export_and_import_of_the_original_layout(
    artifact: Path, merged: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert run("export", merged, tmp_path / "llava", "--format", "llava").exit_code == 0
    assert run("import", tmp_path / "llava", tmp_path / "back").exit_code == 0
    ours, theirs = (load_file(one / "model.safetensors") for one in (tmp_path / "back", merged))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    nameless = run("export", artifact, tmp_path / "lora", "--format", "llava")
    assert nameless.exit_code == 1
    assert "--vision-tower" in nameless.stderr
    assert run("export", artifact, tmp_path / "lora", "--format", "llava", "--vision-tower", "x").exit_code == 0
    assert run("import", tmp_path / "lora", tmp_path / "artifact", "--base-model", tiny_base).exit_code == 0
    assert run("import", tmp_path / "lora", tmp_path / "artifact", "--base-model", tiny_base).exit_code == 1


def test_export_gguf(artifact: Path, merged: Path, tmp_path: Path) -> None:
    result = run("export", merged, tmp_path / "a", "--format", "gguf", "--outtype", "q8_0")
    assert result.exit_code == 0, result.output
    assert "text.gguf, q8_0, 21 tensors; mmproj.gguf, 25 tensors; read back" in result.stdout
    assert "#25814" in result.stdout
    assert run("export", artifact, tmp_path / "b", "--format", "gguf-lora").exit_code == 0
    assert run("export", merged, tmp_path / "a", "--format", "gguf").exit_code == 1
    assert run("export", merged, tmp_path / "c", "--format", "gguf", "--outtype", "q2_k").exit_code == 2
    again = run("export", merged, tmp_path / "c", "--format", "gguf-lora")
    assert "has no adapter" in again.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("layout", ["hf", "llava"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupted_export_leaves_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, where: str
) -> None:
    module = {"hf": hf, "llava": llava_export}[layout]
    original = module.copy_surroundings

    def interrupt(*args: Path) -> None:
        if where == "after":
            original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "copy_surroundings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FORMATS[layout](merged, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_an_export_that_differs_leaves_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """One wrong bit on the way to the disk is found."""
    read = WeightFiles.read
    calls = 0

    def spoilt(self: WeightFiles, name: str) -> torch.Tensor:
        nonlocal calls
        tensor = read(self, name)
        calls += 1
        return -tensor if calls == 1 else tensor

    monkeypatch.setattr(WeightFiles, "read", spoilt)
    result = run("export", merged, tmp_path / "out", "--format", layout)
    assert result.exit_code == 1
    assert "differs between the file and its source" in result.stderr
    assert not list(tmp_path.iterdir())
