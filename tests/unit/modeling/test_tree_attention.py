"""Attention within trees against PyTorch's under the dense mask of the row, outputs and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.rows import Batch, build_row
from lora_llava.modeling.attention import additive_mask, attend_by_tree, masked_inputs
from lora_llava.modeling.fused.tree_attention import spans_of
from lora_llava.modeling.structure import TREES
from tests.unit.modeling.test_attention import random_row

HEADS, KEYS, WIDTH, SCALE = 6, 2, 16, 0.3


def conversation(prefix: int, own: int) -> Encoded:
    return Encoded([1] * (prefix + own), [IGNORE_INDEX] * (prefix + own), prefix)


def drawn(row: Batch, dtype: torch.dtype, *, scale: float = 1.0) -> list[torch.Tensor]:
    """Query, key and value, laid out as a model does: the heads of a token next to each other."""
    generator = torch.Generator().manual_seed(0)
    length = row["input_ids"].shape[1]
    shapes = [(1, length, heads, WIDTH) for heads in (HEADS, KEYS, KEYS)]
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def attended(row: Batch, inputs: list[torch.Tensor]) -> torch.Tensor:
    given = masked_inputs(row, TREES, inputs[0].dtype)
    assert "spans" in given
    assert "trees" not in given
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KEYS)
    return attend_by_tree(module, *inputs, None, spans=given["spans"], scaling=SCALE)[0].transpose(1, 2)


def reference(row: Batch, inputs: list[torch.Tensor]) -> torch.Tensor:
    query, key, value = inputs
    mask = additive_mask(row["segments"], query.dtype)
    key, value = (tensor.repeat_interleave(HEADS // KEYS, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)


def compared(row: Batch, dtype: torch.dtype, *, scale: float = 1.0) -> list[float]:
    """Largest differences of the output and of the three gradients, relative to the largest number."""
    inputs = drawn(row, dtype, scale=scale)
    results = []
    for attend in (attended, reference):
        output = attend(row, inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)])
    return [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(*results, strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_outputs_and_gradients_are_those_under_the_mask(seed: int) -> None:
    row = random_row(seed, longest=600)
    assert max(compared(row, torch.float64)) < 1e-12
    assert max(compared(row, torch.float32)) < 5e-6


def test_scores_far_apart_do_not_overflow() -> None:
    """The scores of the prefix and of a branch differ by hundreds; their log-sum-exps are still joined."""
    row = build_row([[conversation(40, own) for own in (5, 9, 1)]])
    assert max(compared(row, torch.float32, scale=12.0)) < 1e-4


def test_a_branch_may_have_nothing_after_the_prefix() -> None:
    row = build_row([[conversation(7, 3), conversation(7, 0), conversation(7, 2)]])
    [tree] = spans_of(row["segments"], row["tree_spans"].tolist(), torch.float32) or []
    assert (tree.prefix, tree.branches) == (7, (3, 2))
    assert max(compared(row, torch.float64)) < 1e-12


def test_branches_without_a_prefix_take_the_mask() -> None:
    row = build_row([[conversation(0, 3), conversation(0, 2)]])
    assert spans_of(row["segments"], row["tree_spans"].tolist(), torch.float32) is None
    assert "trees" in masked_inputs(row, TREES, torch.float32)


def test_no_branch_is_computed_against_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that are computed: causal for the prefix, branches by prefix, and causal within each branch."""
    row = build_row([[conversation(40, own) for own in (5, 9)], [conversation(3, 4)]])
    assert products(row, monkeypatch) == [(40, 40, True), (14, 40, False), (5, 5, True), (9, 9, True), (7, 7, True)]


def test_a_long_prefix_is_cut_into_blocks_that_see_no_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    row = build_row([[conversation(399, own) for own in (5, 9)]])
    blocks = [(133, 133, True), (133, 266, False), (133, 399, False)]
    assert products(row, monkeypatch) == [*blocks, (14, 399, False), (5, 5, True), (9, 9, True)]
    assert max(compared(row, torch.float64)) < 1e-12
    assert max(compared(row, torch.float32)) < 5e-6


def products(row: Batch, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Return queries, keys, and whether the kernel's causal mask is used, of each call in a forward pass."""
    calls: list[tuple[int, int, bool]] = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(query: Any, key: Any, value: Any, dropout: float, causal: bool, **options: Any) -> Any:
        calls.append((query.shape[2], key.shape[2], causal))
        return kernel(query, key, value, dropout, causal, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted)
        attended(row, drawn(row, torch.float32))
    return calls
