"""Where answers end: plain `generate` on what leaves the kit stops where `chat` does."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import models
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration

from lora_llava.artifact import load_model
from lora_llava.conversation.encode import ImageTokens, Turn, encode
from lora_llava.conversation.endings import end_token_ids, stated_ends, taught_ends
from lora_llava.conversation.templates import TEMPLATES, get_template
from lora_llava.data.record import ImageSource
from lora_llava.errors import ModelError
from lora_llava.generation.chat import Chat
from lora_llava.shipping.export import FORMATS
from lora_llava.shipping.export.gguf.tokenizer import tokenizer_fields
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.hub.facts import gather
from lora_llava.shipping.hub.usage import python_code
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU
from tests.helpers.speaking import QUESTION, chain_of, say, write_artifact, write_base
from tests.helpers.tiny import EOS_ID, IM_END_ID, tiny_tokenizer

SENTENCEPIECE = Path(__file__).parents[1] / "fixtures" / "llava_v15_encoding" / "tokenizer"
SPACE = "\u2581"
"""The mark of a space in SentencePiece."""
MARKERS = ["<|im_start|>", "<|im_end|>"]
MAX_NEW_TOKENS = 9


@lru_cache
def sentencepiece() -> Any:
    """Vicuna's with a thousand of its pieces and all letters: the whole one takes seconds to write and to read."""
    tokenizer = AutoTokenizer.from_pretrained(SENTENCEPIECE)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=lambda piece: int(model["vocab"][piece]))
    pieces = [piece for index, piece in enumerate(pieces) if index < 1000 or (piece.isascii() and len(piece) == 1)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, SPACE])}
    merges = [(left, right) for left, right in model["merges"] if {left, right, left + right} <= vocabulary.keys()]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer.backend_tokenizer.model = models.BPE(vocabulary, merges, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *MARKERS]})
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


TOKENIZERS = {"bpe": tiny_tokenizer, "bpe_without_bos": lambda: tiny_tokenizer(add_bos=False), "spm": sentencepiece}


def shipped(artifact: Path, base: Path, out: Path) -> dict[str, tuple[Any, Path]]:
    """Every form that leaves the kit: a model as plain transformers has it, and the directory it is from."""
    merge_artifact(artifact, out / "merged")
    FORMATS["hf"](artifact, out / "hf", ExportOptions())
    FORMATS["hf"](out / "merged", out / "hf of merged", ExportOptions())
    FORMATS["llava"](out / "merged", out / "llava", ExportOptions())
    FORMATS["vllm"](artifact, out / "vllm", ExportOptions())
    load = LlavaForConditionalGeneration.from_pretrained
    forms = {name: (load(out / name), out / name) for name in ("merged", "hf", "hf of merged")}
    forms["vllm"] = (PeftModel.from_pretrained(load(out / "vllm/base"), out / "vllm/adapter"), out / "vllm/base")
    forms["artifact"] = (PeftModel.from_pretrained(load(base), artifact), artifact)
    # The original's code reads the same file around the same weights.
    forms["llava"] = (load(out / "merged"), out / "llava")
    return forms


def generated(model: Any, directory: Path, form: str, image: Image.Image) -> list[int]:
    """What plain transformers says, its prompt included in nothing of the kit's."""
    processor = AutoProcessor.from_pretrained(directory if form != "llava" else directory.parent / "merged")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    config = GenerationConfig.from_pretrained(directory) if form in ("artifact", "llava") else None
    output = model.generate(**inputs, generation_config=config, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answer: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_k9_plain_generate_stops_where_chat_does(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer, template = TOKENIZERS[kind](), get_template(name)
    own_end = int(tokenizer.convert_tokens_to_ids("<unk>"))
    base = write_base(tmp_path / "base", tokenizer, own_end)
    image = Image.new("RGB", (28, 28), (200, 30, 30))
    image.save(tmp_path / "a.png")
    # The base's own end, its tokenizer's, and the one that is taught.
    ends = list(dict.fromkeys([own_end, tokenizer.eos_token_id, *taught_ends(template, tokenizer)[-1:]]))
    for end in ends:
        chain = chain_of(template, tokenizer, end)
        say(base, chain)
        out = tmp_path / str(end)
        artifact = write_artifact(base, out / "artifact", name)
        loaded, usage = load_model(artifact, device=CPU, dtype=torch.float32)
        chat = Chat(loaded, usage, ImageSource("a.png", tmp_path / "a.png", None), MAX_NEW_TOKENS)
        said = chat.ask(QUESTION)
        assert said == tokenizer.decode(chain[1:3]).strip(), "the model does not say what it was made to say"
        # All forms with the taught end; with the others, which come from the base, one that is as good as all.
        forms = shipped(artifact, base, out) if end == ends[-1] else {"artifact": (loaded.model, artifact)}
        for form, (model, directory) in forms.items():
            assert generated(model, directory, form, image) == chain[1:4], (form, end)
            assert set(ends) <= set(stated_ends(directory)), form


def test_k9_the_cards_code_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, template = tiny_tokenizer(), get_template("chatml")
    base = write_base(tmp_path / "base", tokenizer, EOS_ID)
    say(base, chain_of(template, tokenizer, IM_END_ID))
    artifact = write_artifact(base, tmp_path / "artifact", "chatml")
    merge_artifact(artifact, tmp_path / "merged")
    Image.new("RGB", (28, 28)).save(tmp_path / "image.png")
    (artifact / "recipe.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    for source in (artifact, tmp_path / "merged"):
        code = python_code(gather(source, None), str(source)).replace("path/to/the/base", str(base))
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(code, {})  # what a reader of the card would run
        assert shown.getvalue().strip() == tokenizer.decode(chain_of(template, tokenizer, IM_END_ID)[1:3]).strip()


def test_k9_all_ends_of_a_base_are_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = write_base(tmp_path / "base", tokenizer, EOS_ID)
    settings = {"eos_token_id": [3, EOS_ID], "do_sample": True, "temperature": 0.5, "pad_token_id": 3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    artifact = write_artifact(base, tmp_path / "artifact", "chatml")
    merge_artifact(artifact, tmp_path / "merged")
    for directory in (artifact, tmp_path / "merged"):
        found = json.loads((directory / "generation_config.json").read_text())
        assert found == {**settings, "eos_token_id": [3, EOS_ID, IM_END_ID], "bos_token_id": 1}


def test_k9_a_model_merged_before_is_exported_with_all_its_ends(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = write_base(tmp_path / "base", tokenizer, EOS_ID)
    merge_artifact(write_artifact(base, tmp_path / "artifact", "chatml"), tmp_path / "merged")
    (tmp_path / "merged/generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
    # Earlier versions recorded no identity, either.
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    del report["identity"]
    (tmp_path / "merged/merge_report.json").write_text(json.dumps(report))
    for layout in ("hf", "llava"):
        FORMATS[layout](tmp_path / "merged", tmp_path / layout, ExportOptions())
        assert stated_ends(tmp_path / layout) == [EOS_ID, IM_END_ID]
    fields = tokenizer_fields(tmp_path / "merged", 320, get_template("chatml"))
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")] == [EOS_ID, IM_END_ID]


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("answer", ["no", "a red thing.", "3", "x \n y", "ends in a space ", "日本"])
def test_k9_the_taught_end_is_the_last_supervised_token(name: str, kind: str, answer: str) -> None:
    tokenizer, template = TOKENIZERS[kind](), get_template(name)
    turns = [Turn("user", "<image>\n?"), Turn("assistant", answer)]
    sizes: dict[str, Any] = {"image_tokens": ImageTokens(6, 1), "max_length": 999, "where": "a record"}
    assert encode(turns, template, tokenizer, **sizes).labels[-1] in taught_ends(template, tokenizer)


def test_k9_an_end_that_joins_the_answer_is_one_too() -> None:
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = backend["model"]["vocab"], [tuple(pair) for pair in backend["model"]["merges"]]
    joined = {".Ċ": len(vocabulary), "ĊĊ": len(vocabulary) + 1}
    vocabulary.update(joined)
    tokenizer.backend_tokenizer.model = models.BPE(vocabulary, [*merges, (".", "Ċ"), ("Ċ", "Ċ")], unk_token="<unk>")
    ends = taught_ends(get_template("plain"), tokenizer)
    assert {*joined.values(), vocabulary["Ċ"]} == set(ends)
    assert ends[-1] == vocabulary["Ċ"]


def test_k9_an_end_of_several_tokens_is_refused_before_training() -> None:
    template = replace(get_template("plain"), name="odd", end="###")
    turns = [Turn("user", "<image>"), Turn("assistant", "x")]
    sizes: dict[str, Any] = {"image_tokens": ImageTokens(6, 1), "max_length": 99, "where": "a.json, record 1"}
    with pytest.raises(ModelError, match=r"record 1: template odd ends an answer with '###', .* makes 3 tokens of"):
        encode(turns, template, tiny_tokenizer(), **sizes)
    lacking = AutoTokenizer.from_pretrained(SENTENCEPIECE)
    with pytest.raises(ModelError, match=r"template chatml needs the token <\|im_start\|>"):
        encode(turns, get_template("chatml"), lacking, **sizes)


def test_k9_base_tokenizer_and_training_each_add_an_end_once() -> None:
    tokenizer = tiny_tokenizer()
    assert end_token_ids(get_template("chatml"), tokenizer, [3, EOS_ID]) == [3, EOS_ID, IM_END_ID]
    assert end_token_ids(get_template("vicuna_v1"), tokenizer, []) == [EOS_ID]
