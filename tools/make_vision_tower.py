"""Train the small CLIP vision tower that ships with the package, from easy-VQA's training images alone.

    python tools/make_vision_tower.py easy_vqa-1.0-py3-none-any.whl OUT

LLaVA-1.5 uses the patch tokens of CLIP's second to last layer, so heads that classify shape and color are trained on
them: on every patch token, since a small language model with few questions learns best from tokens that all carry the
answer, and on their mean. Another head is on the last layer's class token. The heads are not saved. Shape and color of
an image follow from its training questions and answers. Every tenth image is held out for the accuracies. Takes about 6
minutes on two CPU cores.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from lora_llava.quickstart.assets import COLORS, SHAPES, read_questions, true_words

COLOR_NAMES, SHAPE_NAMES = sorted(COLORS), sorted(SHAPES)
UNKNOWN = -100
"""Label of an attribute that does not follow from the questions; cross-entropy ignores it."""
SIZE, PATCH = 64, 16
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WIDTH, LAYERS = 192, 5
BATCH = 128
PEAK_LEARNING_RATE = 1.5e-3
LARGEST_SHIFT = 12
"""Pixels."""


@dataclass(frozen=True, slots=True)
class Images:
    """N images (N, 3, 64, 64), uint8, with their labels (N,)."""

    pixels: torch.Tensor
    colors: torch.Tensor
    shapes: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> Images:
        return Images(self.pixels[index], self.colors[index], self.shapes[index])


def read_images(archive: Path) -> Images:
    """Read the training images and their labels, which follow from the questions."""
    asked: dict[int, list[tuple[str, str, int]]] = {}
    for question in read_questions(archive, "train"):
        asked.setdefault(question[2], []).append(question)
    numbers = sorted(asked)
    with zipfile.ZipFile(archive) as wheel:
        data = [wheel.read(f"easy_vqa/data/train/images/{number}.png") for number in numbers]
    pixels = [np.array(Image.open(io.BytesIO(png)).convert("RGB")) for png in data]
    return Images(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
        torch.tensor([_label(true_words(asked[number], COLORS), COLOR_NAMES) for number in numbers]),
        torch.tensor([_label(true_words(asked[number], SHAPES), SHAPE_NAMES) for number in numbers]),
    )


def _label(words: set[str], names: list[str]) -> int:
    return names.index(min(words)) if len(words) == 1 else UNKNOWN


def augmented(images: Images) -> Images:
    """Mirror and shift images; mix the color channels of some, whose color then has no name."""
    pixels, colors = images.pixels.clone(), images.colors.clone()
    count = len(pixels)
    mirrored = torch.rand(count) < 0.5
    pixels[mirrored] = pixels[mirrored].flip(-1)
    border = F.pad(pixels.float(), (LARGEST_SHIFT,) * 4, mode="replicate").to(torch.uint8)
    shift = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, count))
    shift[:, torch.rand(count) < 0.25] = LARGEST_SHIFT
    grid = torch.arange(SIZE)
    rows, columns = (shift[0][:, None] + grid)[:, :, None], (shift[1][:, None] + grid)[:, None, :]
    pixels = border[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    mixed = torch.rand(count) < 0.3
    pixels[mixed] = pixels[mixed][:, torch.randperm(3)]
    colors[mixed] = UNKNOWN
    return Images(pixels, colors, images.shapes)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as normalized floats of the same shape."""
    return (pixels.float() / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Teacher(nn.Module):
    """The tower and the heads that teach it."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 32,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
        self.tower = CLIPVisionModel(config)
        for module in self.tower.modules():
            # CLIP's own initialization suits a width of 1,024; a narrow tower hardly leaves it.
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.05)
        self.patch_head = nn.Linear(WIDTH, len(COLOR_NAMES) + len(SHAPE_NAMES))
        self.class_head = nn.Linear(WIDTH, len(COLOR_NAMES) + len(SHAPE_NAMES))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores of each patch token (N, 16, 11) and of the class token (N, 11)."""
        states = self.tower(normalized(pixels), output_hidden_states=True).hidden_states
        return self.patch_head(states[-2][:, 1:]), self.class_head(states[-1][:, 0])

    def loss(self, images: Images) -> torch.Tensor:
        """Sum the losses of patch tokens, their mean, and the class token."""
        patches, whole = self(images.pixels)
        tokens = patches.shape[1]
        each = _loss(
            patches.flatten(0, 1), images.colors.repeat_interleave(tokens), images.shapes.repeat_interleave(tokens)
        )
        mean = _loss(patches.mean(1), images.colors, images.shapes)
        return each + mean + 0.3 * _loss(whole, images.colors, images.shapes)


def _loss(scores: torch.Tensor, colors: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    color, shape = scores.split([len(COLOR_NAMES), len(SHAPE_NAMES)], dim=-1)
    return F.cross_entropy(color, colors) + F.cross_entropy(shape, shapes)


@torch.no_grad()
def accuracies(teacher: Teacher, images: Images) -> dict[str, float]:
    """Measure color and shape, by the mean of the patch tokens and by each of them alone."""
    teacher.eval()
    patches, _ = teacher(images.pixels)
    result = {}
    for name, labels, scores in (
        ("color", images.colors, patches[..., : len(COLOR_NAMES)]),
        ("shape", images.shapes, patches[..., len(COLOR_NAMES) :]),
    ):
        known = labels != UNKNOWN
        result[name] = float((scores.mean(1).argmax(-1) == labels)[known].float().mean())
        result[f"{name}, one token"] = float((scores.argmax(-1) == labels[:, None])[known].float().mean())
    teacher.train()
    return {name: round(share, 4) for name, share in result.items()}


def train(teacher: Teacher, images: Images, epochs: int) -> None:
    """Train the tower and its heads, one cycle of the learning rate."""
    steps = epochs * (len(images.pixels) // BATCH)
    parameters = list(teacher.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps, pct_start=0.1)
    for epoch in range(epochs):
        for index in torch.randperm(len(images.pixels))[: steps // epochs * BATCH].split(BATCH):
            loss = teacher.loss(augmented(images[index]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        click.echo(f"epoch {epoch + 1}/{epochs}: loss {float(loss.detach()):.4f}")


@torch.no_grad()
def scale_to_unit_spread(tower: CLIPVisionModel, pixels: torch.Tensor) -> None:
    """Scale the residual stream so that the projected features have a standard deviation of 1, about CLIP's.

    Exact but for the norms' epsilon: all that writes to the stream is scaled, and all that reads it has a norm first.
    """
    spread = tower(normalized(pixels), output_hidden_states=True).hidden_states[-2][:, 1:].std()
    for name, parameter in tower.named_parameters():
        if any(writer in name for writer in ("pre_layrnorm.", ".out_proj.", ".fc2.")):
            parameter.div_(spread)


def save(teacher: Teacher, directory: Path) -> None:
    """Write the tower in half precision, with the image settings it was trained with."""
    teacher.tower.half().save_pretrained(directory)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "preprocessor_config.json").write_text(text, encoding="utf-8")


@click.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--epochs", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(wheel: Path, out: Path, epochs: int, seed: int) -> None:
    """Train the tower from easy-VQA's WHEEL and write it to the directory OUT."""
    torch.manual_seed(seed)
    images = read_images(wheel)
    held_out = torch.arange(len(images.pixels)) % 10 == 9
    teacher = Teacher()
    train(teacher, images[~held_out], epochs)
    click.echo(json.dumps(accuracies(teacher, images[held_out])))
    scale_to_unit_spread(teacher.tower, images[held_out].pixels)
    save(teacher, out)


if __name__ == "__main__":
    main()
