"""Write the card's code and commands that load a published model."""

from __future__ import annotations

import shlex

from lora_llava.formats.adapter_config import read_adapter_config
from lora_llava.shipping.export.options import VLLM_RANKS, max_lora_rank
from lora_llava.shipping.hub.describe import adapter_form, nf4
from lora_llava.shipping.hub.facts import Facts
from lora_llava.system.text import python_literal

_DTYPES = ("float32", "float16", "bfloat16")
_QUANTIZATION = """\
# As in training: the language model in 4 bits, the other parts unquantized.
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
    llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
)
"""
_ASK = """\
processor = AutoProcessor.from_pretrained({repo})
{config}
question = {question}
content = [{{"type": "image", "image": Image.open("image.png")}}, {{"type": "text", "text": question}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, {ends}max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def python_code(facts: Facts, repo: str) -> str:
    """Return Python code that loads the model and asks it about an image."""
    names = ["AutoProcessor", *(["BitsAndBytesConfig"] if facts.is_adapter and nf4(facts) else [])]
    names.append("LlavaForConditionalGeneration")
    names += ["GenerationConfig"] if facts.is_adapter else []
    imports = ["import torch"] if facts.is_adapter and nf4(facts) else []
    imports += ["from peft import PeftModel"] if facts.is_adapter else []
    lines = [*imports, "from PIL import Image", f"from transformers import {', '.join(sorted(names))}", ""]
    literal = python_literal(repo)
    if not facts.is_adapter:
        lines.append(
            f'model = LlavaForConditionalGeneration.from_pretrained({literal}, dtype="auto", device_map="auto")'
        )
    else:
        lines += _load_adapter(facts, repo)
    prompt = (facts.manifest.usage.answer_prompt if facts.manifest else None) or ""
    question = "What is in the image?" + (f"\n{prompt}" if prompt else "")
    # The base's generation settings lack the end-of-answer token of training; a merged model's have it.
    config = f"ends = GenerationConfig.from_pretrained({literal})\n" if facts.is_adapter else ""
    ends = "generation_config=ends, " if facts.is_adapter else ""
    asked = _ASK.format(repo=literal, question=python_literal(question), config=config, ends=ends)
    return "\n".join(lines) + "\n" + asked


def _load_adapter(facts: Facts, repo: str) -> list[str]:
    """Return the lines that load the base and the adapter."""
    assert facts.manifest is not None
    lines = []
    base = [python_literal(facts.base_id or "path/to/the/base")]
    if facts.base_id:
        base.append(f"revision={python_literal(facts.manifest.base['revision'])}")
    if nf4(facts):
        quantization = facts.manifest.quantization
        dtype = quantization.get("compute_dtype", "bfloat16")
        dtype = dtype if dtype in _DTYPES else "bfloat16"
        lines.append(_QUANTIZATION.format(double_quant=bool(quantization["double_quant"]), dtype=dtype).rstrip())
        base += ["quantization_config=quantization", f"dtype=torch.{dtype}"]
    base.append('device_map="auto"')
    lines += ["base = LlavaForConditionalGeneration.from_pretrained(", *(f"    {argument}," for argument in base), ")"]
    lines.append(f"model = PeftModel.from_pretrained(base, {python_literal(repo)}).eval()")
    return lines


def vllm_commands(facts: Facts, repo: str) -> str:
    """Return the commands that serve the model with vLLM."""
    if not facts.is_adapter:
        return f"vllm serve {shlex.quote(repo)}"
    name, option = _directory(repo), _base_option(facts)
    form = adapter_form(facts)
    if not form or form["type"] == "dora" or (rank := _largest_rank(facts)) > VLLM_RANKS[-1]:
        return f"{_download(repo)}\nlora-llava merge {name} {name}-merged{option}\nvllm serve {name}-merged"
    return (
        f"{_download(repo)}\nlora-llava export {name} {name}-vllm --format vllm{option}\n"
        f"vllm serve {name}-vllm/base --enable-lora --max-lora-rank {max_lora_rank(rank)} "
        f"--lora-modules tuned={name}-vllm/adapter"
    )


def _largest_rank(facts: Facts) -> int:
    """Return the rank that an export for vLLM gives all layers, or a larger one."""
    config = read_adapter_config(facts.directory)
    return int(max([config.r, *config.rank_pattern.values()]))


def gguf_commands(facts: Facts, repo: str) -> str:
    """Return the commands that export the model for llama.cpp and Ollama."""
    name = _directory(repo)
    return f"{_download(repo)}\nlora-llava export {name} {name}-gguf --format gguf{_base_option(facts)}"


def _directory(repo: str) -> str:
    """Return the directory to download to, quoted for a shell."""
    return shlex.quote(repo.rpartition("/")[2])


def _base_option(facts: Facts) -> str:
    """Return the option that names the base of an adapter, if it is not on the Hub."""
    return " --base-model path/to/the/base" if facts.is_adapter and not facts.base_id else ""


def _download(repo: str) -> str:
    return f"hf download {shlex.quote(repo)} --local-dir {_directory(repo)}"
