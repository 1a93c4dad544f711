"""Tokens by their probabilities: scores equal those of a whole forward pass, draws follow the distribution."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from lora_llava.generation import decoding
from lora_llava.generation.choosing import Sampled, Scored
from lora_llava.generation.decoding import decode_batch, greedy_decode, plan_decoding
from lora_llava.generation.prompts import Prompt
from tests.helpers.tiny import IMAGE_ID, IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_llava

PREFIX = [1, 40, IMAGE_ID, IMAGE_ID, IMAGE_ID, IMAGE_ID]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(seed=3)


def picture(number: int) -> torch.Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(number))


def prompts() -> list[Prompt]:
    assert len(PREFIX) == NUM_IMAGE_TOKENS + 2
    asked = [
        Prompt([*PREFIX, *range(50, 50 + 3 * length)], len(PREFIX), picture(image), image)
        for image in (0, 1)
        for length in (1, 2)
    ]
    return [*asked, Prompt([1, 77, 78], 0, None, None)]


def forced(model: Any, prompt: Prompt, answer: list[int]) -> float:
    """The log-probability of an answer by one forward pass over prompt and answer."""
    ids = torch.tensor([[*prompt.input_ids, *answer]])
    pixels = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixels()[None]}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0]
    scores = torch.log_softmax(logits[len(prompt.input_ids) - 1 : -1].float(), -1)
    return float(scores.gather(1, torch.tensor(answer)[:, None]).sum())


def test_scores_are_those_of_a_whole_forward_pass(model: Any) -> None:
    asked = prompts()
    endless = greedy_decode(model, asked, eos_token_ids=[], max_new_tokens=6)
    # Some answers end early, so that rows leave the batch before others.
    ends = [endless[0][2], endless[-1][0]]
    scored = Scored()
    answers = decode_batch(model, asked, eos_token_ids=ends, max_new_tokens=6, choose=scored)
    assert answers == greedy_decode(model, asked, eos_token_ids=ends, max_new_tokens=6)
    assert len({len(answer) for answer in answers}) > 1
    expected = [forced(model, prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    assert [scored.log_probabilities[row] for row in range(len(asked))] == pytest.approx(expected, abs=1e-4)


def test_a_plan_and_its_batches_give_the_answers_of_greedy_decoding(model: Any) -> None:
    asked = prompts()
    answers: dict[int, list[int]] = {}
    for batch in plan_decoding(model, asked, 4, max_rows=2):
        decoded = decode_batch(model, [asked[index] for index in batch], eos_token_ids=[], max_new_tokens=4)
        answers.update(zip(batch, decoded, strict=True))
    assert [answers[index] for index in range(len(asked))] == greedy_decode(
        model, asked, eos_token_ids=[], max_new_tokens=4
    )


def test_draws_follow_the_distribution_at_the_temperature() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0]]).repeat(20_000, 1)
    for temperature in (0.5, 1.0, 3.0):
        draw = Sampled(temperature, [f"{temperature}/{row}" for row in range(len(logits))])
        counts = Counter(token for [token] in draw(logits, [[row] for row in range(len(logits))]))
        expected = torch.softmax(logits[0] / temperature, -1).tolist()
        assert [counts[token] / len(logits) for token in range(4)] == pytest.approx(expected, abs=0.015)
        assert counts[2] == 0


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_not_drawn_by_the_least_and_the_largest_number(number: float) -> None:
    draw, stream = Sampled(1.0, ["a"]), Random()
    stream.random = lambda: number  # type: ignore[method-assign]
    draw._streams = [stream]
    assert draw(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), [[0]]) == [[1]]


def test_an_answer_depends_on_its_seed_not_on_its_batch(model: Any) -> None:
    asked, seeds = prompts(), [f"seed {index}" for index in range(5)]

    def draw(indices: list[int], temperature: float = 1.0) -> list[list[int]]:
        return decode_batch(
            model,
            [asked[index] for index in indices],
            eos_token_ids=[],
            max_new_tokens=6,
            choose=Sampled(temperature, [seeds[index] for index in indices]),
        )

    together = draw([0, 1, 2, 3, 4])
    assert [draw([index])[0] for index in range(5)] == together
    assert draw([3, 0]) == [together[3], together[0]]
    assert draw([0, 1, 2, 3, 4], temperature=1e-3) == greedy_decode(model, asked, eos_token_ids=[], max_new_tokens=6)
    other = decode_batch(model, asked[:1] * 3, eos_token_ids=[], max_new_tokens=6, choose=Sampled(1.0, ["a", "b", "c"]))
    assert len({tuple(answer) for answer in other}) > 1


def test_answers_to_one_prompt_share_rows_until_they_part(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several answers to a prompt are those of each drawn alone; a step computes what they have in common once."""
    widths: list[int] = []
    forward = decoding._forward

    def counted(model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(len(ids))
        return forward(model, ids, *rest)

    asked, count = prompts(), 6
    seeds = [f"{number}/{draw}" for number in range(len(asked)) for draw in range(count)]
    # Of a sharp distribution some answers are equal, some part late, and some end before others.
    settings: dict[str, Any] = {"eos_token_ids": range(100, 140), "max_new_tokens": 6}
    alone = [
        decode_batch(model, [asked[index // count]], choose=Sampled(0.15, [seed]), **settings)[0]
        for index, seed in enumerate(seeds)
    ]
    monkeypatch.setattr(decoding, "_forward", counted)
    rows = [prompt for prompt in asked for _ in range(count)]
    assert decode_batch(model, rows, choose=Sampled(0.15, seeds), **settings) == alone

    expected = [
        len({(index // count, *answer[:step]) for index, answer in enumerate(alone) if len(answer) > step})
        for step in range(1, max(map(len, alone)))
    ]
    assert widths == expected
    assert len(asked) < max(expected) < len(rows)
    assert len({len(answer) for answer in alone}) > 1


def test_an_answer_keeps_its_stream_when_others_leave() -> None:
    first = Sampled(1.0, ["a", "b"])
    logits = torch.zeros(2, 50)
    both = first(logits, [[0], [1]])
    rest = first(logits[1:], [[1]])
    alone = Sampled(1.0, ["b"])
    assert [alone(logits[1:], [[0]]), alone(logits[1:], [[0]])] == [both[1:], rest]
    # Alike in one row, which has one distribution.
    assert Sampled(1.0, ["a", "b"])(logits[:1], [[0, 1]]) == [[both[0][0], both[1][0]]]
