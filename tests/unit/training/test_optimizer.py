"""Which trained weights decay, and what computes their steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from lora_llava.errors import TrainingError
from lora_llava.training.checkpoints.state import HeldState, load_optimizer
from lora_llava.training.optimizer import groups_of, make_optimizer, make_schedule
from lora_llava.training.parallel.offload import OffloadedAdamW


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)
    return module


def test_the_weights_that_decay_are_those_of_the_trainer(tmp_path: Path) -> None:
    vector, matrix = torch.ones(2), torch.ones(2, 2)
    model = nn.ModuleDict(
        {
            "lora_A": _linear(nn.Parameter(matrix.clone())),
            # Of DoRA: a vector that decays.
            "lora_magnitude_vector": _linear(nn.Parameter(vector.clone())),
            "multi_modal_projector": _linear(nn.Parameter(matrix.clone()), nn.Parameter(vector.clone())),
        }
    )
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, optim="adamw_torch", use_cpu=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, args, None).param_groups
    decaying = {names[id(one)] for group in groups if group["weight_decay"] for one in group["params"]}
    trainer = Trainer(nn.Linear(1, 1), args)
    assert decaying == set(trainer.get_decay_parameter_names(model))
    assert "lora_magnitude_vector.weight" in decaying


@pytest.mark.parametrize(("mm_projector_lr", "expected"), [(0.001, 0.001), (None, 0.01)])
def test_lora_comes_first_and_the_projector_has_its_own_rate(
    tmp_path: Path, mm_projector_lr: float | None, expected: float
) -> None:
    """Whatever their order in the model: every checkpoint has the states of the optimizer in that of its groups."""
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    parts = {
        "multi_modal_projector": _linear(nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))),
        "frozen": _linear(frozen),
        "lora_A": _linear(nn.Parameter(torch.ones(2, 2))),
    }
    model = nn.ModuleDict({"model": nn.ModuleDict(parts)})
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1, "use_cpu": True}
    optimizer = make_optimizer(model, TrainingArguments(output_dir=str(tmp_path), **options), mm_projector_lr)
    named = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert named == [("lora", 0.01, 0.1), ("projector", expected, 0.1), ("projector", expected, 0.0)]
    groups = groups_of(optimizer)
    assert list(groups) == ["lora", "projector"]
    assert groups["lora"][0] is parts["lora_A"].weight
    assert [one.shape for one in groups["projector"]] == [(2, 2), (2,)]


def test_deepspeed_updates_weights_with_adamw_alone(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lora_A": _linear(nn.Parameter(torch.ones(2, 2)))})
    adamw = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", use_cpu=True)
    assert isinstance(make_optimizer(model, adamw, None, offloads=True), OffloadedAdamW)
    assert not isinstance(make_optimizer(model, adamw, None), OffloadedAdamW)
    other = TrainingArguments(output_dir=str(tmp_path), optim="adafactor", use_cpu=True)
    with pytest.raises(TrainingError, match=r"the checkpoint's optimizer is adafactor, and .* with adamw_torch"):
        make_optimizer(model, other, None, offloads=True)
    assert not any("fused" in group for group in make_optimizer(model, other, None).param_groups)


def _steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, count: int) -> torch.Tensor:
    for _ in range(count):
        parameter.grad = torch.sin(parameter.detach() * 3)
        optimizer.step()
    return parameter.detach().clone()


def test_adamw_is_fused_on_cuda_and_takes_states_of_either_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", learning_rate=0.1, use_cpu=True)

    def make(device: str) -> tuple[torch.optim.Optimizer, nn.Parameter]:
        weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        # Only the arguments name the card: on a CPU, too, torch can fuse.
        monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
        return make_optimizer(nn.ModuleDict({"lora_A": _linear(weight)}), args, None), weight

    for saved_by, loaded_by in (("cpu", "cuda"), ("cuda", "cpu")):
        ours, weight = make(saved_by)
        fused = [group.get("fused") for group in ours.param_groups]
        assert fused == [saved_by == "cuda" or None]
        before = _steps(ours, weight, 3)
        HeldState.of(ours.state_dict(), make_schedule(ours, args), TrainerState()).write(tmp_path)
        theirs, other = make(loaded_by)
        other.data.copy_(before)
        load_optimizer(tmp_path, theirs, settings=True)
        # The kernels are this machine's, the state is that of the checkpoint.
        assert [group.get("fused") for group in theirs.param_groups] == [loaded_by == "cuda" or None]
        assert theirs.state_dict()["state"][0].keys() == ours.state_dict()["state"][0].keys()
        assert torch.allclose(_steps(theirs, other, 3), _steps(ours, weight, 3), rtol=1e-6)
