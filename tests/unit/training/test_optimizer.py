"""Which trained weights decay."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_llava.training.optimizer import make_optimizer


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
