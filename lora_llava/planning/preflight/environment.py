"""Check the machine: number of processes, trackers, libraries, and what its device can compute."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lora_llava.planning.preflight.findings import Finding, Findings, Problem
from lora_llava.planning.preflight.setup import Setup
from lora_llava.system.device import has_driver
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.ranks import is_alone, world_size

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which launchers and schedulers state the number of processes."""
_BF16_FROM = (8, 0)
"""Lowest compute capability with bf16."""
_TRACKERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml.core",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub", "mlflow"), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard",), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
"""The trackers of transformers: the modules that each needs, and the pip packages that have them."""
_CUDA_MAJOR, _CUDA_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
_OTHER_MODULES = {"tensorboard": "tensorboardX", "neptune": "neptune_scale"}


def refuse_several_processes() -> None:
    """Raise PreflightError if several processes were started for a command that works in one.

    `finetune` connects those that torchrun or accelerate started, before it comes here.
    """
    if not is_alone():
        return
    for name in _WORLD_SIZES:
        value = os.environ.get(name, "1")
        if value.strip() not in ("", "0", "1"):
            findings = Findings([Problem(name, *_several(value))])
            findings.refuse()


def _several(value: str) -> tuple[str, str]:
    return (
        f"is {value} in the environment: this was started as several processes, which cannot reach each other",
        "On several GPUs, start lora-llava finetune with --gpus, torchrun or accelerate launch; every other command as "
        "one process. Or unset the variable if it is left over.",
    )


def trackers_are_installed(setup: Setup) -> Iterator[Finding]:
    """Every tracker in report_to is known to transformers and installed."""
    named = setup.recipe.report_to
    for name in [] if isinstance(named, str) else named:
        if name in ("none", "all"):
            continue
        if name not in _TRACKERS:
            fix = did_you_mean(similar(name.lower(), _TRACKERS), f"There are {', '.join(_TRACKERS)}.")
            yield Problem("report_to", f"no tracker is called {name}", fix)
            continue
        modules, package = _TRACKERS[name]
        if not all(_is_installed(module) for module in modules) and not _is_installed(_OTHER_MODULES.get(name, "")):
            yield Problem("report_to", f"{name} is not installed", f"Install it: pip install {package}")


def libraries_are_installed(setup: Setup) -> Iterator[Finding]:
    """The libraries bitsandbytes and deepspeed are installed if a setting needs them."""
    if setup.recipe.distributed.engine == "deepspeed" and not _is_installed("deepspeed"):
        fix = "Install it: pip install 'lora-llava[deepspeed]'"
        yield Problem("distributed.engine", "deepspeed needs DeepSpeed, which is not installed", fix)
    if _is_installed("bitsandbytes"):
        return
    fix = "Install it: pip install bitsandbytes"
    if setup.recipe.quantization.type == "nf4":
        yield Problem("quantization.type", "nf4 needs bitsandbytes, which is not installed", fix)
    for stage in setup.recipe.stage_names:
        if (optim := setup.recipe.stage(stage).optim).endswith("bit"):
            yield Problem(f"stages.{stage}.optim", f"{optim} needs bitsandbytes, which is not installed", fix)


def stages_can_be_divided(setup: Setup) -> Iterator[Finding]:
    """Every stage can be trained by several processes that divide its weights or its optimizer."""
    distributed = setup.recipe.distributed
    if world_size() == 1 or not (distributed.shard or distributed.offload):
        return
    key = "distributed.shard" if distributed.shard else "distributed.engine"
    for stage in setup.recipe.stage_names:
        if setup.recipe.stage(stage).trains_on_pairs:
            what = f"stage {stage} trains on pairs, which processes cannot divide that way"
            yield Problem(key, what, "Train it in a run of its own (start_from), without distributed.")


def device_can_compute(setup: Setup) -> Iterator[Finding]:
    """The device supports the precision and the attention of the recipe."""
    recipe = setup.recipe
    needs_half, needs_flex = recipe.precision in ("bf16", "fp16"), recipe.attn_implementation == "flex_attention"
    cards = _capabilities() if setup.here and (needs_half or needs_flex) else None
    if cards is None:
        return
    device = f"a card of compute capability {cards[0][0]}.{cards[0][1]}" if cards else "no CUDA device, only a CPU"
    if needs_half and (not cards or (recipe.precision == "bf16" and cards[0] < _BF16_FROM)):
        what = f"{recipe.precision} cannot be computed on this machine, which has {device}"
        taken = "fp16" if cards else "fp32"
        yield Problem(
            "precision",
            what,
            f"Set precision: auto, which takes {taken} here; to plan for another machine, add --memory to --dry-run.",
        )
    if needs_flex and not cards:
        what = "flex_attention has no backward pass on a CPU, and this machine has no CUDA device"
        yield Problem("attn_implementation", what, "Set attn_implementation: auto.")


def _is_installed(module: str) -> bool:
    """Tell whether a module could be imported, without importing it."""
    try:
        return bool(module) and find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@cache
def _capabilities() -> list[tuple[int, int]] | None:
    """Return the compute capability of each visible device; [] on a CPU; None where only torch can tell (ROCm).

    Asks the driver: importing torch would take seconds.
    """
    if not has_driver():
        return []
    built = _torch_built_for()
    if built != "cuda":
        return [] if built == "cpu" else None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [
        (_attribute(driver, number, _CUDA_MAJOR), _attribute(driver, number, _CUDA_MINOR))
        for number in range(count.value)
    ]


def _attribute(driver: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def _torch_built_for() -> str | None:
    """Return what the installed torch was built for, `cuda` or `cpu`; None if its files do not tell."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    values = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE))
    if values.get("cuda", "None").strip() != "None":
        return "cuda"
    return "cpu" if all(value.strip() == "None" for value in values.values()) else None
