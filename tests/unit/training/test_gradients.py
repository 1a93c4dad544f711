"""Gradients are summed over the processes, also where some have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_llava.training.parallel import gradients
from lora_llava.training.parallel.gradients import sum_gradients, summed

Other = dict[int, torch.Tensor | None]
"""Gradients of the other process, by the number of elements of their parameter."""


def parameter(size: int, gradient: float | None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(size, dtype=dtype))
    made.grad = None if gradient is None else torch.full((size,), gradient, dtype=dtype)
    return made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was sent to a second process, which has the same gradients but for a third parameter's, and 5 there."""
    sent: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, how: Any = None) -> None:
        sent.append(tensor.clone())
        if tensor.dtype == torch.uint8:
            tensor[2] = 1
        else:
            tensor[tensor == 0] = 2.5
            tensor *= 2

    monkeypatch.setattr(gradients, "is_alone", lambda: False)
    monkeypatch.setattr(gradients.dist, "all_reduce", all_reduce)
    return sent


def test_a_gradient_of_any_process_reaches_all(sent: list[torch.Tensor]) -> None:
    parameters = [parameter(2, 1.0), parameter(3, None), parameter(4, None), parameter(1, 3.0, torch.bfloat16)]
    sum_gradients(parameters)
    found = [None if one.grad is None else one.grad.tolist() for one in parameters]
    # In no process, in the other one, and in both.
    assert found == [[2.0, 2.0], None, [5.0] * 4, [6.0]]
    assert [one.dtype for one in sent] == [torch.uint8, torch.float32, torch.bfloat16]
    assert [one.numel() for one in sent] == [4, 6, 1]


@pytest.mark.parametrize(("limit", "sizes"), [(12, [2, 4, 2]), (24, [6, 2]), (1, [2, 4, 2]), (2**26, [8])])
def test_gradients_travel_in_buckets(
    sent: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, limit: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", limit)
    parameters = [parameter(2, 1.0), parameter(4, 2.0), parameter(2, 3.0)]
    held = [one.grad for one in parameters]
    sum_gradients(parameters)
    assert [one.numel() for one in sent[1:]] == sizes
    assert [one.grad[0].item() for one in parameters if one.grad is not None] == [2.0, 4.0, 6.0]
    assert all(one.grad is before for one, before in zip(parameters, held, strict=True))


def test_a_single_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients.dist, "all_reduce", None)
    one, total = parameter(2, 1.0), torch.ones(3)
    sum_gradients([one])
    assert one.grad is not None
    assert one.grad.tolist() == [1.0, 1.0]
    assert summed(total) is total


def test_a_sum_leaves_its_terms_alone(sent: list[torch.Tensor]) -> None:
    total = torch.ones(3)
    assert summed(total).tolist() == [2.0] * 3
    assert total.tolist() == [1.0] * 3
