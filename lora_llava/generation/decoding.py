"""Decoding: prefill what prompts have in common once, then decode all of them in one batch.

Shapes: I images, R rows (distinct prompts, and what their answers begin with), S tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lora_llava.formats.shapes import attention_widths
from lora_llava.generation.prompts import Prompt, pack_prompts, plan_batches
from lora_llava.modeling.attention import with_attention
from lora_llava.modeling.packed import llava_in
from lora_llava.modeling.structure import TREES, image_tokens
from lora_llava.system.device import autocast, free_memory_bytes

Progress = Callable[[int, int], None]
"""Called with the number of finished questions and the total."""
_OnToken = Callable[[int], None]
"""Called with each new token of an answer, including the end token."""
Choose = Callable[[torch.Tensor, Sequence[Sequence[int]]], list[list[int]]]
"""Returns the next token of each answer, from the logits (R, vocabulary) of each row and the indices of its answers."""

_MOST_ROWS = {"cuda": 256, "cpu": 64}
"""Rows of a batch beyond which a step of decoding takes longer for each more."""
_USABLE_SHARE = 0.8
"""Share of the free memory that a batch of prompts may take; the rest is for its images and for fragmentation."""
_HIDDEN_WIDTHS, _MLP_WIDTHS = 8, 3
"""Hidden and intermediate widths per token that a layer holds at one time without gradients: an estimate."""


@dataclass(slots=True)
class _State:
    """A batch between two decoding steps."""

    cache: DynamicCache
    mask: torch.Tensor
    """Attention mask (R, tokens so far): 0 at padding."""
    lengths: torch.Tensor
    """(R,): tokens so far without padding, which is the position of the next token."""
    logits: torch.Tensor
    """(R, vocabulary): scores of the next token."""


def greedy_decode(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    max_rows: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Generate an answer to each prompt greedily, ending with an end token or after `max_new_tokens`.

    `model` is a LlavaForConditionalGeneration, or a PeftModel around one. The tokens equal those of
    `model.generate(do_sample=False)` on each prompt alone; equal prompts are answered once. A forward pass holds at
    most `max_rows` prompts, each with its own keys and values (7B model in bf16: 0.5 MB per token, 0.3 GB for an image
    and a short question); on CUDA fewer if the free memory holds fewer. `progress` is called after each batch. Raises
    ValueError for an empty prompt, or a limit below 1.
    """
    # Without their images, many questions of a data set are the same.
    copies = equal_prompts(prompts)
    distinct = [prompts[indices[0]] for indices in copies]
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in plan_decoding(model, distinct, max_new_tokens, max_rows):
        rows = [distinct[number] for number in batch]
        decoded = decode_batch(model, rows, eos_token_ids=eos_token_ids, max_new_tokens=max_new_tokens)
        for number, answer in zip(batch, decoded, strict=True):
            for index in copies[number]:
                answers[index] = list(answer)
            done += len(copies[number])
        if progress is not None:
            progress(done, len(prompts))
    return answers


def plan_decoding(
    model: nn.Module, prompts: Sequence[Prompt], max_new_tokens: int, max_rows: int = 64
) -> list[list[int]]:
    """Return the batches in which to decode `prompts`, as their indices.

    A batch holds at most `max_rows` prompts, on CUDA also no more than the free memory holds.
    Raises ValueError for an empty prompt, or a limit below 1.
    """
    if max_new_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_new_tokens and max_rows must be at least 1; got {max_new_tokens} and {max_rows}")
    for index, prompt in enumerate(prompts):
        if not prompt.input_ids:
            raise ValueError(f"prompt {index} is empty")
    if (free := _free_bytes(next(model.parameters()).device)) is not None and prompts:
        max_rows = min(max_rows, _rows_that_fit(llava_in(model), prompts, max_new_tokens, free))
    return plan_batches(prompts, max_rows)


def decode_batch(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    choose: Choose | None = None,
) -> list[list[int]]:
    """Generate the answers to one batch of `plan_decoding`; `choose` replaces taking the most likely token.

    Equal prompts are one row until their answers part, so several drawn answers cost little more than one.
    """
    copies = equal_prompts(prompts)
    with _inference(model):
        state = _prefill(model, [prompts[indices[0]] for indices in copies])
        return _decode(model, state, copies, frozenset(eos_token_ids), max_new_tokens, choose or _most_likely)


def most_rows(model: nn.Module) -> int:
    """Return the prompts of a forward pass if nothing but memory limits them, which `plan_decoding` looks at."""
    return _MOST_ROWS["cuda" if next(model.parameters()).is_cuda else "cpu"]


def equal_prompts(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Group the indices of prompts that are equal, image included, in order of the first of each group."""
    copies: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        copies.setdefault((prompt.pixel_values is None, prompt.group, tuple(prompt.input_ids)), []).append(index)
    return list(copies.values())


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a CUDA device; None on a CPU, where the batches are the same on every machine."""
    return free_memory_bytes(device.type) if device.type == "cuda" else None


def _rows_that_fit(llava: Any, prompts: Sequence[Prompt], max_new_tokens: int, free: int) -> int:
    """Return the number of prompts of a forward pass that `free` bytes hold, at least 1, if all are like the longest.

    A prompt holds keys and values in every layer, and while it is prefilled the activations of one layer, a mask over
    its own tokens, and its logits.
    """
    text, itemsize = llava.config.text_config, llava.get_input_embeddings().weight.itemsize
    _, keys = attention_widths(text)
    tokens = max(len(prompt.input_ids) for prompt in prompts)
    cached = 2 * int(text.num_hidden_layers) * keys * (tokens + max_new_tokens)
    activations = tokens * (_HIDDEN_WIDTHS * int(text.hidden_size) + _MLP_WIDTHS * int(text.intermediate_size))
    row = (cached + activations + tokens * tokens + int(text.vocab_size)) * itemsize + 4 * int(text.vocab_size)
    return max(1, int(_USABLE_SHARE * free / row))


class CachedConversation:
    """Decodes the turns of one conversation; each prompt reuses the cached tokens it has in common with the last.

    Answers equal those of `greedy_decode`. After an error or an interruption the next prompt is prefilled in full.
    """

    def __init__(self, model: nn.Module, image_token_id: int) -> None:
        self.model = model
        self.image_token_id = image_token_id
        self._cache = DynamicCache()
        self._ids: list[int] = []
        """Tokens whose keys and values are cached."""

    def answer(
        self, prompt: Prompt, *, eos_token_ids: Collection[int], max_new_tokens: int, on_token: _OnToken | None = None
    ) -> list[int]:
        """Generate an answer to `prompt` greedily, ending with an end token or after `max_new_tokens`."""
        cache, cached_ids = self._cache, self._ids
        self._cache, self._ids = DynamicCache(), []
        shared = self._num_reusable(prompt.input_ids, cached_ids)
        if not shared:
            cache = DynamicCache()
        elif shared < len(cached_ids):
            cache.crop(shared - len(cached_ids))
        with _inference(self.model):
            state = self._prefill(prompt, cache, shared)
            ends = frozenset(eos_token_ids)
            [answer] = _decode(self.model, state, [[0]], ends, max_new_tokens, _most_likely, on_token)
        # The last token was never an input, so the cache does not hold it.
        self._cache, self._ids = cache, [*prompt.input_ids, *answer[:-1]]
        return answer

    def _num_reusable(self, ids: list[int], cached_ids: list[int]) -> int:
        """Count the leading tokens whose cache can be reused: at least one token is left, and no image is split."""
        shared = 0
        while shared < min(len(ids) - 1, len(cached_ids)) and ids[shared] == cached_ids[shared]:
            shared += 1
        splits_image = self.image_token_id in ids[shared:] and self.image_token_id in ids[:shared]
        return 0 if splits_image else shared

    def _prefill(self, prompt: Prompt, cache: DynamicCache, shared: int) -> _State:
        device = next(self.model.parameters()).device
        ids = torch.tensor([prompt.input_ids[shared:]], device=device)
        mask = torch.ones((1, len(prompt.input_ids)), dtype=torch.long, device=device)
        positions = torch.arange(shared, len(prompt.input_ids), device=device)[None]
        pixels = prompt.pixels()[None].to(device) if self.image_token_id in prompt.input_ids[shared:] else None
        logits = _forward(self.model, ids, mask, positions, cache, pixels)
        return _State(cache, mask, positions[:, -1] + 1, logits)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients, compute in the precision of training, and restore each module's mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]  # a method of PreTrainedModel
    # Trained weights are fp32 while the base may be in half precision; without autocast their matmuls fail.
    try:
        with torch.no_grad(), autocast(embeddings.device, embeddings.dtype):
            yield
    finally:
        for module in training:
            module.training = True


def _prefill(model: nn.Module, prompts: Sequence[Prompt]) -> _State:
    """Prefill a batch in one pass, its common tokens once, and give each prompt its own keys and values."""
    llava = llava_in(model)
    embeddings = llava.get_input_embeddings().weight
    device = embeddings.device
    packed = pack_prompts(prompts, image_tokens(llava.config).id, embeddings.dtype, device)
    images = [prompt.pixels() for prompt in packed.image_prompts]
    ids = torch.tensor([packed.input_ids], device=device)
    # Without a config every layer caches all keys; a sliding window would drop columns that the mask counts.
    computed = DynamicCache()
    with with_attention(llava, TREES):
        output: Any = model(
            input_ids=ids,
            pixel_values=torch.stack(images).to(device) if images else None,
            # All ones, so that transformers builds no mask.
            attention_mask=torch.ones_like(ids),
            position_ids=torch.tensor([packed.positions], device=device),
            past_key_values=computed,
            use_cache=True,
            logits_to_keep=torch.tensor([path[-1] for path in packed.paths], device=device),
            trees=packed.trees,
        )
    # Pad on the left, so that the new tokens of all rows follow in the same column.
    width = max(map(len, packed.paths))
    paths = torch.tensor([[0] * (width - len(path)) + path for path in packed.paths], device=device)
    mask = torch.tensor([[0] * (width - len(path)) + [1] * len(path) for path in packed.paths], device=device)
    return _State(_selected(computed, paths), mask, mask.sum(1), output.logits[0])


def _selected(cache: DynamicCache, paths: torch.Tensor) -> DynamicCache:
    """Return a cache of R rows with the columns `paths` (R, S) of a cache of one row, which is emptied."""
    selected = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (tensor[0][:, paths].transpose(0, 1) for tensor in (layer.keys, layer.values))
        layer.reset()
        selected.update(keys, values, index)
    return selected


def _forward(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
    pixels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `ids` (R, S) with `pixels` (I, 3, H, W), extend the cache, and return the last logits (R, vocabulary)."""
    output: Any = model(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _most_likely(logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[token] * len(row) for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True)]


def _decode(
    model: nn.Module,
    state: _State,
    rows: Sequence[list[int]],
    eos: frozenset[int],
    max_new_tokens: int,
    choose: Choose,
    on_token: _OnToken | None = None,
) -> list[list[int]]:
    """Decode token by token; `rows` (R) holds the indices of the answers to each prompt.

    Answers that begin alike share a row, which is split where they part. Finished answers leave the batch, so that only
    long ones take more steps.
    """
    answers: list[list[int]] = [[] for row in rows for _ in row]
    for step in range(max_new_tokens):
        # The rows of the next step: the row each comes from, its token, and its answers.
        parents: list[int] = []
        inputs: list[int] = []
        parts: list[list[int]] = []
        for number, (row, tokens) in enumerate(zip(rows, choose(state.logits, rows), strict=True)):
            continued: dict[int, list[int]] = {}
            for answer, token in zip(row, tokens, strict=True):
                answers[answer].append(token)
                if on_token is not None:
                    on_token(token)
                if token not in eos:
                    continued.setdefault(token, []).append(answer)
            parents += [number] * len(continued)
            inputs += continued
            parts += continued.values()
        if not parents or step + 1 == max_new_tokens:
            break
        if parents != list(range(len(rows))):
            _take_rows(state, parents)
        rows = parts
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(rows), 1)], dim=1)
        ids = torch.tensor(inputs, device=state.mask.device)[:, None]
        state.logits = _forward(model, ids, state.mask, state.lengths[:, None], state.cache)
        state.lengths = state.lengths + 1
    return answers


def _take_rows(state: _State, rows: Sequence[int]) -> None:
    """Replace the rows of a batch by its `rows`, some of them several times."""
    indices = torch.tensor(rows, device=state.mask.device)
    state.mask, state.lengths = state.mask[indices], state.lengths[indices]
    state.cache.batch_select_indices(indices)
