"""Ask llama.cpp, in this process: TEXT_GGUF MMPROJ_GGUF QUESTIONS OUTPUT [LORA_GGUF CHAT_TEMPLATE]."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from tools.foreign.asked import read_questions, write_answers


def main(text: str, mmproj: str, questions: str, output: str, lora: str | None = None, template: str = "") -> None:
    """Put the questions one by one to llama.cpp's server."""
    # llama.cpp draws a random marker otherwise, and then drops the line feed after the image.
    os.environ["LLAMA_MEDIA_MARKER"] = "<__media__>"
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.mmproj.path = text, mmproj
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
        settings.chat_template = Path(template).read_text(encoding="utf-8")
    settings.n_ctx, settings.n_parallel, settings.use_jinja, settings.warmup = 1024, 1, True, False
    settings.cpuparams.n_threads, settings.mmproj_use_gpu = 1, False
    server = xllamacpp.Server(settings)
    write_answers(output, [_answer(server, entry) for entry in read_questions(questions)])


def _answer(server: Any, entry: dict[str, Any]) -> str:
    image = base64.b64encode(Path(entry["image"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": entry["question"]},
    ]
    reply = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "top_k": 1,
            "max_tokens": entry["max_new_tokens"],
        }
    )
    data = json.loads(reply) if isinstance(reply, str | bytes) else reply
    if "choices" not in data:
        raise SystemExit(str(data)[:300])
    return str(data["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
