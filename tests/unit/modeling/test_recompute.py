"""Recomputing on the way back: the same gradients to the bit, at a known price in work and memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lora_llava.modeling.recompute as recompute
from lora_llava.data.rows import Batch, build_row
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.modeling.stages import build_stage
from lora_llava.modeling.structure import TREES
from lora_llava.recipe.settings import AdapterSettings
from lora_llava.recipe.stages import GradientCheckpointing
from tests.helpers.tiny import IMAGE_SIZE, tiny_config, tiny_llava
from tests.parity.test_packed import branches, gradients

POLICIES: list[tuple[GradientCheckpointing, int]] = [("selective", 0), ("selective", 1), (True, 0)]


def trained(policy: GradientCheckpointing, full_layers: int) -> Any:
    torch.manual_seed(0)
    model = build_stage(tiny_llava(seed=3, layers=3), "instruct", AdapterSettings(r=2, lora_alpha=4.0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    recompute.set_recompute(model, policy, full_layers)
    set_attention(llava_in(model), TREES)
    return model.train()


def row() -> Batch:
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return build_row([branches(5)]) | {"pixel_values": pixels}


def flops(model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        packed_loss(model, row(), 9).backward()
    return counter.get_total_flops()


@pytest.mark.fault("training: activation checkpointing that changes the loss")
@pytest.mark.parametrize(("policy", "full_layers"), POLICIES)
def test_gradients_are_those_without_recomputing(policy: GradientCheckpointing, full_layers: int) -> None:
    plain, again = trained(False, 0), trained(policy, full_layers)
    ours, theirs = (gradients(model, packed_loss(model, row(), 9)) for model in (again, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.fault("training: activation checkpointing that changes the loss")
def test_selective_computes_little_again() -> None:
    plain, selective, mixed, full = (flops(trained(*policy)) for policy in [(False, 0), *POLICIES])
    assert plain < selective < mixed < full
    assert selective <= 1.25 * plain
    assert full >= 1.3 * plain


def kept_bytes(monkeypatch: pytest.MonkeyPatch, config: LlamaConfig, tokens: int) -> int:
    """Bytes of a layer's input and of what the policy keeps of it; the weights are whatever lay in memory."""
    kept = 0
    decide = recompute._keep_expensive

    def watched(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        nonlocal kept
        policy = decide(context, operator, *args, **options)
        if policy == CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            outputs = operator(*args, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            kept += sum(one.nbytes for one in outputs if isinstance(one, torch.Tensor))
        return policy

    monkeypatch.setattr(recompute, "_keep_expensive", watched)
    shapes = LlavaConfig(vision_config=tiny_config().vision_config, text_config=config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shapes).to(torch.bfloat16)
        wrapped = build_stage(model, "instruct", AdapterSettings(r=128)).train()
    wrapped.to_empty(device="cpu")
    recompute.set_recompute(wrapped, "selective")
    hidden_states = torch.zeros(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.model.language_model(inputs_embeds=hidden_states, use_cache=False).last_hidden_state.sum().backward()
    return kept + hidden_states.nbytes


def test_selective_keeps_at_most_100_kib_a_token_and_layer_of_the_7b(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=64
    )
    tokens = 2
    kib = kept_bytes(monkeypatch, config, tokens) / tokens / 1024
    sys.stdout.write(f"kept by selective recomputing: {kib:.1f} KiB a token and layer\n")
    assert 50 < kib <= 100
