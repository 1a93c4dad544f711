"""A model's own chat template: read, rendered, recognized, compared with a recipe's, and used to ask."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_llava.conversation.chat_template import (
    OwnTemplate,
    chat_template,
    encode_own,
    own_end,
    read_own_template,
    recognize,
    template_difference,
)
from lora_llava.conversation.encode import ImageTokens, Turn, encode_prompt
from lora_llava.conversation.templates import TEMPLATES, get_template
from lora_llava.errors import DataError, ModelError
from tests.helpers.tiny import IMAGE_ID, NUM_IMAGE_TOKENS, tiny_tokenizer

TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Smol<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ASK = (Turn("user", "<image>\nWhat is it?"),)


def written(directory: Path, jinja: str, how: str = "chat_template.jinja") -> Path:
    """Write a chat template next to a tokenizer, in one of the ways that there are."""
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}}
    if how == "tokenizer_config.json":
        config["chat_template"] = jinja
    elif how == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": jinja}]
    elif how.endswith(".json"):
        (directory / how).write_text(json.dumps({"chat_template": jinja}))
    else:
        (directory / how).write_text(jinja)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "how", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json", "named"]
)
def test_k10_a_models_own_template_is_found_wherever_it_is_written(tmp_path: Path, how: str) -> None:
    assert read_own_template(written(tmp_path, LLAMA3, how)) == OwnTemplate(LLAMA3, TOKENS)


def test_k10_no_template_and_a_damaged_file(tmp_path: Path) -> None:
    assert read_own_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is damaged"):
        read_own_template(tmp_path)


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("system", [None, "", "Answer in one word."])
def test_k10_the_kits_templates_are_recognized_by_what_they_write(name: str, system: str | None) -> None:
    if name == "plain" and system:
        return
    template = get_template(name, system)
    assert recognize(OwnTemplate(chat_template(template, "</s>"), TOKENS)) == template


def test_k10_chatml_of_a_language_model_is_recognized_with_its_system_text() -> None:
    assert recognize(OwnTemplate(SMOL, TOKENS)) == get_template("chatml", "You are Smol")


@pytest.mark.parametrize("jinja", [LLAVA_HF, LLAMA3, "{{ raise_exception('no') }}", "{% broken", "{{ 1 / 0 }}"])
def test_k10_other_templates_are_not_taken_for_one_of_the_kits(jinja: str) -> None:
    assert recognize(OwnTemplate(jinja, TOKENS)) is None


@pytest.mark.parametrize(
    ("jinja", "name", "said"),
    [
        (LLAMA3, "vicuna_v1", ["vicuna_v1: it writes", "<|start_header_id|>user", "must learn the new form"]),
        (SMOL, "vicuna_v1", ["it is chatml", 'set template: chatml and system: "You are Smol"']),
        (SMOL, "chatml", ["in its system prompt", '"You are Smol" there', '"" in the recipe']),
        (LLAVA_HF, "vicuna_v1", ["in its system prompt", '"" there', 'set system: ""']),
        ("{{ raise_exception('no') }}", "chatml", ["could not be compared with chatml", "cannot be used: no"]),
    ],
)
def test_k10_a_difference_from_the_recipes_template_is_named(
    tmp_path: Path, jinja: str, name: str, said: list[str]
) -> None:
    difference = template_difference(written(tmp_path, jinja), get_template(name))
    assert difference is not None
    for words in said:
        assert words in difference
    assert "\n" not in difference


def test_k10_no_difference_no_word(tmp_path: Path) -> None:
    assert template_difference(tmp_path, get_template("vicuna_v1")) is None
    written(tmp_path, SMOL)
    assert template_difference(tmp_path, get_template("chatml", "You are Smol")) is None
    assert template_difference(tmp_path, get_template("plain")) is None


def test_k10_the_comparison_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_llava.conversation.templates import get_template as g;"
        "from lora_llava.conversation.chat_template import template_difference as d;"
        f"assert d(Path({str(written(tmp_path, LLAMA3))!r}), g('chatml')); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("jinja", [LLAVA_HF, LLAMA3, SMOL])
@pytest.mark.parametrize("add_bos", [True, False])
def test_k10_a_prompt_in_the_models_own_template_is_that_of_transformers(jinja: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    parts = jinja == LLAVA_HF
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}] if parts else ASK[0].text
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(
        text.replace("<image>", "<image>" * NUM_IMAGE_TOKENS), add_special_tokens=not text.startswith("<s>")
    ).input_ids
    own = OwnTemplate(jinja, TOKENS)
    found = encode_own(ASK, own, tokenizer, image_tokens=ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS), where="a question")
    assert found.input_ids == expected
    assert found.input_ids[: found.prefix_length][-NUM_IMAGE_TOKENS:] == [IMAGE_ID] * NUM_IMAGE_TOKENS
    assert found.input_ids[found.prefix_length] != IMAGE_ID


def test_k10_text_never_becomes_a_special_token_of_a_foreign_template() -> None:
    sizes = {"image_tokens": ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS), "where": "a.json, record 3"}
    with pytest.raises(DataError, match=r"record 3: the text contains the special token </s>"):
        encode_own((Turn("user", "a</s>b"),), OwnTemplate(LLAMA3, TOKENS), tiny_tokenizer(), **sizes)
    with pytest.raises(ModelError, match="does not support images; give another with --template"):
        encode_own(ASK, OwnTemplate("{{ messages|length }}", TOKENS), tiny_tokenizer(), **sizes)


def test_k10_a_recognized_template_encodes_as_in_training() -> None:
    sizes = {"image_tokens": ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS), "where": "a question"}
    tokenizer = tiny_tokenizer()
    for name in TEMPLATES:
        own = OwnTemplate(chat_template(get_template(name), "</s>"), TOKENS)
        ours = encode_prompt(ASK, get_template(name), tokenizer, **sizes)
        assert encode_own(ASK, own, tokenizer, **sizes) == replace(ours), name


def test_k9_what_a_foreign_template_writes_after_an_answer() -> None:
    ends = {jinja: own_end(OwnTemplate(jinja, TOKENS)) for jinja in (LLAMA3, SMOL, LLAVA_HF)}
    assert list(ends.values()) == ["<|eot_id|>", "<|im_end|>", ""]
