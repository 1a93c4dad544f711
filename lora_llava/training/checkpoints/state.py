"""Save and load the state of a training as safetensors and JSON: optimizer, scheduler, RNGs, TrainerState.

Nothing is pickled. The round trip is exact to the bit: JSON keeps all digits of a float.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.system.ranks import rank
from lora_llava.training.checkpoints.held import copy_to_host

OPTIMIZER, OPTIMIZER_TENSORS = "optimizer.json", "optimizer.safetensors"
SCHEDULER = "scheduler.json"
SCALER = "scaler.json"
RANDOM, RANDOM_TENSORS = "random.json", "random.safetensors"
TRAINER = "trainer_state.json"
"""Named as in `transformers`."""

Tensors = dict[str, torch.Tensor]

_KERNELS = ("fused", "foreach")
"""Options of torch's optimizers that choose their kernels."""
_TENSOR = "$tensor"
"""Key of a reference to a tensor in the safetensors file."""


@dataclass(frozen=True, slots=True)
class HeldState:
    """Everything that a resumed training needs, except the weights; shares nothing that training changes."""

    texts: dict[str, str]
    """Content of the JSON files, by name."""
    tensors: dict[str, Tensors]
    """Tensors on the host, by the name of their file and their own."""
    trainer: TrainerState

    @classmethod
    def of(
        cls,
        optimizer: dict[str, Any],
        scheduler: Any,
        trainer: TrainerState,
        scaler: torch.amp.GradScaler | None = None,
        generators: Sequence[Tensors] = (),
    ) -> HeldState:
        """Copy the state of a training after a step; of the scale of the loss only in fp16, where it has one.

        `optimizer`: its state; `generators`: torch's RNG states of each process; (): of this one.
        """
        optimizer_tensors: Tensors = {}
        settings = _without_tensors(optimizer, "", optimizer_tensors)
        # The names of the first process's states have no number, as in a run of one process.
        random_tensors = {
            f"{name}.{number}" if number else name: state
            for number, states in enumerate(generators or [torch_random_state()])
            for name, state in states.items()
        }
        contents = {OPTIMIZER: settings, SCHEDULER: scheduler.state_dict(), RANDOM: _random_state()}
        if scaler is not None and scaler.is_enabled():
            contents[SCALER] = scaler.state_dict()
        held = copy(trainer)
        # Lines of the log are added, never changed.
        held.log_history = list(trainer.log_history)
        held.stateful_callbacks = deepcopy(trainer.stateful_callbacks)
        tensors = {OPTIMIZER_TENSORS: copy_to_host(optimizer_tensors), RANDOM_TENSORS: random_tensors}
        return cls({name: json.dumps(content) + "\n" for name, content in contents.items()}, tensors, held)

    def write(self, directory: Path) -> None:
        """Write the files of a checkpoint that hold the state."""
        for name, tensors in self.tensors.items():
            save_file(tensors, directory / name)
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        self.trainer.save_to_json(str(directory / TRAINER))


def load_optimizer(directory: Path, optimizer: Any, *, settings: bool) -> None:
    """Restore an optimizer: its state of each parameter and, with `settings`, its learning rates and betas.

    Raises TrainingError if the number of parameters differs.
    """
    tensors = load_file(directory / OPTIMIZER_TENSORS)
    content = _with_tensors(_read(directory / OPTIMIZER), tensors)
    fresh = optimizer.state_dict()["param_groups"]
    groups = content["param_groups"]
    sizes, fresh_sizes = ([len(group["params"]) for group in some] for some in (groups, fresh))
    if sum(sizes) != sum(fresh_sizes):
        raise TrainingError(f"{directory / OPTIMIZER} holds another number of parameters than are trained now")
    # The order of the parameters is fixed; weight decay splits it into more groups.
    settings = settings and sizes == fresh_sizes
    for group, other in zip(groups, fresh, strict=settings):
        # JSON has no tuples.
        group |= {key: tuple(group[key]) for key, value in other.items() if isinstance(value, tuple)}
        # Which kernels compute the step depends on this machine, not on the one that saved the checkpoint.
        group |= {key: other[key] for key in _KERNELS if key in other}
    state = {int(key): value for key, value in content["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups if settings else fresh})
    _page(getattr(optimizer, "optimizer", optimizer))


def _page(optimizer: Any) -> None:
    """Move the state of a paged bitsandbytes optimizer to paged memory, as the optimizer does with large states."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        if parameter.device.type == "cuda":
            for name in {"state1", "state2"} & state.keys():
                pages = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = pages.copy_(state[name])


def load_scheduler(directory: Path, scheduler: Any, *, settings: bool) -> None:
    """Restore a scheduler; without `settings`, advance a fresh one by as many steps of the current schedule."""
    saved = _read(directory / SCHEDULER)
    step = int(saved["last_epoch"])
    if settings and len(saved["base_lrs"]) == len(scheduler.base_lrs):
        scheduler.load_state_dict(saved)
        return
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def load_scaler(directory: Path, scaler: torch.amp.GradScaler) -> None:
    """Restore the scale of the loss; a checkpoint of a training in another precision has none."""
    if scaler.is_enabled() and (path := directory / SCALER).exists():
        scaler.load_state_dict(_read(path))


def torch_random_state() -> Tensors:
    """Return the states of torch's RNGs that this process draws from."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _random_state() -> dict[str, Any]:
    """Return the RNG states of Python and numpy."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that libraries draw from
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def load_random_state(directory: Path) -> None:
    """Restore the RNG states of Python, numpy and torch.

    A process that had none when they were saved draws a seed from the first one's, and its number makes it another.
    """
    tensors = load_file(directory / RANDOM_TENSORS)
    number = f".{rank()}" if f"cpu.{rank()}" in tensors else ""
    torch.set_rng_state(tensors[f"cpu{number}"])
    if torch.cuda.is_available() and f"cuda{number}" in tensors:
        torch.cuda.set_rng_state(tensors[f"cuda{number}"])
    if rank() and not number:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank())
    content = _read(directory / RANDOM)
    version, numbers, spare = content["python"]
    random.setstate((version, tuple(numbers), spare))
    name, keys, *rest = content["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def load_weights(directory: Path, model: PeftModel) -> None:
    """Load the weights of the artifact in `directory` into `model`; TrainingError if names or shapes differ."""
    state = load_file(directory / WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise TrainingError(f"{directory / WEIGHTS} does not match the weights that are trained now; start a new run")
    set_peft_model_state_dict(model, state)


def _without_tensors(value: Any, name: str, tensors: Tensors) -> Any:
    """Return `value` ready for JSON, with its tensors moved to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
