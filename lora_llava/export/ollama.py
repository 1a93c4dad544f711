"""A Modelfile: how Ollama puts text model and mmproj together and writes a chat."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.conversation import Template
from lora_llava.errors import ArtifactError

_QUOTES = '"""'


def modelfile(files: Sequence[str], template: Template, eos_token: str) -> str:
    """Write the Modelfile of GGUF files beside it. Raises ArtifactError for a system text that it cannot hold.

    Syntax: Ollama's docs, modelfile and template.
    """
    if _QUOTES in template.system or template.system.endswith('"'):
        raise ArtifactError(f"the system text has {_QUOTES} in it or ends with a quote, which a Modelfile cannot hold")
    end = eos_token if template.end is None else template.end
    system = f"{{{{ if .System }}}}{template.system_prefix}{{{{ .System }}}}{template.system_suffix}{{{{ end }}}}"
    # The space after the prefix is part of the answer: the model's first token brings it.
    turn = f"{template.user_prefix}{{{{ .Prompt }}}}{template.assistant_prefix.rstrip(' ')}{{{{ .Response }}}}"
    lines = [f"FROM ./{name}" for name in files]
    lines.append(f"TEMPLATE {_QUOTES}{system}{turn}{end}{template.separator}{_QUOTES}")
    if template.system:
        lines.append(f"SYSTEM {_QUOTES}{template.system}{_QUOTES}")
    stops = [end, template.user_prefix.strip()] if template.user_prefix.strip() not in end else [end]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if stop]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if "\n" in text else f'"{text}"'
