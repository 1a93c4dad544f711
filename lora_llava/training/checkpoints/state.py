"""The state of a training as safetensors and JSON: optimizer, scheduler, random numbers, the Trainer's own.

Nothing here is pickled. What comes back is bit by bit what was saved: floats keep all their digits in JSON.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS

OPTIMIZER, OPTIMIZER_TENSORS = "optimizer.json", "optimizer.safetensors"
SCHEDULER = "scheduler.json"
RANDOM, RANDOM_TENSORS = "random.json", "random.safetensors"
TRAINER = "trainer_state.json"
"""As `transformers` names it: `Trainer.train` reads it from there."""

_TENSOR = "$tensor"
"""Key that stands for a tensor of the file beside."""


def save_state(directory: Path, optimizer: Any, scheduler: Any, trainer: TrainerState) -> None:
    """Write all that a training needs to go on, apart from the weights."""
    save_optimizer(directory, optimizer)
    _write(directory / SCHEDULER, scheduler.state_dict())
    save_random_state(directory)
    trainer.save_to_json(str(directory / TRAINER))


def save_optimizer(directory: Path, optimizer: Any) -> None:
    """Write the state of an optimizer, whatever it keeps for a parameter."""
    tensors: dict[str, torch.Tensor] = {}
    content = _without_tensors(optimizer.state_dict(), "", tensors)
    save_file(tensors, directory / OPTIMIZER_TENSORS)
    _write(directory / OPTIMIZER, content)


def load_optimizer(directory: Path, optimizer: Any, *, settings: bool) -> None:
    """Give an optimizer its state back: what it keeps for each parameter and, with `settings`, its rates and betas.

    Raises TrainingError if the state is that of other parameters.
    """
    tensors = load_file(directory / OPTIMIZER_TENSORS)
    content = _with_tensors(_read(directory / OPTIMIZER), tensors)
    fresh = optimizer.state_dict()["param_groups"]
    groups = content["param_groups"]
    sizes, fresh_sizes = ([len(group["params"]) for group in one] for one in (groups, fresh))
    if sum(sizes) != sum(fresh_sizes):
        raise TrainingError(f"{directory / OPTIMIZER} is of another number of parameters than are trained now")
    # Parameters have one order; with weight decay it is cut into more groups than without.
    settings = settings and sizes == fresh_sizes
    for group, other in zip(groups, fresh, strict=settings):
        # JSON has no tuples.
        group |= {key: tuple(group[key]) for key, value in other.items() if isinstance(value, tuple)}
    state = {int(key): value for key, value in content["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups if settings else fresh})
    _page(getattr(optimizer, "optimizer", optimizer))


def _page(optimizer: Any) -> None:
    """Move the state of a paged optimizer of bitsandbytes to pages again, as it does with large ones at its start."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        if parameter.device.type == "cuda":
            for name in {"state1", "state2"} & state.keys():
                pages = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = pages.copy_(state[name])


def load_scheduler(directory: Path, scheduler: Any, step: int, *, settings: bool) -> None:
    """Give a scheduler its state back; without `settings`, set a fresh one to `step` of its own schedule."""
    saved = _read(directory / SCHEDULER)
    if settings and len(saved["base_lrs"]) == len(scheduler.base_lrs):
        scheduler.load_state_dict(saved)
        return
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def save_random_state(directory: Path) -> None:
    """Write the state of the generators of Python, numpy and torch."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, directory / RANDOM_TENSORS)
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that libraries draw from
    content = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    _write(directory / RANDOM, content)


def load_random_state(directory: Path) -> None:
    """Set the generators to a saved state."""
    tensors = load_file(directory / RANDOM_TENSORS)
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    content = _read(directory / RANDOM)
    version, numbers, spare = content["python"]
    random.setstate((version, tuple(numbers), spare))
    name, keys, *rest = content["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def load_weights(directory: Path, model: PeftModel) -> None:
    """Give a model the weights of the artifact in `directory`. Raises TrainingError if they are of another form."""
    state = load_file(directory / WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise TrainingError(f"{directory / WEIGHTS} holds other weights than are trained now; start a new run")
    set_peft_model_state_dict(model, state)


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON takes it, having moved the tensors in it to `tensors`."""
    if isinstance(value, torch.Tensor):
        # A copy: tensors may share their memory, and safetensors refuses that.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(one, f"{name}.{key}".lstrip("."), tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(one, f"{name}.{place}", tensors) for place, one in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_tensors(one, tensors) for one in value]
    return value


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
