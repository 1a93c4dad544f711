"""Steps on CUDA without a card: tensors have a device, shape and dtype, but no values (`FakeTensorMode`).

An operator that would mix tensors of host and card raises. Whatever would wait for the card is listed: values that are
read from it, and copies from memory that is not pinned. Gradients are made up, since autograd needs a real card.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

import lora_llava
from lora_llava.generation import decoding
from lora_llava.generation.decoding import greedy_decode
from lora_llava.generation.prompts import Prompt
from lora_llava.modeling import attention as attention_module
from lora_llava.modeling.attention import block_mask_tensors, set_attention, to_device, with_block_lists
from lora_llava.modeling.fused import compiled
from lora_llava.modeling.fused.compiled import CompiledElementwise
from lora_llava.modeling.fused.functions import output_backward, output_forward, qkv_backward, qkv_forward
from lora_llava.modeling.fused.layer import fuse_layers
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import FLEX, SDPA, TREES
from lora_llava.recipe.stages import PreferSettings
from lora_llava.training.objectives.by_source import LossBySource
from lora_llava.training.objectives.preference import PairSums, PreferenceObjective
from lora_llava.training.parallel.gradients import WholeGradients
from lora_llava.training.trainer import PackedTrainer
from tests.helpers import steps
from tests.helpers.layers import Layers, training_model
from tests.helpers.steps import made_rows, made_trainer
from tests.helpers.tiny import BOS_ID, EOS_ID, IMAGE_ID, NUM_IMAGE_TOKENS
from tests.parity.test_preference import TEXTS, pair, row_of_pairs
from tests.unit.modeling.test_fused import layers_of

CARD = torch.device("cuda", 0)
_CUDA, _META = 1, 14
"""Numbers of the types of devices in `c10/core/DeviceType.h`."""
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
PACKAGE = str(Path(lora_llava.__file__).parent)


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    """Let PyTorch without CUDA index tensors on a card, for which it asks the card's guard: that of `meta` does."""
    if torch.cuda.is_available():
        yield
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as error:
        pytest.skip(f"no guards to be found: {error}")
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    yield
    guards[_CUDA] = before


class Waits(TorchDispatchMode):
    """Notes by whom a value of the card is read, and what is copied to or from it and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device == CARD:
            self._note("read")
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        result = function(*args, **kwargs)
        if function in COPIES and not kwargs.get("non_blocking", args[2] if len(args) > 2 else False):
            source = args[1] if function is COPIES[1] else args[0]
            if source.device != result.device:
                self._note("copied")
        return result

    def _note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        self.found[f"{what} in {Path(frames[-1].filename).stem}.{frames[-1].name}"] += 1


class OnCard:
    """A trainer whose model is on a card, and what its steps wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, attention: Any) -> None:
        monkeypatch.setattr(steps, "build_model", lambda: training_model(Layers(quantization="none")))
        # Autocast asks whether there is a card.
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(compiled, "_compiled", lambda name, _: compiled._PARTS[name])
        monkeypatch.setattr(CompiledElementwise, "try_on", lambda *_: None)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention_module._FLEX_NAME, _by_blocks)
        monkeypatch.setattr(WholeGradients, "backward", _made_up)
        rows = made_rows(range(1))
        rows.sources = ("a", "b")
        rows.records = [replace(one, source="ab"[number % 2]) for number, one in enumerate(rows.records)]
        self.trainer: Any = made_trainer(directory, rows, dtype=torch.bfloat16)
        # Read here: inside the mode, they would have no values on the host either.
        batches = [with_block_lists(rows[number]) if attention == FLEX else rows[number] for number in range(len(rows))]
        monkeypatch.setattr(PackedTrainer, "rows_loader", lambda *_: iter(batches))
        set_attention(llava_in(self.trainer.model), attention)
        monkeypatch.setattr(type(self.trainer.args), "device", CARD)
        self.mode, self.waits = FakeTensorMode(allow_non_fake_inputs=True), Waits()
        with self.mode:
            for module in self.trainer.model.modules():
                module._parameters = {key: self._parameter(one) for key, one in module._parameters.items()}
                module._buffers = {key: self._moved(one) for key, one in module._buffers.items()}
            self.trainer.device, self.trainer.by_source = CARD, LossBySource(rows.sources, CARD)
            assert fuse_layers(self.trainer.model) is None

    def waited(self, run: Callable[[], object]) -> Counter[str]:
        """Run something, and return what was waited for."""
        with torch.no_grad(), self.mode, self.waits:
            run()
        return self.waits.found

    def _moved(self, tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else self.mode.from_tensor(tensor.detach()).to(CARD)

    def _parameter(self, one: nn.Parameter | None) -> nn.Parameter | None:
        return None if one is None else nn.Parameter(self._moved(one), requires_grad=one.requires_grad)


def _made_up(gradients: WholeGradients, loss: torch.Tensor, *, has_image: bool) -> None:
    for weights in gradients.groups.values():
        for weight in weights:
            weight.grad = torch.zeros_like(weight)


def _by_blocks(_module: Any, query: Any, _key: Any, _value: Any, mask: Any, **_: Any) -> Any:
    assert {one.device for one in block_mask_tensors(mask)} == {CARD}
    return query.transpose(1, 2), None


@pytest.mark.parametrize("attention", [TREES, FLEX])
def test_a_step_mixes_no_devices_and_waits_in_the_guard_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attention: Any
) -> None:
    card = OnCard(monkeypatch, tmp_path, attention)
    assert card.waited(card.trainer.train) == {
        # Once: the loss, and the norms of LoRA and the projector.
        "read in non_finite.on_step": 3,
        # For the line of the log, and the summary at the end.
        "read in trainer._log_loss": 2,
        "read in by_source.state": 4,
        "read in monitor.projector_norms": 3,
        "read in trainer._end": 1,
    }


def test_validation_waits_after_its_last_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = OnCard(monkeypatch, tmp_path, TREES)
    rows = card.trainer.train_dataset
    batches = card.trainer.rows_loader()
    assert card.waited(lambda: card.trainer.held_out.mean(rows, batches)) == {"read in validation._measure_all": 2}


def test_a_row_of_pairs_mixes_no_devices_and_does_not_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = OnCard(monkeypatch, tmp_path, TREES)
    pairs = [pair(*texts) for texts in TEXTS]
    row = row_of_pairs(pairs, torch.zeros(len(pairs), 2, dtype=torch.float64))
    objective = PreferenceObjective(PreferSettings.model_construct(sft_weight=0.1))
    assert not card.waited(lambda: objective.loss(card.trainer.model, to_device(row, CARD), 1))
    assert card.waited(lambda: objective.take_sums(CARD)) == {"read in preference.take_sums": len(fields(PairSums))}


def test_decoding_mixes_no_devices_and_reads_a_token_of_each_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = OnCard(monkeypatch, tmp_path, SDPA)
    monkeypatch.setattr(decoding, "_free_bytes", lambda _: None)
    ids = [BOS_ID, *[IMAGE_ID] * NUM_IMAGE_TOKENS]
    prompts = [Prompt([*ids, 50 + number, 60], len(ids), lambda: torch.zeros(3, 28, 28), 0) for number in range(3)]
    answers: list[list[int]] = []
    found = card.waited(
        lambda: answers.extend(greedy_decode(card.trainer.model, prompts, eos_token_ids=[EOS_ID], max_new_tokens=2))
    )
    assert answers == [[1, 1]] * 3
    assert found["read in decoding._most_likely"] == 6


def test_the_gradients_of_a_layer_mix_no_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = OnCard(monkeypatch, tmp_path, TREES)
    parts = layers_of(card.trainer.model)[0].parts
    with torch.no_grad(), card.mode, card.waits:
        x, table = (torch.zeros(shape, dtype=torch.bfloat16, device=CARD) for shape in ((9, 64), (9, 1, 16)))
        heads, kept = qkv_forward(parts, x, table, table)
        output, kept_output = output_forward(parts, x, heads[0].reshape(9, -1))
        _, d_attended, d_factors = output_backward(parts, kept_output, output)
        dx, more = qkv_backward(parts, kept, heads)
    assert {one.device for one in (d_attended, dx, *d_factors, *more)} == {CARD}
    assert not card.waits.found
