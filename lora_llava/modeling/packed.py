"""The packed forward pass: the loss of a row of trees, equal to that of its conversations one by one.

The last decoder layer computes only where a token is predicted: of all other positions only keys and values are read,
so their queries, attention output and MLP have no influence on the loss. At the 7B's shapes that saves 2.5 % of the
work, of a model of eight layers a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_llava.modeling.attention import attention_of, masked_inputs
from lora_llava.modeling.structure import HEAD_CHUNK, LANGUAGE_MODEL


def _packed_hidden_states(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the last hidden states (S, hidden size) at the row's `target_positions` (S,); see `data.rows.build_row`.

    Calls the model as a whole, so that a wrapper (data parallelism) sees the call.
    """
    llava = llava_in(model)
    inputs = masked_inputs(batch, attention_of(llava), llava.get_input_embeddings().weight.dtype)
    last_layer = llava.get_submodule(LANGUAGE_MODEL).layers[-1]
    with _without_head(llava), _images_in(llava, batch), _only_at(last_layer, batch["unique_target_positions"]):
        outputs = model(
            **inputs,
            logits_to_keep=batch["target_positions"],
            use_cache=False,
        )
    hidden_states: torch.Tensor = outputs.logits[0]
    return hidden_states


def packed_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the logits (S, vocabulary) at the row's `target_positions` (S,)."""
    logits: torch.Tensor = llava_in(model).lm_head(_packed_hidden_states(model, batch))
    return logits


def packed_loss(model: Any, batch: Mapping[str, torch.Tensor], num_supervised: torch.Tensor | int) -> torch.Tensor:
    """Return the sum of a row's cross-entropies, in fp32, divided by `num_supervised`: a scalar.

    Contract: `num_supervised` counts the supervised tokens of the whole optimizer step, over all its rows and ranks,
    so the sum over the rows is the mean over the step, however the step is cut into rows.
    """
    hidden_states = _packed_hidden_states(model, batch)
    sums = _chunk_losses(llava_in(model).lm_head, hidden_states, batch["shift_labels"], "sum", torch.float32)
    return torch.stack(sums).sum() / num_supervised


def packed_loss_by_token(
    model: Any, batch: Mapping[str, torch.Tensor], num_supervised: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `packed_loss`, to the bit, and the cross-entropy (S,) of each supervised token, detached."""
    hidden_states = _packed_hidden_states(model, batch)
    head, labels = llava_in(model).lm_head, batch["shift_labels"]

    def chunk_losses(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # What `F.cross_entropy` computes, with the log-probabilities at hand.
        log_probs = F.log_softmax(head(hidden).float(), dim=-1)
        by_token = -log_probs.detach().gather(1, targets[:, None])[:, 0]
        return F.nll_loss(log_probs, targets, reduction="sum"), by_token

    sums, by_token = zip(*_in_chunks(chunk_losses, hidden_states, labels), strict=True)
    return torch.stack(sums).sum() / num_supervised, torch.cat(by_token)


def answer_log_probs(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the log-probabilities (P, 2), in fp64, of the chosen and the rejected answer of each pair of a row.

    That of an answer is the sum over its tokens; see `answers` of `data.rows.Layout`. Losses are made of small
    differences of these sums, which fp32 would round, and which CUDA adds up in any order.
    """
    hidden_states = _packed_hidden_states(model, batch)
    head = llava_in(model).lm_head
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    losses = torch.cat(_chunk_losses(head, hidden_states, batch["shift_labels"], "none", dtype))
    sums = torch.zeros(2 * len(batch["tree_spans"]), dtype=torch.float64, device=losses.device)
    return sums.index_add(0, batch["answers"], -losses.double()).view(-1, 2)


def answer_lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Count the tokens (P, 2), in fp64, of the chosen and the rejected answer of each pair of a row."""
    answers = batch["answers"]
    # Not `bincount`, which waits for CUDA to know the size of its result.
    counts = torch.zeros(2 * len(batch["tree_spans"]), dtype=torch.float64, device=answers.device)
    return counts.index_add(0, answers, torch.ones_like(answers, dtype=torch.float64)).view(-1, 2)


def _chunk_losses(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor, reduction: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Compute cross-entropy in `dtype` against `labels` (S,) in chunks, each with `reduction`; see `_in_chunks`."""

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).to(dtype), targets, reduction=reduction)

    return _in_chunks(chunk_loss, hidden_states, labels)


def _in_chunks(compute: Callable[..., Any], hidden_states: torch.Tensor, labels: torch.Tensor) -> list[Any]:
    """Call `compute` with chunks of (HEAD_CHUNK, hidden size) and their labels.

    With more than one chunk, the backward pass recomputes the logits instead of keeping (S, vocabulary).
    """
    if len(labels) <= HEAD_CHUNK:
        return [compute(hidden_states, labels)]
    chunks = zip(hidden_states.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True)
    return [checkpoint(compute, *chunk, use_reentrant=False) for chunk in chunks]


@contextmanager
def _without_head(llava: Any) -> Iterator[None]:
    """Bypass lm_head inside the `with` block, so that the model returns hidden states as its logits."""
    head = llava.lm_head
    llava.lm_head = nn.Identity()
    try:
        yield
    finally:
        llava.lm_head = head


def llava_in(model: Any) -> Any:
    """Unwrap the `LlavaForConditionalGeneration` from data parallelism and PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


@contextmanager
def _images_in(llava: Any, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the `with` block, replace the embeddings of image tokens by the projected features of `pixel_values`.

    The same as transformers' forward pass with `pixel_values`, which waits for the device twice a row: to compare the
    number of features with that of image tokens, and to take the features' gradients out by a mask.
    """
    pixel_values = batch.get("pixel_values")
    if pixel_values is None:
        yield
        return

    def insert(_module: nn.Module, inputs: tuple[torch.Tensor, ...], embeddings: torch.Tensor) -> torch.Tensor:
        pooled = llava.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        features = torch.cat(list(pooled)).to(embeddings.dtype)
        is_text = inputs[0][0] != llava.config.image_token_id
        if not is_text.is_cuda and int((~is_text).sum()) != len(features):
            raise ValueError(f"{int((~is_text).sum())} image tokens, but features for {len(features)}")
        # As many positions as there are features; `nonzero` would wait to know how many it finds.
        positions = is_text.to(torch.uint8).argsort(stable=True)[: len(features)]
        return embeddings.index_copy(1, positions, features[None])

    handle = llava.get_input_embeddings().register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _only_at(layer: Any, positions: torch.Tensor) -> Iterator[None]:
    """Inside the `with` block, run decoder `layer` only at unique `positions` (R,); its other outputs are undefined.

    Forward hooks gather the rows (1, R, width) that go into a module and scatter its outputs back to (1, T, width), so
    modules, and what PEFT made of them, stay untouched. The backward pass may run outside of the block. The layer must
    not be checkpointed: it would be recomputed without the hooks.
    """
    with ExitStack() as hooks:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            for handle in _hook(module, positions):
                hooks.callback(handle.remove)
        yield


def _hook(module: nn.Module, positions: torch.Tensor) -> tuple[Any, Any]:
    length: int

    def gather(_module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        nonlocal length
        [hidden_states] = inputs
        length = hidden_states.shape[1]
        return hidden_states.index_select(1, positions)

    def scatter(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        full = output.new_zeros(output.shape[0], length, output.shape[2])
        return full.index_copy(1, positions, output)

    return module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)
