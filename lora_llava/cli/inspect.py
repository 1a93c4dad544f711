"""Commands that show something: inspect, env."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import click

from lora_llava.cli.common import leave_torch_out, make_console, open_recipe, quiet_libraries
from lora_llava.system.text import dtype_name

_PACKAGES = (
    "lora-llava", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub", "Pillow",
)  # fmt: skip


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--index", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the training record.")
@click.option("--stage", metavar="NAME", help="Stage, such as instruct [the last of the recipe].")
def inspect(recipe: str, overrides: tuple[str, ...], index: int, stage: str | None) -> None:
    """Show one training record as the model sees it.

    Prints each token, whether it is supervised, and the tensors of the record. Loads the tokenizer and the data, not
    the model.
    """
    settings = open_recipe(recipe, overrides)
    leave_torch_out(settings)
    quiet_libraries()
    from lora_llava.doctor.inspection import inspect_record

    make_console().print(inspect_record(settings, stage, index))


@click.command()
def env() -> None:
    """Show versions, device and memory, for a bug report."""
    quiet_libraries()
    import psutil
    import torch

    from lora_llava.system.device import pick_device, pick_dtype

    rows = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    rows.update({name: _version(name) for name in _PACKAGES})
    rows["device"] = "CPU"
    if (device := pick_device()).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows["device"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        rows["device memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        rows["devices"] = str(torch.cuda.device_count())
        rows["CUDA"] = str(torch.version.cuda)
    rows["precision: auto"] = dtype_name(pick_dtype("auto", device))
    rows["CPU cores"] = str(os.cpu_count())
    rows["torch threads"] = str(torch.get_num_threads())
    rows["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
