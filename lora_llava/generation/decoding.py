"""Greedy decoding: prefill each image once, then decode all its questions in one batch.

Shapes: I images, R rows (questions), P tokens of the shared prefix, S tokens of the longest prompt after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

Progress = Callable[[int, int], None]
"""Called with the number of finished questions and the total."""
OnToken = Callable[[int], None]
"""Called with each new token of an answer, including the end token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt and its image."""

    input_ids: list[int]
    prefix_length: int
    """Tokens that all prompts about this image share, image tokens included; 0 if none."""
    pixel_values: torch.Tensor | Callable[[], torch.Tensor] | None
    """(3, H, W), or a function that returns it; None for a prompt without an image."""
    group: Hashable
    """Key of the image; prompts with equal keys and prefix tokens share one image."""

    @property
    def shared(self) -> int:
        """Tokens to prefill once per image; 0 if there is no image, or no token after the prefix."""
        # The forward pass needs a token to predict from; under the plain template a prompt may be its prefix alone.
        return self.prefix_length if self.pixel_values is not None and self.prefix_length < len(self.input_ids) else 0

    def pixels(self) -> torch.Tensor:
        """Return the image, (3, H, W)."""
        if self.pixel_values is None:
            raise ValueError("this prompt has no image")
        return self.pixel_values() if callable(self.pixel_values) else self.pixel_values


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
    pad_token_id: int,
    max_new_tokens: int,
    max_rows: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Generate an answer to each prompt greedily, ending with an end token or after `max_new_tokens`.

    `model` is a LlavaForConditionalGeneration, or a PeftModel around one. The tokens equal those of
    `model.generate(do_sample=False)` on each prompt alone. A forward pass holds at most `max_rows` prompts, each with
    its own keys and values (7B model in bf16: 0.5 MB per token, 0.3 GB for an image and a short question). `progress`
    is called after each batch. Raises ValueError for an empty prompt, or a limit below 1.
    """
    if max_new_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_new_tokens and max_rows must be at least 1; got {max_new_tokens} and {max_rows}")
    for index, prompt in enumerate(prompts):
        if not prompt.input_ids:
            raise ValueError(f"prompt {index} is empty")
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _inference(model):
        for batch in plan_batches(prompts, max_rows):
            state = _prefill(model, [prompts[index] for index in batch], pad_token_id)
            decoded = _decode(model, state, frozenset(eos_token_ids), max_new_tokens)
            for index, answer in zip(batch, decoded, strict=True):
                answers[index] = answer
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    return answers


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
        self, prompt: Prompt, *, eos_token_ids: Collection[int], max_new_tokens: int, on_token: OnToken | None = None
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
            [answer] = _decode(self.model, state, frozenset(eos_token_ids), max_new_tokens, on_token)
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


def plan_batches(prompts: Sequence[Prompt], max_rows: int) -> list[list[int]]:
    """Group prompt indices into batches of at most `max_rows` that share one prefix.

    Prompts about one image stay together, unless there are more than `max_rows` of them. Prompts without a shared
    prefix are batched by length, to keep padding low.
    """
    by_prefix: dict[tuple[int, ...], dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    unshared: list[int] = []
    for index, prompt in enumerate(prompts):
        if prompt.shared:
            by_prefix[tuple(prompt.input_ids[: prompt.shared])][prompt.group].append(index)
        else:
            unshared.append(index)
    batches: list[list[int]] = []
    for groups in by_prefix.values():
        room = 0
        for group in groups.values():
            for start in range(0, len(group), max_rows):
                part = group[start : start + max_rows]
                if len(part) > room:
                    batches.append([])
                    room = max_rows
                batches[-1].extend(part)
                room -= len(part)
    unshared.sort(key=lambda index: len(prompts[index].input_ids))
    batches.extend(unshared[start : start + max_rows] for start in range(0, len(unshared), max_rows))
    return batches


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients, compute in the precision of training, and restore each module's mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]  # a method of PreTrainedModel
    # Trained weights are fp32 while the base may be bf16; without autocast their matmuls fail.
    enabled = embeddings.dtype == torch.bfloat16
    autocast = torch.autocast(embeddings.device.type, dtype=torch.bfloat16, enabled=enabled)
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module in training:
            module.training = True


def _prefill(model: nn.Module, prompts: Sequence[Prompt], pad_token_id: int) -> _State:
    """Prefill a batch: the shared prefix (I, P) once per image, then the rest of every prompt (R, S)."""
    device = next(model.parameters()).device
    # Without a config every layer caches all keys; a sliding window would drop columns that the mask counts.
    cache = DynamicCache()
    shared = prompts[0].shared
    pixels = None
    if shared:
        _prefill_prefixes(model, prompts, cache, device)
    else:
        images = [prompt.pixels() for prompt in prompts if prompt.pixel_values is not None]
        pixels = torch.stack(images).to(device) if images else None
    rests = [prompt.input_ids[shared:] for prompt in prompts]
    width = max(map(len, rests))
    # Pad on the left, so that the last column predicts the first new token of every row.
    ids = torch.tensor([[pad_token_id] * (width - len(rest)) + rest for rest in rests], device=device)
    real = torch.tensor([[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    mask = torch.cat([real.new_ones(len(rests), shared), real], dim=1)
    positions = (real.cumsum(1) - 1).clamp(min=0) + shared
    logits = _forward(model, ids, mask, positions, cache, pixels)
    return _State(cache, mask, positions[:, -1] + 1, logits)


def _prefill_prefixes(model: nn.Module, prompts: Sequence[Prompt], cache: DynamicCache, device: torch.device) -> None:
    """Prefill the prefixes (I, P), one per image, and expand `cache` to one row per prompt."""
    first: dict[Hashable, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.group, prompt)
    shared = prompts[0].shared
    ids = torch.tensor([prompts[0].input_ids[:shared]], device=device).expand(len(first), shared)
    pixels = torch.stack([prompt.pixels() for prompt in first.values()]).to(device)
    positions = torch.arange(shared, device=device).expand(len(first), shared)
    _forward(model, ids, torch.ones_like(ids), positions, cache, pixels)
    rows = {group: row for row, group in enumerate(first)}
    cache.batch_select_indices(torch.tensor([rows[prompt.group] for prompt in prompts], device=device))


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


def _decode(
    model: nn.Module, state: _State, eos: frozenset[int], max_new_tokens: int, on_token: OnToken | None = None
) -> list[list[int]]:
    """Decode token by token; finished rows leave the batch, so that only long answers take more steps."""
    answers: list[list[int]] = [[] for _ in range(len(state.mask))]
    alive = list(range(len(answers)))
    for step in range(max_new_tokens):
        tokens = state.logits.argmax(-1)
        keep: list[int] = []
        for row, token in enumerate(tokens.tolist()):
            answers[alive[row]].append(token)
            if on_token is not None:
                on_token(token)
            if token not in eos:
                keep.append(row)
        if not keep or step + 1 == max_new_tokens:
            break
        if len(keep) < len(alive):
            alive = [alive[row] for row in keep]
            rows = torch.tensor(keep, device=tokens.device)
            tokens = tokens[rows]
            state.mask, state.lengths = state.mask[rows], state.lengths[rows]
            state.cache.batch_select_indices(rows)
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(alive), 1)], dim=1)
        state.logits = _forward(model, tokens[:, None], state.mask, state.lengths[:, None], state.cache)
        state.lengths = state.lengths + 1
    return answers
