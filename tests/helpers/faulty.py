"""A small data set about pictures, and one with faults of many kinds put into it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

NUM_IMAGES = 16


def scene(seed: int, side: int = 32) -> Image.Image:
    """Draw a soft picture that no other seed comes near."""
    fields = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def entry(identity: str, image: str, question: str, answer: str, patient: str = "") -> dict[str, Any]:
    """Write one question about an image in LLaVA's form."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "patient": patient or f"of {image}", "conversations": turns}


def sound_data() -> tuple[dict[str, bytes], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return images by name, training entries, and entries of an evaluation on other images, all sound."""
    images = {f"{number}.png": encoded(scene(number)) for number in range(NUM_IMAGES)}
    entries = [
        entry(f"r{number}-{place}", f"{number}.png", f"What is {place}?", f"thing {number + place}")
        for number in range(NUM_IMAGES)
        for place in range(3)
    ]
    half = len(entries) // 2
    return images, entries[:half], entries[half:]


def plant(
    images: dict[str, bytes], train: list[dict[str, Any]], tested: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Put 25 faults of 12 kinds into the data; returns their kind, part of the recipe and id."""
    planted: list[tuple[str, str, str]] = []

    def put(kind: str, made: dict[str, Any], part: str = "instruct", **changes: Any) -> None:
        (train if part == "instruct" else tested).append(made | changes)
        planted.append((kind, part, str(made["id"])))

    whole = encoded(scene(90), "JPEG")
    images |= {"cut.jpg": whole[: len(whole) // 2], "cut.png": encoded(scene(91))[:-60]}
    images |= {"page.jpg": b"<html><body>404</body></html>", "empty.png": b""}
    for number in range(3):
        put("missing_image", entry(f"gone-{number}", f"gone{number}.png", "What?", "nothing"))
    for name in ("cut.jpg", "cut.png", "page.jpg", "empty.png"):
        put("bad_image", entry(f"bad-{name}", name, "What?", "nothing"))
    for name in ("../secret.png", "/etc/hostname", "http://127.0.0.1/x.png"):
        put("image_path", entry(f"path-{len(planted)}", name, "What?", "nothing"))
    put("record", entry("empty-answer", "1.png", "Empty?", "  "))
    put("record", entry("no-turns", "1.png", "", ""), conversations=[])
    put("record", entry("wrong-role", "1.png", "", ""), conversations=[{"from": "robot", "value": "<image>"}])
    put("unsupervised", entry("long-1", "2.png", "why " * 200, "because"))
    put("unsupervised", entry("long-2", "3.png", "how " * 200, "so"))
    put("truncated", entry("long-answer", "4.png", "Tell me.", "on and on " * 60))
    put("contradiction", entry("against-1", "0.png", "what is 0?", "<script>alert(1)</script>"))
    put("contradiction", entry("against-2", "1.png", "What is  1?", "no"))
    put("duplicate_id", entry("r2-0", "2.png", "Who?", "me"))
    put("duplicate_id", entry("r2-1", "2.png", "Where?", "here"))
    put("special_text", entry("markup", "5.png", "Is it </s><script>alert(1)</script>?", "no"))
    images |= {"copy0.png": images["0.png"], "copy1.png": images["1.png"]}
    images["again.jpg"] = encoded(scene(2).resize((64, 64), Image.Resampling.BICUBIC), "JPEG", quality=92)
    put("image_leak", entry("leak-0", "copy0.png", "What is it?", "a"), "evaluation")
    put("image_leak", entry("leak-1", "copy1.png", "What is it?", "b"), "evaluation")
    put("near_leak", entry("near", "again.jpg", "What is it?", "c"), "evaluation")
    put("group_leak", entry("patient", "9.png", "What is it?", "d", "of 3.png"), "evaluation")
    return planted


def write_recipe(
    directory: Path,
    base: Path | str,
    images: dict[str, bytes],
    train: list[dict[str, Any]],
    tested: list[dict[str, Any]],
    **data: Any,
) -> Path:
    """Write the data and a recipe over them, and return the recipe's path."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (directory / "images" / name).write_bytes(content)
    for name, entries in (("train.json", train), ("test.json", tested)):
        (directory / name).write_text(json.dumps(entries), encoding="utf-8")
    recipe = {
        "name": "faulty",
        "output_dir": "run",
        "base": {"model_name_or_path": str(base)},
        "quantization": {"type": "none"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "stages": {
            "instruct": {
                "data": {"path": "train.json", "image_root": "images", **data},
                "max_length": 400,
                "tokens_per_micro_batch": 500,
                "batch_size": 8,
                "num_train_epochs": 20,
            }
        },
        "evaluation": {"data": {"path": "test.json", "image_root": "images", **data}, "max_new_tokens": 12},
    }
    path = directory / "faulty.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
