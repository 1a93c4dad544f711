"""Convert COCO captions and instances, as cocodataset.org, Roboflow and CVAT write them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_llava.data.convert.boxes import Box, check_size, clipped, corners
from lora_llava.data.convert.fields import (
    WRONG_FIELD,
    DropError,
    finite,
    identity,
    input_file,
    items,
    mapping,
    number,
    numbered,
    text,
)
from lora_llava.data.convert.objects import Labeled, Scene, ask_about_objects
from lora_llava.data.convert.writer import ConvertOptions, Picture, Writer
from lora_llava.data.sources.tables import read_document

_ROBOFLOW = "_annotations.coco.json"
CAPTION_PROMPTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""LLaVA's requests for a brief description (arXiv 2304.08485, table 11)."""


def convert_coco(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each caption, and questions about labeled objects.

    `source`: an annotation file, a directory with one, or one with a directory for each split, as Roboflow exports it.
    """
    files = _files(source)
    root = options.images or (source if source.is_dir() else source.parent)
    with Writer(output, root, options) as writer:
        scenes: list[Scene] = []
        for split, path in files.items():
            # Of an export by splits, each has its images next to its annotations.
            prefix = "" if options.images or path.parent == root else f"{path.parent.relative_to(root).as_posix()}/"
            scenes += _File(writer, path, split, prefix).read()
        if any(scene.objects for scene in scenes):
            ask_about_objects(writer, scenes)
    return writer


def _files(source: Path) -> dict[str, Path]:
    """Return the annotation files by the name of their split."""
    splits = sorted(source.glob(f"*/{_ROBOFLOW}")) if source.is_dir() else []
    if splits:
        return {path.parent.name: path for path in splits}
    has_one = source.is_dir() and (source / _ROBOFLOW).is_file()
    return {"records": input_file(source, _ROBOFLOW if has_one else "*.json")}


class _File:
    """One annotation file: its images and categories by id."""

    def __init__(self, writer: Writer, path: Path, split: str, prefix: str) -> None:
        self.writer, self.split, self.prefix = writer, split, prefix
        self.document = read_document(path)
        self.name = path.name if split == "records" else f"{split}/{path.name}"
        self.scenes: dict[str, Scene] = {}
        self.categories: dict[str, str] = {}
        self.captions: dict[str, list[str]] = {}
        """By the id of the image."""
        self.recorded: dict[str, tuple[float, float]] = {}
        """Width and height that the file names, by the id of the image."""

    def read(self) -> list[Scene]:
        """Write the records of captions; return the images with their objects."""
        images = items(self.document, "images", self.name)
        annotations = items(self.document, "annotations", self.name)
        for where, value in numbered(images, f"{self.name}, images"):
            self._take(self._add_image, value, where)
        has_objects = any(isinstance(entry, dict) and "category_id" in entry for entry in annotations)
        if has_objects:
            for where, value in numbered(items(self.document, "categories", self.name), f"{self.name}, categories"):
                self._take(self._add_category, value, where)
        for where, value in numbered(annotations, f"{self.name}, annotations"):
            self._take(self._add_annotation, value, where)
        self._write_captions()
        return list(self.scenes.values()) if has_objects else []

    def _take(self, add: Callable[[dict[str, Any], str], None], value: Any, where: str) -> None:
        """Add an entry, or report why it is left out."""
        with self.writer.report.dropping():
            add(mapping(value, where), where)

    def _add_image(self, entry: dict[str, Any], where: str) -> None:
        key = identity(entry, "id", where)
        if key in self.scenes:
            raise DropError(f"{where}: id: {key} occurs twice", "an id occurs twice")
        picture = self.writer.picture(self.prefix + text(entry, "file_name", where), where)
        if entry.get("width") is not None and entry.get("height") is not None:
            self.recorded[key] = (number(entry, "width", where), number(entry, "height", where))
        self.scenes[key] = Scene(key, picture, self.split)

    def _add_category(self, entry: dict[str, Any], where: str) -> None:
        self.categories[identity(entry, "id", where)] = text(entry, "name", where)

    def _add_annotation(self, entry: dict[str, Any], where: str) -> None:
        key = identity(entry, "image_id", where)
        scene = self.scenes.get(key)
        if scene is None:
            raise DropError(
                f"{where}: image_id: {key} is no image of the file, or one that was left out",
                "an annotation belongs to no image",
            )
        if "category_id" in entry:
            scene.objects.append(self._object(entry, where, scene.picture, key))
        elif "caption" in entry:
            self.captions.setdefault(key, []).append(text(entry, "caption", where))
        else:
            raise DropError(f"{where}: has neither caption nor category_id", WRONG_FIELD)

    def _object(self, entry: dict[str, Any], where: str, picture: Picture, key: str) -> Labeled:
        category = identity(entry, "category_id", where)
        label = self.categories.get(category)
        if label is None:
            raise DropError(f"{where}: category_id: {category} is no category of the file", "a label is unknown")
        with self.writer.report.dropping():
            check_size(picture, self.recorded.get(key), where)
            box = _box(entry, where)
            clipped(box, picture.size, f"{where}: bbox")
            return Labeled(label, f"{where}: bbox", box, is_crowd=entry.get("iscrowd") not in (0, None, False))
        # The label holds without its box.
        return Labeled(label, where, None, is_crowd=True)

    def _write_captions(self) -> None:
        if self.captions:
            self.writer.report.rules.append(
                "Captions: one record each; the captions of an image get different requests, drawn with the seed, and "
                "`references` holds all of them."
            )
        for key, captions in self.captions.items():
            rng = random.Random(f"{self.writer.options.seed}/{self.split}/{key}/captions")
            prompts = rng.sample(CAPTION_PROMPTS, len(CAPTION_PROMPTS))
            references = captions if len(captions) > 1 else None
            for index, caption in enumerate(captions):
                record = {"id": f"{key}/caption/{index}", "image": self.scenes[key].picture.path, "answer": caption}
                question = self.writer.options.question or prompts[index % len(prompts)]
                self.writer.write(
                    {**record, "question": question, "references": references}, kind="caption", split=self.split
                )


def _box(entry: dict[str, Any], where: str) -> Box:
    values = entry.get("bbox")
    if not isinstance(values, list) or len(values) != 4:
        raise DropError(f"{where}: bbox: must be a list of x, y, width and height", WRONG_FIELD)
    left, top, width, height = (finite(value, f"{where}: bbox[{index}]") for index, value in enumerate(values))
    return corners(left, top, width, height)
