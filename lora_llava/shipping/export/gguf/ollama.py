"""Write the Modelfile, which tells Ollama the files of a model and its chat template."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.conversation.chat_template import OwnTemplate
from lora_llava.conversation.templates import Template
from lora_llava.errors import ArtifactError

_QUOTES = '"""'


def modelfile(
    files: Sequence[str], template: Template | OwnTemplate | None, eos_token: str, stops: Sequence[str] = ()
) -> str:
    """Return the Modelfile of GGUF files in its directory. Ollama reads a model's own chat template from the GGUF.

    `stops` are further texts that end an answer. Raises ArtifactError for a system prompt that a Modelfile cannot hold.
    Syntax: Ollama's docs, modelfile and template.
    """
    lines = [f"FROM ./{name}" for name in files]
    ends = [eos_token]
    if isinstance(template, Template):
        lines += _template_lines(template, eos_token)
        ends = [eos_token if template.end is None else template.end]
        if (turn := template.user_prefix.strip()) not in ends[0]:
            ends.append(turn)
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys([*ends, *stops]) if stop]
    return "\n".join(lines) + "\n"


def _template_lines(template: Template, eos_token: str) -> list[str]:
    if _QUOTES in template.system or template.system.endswith('"'):
        raise ArtifactError(f"the system prompt contains {_QUOTES} or ends with a quote, which a Modelfile cannot hold")
    end = eos_token if template.end is None else template.end
    system = f"{{{{ if .System }}}}{template.system_prefix}{{{{ .System }}}}{template.system_suffix}{{{{ end }}}}"
    # Without the space after the assistant's prefix: it is part of the answer's first token.
    turn = f"{template.user_prefix}{{{{ .Prompt }}}}{template.assistant_prefix.rstrip(' ')}{{{{ .Response }}}}"
    lines = [f"TEMPLATE {_QUOTES}{system}{turn}{end}{template.separator}{_QUOTES}"]
    return [*lines, f"SYSTEM {_QUOTES}{template.system}{_QUOTES}"] if template.system else lines


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if "\n" in text else f'"{text}"'
