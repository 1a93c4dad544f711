"""What llama.cpp itself makes of the files: the same tokens, the same greedy text as transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from lora_llava.artifact import load_model
from lora_llava.data.images.read import preprocess
from lora_llava.formats.processor import save_processor
from lora_llava.shipping.export import FORMATS
from lora_llava.shipping.export.gguf.tokenizer import _LLAMA3, MEDIA_MARKER
from lora_llava.shipping.export.options import ExportOptions
from tests.helpers.artifacts import CPU, make_artifact
from tests.helpers.gguf_model import GGUFContent, image_features, text_logits
from tests.helpers.tiny import (
    IMAGE_ID,
    IMAGE_MEAN,
    IMAGE_SIZE,
    IMAGE_STD,
    NUM_IMAGE_TOKENS,
    tiny_llava,
    tiny_tokenizer,
)
from tests.unit.shipping.test_gguf_tokenizer import TEXTS, VICUNA

pytestmark = pytest.mark.node

PACKAGE = Path(__file__).parents[2] / ".node" / "node_modules" / "@fugood" / "llama.node"
SCRIPT = Path(__file__).parents[1] / "helpers" / "llama_node.js"
TOKENS = 8
SUBJECTS = ("France", "tea", "rain", "7", "a cat", "the sun", "USER", "it", "snow", "one and two")
PROMPTS = [f"USER: What is {one}{end} ASSISTANT:" for one in SUBJECTS for end in ("?", " in 1984?")]
IMAGE_PROMPT = f"USER: {MEDIA_MARKER}\nWhat is it? ASSISTANT:"

Ask = Callable[..., dict[str, Any]]
NextLogits = Callable[[list[int]], torch.Tensor]
"""Gives the logits after some generated tokens."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not PACKAGE.is_dir():
        pytest.skip("@fugood/llama.node is not installed; make node brings it")
    directory = tmp_path_factory.mktemp("node")

    def run(**job: Any) -> dict[str, Any]:
        task, answers = directory / "job.json", directory / "answers.json"
        answers.unlink(missing_ok=True)
        task.write_text(json.dumps({"package": str(PACKAGE), **job}, default=str), encoding="utf-8")
        done = subprocess.run(["node", SCRIPT, task, answers], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        result: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
        return result

    return run


def export(source: Path, output: Path, layout: str = "gguf", outtype: str | None = None) -> Path:
    # The model is bare: no file next to it names the template.
    FORMATS[layout](source, output, ExportOptions(outtype=outtype, template="vicuna_v1"))
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights f16 holds exactly, and that writes printable ASCII alone: its text shows its tokens."""
    directory = tmp_path_factory.mktemp("ascii") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = cutters()["smollm"]
    model = tiny_llava(seed=5).half().float()
    for index in range(model.lm_head.weight.shape[0]):
        text = tokenizer.decode([index]) if index in range(7, len(tokenizer)) else ""
        if not (text.isascii() and text.isprintable() and text):
            model.lm_head.weight.data[index] = 0
    model.save_pretrained(directory)
    save_processor(directory, tokenizer, model.config, {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD})
    return directory


def cutters() -> dict[str, Any]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    llama3 = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    uncut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([llama3, uncut]),
    }


def greedy(logits: NextLogits, tolerance: float) -> list[int]:
    """Answer greedily, up to where the two best tokens are nearer than rounding may move them."""
    answer: list[int] = []
    while len(answer) < TOKENS:
        found = logits(answer)
        best = found.topk(2)
        if best.values[0] - best.values[1] < tolerance * found.std():
            break
        answer.append(int(best.indices[0]))
    return answer


@torch.no_grad()
def compare(model: Any, tokenizer: Any, texts: list[str]) -> int:
    """Assert that llama.cpp's texts are the model's greedy answers; returns how many tokens could be compared."""
    compared = 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt).input_ids
        answer = greedy(lambda more, ids=ids: model(input_ids=torch.tensor([ids + more])).logits[0, -1], 0.01)
        assert text.startswith(tokenizer.decode(answer)), prompt
        compared += len(answer)
    return compared


def test_greedy_text_of_twenty_prompts(ask: Ask, base: Path, tmp_path: Path) -> None:
    out = export(base, tmp_path / "out")
    texts = ask(model=out / "text.gguf", complete=[{"prompt": one, "tokens": TOKENS} for one in PROMPTS])["complete"]
    assert len(set(texts)) > 10
    model = LlavaForConditionalGeneration.from_pretrained(base).eval()
    assert compare(model, AutoTokenizer.from_pretrained(base), texts) > 0.7 * TOKENS * len(PROMPTS)


def test_greedy_text_with_the_adapter(ask: Ask, base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(base, tmp_path / "instruct", kind="rslora")
    lora, out = export(artifact, tmp_path / "lora", "gguf-lora"), export(base, tmp_path / "out")
    tasks = [{"prompt": one, "tokens": TOKENS} for one in PROMPTS]
    texts = ask(model=out / "text.gguf", lora=lora / "lora.gguf", complete=tasks)["complete"]
    loaded, _ = load_model(artifact, device=CPU, dtype=torch.float32)
    assert compare(loaded.model, loaded.tokenizer, texts) > 0.7 * TOKENS * len(PROMPTS)
    assert texts != ask(model=out / "text.gguf", complete=tasks)["complete"]


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_greedy_text_of_quantised_weights(ask: Ask, base: Path, tmp_path: Path, outtype: str) -> None:
    """Against what the same file gives in fp32: llama.cpp quantises what it multiplies, too."""
    out = export(base, tmp_path / "out", outtype=outtype)
    texts = ask(model=out / "text.gguf", complete=[{"prompt": one, "tokens": TOKENS} for one in PROMPTS])["complete"]
    content, tokenizer = GGUFContent(out / "text.gguf"), AutoTokenizer.from_pretrained(base)
    compared = 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt).input_ids
        answer = greedy(lambda more, ids=ids: text_logits(content, ids + more)[-1], 0.05)
        assert text.startswith(tokenizer.decode(answer)), prompt
        compared += len(answer)
    assert compared > 0.4 * TOKENS * len(PROMPTS)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "vicuna"])
def test_the_same_tokens(ask: Ask, tmp_path: Path, name: str) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llava()
    if name == "vicuna":
        tokenizer = AutoTokenizer.from_pretrained(VICUNA)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        model.resize_token_embeddings(32064, mean_resizing=False)
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = cutters()[name]
        tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
    model.save_pretrained(tmp_path / "model")
    pixels = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    save_processor(tmp_path / "model", tokenizer, model.config, pixels)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [*TEXTS, "a<image>b" if name != "vicuna" else "a<image>"]
    found = ask(model=export(tmp_path / "model", tmp_path / "out") / "text.gguf", tokenize=texts)["tokenize"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer(text, add_special_tokens=False).input_ids, text


def test_the_chat_template(ask: Ask, base: Path, tmp_path: Path) -> None:
    out = export(base, tmp_path / "out")
    parts = [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "What is it?"}]
    chats = [[{"role": "user", "content": parts}], [{"role": "user", "content": "Hi?"}]]
    image, text = ask(model=out / "text.gguf", chat=chats)["chat"]
    assert image.endswith(f"questions. {IMAGE_PROMPT}")
    assert text.endswith("questions. USER: Hi? ASSISTANT:")


def test_answers_about_images(
    ask: Ask, base: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """llama.cpp sees images wrongly (its #25814), in a way that is known; how often it agrees is recorded, no more.

    What it answers is what either its defect or, once that is fixed, the right image gives: the file is right.
    """
    out = export(base, tmp_path / "out")
    content = GGUFContent(out / "mmproj.gguf")
    model = LlavaForConditionalGeneration.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    before, after = IMAGE_PROMPT.split(MEDIA_MARKER)
    start = [*tokenizer(before).input_ids, *[IMAGE_ID] * NUM_IMAGE_TOKENS]
    end = tokenizer(after, add_special_tokens=False).input_ids
    images, right, defective = [], [], []
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(noise.numpy())
        image.save(tmp_path / f"{number}.png")
        images.append(tmp_path / f"{number}.png")
        pixels = preprocess(image, size=IMAGE_SIZE, mean=IMAGE_MEAN, std=IMAGE_STD, aspect_ratio="pad")

        def logits(more: list[int], seen: torch.Tensor) -> torch.Tensor:
            embeds = model.get_input_embeddings()(torch.tensor([start + end + more]))
            embeds[0, len(start) - NUM_IMAGE_TOKENS : len(start)] = seen
            found: torch.Tensor = model(inputs_embeds=embeds).logits[0, -1]
            return found

        with torch.no_grad():
            for answers, class_last in ((right, False), (defective, True)):
                seen = image_features(content, pixels, class_last=class_last)
                ids = greedy(lambda more, seen=seen, logits=logits: logits(more, seen), 0.03)
                answers.append(tokenizer.decode(ids))
    tasks = [{"prompt": IMAGE_PROMPT, "images": [str(one)], "tokens": TOKENS} for one in images]
    texts = ask(model=out / "text.gguf", mmproj=out / "mmproj.gguf", complete=tasks)["complete"]
    agreeing = [
        sum(text.startswith(answer) for text, answer in zip(texts, answers, strict=True))
        for answers in (right, defective)
    ]
    record_property("images_answered_as_transformers", f"{agreeing[0]} of {len(texts)}")
    record_property("images_answered_as_with_the_defect", f"{agreeing[1]} of {len(texts)}")
    print(f"as transformers {agreeing[0]}, as with the defect {agreeing[1]}, of {len(texts)}")  # noqa: T201
    assert all(texts)
    assert sum(map(len, right)) > 20
    assert max(agreeing) == len(texts)
