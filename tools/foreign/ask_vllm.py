"""Ask vLLM on a CPU: BASE QUESTIONS OUTPUT [ADAPTER]. The adapter is served next to the base, as a LoRA request."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from tools.foreign.asked import read_questions, write_answers

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def main(base: str, questions: str, output: str, adapter: str | None = None) -> None:
    """Serve a model, and put all questions to it at once."""
    os.environ.update(_ENVIRONMENT)
    # vLLM reads the environment when it is imported.
    import vllm
    from vllm.lora.request import LoRARequest

    lora = {} if adapter is None else {"enable_lora": True, "max_lora_rank": 64, "max_loras": 1}
    model = vllm.LLM(
        base,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 1},
        **lora,
    )
    entries, chats = read_questions(questions), []
    for entry in entries:
        image = base64.b64encode(Path(entry["image"]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": entry["question"]},
        ]
        chats.append([{"role": "user", "content": content}])
    settings = [vllm.SamplingParams(temperature=0, max_tokens=entry["max_new_tokens"]) for entry in entries]
    request = None if adapter is None else LoRARequest("tuned", 1, str(Path(adapter).resolve()))
    outputs = model.chat(chats, settings, lora_request=request, use_tqdm=False)
    write_answers(output, [result.outputs[0].text for result in outputs])


if __name__ == "__main__":
    main(*sys.argv[1:])
