"""Compiled elementwise parts of fused layers: the values of the eager ones, one graph for all lengths, and failures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lora_llava.modeling.fused import compiled as module
from lora_llava.modeling.fused.compiled import CompiledElementwise
from lora_llava.modeling.fused.elementwise import Elementwise
from lora_llava.modeling.fused.layer import fuse_layers, why_not_compiled
from lora_llava.modeling.packed import packed_loss
from tests.helpers.layers import Layers, config_of, one_tree, training_model, two_trees
from tests.unit.modeling.test_fused import gradients_of, layers_of

EAGER = Elementwise()
_forget = module._compiled.cache_clear


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No part is compiled yet, and none stays."""
    _forget()
    torch._dynamo.reset()
    counters.clear()
    yield
    _forget()
    torch._dynamo.reset()


def with_elementwise(model: Any, elementwise: Elementwise) -> Any:
    """Fuse a model's layers, with other elementwise parts than a CPU has."""
    assert fuse_layers(model) is None
    for layer in layers_of(model)[:-1]:
        layer.parts = replace(layer.parts, elementwise=elementwise)
    return model


def test_a_part_is_one_graph_for_rows_of_all_lengths() -> None:
    parts, shapes, dtype = CompiledElementwise("aot_eager"), Layers(key_value_heads=2), torch.bfloat16
    torch.manual_seed(3)
    parts.try_on(torch.rand(shapes.width, dtype=dtype), config_of(shapes).text_config)
    assert parts.failure is None
    assert counters["stats"]["unique_graphs"] == len(module._PARTS) == 7
    for length in (5, 96, 131):
        for name, args in module._examples(length, torch.rand(64, dtype=dtype), config_of(shapes).text_config).items():
            before = [one.clone() if isinstance(one, torch.Tensor) else one for one in args]
            with torch.no_grad():
                assert getattr(parts, name)(*args) is not None
                tensors = [pair for pair in zip(args, before, strict=True) if isinstance(pair[0], torch.Tensor)]
                assert all(torch.equal(*pair) for pair in tensors), name
                parts._compare(name, args)
            assert parts.failure is None, name
    assert counters["stats"]["unique_graphs"] == 7


def test_generated_kernels_compute_what_the_eager_parts_do() -> None:
    parts, config = CompiledElementwise("inductor"), config_of(Layers()).text_config
    for length in (96, 160):
        args = module._examples(length, torch.rand(64), config)["norm_backward"]
        with torch.no_grad():
            parts._compare("norm_backward", args)
    assert parts.failure is None


def test_gradients_are_those_of_the_eager_parts() -> None:
    shapes, rows = Layers(key_value_heads=2), (two_trees(), one_tree())
    expected = gradients_of(with_elementwise(training_model(shapes), EAGER), *rows)
    parts = CompiledElementwise("aot_eager")
    gradients = gradients_of(with_elementwise(training_model(shapes), parts), *rows)
    assert parts.failure is None
    # The norm's gradient is a graph with and one without the residual's; queries' gradients have two layouts.
    assert 7 <= counters["stats"]["unique_graphs"] <= 9
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("name", ["norm", "rotate_backward", "swiglu_backward"])
def test_a_part_that_does_not_compile_makes_all_run_eagerly_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(part: str, _backend: str) -> Any:
        if part == name:
            raise RuntimeError("no C compiler\nat line 7")
        return getattr(EAGER, part) if part != "swiglu_backward" else module._swiglu_backward

    monkeypatch.setattr(module, "_compiled", no_compiler)
    parts = CompiledElementwise()
    model = with_elementwise(training_model(Layers()), parts)
    assert why_not_compiled(model) is None
    gradients = gradients_of(model, two_trees())
    expected = gradients_of(with_elementwise(training_model(Layers()), EAGER), two_trees())
    assert why_not_compiled(model) == f"{name}: RuntimeError: no C compiler"
    assert all(torch.equal(gradients[key], one) for key, one in expected.items())


def test_a_part_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", lambda name, _: lambda *args: _spoilt(getattr(EAGER, name)(*args)))
    parts = CompiledElementwise()
    parts.try_on(torch.ones(64), config_of(Layers()).text_config)
    assert parts.failure is not None
    assert parts.failure.startswith("norm: differs by ")
    row = torch.randn(7, 64)
    assert torch.equal(parts.norm(row, torch.ones(64), 1e-6)[0], EAGER.norm(row, torch.ones(64), 1e-6)[0])


def _spoilt(result: Any) -> Any:
    return tuple(one * 1.1 for one in result) if isinstance(result, tuple) else result * math.nan


def test_out_of_memory_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_compiled", lambda *_: full)
    model = with_elementwise(training_model(Layers()), CompiledElementwise())
    with pytest.raises(torch.OutOfMemoryError):
        packed_loss(model, one_tree(), 1)
    assert why_not_compiled(model) is None
