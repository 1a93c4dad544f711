"""Gradients and optimizer in parts on the hosts, without DeepSpeed: order, parts, norms, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_llava.errors import TrainingError
from lora_llava.recipe.settings import DistributedSettings
from lora_llava.system.ranks import planned_for
from lora_llava.training.parallel import offload
from lora_llava.training.parallel.offload import OffloadedAdamW, OffloadedGradients, check_offload, offload_line

ENGINE: Any = {"engine": "deepspeed", "offload": True}


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(1.0, size + 1)) for size in sizes]


def divided(monkeypatch: pytest.MonkeyPatch) -> tuple[OffloadedAdamW, OffloadedGradients, list[Any]]:
    """An optimizer whose parts are those of a single process, and what DeepSpeed is asked to do, in order."""
    asked: list[Any] = []

    def initialized(model: nn.Module, parts: torch.optim.AdamW) -> tuple[Any, Any]:
        for group in parts.param_groups:
            flat = nn.Parameter(torch.cat([one.detach() for one in group["params"]]))
            flat.grad = torch.full_like(flat, 3.0 if group["name"] == "lora" else 4.0)
            group["params"] = [flat]

        def step() -> None:
            asked.append([None if group["params"][0].grad is None else group["name"] for group in parts.param_groups])
            parts.step()

        zero = SimpleNamespace(
            process_gradients=lambda one, group: asked.append((one.numel(), group)),
            finalize_gradient_accumulation_boundary=lambda: asked.append("sums"),
            step=step,
            zero_grad=lambda: asked.append("zero"),
        )
        return SimpleNamespace(), zero

    monkeypatch.setattr(offload, "_initialized", initialized)
    rates: list[dict[str, Any]] = [
        {"params": weights(2, 3), "lr": 0.5, "name": "lora"},
        {"params": weights(4), "lr": 0.25, "name": "projector"},
    ]
    optimizer = OffloadedAdamW(rates, weight_decay=0.0)
    return optimizer, OffloadedGradients(optimizer), asked


def test_gradients_are_handed_over_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, gradients, asked = divided(monkeypatch)
    first, second, projector = [one for group in optimizer.param_groups for one in group["params"]]
    for _ in range(2):
        asked.clear()
        optimizer.zero.process_gradients(projector, 1)
        optimizer.zero.process_gradients(first, 0)
        assert asked == []
        optimizer.zero.process_gradients(second, 0)
        assert asked == [(3, 0), (2, 0), (4, 1)]
        gradients._in_order.end()
    optimizer.zero.process_gradients(second, 0)
    with pytest.raises(AssertionError, match="a pass completes all gradients"):
        gradients._in_order.end()


def test_the_loss_of_a_row_completes_the_projector_whatever_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, gradients, _ = divided(monkeypatch)
    [projector] = optimizer.param_groups[1]["params"]
    zero = gradients.before_row()
    zero.backward()
    assert zero.item() == 0.0
    assert projector.grad is not None
    assert not projector.grad.any()


def test_norms_and_clipping_are_those_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, gradients, _ = divided(monkeypatch)
    optimizer.reached = {"lora", "projector"}
    gradients.complete()
    assert {name: float(norm) for name, norm in gradients.norms().items()} == pytest.approx(
        {"lora": 3 * 5**0.5, "projector": 8.0}
    )
    assert float(gradients.clip(1.0)) == pytest.approx(109**0.5)
    clipped = [group["params"][0].grad for group in optimizer.part_groups]
    assert float(torch.cat(clipped).norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("drops", [False, True])
def test_a_group_without_gradients_and_a_dropped_step_leave_weights_and_averages_alone(
    monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    optimizer, gradients, asked = divided(monkeypatch)
    lora, projector = (group["params"][0] for group in optimizer.part_groups)
    before = [lora.detach().clone(), projector.detach().clone()]
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.reached = {"lora"}
    gradients.complete()
    assert float(gradients.norms()["projector"]) == 0.0
    if drops:
        gradients.drop()
    optimizer.step()
    assert asked == ["sums", [None if drops else "lora", None], "zero"]
    assert torch.equal(projector, before[1])
    # The first step of AdamW moves each weight by the learning rate.
    assert torch.allclose(before[0] - lora, torch.full_like(lora, 0.0 if drops else 0.125))
    assert lora.grad is not None
    assert projector.grad is not None
    states = optimizer._parts.state  # type: ignore[union-attr]
    assert set(states) == (set() if drops else {lora})
    assert optimizer.reached == set()


def test_parts_of_a_state_are_its_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, parts = torch.zeros(3), []
    for rank in range(2):
        monkeypatch.setattr(offload, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(offload, "world_size", lambda: 2)
        parts.append(offload._own_part([torch.ones(2, 1), torch.full((3,), 2.0)], flat))
    assert torch.cat(parts).tolist() == [1, 1, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float16, "precision is fp16 here"), (torch.bfloat16, None), (torch.float32, None)],
)
def test_what_cannot_be_offloaded_is_refused_with_several_processes(dtype: torch.dtype, words: str | None) -> None:
    asked: Any = SimpleNamespace(recipe=SimpleNamespace(distributed=DistributedSettings(**ENGINE)), name="align")
    check_offload(asked, dtype)
    assert offload_line(asked) == "distributed.offload: no effect in a single process; start several with --gpus"
    with planned_for(2):
        assert offload_line(asked) is None
        if words is None:
            check_offload(asked, dtype)
            return
        with pytest.raises(TrainingError, match=words):
            check_offload(asked, dtype)
