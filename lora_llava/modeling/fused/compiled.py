"""Elementwise parts of a decoder layer compiled to one or two kernels each, for rows of all lengths.

Where an operator after the other launches up to eight kernels, each with its own pass over memory, a compiled part
reads its inputs once and writes its outputs once. `torch.nn.functional.rms_norm` would fuse the norm alone, and rounds
differently in bf16: transformers rounds before it multiplies by the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from lora_llava.modeling.fused.elementwise import Elementwise

_LENGTHS = (96, 160)
"""Tokens of the rows to try: the second must not compile again."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative difference from the same parts one by one; a compiled part rounds once, at its end."""
_EAGER = Elementwise()


# Compiled parts return new tensors. The compiler leaves out the copies that these functions make for that.


def _norm_backward(dy: torch.Tensor, *others: Any) -> torch.Tensor:
    return _EAGER.norm_backward(dy.clone(), *others)


def _swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, _activated: None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _EAGER.swiglu_backward(dy.clone(), gate, up, None)


_PARTS: dict[str, Callable[..., Any]] = {
    "norm": _EAGER.norm,
    "normalized": _EAGER.normalized,
    "norm_backward": _norm_backward,
    "rotate": _EAGER.rotate,
    "rotate_backward": _EAGER.rotate_backward,
    "swiglu": _EAGER.swiglu,
    "swiglu_backward": _swiglu_backward,
}


@cache
def _compiled(name: str, backend: str) -> Callable[..., Any]:
    """Compile a part, once in a process."""
    compiled: Callable[..., Any] = torch.compile(_PARTS[name], fullgraph=True, backend=backend)
    return compiled


class CompiledElementwise(Elementwise):
    """The same parts compiled. From the first failure on, of compiler or kernel, they run one by one."""

    def __init__(self, backend: str = "inductor") -> None:
        """`backend`: of torch.compile."""
        self.backend = backend
        for name in _PARTS:
            setattr(self, name, partial(self._run, name))

    def try_on(self, weight: torch.Tensor, config: Any) -> None:
        """Compile every part at the widths of a model, and compare it with the same part run by itself.

        `weight` (D,): of a norm; `config`: the language model's. A difference beyond rounding is a failure.
        """
        for length in _LENGTHS:
            for name, args in _examples(length, weight, config).items():
                with torch.no_grad():
                    self._compare(name, args)
                if self.failure is not None:
                    return

    def _compare(self, name: str, args: tuple[Any, ...]) -> None:
        compiled = self._run(name, *args)
        expected = getattr(_EAGER, name)(*args)
        pairs = ((compiled, expected),) if isinstance(expected, torch.Tensor) else zip(compiled, expected, strict=True)
        for one, other in pairs:
            difference = float((one.float() - other.float()).norm() / other.float().norm())
            if not difference <= _TOLERANCE[args[0].dtype]:
                self.failure = f"{name}: differs by {difference:.1e} when it is compiled"

    def _run(self, name: str, *args: Any) -> Any:
        if self.failure is None:
            try:
                return _compiled(name, self.backend)(*_for_all_rows(args))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises; nothing has been overwritten yet
                lines = str(error).strip().splitlines() or [""]
                self.failure = f"{name}: {type(error).__name__}: {lines[0]}"
        return getattr(_EAGER, name)(*args)

    def swiglu_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return `swiglu`; silu(gate) is computed again in registers, which costs less than to write and read it."""
        return self.swiglu(gate, up), None


def _for_all_rows(args: tuple[Any, ...]) -> list[Any]:
    """Return arguments for which the compiler makes one graph: of any number of tokens, with a gradient or without."""
    detached = [one.detach() if isinstance(one, torch.Tensor) else one for one in args]
    tokens = args[0].shape[0]
    for one in detached:
        if isinstance(one, torch.Tensor) and one.dim() > 1 and one.shape[0] == tokens:
            torch._dynamo.maybe_mark_dynamic(one, 0)
    return detached


def _examples(length: int, weight: torch.Tensor, config: Any) -> dict[str, tuple[Any, ...]]:
    """Make arguments of each part for a row of `length` tokens, of a generator that nothing else draws from."""
    generator = torch.Generator(weight.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(length, *shape, generator=generator, device=weight.device, dtype=weight.dtype)

    width, intermediate = len(weight), int(config.intermediate_size)
    heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    head_dim = int(getattr(config, "head_dim", None) or width // heads)
    x, scale = draw(width), torch.rand(length, 1, generator=generator, device=weight.device) + 0.5
    turned = (draw(heads, head_dim), draw(key_heads, head_dim), draw(1, head_dim), draw(1, head_dim))
    gate, up = draw(intermediate), draw(intermediate)
    return {
        "norm": (x, weight.detach(), 1e-6),
        "normalized": (x, weight.detach(), scale),
        "norm_backward": (draw(width), x, weight.detach(), scale, None),
        "rotate": turned,
        "rotate_backward": turned,
        "swiglu": (gate, up),
        "swiglu_backward": (draw(intermediate), gate, up, None),
    }
