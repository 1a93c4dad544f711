"""The layout of haotian-liu/LLaVA for a whole model; an artifact goes to `llava_adapter`."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_llava.artifact import is_artifact, read_usage
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import WeightFiles, each_tensor, expected_shapes, write_json, write_weights
from lora_llava.formats.llava_original import TOWER_DIRECTORY, is_linear, original_name, to_original_config
from lora_llava.formats.names import EMBEDDINGS, PROJECTOR_PREFIX
from lora_llava.modeling.metadata import read_config
from lora_llava.shipping.export.hf import copy_surroundings
from lora_llava.shipping.export.llava_adapter import export_adapter, left_out
from lora_llava.shipping.export.options import ExportOptions, ExportReport
from lora_llava.shipping.export.verify import check_bits
from lora_llava.system.files import staged
from lora_llava.system.text import dtype_name

_TOWER = "vision_tower."
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def export_llava(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    """Write an artifact as the original's LoRA (or projector) directory, a model as the original's checkpoint.

    Everything that was written is read back and compared, bit by bit.
    """
    return (export_adapter if is_artifact(source) else _export_model)(source, output, options)


def _export_model(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    config = read_config(source)
    files = WeightFiles(source)
    files.check(config)
    names = sorted(expected_shapes(config))
    projector = (name for name in names if name.startswith(PROJECTOR_PREFIX))
    skipped = left_out({name: files.read(name) for name in projector}) if is_linear(config) else set()
    own = {name: original_name(name, linear=is_linear(config)) for name in names if name not in skipped}
    main = [name for name in own if not name.startswith(_TOWER)]
    tower = options.vision_tower or TOWER_DIRECTORY
    with staged(output) as staging:
        write_weights(staging, ((own[name], files.read(name)) for name in main))
        _check_written(staging, {own[name]: name for name in main}, files)
        if options.vision_tower is None:
            _write_tower(staging / TOWER_DIRECTORY, source, config, files)
        copy_surroundings(source, staging, options)
        for name in _PROCESSORS:
            (staging / name).unlink(missing_ok=True)
        aspect_ratio = read_usage(source, options.template).image_aspect_ratio
        write_json(staging / "config.json", to_original_config(config, files.dtype(EMBEDDINGS), tower, aspect_ratio))
    where = "in its directory vision_tower" if options.vision_tower is None else f"{tower}, by name: not compared"
    lines = [
        f"{output}: {len(own)} tensors in the original layout, each read back and the same",
        f"vision tower: {where}",
        f"vocabulary: {config.text_config.vocab_size} rows, those of <image> and of padding included",
    ]
    if options.vision_tower is None:
        lines.append("the original code looks for the tower from the current directory: start it inside this one")
    return {"summary": lines}


def _check_written(directory: Path, own: dict[str, str], files: WeightFiles) -> None:
    """Raise ArtifactError unless the files of `directory` hold just the tensors of `files` that `own` names."""
    left = dict(own)
    for name, tensor in each_tensor(directory):
        check_bits(tensor, files.read(left.pop(name)), name)
    if left:
        raise ArtifactError(f"{directory}: {', '.join(sorted(left)[:3])} was not written; please report it")


def _write_tower(directory: Path, source: Path, config: LlavaConfig, files: WeightFiles) -> None:
    """Write the vision tower as CLIP is published, for `CLIPVisionModel.from_pretrained`."""
    directory.mkdir()
    own = {name.removeprefix(_TOWER): name for name in expected_shapes(config) if name.startswith(_TOWER)}
    write_weights(directory, ((short, files.read(own[short])) for short in sorted(own)))
    _check_written(directory, own, files)
    size = int(config.vision_config.image_size)
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(source)
    CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=pixels["image_mean"],
        image_std=pixels["image_std"],
    ).save_pretrained(directory)
    dtype = dtype_name(files.dtype(f"{_TOWER}vision_model.embeddings.class_embedding"))
    vision = {**config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"], "dtype": dtype}
    write_json(directory / "config.json", vision)
