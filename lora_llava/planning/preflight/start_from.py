"""Check that `start_from` is an undamaged artifact that fits the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_llava.errors import ArtifactError, ModelError
from lora_llava.formats.manifest import FORMAT, MANIFEST
from lora_llava.formats.names import ADAPTER_CONFIG, PEFT_PREFIX, PROJECTOR_PREFIX, WEIGHTS, canonical_name, split_lora
from lora_llava.formats.shapes import LlavaShape, Shape
from lora_llava.planning.preflight.findings import Finding, Problem
from lora_llava.planning.preflight.model.weights import Tensor, read_header, shown
from lora_llava.planning.preflight.setup import LLAVA, Setup
from lora_llava.recipe.stages import STAGES, trains_lora
from lora_llava.system.files import file_sha256, find_json
from lora_llava.system.names import path_hint

_KEY = "start_from"
_NEEDED = ("stage", "base", "adapter_sha256", "quantization", "template", "images", "data")
_LAYERS = "language_model.model."
_AGAIN = "Take the artifact from its source again."


def start_from_fits(setup: Setup) -> Iterator[Finding]:
    """The artifact in `start_from` is complete, undamaged and has the shape of the base."""
    path = setup.recipe.start_from
    if path is None:
        return
    problem = _not_an_artifact(path)
    if problem is None:
        problem = next(_damage(path), None)
    if problem is not None:
        yield Problem(_KEY, *problem)
        return
    try:
        tensors = read_header(path / WEIGHTS)
    except ModelError as error:
        yield Problem(_KEY, str(error), _AGAIN)
        return
    problems = [*_misfit(path, tensors, setup)]
    yield from problems or _altered(path, setup)


def preference_has_a_start(setup: Setup) -> Iterator[Finding]:
    """Stage `prefer` starts from a model that was taught to answer."""
    recipe = setup.recipe
    if "prefer" not in recipe.stage_names or "instruct" in recipe.stage_names or recipe.base.model_name_or_path:
        return
    start = recipe.start_from
    stage = "" if start is None else str((find_json(start / MANIFEST) or {}).get("stage"))
    if not trains_lora(stage):
        given = "no stage before it" if start is None else f"only {start}, of stage {stage},"
        yield Problem(
            "stages.prefer",
            f"has nothing to start from: the base is assembled from parts, and {given} taught it to answer",
            "Add stages.instruct, or set start_from to an artifact of stage instruct or prefer.",
        )


def _altered(path: Path, setup: Setup) -> Iterator[Finding]:
    """Yield what is not as in training: in the artifact, or in the files of a base that need not be assembled."""
    # Imported here: it reads tokenizers with transformers.
    from lora_llava.modeling.identity import base_fields, check_unchanged, compare_base

    manifest = find_json(path / MANIFEST) or {}
    model = dict(setup.usable()).get(LLAVA)
    try:
        check_unchanged(manifest, path)
        if model is None or model.directory is None:
            return
        for line in compare_base(manifest, path, base_fields(model.directory), training=True).decisive:
            yield Problem(_KEY, f"{path} was trained on another base than {model.name}: {line}", "Put its files back.")
    except (ArtifactError, ModelError, KeyError, AttributeError, TypeError) as error:
        yield Problem(_KEY, f"{path}: {error}", _AGAIN)


def _not_an_artifact(path: Path) -> tuple[str, str] | None:
    if not path.exists():
        return f"{path} does not exist", path_hint(path)
    if (path / MANIFEST).is_file():
        return None
    below = [name for name in reversed(STAGES) if (path / name / MANIFEST).is_file()]
    if below:
        return f"{path} is the directory of a run, the artifact of a stage is needed", f"Name {path / below[0]}."
    hint = (
        "Bring it in first: lora-llava import"
        if (path / ADAPTER_CONFIG).is_file()
        else ("Name the directory of a stage, such as runs/NAME/instruct.")
    )
    return f"{path} is not an artifact: it has no {MANIFEST}", hint


def _damage(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what is damaged; only the first is reported."""
    manifest, config = find_json(path / MANIFEST), find_json(path / ADAPTER_CONFIG)
    if manifest is None or any(key not in manifest for key in _NEEDED):
        yield f"{path / MANIFEST} is damaged", _AGAIN
        return
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        yield f"{path / MANIFEST} has format {manifest['format']}, newer than this program's {FORMAT}", "Update it."
    if config is None:
        yield f"{path / ADAPTER_CONFIG} is missing or damaged", _AGAIN
    weights = path / WEIGHTS
    if not weights.is_file():
        yield f"{path} lacks {WEIGHTS}", _AGAIN
        return
    sha256 = file_sha256(weights)
    if sha256 != manifest["adapter_sha256"]:
        what = f"{weights} was altered: its sha256 is {sha256}, the manifest has {manifest['adapter_sha256']}"
        yield what, _AGAIN


def _misfit(path: Path, tensors: dict[str, Tensor], setup: Setup) -> Iterator[Finding]:
    """Yield what does not fit the base. `recipe.start` refuses a LoRA of another form than the recipe's."""
    lora: dict[str, dict[str, Shape]] = {}
    outside, replaced, projector = list[str](), list[str](), dict[str, Shape]()
    for name, tensor in tensors.items():
        unprefixed = name.removeprefix(PEFT_PREFIX)
        part = split_lora(unprefixed)
        try:
            weight = canonical_name(part[0] if part else unprefixed)
        except ModelError:
            outside.append(name)
            continue
        if part is None and weight.startswith(PROJECTOR_PREFIX):
            projector[weight] = tensor.shape
        elif part is None:
            replaced.append(weight)
        elif weight.startswith(_LAYERS):
            lora.setdefault(weight, {})[part[1]] = tensor.shape
        else:
            outside.append(weight)
    for what, names in (("has LoRA outside the language model", outside), ("replaces weights", replaced)):
        if names:
            what = f"{path} {what} ({shown(sorted(names))}), which the kit does not train"
            yield Problem(_KEY, what, "Merge it into its base (lora-llava merge), and name the result as the base.")
    if setup.shape is not None and (wrong := _wrong_shapes(lora, projector, setup.shape)):
        what = f"{path} was trained on a base of another shape: {shown(wrong)}"
        yield Problem(_KEY, what, "Name the base that it was trained on; its manifest.json says which.")


def _wrong_shapes(lora: dict[str, dict[str, Shape]], projector: dict[str, Shape], base: LlavaShape) -> list[str]:
    expected = dict(base.tensors())
    wrong = [f"the base has no {name}" for name in lora if name not in expected]
    for name, parts in lora.items():
        a, b = parts.get("lora_A"), parts.get("lora_B")
        if a and b and name in expected and (b[0], a[-1]) != expected[name]:
            wrong.append(f"LoRA for {name} of {(b[0], a[-1])}, the base has {expected[name]}")
    for name, shape in base.projector():
        actual = projector.get(name)
        if actual != shape:
            wrong.append(f"{name} is {'missing' if actual is None else actual}, the base has {shape}")
    return wrong
