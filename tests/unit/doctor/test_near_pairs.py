"""Near duplicates: what is found equals a plain comparison of all pairs, and many images may be alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_llava.doctor import images
from lora_llava.doctor.images import ImageFacts, near_pairs


def plain(asked: list[ImageFacts], known: list[ImageFacts]) -> list[tuple[int, int]]:
    """Compare all pairs, one after the other."""
    pairs = []
    for index, ours in enumerate(asked):
        own, found = np.frombuffer(ours.colors, np.uint8).astype(int), list[tuple[int, int]]()
        for other, theirs in enumerate(known):
            far = int(np.abs(own - np.frombuffer(theirs.colors, np.uint8)).max())
            if (ours.dhash ^ theirs.dhash).bit_count() <= 8 and far <= 10 and ours.sha256 != theirs.sha256:
                found.append((far, other))
        if found:
            pairs.append((index, min(found)[1]))
    return pairs


def dark(number: int, noise: int, cells: int, seed: int, *, contents: int = 10**6) -> list[ImageFacts]:
    """Describe nearly black images: some cells have values up to `noise`, and the hashes differ in a few bits."""
    draw = np.random.default_rng(seed)
    colors = np.zeros((number, 192), np.uint8)
    for row in colors:
        row[draw.choice(192, cells, replace=False)] = draw.integers(0, noise + 1, cells)
    hashes = [sum(1 << int(bit) for bit in draw.choice(64, 3, replace=False)) for _ in range(number)]
    names = draw.integers(0, contents, number)
    return [
        ImageFacts(sha256=int(name).to_bytes(32, "big"), dhash=dhash, colors=row.tobytes())
        for name, dhash, row in zip(names, hashes, colors, strict=True)
    ]


@pytest.mark.parametrize(("noise", "cells"), [(0, 0), (1, 3), (3, 192), (14, 192), (40, 20), (255, 192)])
@pytest.mark.parametrize("contents", [3, 10**6])
def test_the_pairs_are_those_of_a_plain_comparison(noise: int, cells: int, contents: int) -> None:
    known = dark(300, noise, cells, 1, contents=contents)
    asked = dark(40, noise, cells, 2, contents=contents) + known[:5]
    assert near_pairs(asked, known) == plain(asked, known)
    assert near_pairs(asked, []) == near_pairs([], known) == []


def test_of_images_that_look_equal_two_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    nearest = images._nearest

    def counting(own: Any, colors: Any, candidates: Any, middle: Any) -> int | None:
        compared.append(len(candidates))
        return nearest(own, colors, candidates, middle)

    monkeypatch.setattr(images, "_nearest", counting)
    black = [replace(facts, dhash=0) for facts in dark(400, 0, 0, 1)]
    assert near_pairs(black[:200], black[200:]) == [(index, 0) for index in range(200)]
    assert compared == [2] * 200
