"""Jinja chat templates: write those of this package; read, render and recognize a model's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_llava.conversation.encode import IGNORE_INDEX, IMAGE_PLACEHOLDER, Encoded, ImageTokens, Turn, check_turns
from lora_llava.conversation.templates import TEMPLATES, Template
from lora_llava.errors import DataError, ModelError
from lora_llava.system.files import read_json
from lora_llava.system.text import first_line

_JINJA = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else SYSTEM -%}
{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}
{%- if system -%}{{ SYSTEM_PREFIX + system + SYSTEM_SUFFIX }}{%- endif -%}
{%- for message in messages if message['role'] != 'system' -%}
{%- set seen = namespace(image=false, text='') -%}
{%- if message['content'] is string -%}
{%- set seen.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set seen.text = seen.text + part['text'] -%}
{%- else -%}{%- set seen.image = true -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '' if loop.first else SEPARATOR -}}{{- USER_PREFIX -}}
{%- if seen.image or IMAGE in seen.text -%}
{%- set words = seen.text.replace(IMAGE, '').strip() -%}
{{- IMAGE -}}{%- if words and not CAPTION_ONLY -%}{{ '\\n' + words }}{%- endif -%}
{%- elif not CAPTION_ONLY -%}{{ seen.text }}{%- endif -%}
{{- ASSISTANT_PREFIX -}}
{%- else -%}
{% generation %}{{ ANSWER_SPACE + seen.text + END }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""

TEMPLATE_FILE = "chat_template.jinja"
_QUESTION, _SECOND, _ANSWER = "Is it 4 or 5?", "And where?", "xyz4"
_WITH_IMAGE = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{_QUESTION}"),)
_TEXT_ONLY = (Turn("user", _QUESTION),)
_ANSWERED = (*_TEXT_ONLY, Turn("assistant", _ANSWER))
_TWO_TURNS = (*_WITH_IMAGE, Turn("assistant", _ANSWER), Turn("user", _SECOND))
_SHOWN = 70
"""Maximum characters of a rendered prompt that a message shows."""


def chat_template(template: Template, eos_token: str, image: str = IMAGE_PLACEHOLDER) -> str:
    """Return `template` in Jinja; it renders the text that `encode` tokenizes, without the BOS that the tokenizer adds.

    A system message replaces the template's. `add_generation_prompt` has no effect: the start of the answer always
    follows the question. `image`: the placeholder to write for an image.
    """
    prefix = template.assistant_prefix.rstrip(" ")
    values = {
        "SYSTEM": template.system,
        "SYSTEM_PREFIX": template.system_prefix,
        "SYSTEM_SUFFIX": template.system_suffix,
        "SEPARATOR": template.separator,
        "USER_PREFIX": template.user_prefix,
        "IMAGE": image,
        "CAPTION_ONLY": template.caption_only,
        "ASSISTANT_PREFIX": prefix,
        "ANSWER_SPACE": template.assistant_prefix[len(prefix) :],
        "END": eos_token if template.end is None else template.end,
    }
    names = "\n".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    return f"{names}\n{_JINJA}"


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A model's own chat template in Jinja, with the special tokens that it may use."""

    jinja: str
    tokens: tuple[tuple[str, str], ...] = ()
    """Pairs of a name (`bos_token`, `eos_token`, ...) and its text."""

    def render(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Render turns as text in the sandbox of transformers; if the user is last, up to the start of the answer.

        `system`: text of a system message before them.

        Raises ModelError if the template fails.
        """
        return _render(self, turns, as_parts=_takes_parts(self), system=system)


def read_own_template(directory: Path) -> OwnTemplate | None:
    """Read the chat template of a model directory; None if there is none."""
    tokenizer = read_json(directory / "tokenizer_config.json")
    named = {**read_json(directory / "special_tokens_map.json"), **tokenizer}
    tokens = {
        key: str(value.get("content", "")) if isinstance(value, dict) else str(value)
        for key, value in named.items()
        if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value
    }
    file = directory / TEMPLATE_FILE
    jinja: Any = None
    if file.is_file():
        try:
            jinja = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} is damaged ({first_line(error)}); download it again") from error
    for name in ("chat_template.json", "processor_config.json"):
        jinja = jinja or read_json(directory / name).get("chat_template")
    jinja = jinja or tokenizer.get("chat_template")
    if isinstance(jinja, list):
        # Several named templates, as a list of {name, template}.
        jinja = next((entry.get("template") for entry in jinja if entry.get("name") == "default"), None)
    return OwnTemplate(jinja, tuple(sorted(tokens.items()))) if isinstance(jinja, str) and jinja.strip() else None


def recognize(own: OwnTemplate, *, first_question: bool = False) -> Template | None:
    """Return the template in `TEMPLATES` that is equivalent to a model's own; None if none is.

    `first_question`: only the first question must be rendered alike. Later turns may differ: llava-hf's template ends
    an answer with a space, `vicuna_v1` with the end token.
    """
    eos_token = dict(own.tokens).get("eos_token", "")
    try:
        opened = _bare(own, _TEXT_ONLY)
        for known in TEMPLATES.values():
            template = _with_system_of(known, opened, eos_token)
            ours = OwnTemplate(chat_template(template, eos_token))
            if any(_bare(own, turns) != _bare(ours, turns) for turns in (_TEXT_ONLY, _WITH_IMAGE)):
                continue
            if not known.caption_only if first_question else _continues_alike(own, ours, template.separator):
                return template
    except ModelError:
        return None
    return None


def _continues_alike(own: OwnTemplate, ours: OwnTemplate, separator: str) -> bool:
    """Tell whether two templates render an answer and a second question alike."""
    # After the last answer, many templates already write the separator before the next turn.
    same_end = _bare(own, _ANSWERED).removesuffix(separator) == _bare(ours, _ANSWERED)
    return same_end and _bare(own, _TWO_TURNS) == _bare(ours, _TWO_TURNS)


def _with_system_of(known: Template, opened: str, eos_token: str) -> Template:
    """Return `known` with the system prompt that `opened`, a prompt without an image, begins with."""
    bare = replace(known, system="")
    head = opened.removesuffix(_bare(OwnTemplate(chat_template(bare, eos_token)), _TEXT_ONLY))
    system = head.removeprefix(known.system_prefix).removesuffix(known.system_suffix)
    return bare if known.caption_only else replace(known, system=system)


def template_difference(directory: Path, template: Template) -> str | None:
    """Describe how the chat template of a base, or a language model, differs from the one for training.

    `directory` needs no weights: only its tokenizer and processor files are read. None if the templates are equivalent,
    the base has none, or `template` is for captions only.
    """
    own = None if template.caption_only else read_own_template(directory)
    if own is None:
        return None
    eos_token = dict(own.tokens).get("eos_token", "")
    start = f"the base's own chat template differs from the recipe's template {template.name}"
    try:
        theirs = _bare(own, _TEXT_ONLY)
        known = recognize(own)
        same_turns = known if known and known.name == template.name else _with_system_of(template, theirs, eos_token)
        ours, reworded = (
            _bare(OwnTemplate(chat_template(candidate, eos_token)), _TEXT_ONLY) for candidate in (template, same_turns)
        )
    except ModelError as error:
        return f"the base's own chat template could not be compared with {template.name}: {error}"
    if known == template:
        return None
    if theirs == reworded != ours:
        return (
            f"{start} in its system prompt: {_quoted(same_turns.system)} there, {_quoted(template.system)} in the "
            f"recipe; to train with the base's, set system: {json.dumps(same_turns.system)}"
        )
    if known is not None:
        system = "" if known == TEMPLATES[known.name] else f" and system: {json.dumps(known.system)}"
        return f"{start}: it is {known.name}; to train in the base's own format, set template: {known.name}{system}"
    if theirs == ours:
        return f"{start} after the first question; training and evaluation use {template.name}"
    shown = f"{start}: it writes {_quoted(theirs)}, {template.name} writes {_quoted(ours)}"
    return f"{shown}; the base must learn the new format from your data"


def _quoted(text: str) -> str:
    """Quote a prompt or system prompt, shortened in the middle if it is long."""
    half = _SHOWN // 2
    return json.dumps(text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}", ensure_ascii=False)


def encode_own(
    turns: Sequence[Turn],
    own: OwnTemplate,
    tokenizer: Any,
    image_tokens: ImageTokens,
    *,
    where: str,
    system: str | None = None,
) -> Encoded:
    """Encode turns that end with the user's in a model's own template, as its processor in transformers does.

    Raises DataError, which begins with `where`, for turns out of order and for text with a special token, which would
    be parsed as one; ModelError if the template fails or renders no image.
    """
    check_turns(turns, "user", where)
    texts = [turn.text for turn in turns]
    if system is not None:
        texts.append(system)
    for token in tokenizer.added_tokens_encoder:
        if token != IMAGE_PLACEHOLDER and any(token in text for text in texts):
            raise DataError(f"{where}: the text contains the special token {token}; remove it or the record")
    text = own.render(turns, system)
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = []
    image_end = 0
    for token in tokenizer([text], add_special_tokens=not has_bos)["input_ids"][0]:
        ids += [token] * (image_tokens.count if token == image_tokens.id else 1)
        image_end = len(ids) if token == image_tokens.id and not image_end else image_end
    images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if ids.count(image_tokens.id) != images * image_tokens.count:
        raise ModelError(
            f"{where}: the model's own chat template does not support images; give another with --template"
        )
    prefix = image_end if IMAGE_PLACEHOLDER in turns[0].text else 0
    return Encoded(ids, [IGNORE_INDEX] * len(ids), prefix)


def own_end(own: OwnTemplate) -> str:
    """Return the text that a model's own template writes after an answer, stripped; empty if it writes nothing."""
    return own.render(_ANSWERED).rpartition(_ANSWER)[2].strip()


def _bare(own: OwnTemplate, turns: Sequence[Turn]) -> str:
    """Render without BOS, which the tokenizer adds, and without the spaces that belong to the answer."""
    return own.render(turns).removeprefix(dict(own.tokens).get("bos_token", "")).rstrip(" ")


@lru_cache(maxsize=32)
def _takes_parts(own: OwnTemplate) -> bool:
    """Tell whether a template renders messages with image and text parts; those of language models take only text."""
    try:
        text = _render(own, _WITH_IMAGE, as_parts=True)
    except ModelError:
        return False
    return text.count(IMAGE_PLACEHOLDER) == 1 and _QUESTION in text and "'type'" not in text


def _render(own: OwnTemplate, turns: Sequence[Turn], *, as_parts: bool, system: str | None = None) -> str:
    # Imported late: transformers takes half a second even without torch.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    texts = [*([] if system is None else [("system", system)]), *((turn.role, turn.text) for turn in turns)]
    messages = [{"role": role, "content": _message_parts(text) if as_parts else text} for role, text in texts]
    try:
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=own.jinja,
            add_generation_prompt=turns[-1].role == "user",
            **dict(own.tokens),
        )
    # Everything that the code of a template can raise.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the model's own chat template cannot be used: {reason}") from error
    return str(rendered[0])


def _message_parts(text: str) -> list[dict[str, str]]:
    """Split a text with an image into the message parts of transformers."""
    if IMAGE_PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    words = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
