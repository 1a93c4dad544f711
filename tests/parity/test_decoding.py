"""Side-by-side decoding against `generate` on each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlavaForConditionalGeneration

import lora_llava.generation.decoding as decoding
from lora_llava.generation.decoding import greedy_decode
from lora_llava.generation.prompts import Prompt, pack_prompts, plan_batches
from tests.helpers.tiny import (
    BOS_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    PAD_ID,
    VOCAB_SIZE,
    tiny_llava,
)
from tests.unit.planning.test_memory_plan import PeakBytes

PREFIX = [BOS_ID, 20, 21, *[IMAGE_ID] * NUM_IMAGE_TOKENS]
MAX_NEW_TOKENS = 12


def picture(seed: int) -> torch.Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def words(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(10, VOCAB_SIZE, (length,), generator=generator).tolist()


def question(image: int, length: int, seed: int) -> Prompt:
    return Prompt(PREFIX + words(length, seed), len(PREFIX), picture(image), f"image {image}")


def mixed_prompts() -> list[Prompt]:
    """Questions of many lengths on several images, out of order, with every other kind of prompt between."""
    prompts = [question(image, length, seed=10 * image + length) for image in range(4) for length in (1, 3, 9)]
    prompts.insert(2, Prompt([BOS_ID, *words(6, 1)], 0, None, None))
    prompts.insert(5, Prompt([BOS_ID, *words(17, 2)], 0, None, None))
    late = [BOS_ID, *words(5, 3), *[IMAGE_ID] * NUM_IMAGE_TOKENS, *words(4, 4)]
    prompts.insert(7, Prompt(late, 0, picture(1), "image 1"))
    other = [BOS_ID, 22, *[IMAGE_ID] * NUM_IMAGE_TOKENS]
    prompts.insert(9, Prompt(other + words(4, 5), len(other), picture(2), "image 2"))
    # The plain template: nothing after the image.
    prompts.append(Prompt([BOS_ID, *[IMAGE_ID] * NUM_IMAGE_TOKENS], 1 + NUM_IMAGE_TOKENS, picture(3), "image 3"))
    prompts.append(question(0, 7, seed=99))
    return prompts


def generate_alone(model: Any, prompt: Prompt, eos: Sequence[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt.input_ids])
    pixels = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixels()[None]}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=list(eos),
        pad_token_id=PAD_ID,
        max_new_tokens=max_new_tokens,
        **pixels,
    )
    answer: list[int] = output[0, ids.shape[1] :].tolist()
    return answer


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(seed=3)


@pytest.fixture(scope="module")
def endless(model: LlavaForConditionalGeneration) -> list[list[int]]:
    """Every answer in full, with an end token that never comes."""
    return [generate_alone(model, prompt, [VOCAB_SIZE + 1], MAX_NEW_TOKENS) for prompt in mixed_prompts()]


def ends(endless: list[list[int]]) -> tuple[int, int]:
    """Two tokens that, taken as end tokens, end some answers at once, some later, and some never."""
    chosen = endless[0][0], endless[3][4]
    lengths = {min([row.index(end) for end in chosen if end in row], default=MAX_NEW_TOKENS) for row in endless}
    assert {0, MAX_NEW_TOKENS} < lengths
    return chosen


@pytest.mark.parametrize("max_rows", [1, 2, 5, 64])
def test_equals_generate_on_each_prompt_alone(
    model: LlavaForConditionalGeneration, endless: list[list[int]], max_rows: int
) -> None:
    eos = ends(endless)
    prompts = mixed_prompts()
    theirs = [generate_alone(model, prompt, eos, MAX_NEW_TOKENS) for prompt in prompts]
    ours = greedy_decode(
        model,
        prompts,
        eos_token_ids=eos,
        max_new_tokens=MAX_NEW_TOKENS,
        max_rows=max_rows,
    )
    assert ours == theirs
    # Answers that depend on the image and the question, or else the equality says little.
    assert len({tuple(answer) for answer in endless}) > len(endless) // 2


def test_equals_generate_through_an_adapter_in_training_mode(endless: list[list[int]]) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.5,
        init_lora_weights=False,
        target_modules=r".*language_model.*_proj",
    )
    adapted: Any = get_peft_model(tiny_llava(seed=3), lora)
    adapted.train()
    adapted.base_model.model.model.vision_tower.eval()
    modes = [module.training for module in adapted.modules()]
    prompts = mixed_prompts()
    ours = greedy_decode(adapted, prompts, eos_token_ids=[], max_new_tokens=MAX_NEW_TOKENS)
    assert [module.training for module in adapted.modules()] == modes
    adapted.eval()
    assert ours == [generate_alone(adapted, prompt, [VOCAB_SIZE + 1], MAX_NEW_TOKENS) for prompt in prompts]
    assert ours != endless


@pytest.mark.parametrize("max_tree", [1, 25, 40])
def test_large_trees_are_split(
    model: LlavaForConditionalGeneration, endless: list[list[int]], max_tree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_llava.generation.prompts._MAX_TREE", max_tree)
    packed = pack_prompts(mixed_prompts(), IMAGE_ID, torch.float32, torch.device("cpu"))
    assert all(tree.length <= max(max_tree, tree.causal_length) for tree in packed.trees)
    ours = greedy_decode(model, mixed_prompts(), eos_token_ids=[], max_new_tokens=MAX_NEW_TOKENS)
    assert ours == endless


def test_prompts_that_begin_alike_are_computed_once(model: LlavaForConditionalGeneration) -> None:
    start, end = words(4, 7), words(2, 8)
    texts = [[*start, 30, *end], [*start, 31, *end], [*start, 30, *end, 32], start, [*start, 30, *end]]
    prompts = [Prompt(PREFIX + text, len(PREFIX), picture(1), "image 1") for text in texts]
    packed = pack_prompts(prompts, IMAGE_ID, torch.float32, torch.device("cpu"))
    # The prefix, the start, one branch per next word, and the last word of the longest.
    assert len(packed.input_ids) == len(PREFIX) + 4 + 2 * 3 + 1
    assert [[packed.input_ids[index] for index in path] for path in packed.paths] == [p.input_ids for p in prompts]
    assert all([packed.positions[index] for index in path] == list(range(len(path))) for path in packed.paths)
    assert len(packed.image_prompts) == 1
    watch = Watch(model)
    ours = greedy_decode(model, prompts, eos_token_ids=[], max_new_tokens=3)
    for handle in watch.handles:
        handle.remove()
    # Equal prompts are answered once.
    assert watch.rows == [1, 4, 4]
    assert ours == [generate_alone(model, prompt, [VOCAB_SIZE + 1], 3) for prompt in prompts]


def test_prompts_about_other_images_are_not_shared(model: LlavaForConditionalGeneration) -> None:
    ids = PREFIX + words(3, 9)
    prompts = [Prompt(ids, len(PREFIX), picture(image), image) for image in (0, 1, 0)] + [Prompt(ids[:3], 0, None, 0)]
    packed = pack_prompts(prompts, IMAGE_ID, torch.float32, torch.device("cpu"))
    assert len(packed.trees) == 3
    assert [prompt.group for prompt in packed.image_prompts] == [0, 1]
    ours = greedy_decode(model, prompts, eos_token_ids=[], max_new_tokens=MAX_NEW_TOKENS)
    assert ours == [generate_alone(model, prompt, [VOCAB_SIZE + 1], MAX_NEW_TOKENS) for prompt in prompts]
    assert ours[0] == ours[2] != ours[1]


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_stops_at_max_new_tokens(
    model: LlavaForConditionalGeneration, endless: list[list[int]], max_new_tokens: int
) -> None:
    ours = greedy_decode(model, mixed_prompts(), eos_token_ids=[], max_new_tokens=max_new_tokens)
    assert ours == [answer[:max_new_tokens] for answer in endless]


class Watch:
    """Counts images seen and token rows run."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.images = 0
        self.rows: list[int] = []
        self.handles = [
            model.model.vision_tower.register_forward_pre_hook(self._image),
            model.register_forward_pre_hook(self._rows, with_kwargs=True),
        ]

    def _image(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.images += len(args[0])

    def _rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs["input_ids"]))


def test_each_image_is_computed_once_and_finished_rows_leave(endless: list[list[int]]) -> None:
    model = tiny_llava(seed=3)
    watch = Watch(model)
    prompts = [question(image, length, seed=10 * image + length) for image in range(4) for length in (1, 3, 9)]
    eos = ends(endless)
    answers = greedy_decode(model, prompts, eos_token_ids=eos, max_new_tokens=MAX_NEW_TOKENS)
    assert watch.images == 4
    # A row is in the forward pass of step n only if its answer is longer than n.
    steps = [sum(len(answer) > n for answer in answers) for n in range(1, MAX_NEW_TOKENS)]
    # The prefill is one sequence for all.
    assert watch.rows == [1, *[rows for rows in steps if rows]]
    assert min(steps) < 12


def test_images_are_asked_for_when_needed_and_progress_is_told(model: LlavaForConditionalGeneration) -> None:
    log: list[Any] = []

    def prompt(image: int, seed: int) -> Prompt:
        def pixels() -> torch.Tensor:
            log.append(image)
            return picture(image)

        return Prompt(PREFIX + words(3, seed), len(PREFIX), pixels, image)

    greedy_decode(
        model,
        [prompt(0, 1), prompt(1, 2), prompt(0, 3), prompt(1, 4), prompt(2, 5)],
        eos_token_ids=[],
        max_new_tokens=1,
        max_rows=2,
        progress=lambda done, total: log.append((done, total)),
    )
    assert log == [0, (2, 5), 1, (4, 5), 2, (5, 5)]


@pytest.mark.parametrize("max_rows", [1, 3, 4, 64])
def test_plan_holds_each_prompt_once_within_the_bound(max_rows: int) -> None:
    prompts = mixed_prompts()
    batches = plan_batches(prompts, max_rows)
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))
    assert all(1 <= len(batch) <= max_rows for batch in batches)
    for batch in batches:
        assert len({(prompts[i].shared, *prompts[i].input_ids[: prompts[i].shared]) for i in batch}) == 1
    if max_rows >= 4:
        places: dict[Any, set[int]] = {}
        for number, batch in enumerate(batches):
            for i in batch:
                if prompts[i].shared == len(PREFIX):
                    places.setdefault(prompts[i].group, set()).add(number)
        assert all(len(numbers) == 1 for numbers in places.values())


def test_no_prompts_no_answers(model: LlavaForConditionalGeneration) -> None:
    assert greedy_decode(model, [], eos_token_ids=[], max_new_tokens=4) == []


def test_refuses_an_empty_prompt_and_limits_below_one(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        greedy_decode(
            model,
            [question(0, 1, 1), Prompt([], 0, None, None)],
            eos_token_ids=[],
            max_new_tokens=4,
        )
    with pytest.raises(ValueError, match="got 0 and 64"):
        greedy_decode(model, [], eos_token_ids=[], max_new_tokens=0)


@pytest.mark.parametrize(("rows", "length"), [(4, 300), (8, 300), (6, 600)])
def test_the_estimated_memory_of_a_batch_bounds_the_measured(rows: int, length: int) -> None:
    config = tiny_llava(seed=3).config
    config.text_config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    model = LlavaForConditionalGeneration(config).eval()
    prompts = [Prompt([5 + (7 * row + place) % 400 for place in range(length)], 0, None, None) for row in range(rows)]
    with PeakBytes(model) as measured:
        greedy_decode(model, prompts, eos_token_ids=[], max_new_tokens=8)
    # The estimate plans with four fifths of what is free.
    assert decoding._rows_that_fit(model, prompts, 8, int(measured.peak / 0.8)) < rows
    assert decoding._rows_that_fit(model, prompts, 8, int(1.3 * measured.peak / 0.8)) >= rows


def test_with_nothing_but_memory_as_a_limit_a_cpu_decodes_what_it_did(model: LlavaForConditionalGeneration) -> None:
    assert decoding.most_rows(model) == 64


@pytest.mark.parametrize("share", [0.0, 3.5, 1000.0])
def test_as_many_prompts_are_decoded_at_once_as_the_free_memory_holds(
    model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    prompts = mixed_prompts()
    free = 10**12
    row = 0.8 * free / decoding._rows_that_fit(model, prompts, MAX_NEW_TOKENS, free)
    sizes: list[int] = []
    prefill = decoding._prefill
    everything = greedy_decode(model, prompts, eos_token_ids=[], max_new_tokens=MAX_NEW_TOKENS, max_rows=8)
    monkeypatch.setattr(decoding, "_prefill", lambda model, batch: sizes.append(len(batch)) or prefill(model, batch))
    monkeypatch.setattr(decoding, "_free_bytes", lambda _: int(share * row / 0.8))
    answers = greedy_decode(model, prompts, eos_token_ids=[], max_new_tokens=MAX_NEW_TOKENS, max_rows=8)
    assert answers == everything
    assert max(sizes) == {0.0: 1, 3.5: 3}.get(share, max(len(batch) for batch in plan_batches(prompts, 8)))
