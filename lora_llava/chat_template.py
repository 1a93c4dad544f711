"""A template of the kit in Jinja, so that `apply_chat_template` writes what the model was trained on."""

from __future__ import annotations

import json

from lora_llava.conversation import IMAGE_PLACEHOLDER
from lora_llava.templates import Template

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


def chat_template(template: Template, eos_token: str, image: str = IMAGE_PLACEHOLDER) -> str:
    """Write `template` in Jinja: as text, what `encode` makes tokens of, without the BOS that the tokenizer adds.

    A system message replaces the template's. `add_generation_prompt` makes no difference: the answer's start
    follows the question. `image` is what stands for an image.
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
