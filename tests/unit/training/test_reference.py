"""The reference of stage `prefer`: what it is, when a stored one is taken, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_llava.data.packing import PlanItem
from lora_llava.data.rows import Batch, PackedRows
from lora_llava.errors import TrainingError
from lora_llava.run_directory import output
from lora_llava.training.objectives import reference as module
from tests.helpers.pairs import TEXTS, log_probs_by_definition, pair, pair_record
from tests.parity.test_packed import build_model

STEPS = [(((0,), (2,)),), (((2,),), ((3,),))]
"""Two steps; record 1 is in none of them."""
SETTINGS = {"template": "vicuna_v1", "system": None, "max_length": 90, "window": None}
FACTS = {
    "stages.prefer.data": "1234",
    "stages.prefer.optim": "adamw",
    "processes": 1,
    f"stages.prefer.{module.FACT}": "5",
}


def data_of(steps: Sequence[Any] = STEPS, lengths: Sequence[int] = (5, 6, 7, 8), held_out: int = 0) -> Any:
    records = [pair_record("Why?", "yes", "no", where=f"record {number}") for number in range(len(lengths))]
    encoded = SimpleNamespace(records=records, items=[PlanItem(length, 0, -1) for length in lengths])
    return SimpleNamespace(plan=SimpleNamespace(steps=steps), encoded=encoded, validation=range(held_out))


def identity(facts: dict[str, Any] = FACTS, steps: Sequence[Any] = STEPS, nf4: bool = True, **changes: Any) -> str:
    values = {"aspect_ratio": "pad", **SETTINGS, **changes}
    aspect_ratio, window = values.pop("aspect_ratio"), values.pop("window")
    stage: Any = SimpleNamespace(
        settings=SimpleNamespace(**values, data=SimpleNamespace(window=window)),
        aspect_ratio=aspect_ratio,
        quantization=SimpleNamespace(model_dump=lambda: {"type": "nf4" if nf4 else "none"}),
    )
    return module._identity(stage, data_of(steps), facts)


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {**FACTS, "stages.prefer.data": "5678"}},
        {"template": "chatml"},
        {"system": "Be brief."},
        {"aspect_ratio": "square"},
        {"max_length": 91},
        {"window": [0, 400]},
        {"nf4": False},
        {"steps": STEPS[:1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_reference_depends_on_records_format_precision_and_what_is_used(changes: dict[str, Any]) -> None:
    assert identity(**changes) != identity()


def test_it_depends_on_neither_optimizer_processes_nor_the_order_of_steps() -> None:
    other = {"stages.prefer.data": "1234", "stages.prefer.optim": "sgd", "processes": 2}
    assert identity(other) == identity() == identity(steps=STEPS[::-1])


def test_a_stored_reference_is_taken_if_it_is_whole_and_of_the_same_identity(tmp_path: Path) -> None:
    stored = {"train": torch.randn(4, 2, dtype=torch.float64), "validation": torch.zeros(2, 2, dtype=torch.float64)}
    data = data_of(held_out=2)
    data.encoded = range(4)
    assert module._stored(tmp_path, "same", data) is None
    module._store(tmp_path, "same", stored)
    taken = module._stored(tmp_path, "same", data)
    assert taken is not None
    assert all(torch.equal(taken[name], stored[name]) for name in ("train", "validation"))
    assert module._stored(tmp_path, "other", data) is None
    for train, held_out in ((3, 2), (4, 1)):
        other: Any = SimpleNamespace(encoded=range(train), validation=range(held_out))
        assert module._stored(tmp_path, "same", other) is None
    (tmp_path / output.REFERENCE).write_bytes(b"damaged")
    assert module._stored(tmp_path, "same", data) is None


def test_its_hash_sees_both_parts() -> None:
    one, other = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    pairs = [{"train": first, "validation": second} for first in (one, other) for second in (one, other)]
    assert len({module._sha256(reference) for reference in pairs}) == 4


def test_log_probabilities_that_are_not_finite_are_refused_with_their_records() -> None:
    values = torch.tensor([[-1.0, -2.0], [math.nan, math.nan], [-1.0, -math.inf], [math.nan, -1.0]])
    message = r"not finite for 2 pairs: record 2; record 3\. Repair"
    with pytest.raises(TrainingError, match=message):
        module._check_finite(values, data_of())
    # Record 1 is not used.
    values[2:] = -1.0
    module._check_finite(values, data_of())


def test_each_record_that_is_used_is_in_one_row_no_longer_than_those_of_the_training() -> None:
    rows = module._used_rows(data_of())
    assert sorted(index for row in rows for tree in row for index in tree) == [0, 2, 3]
    # The longest row of the training has 12 tokens: 5 and 7, but not 7 and 8.
    assert len(rows) == 2
    assert max(sum((5, 6, 7, 8)[index] for tree in row for index in tree) for row in rows) == 12


def test_the_reference_is_that_of_the_model_in_evaluation_mode() -> None:
    model, pairs = build_model(), [pair(*(text.removeprefix("<image>\n") for text in texts)) for texts in TEXTS]
    expected = log_probs_by_definition(model, pairs).detach()
    records = [pair_record("Why?", "yes", "no")] * 4
    modes: list[tuple[bool, bool]] = []

    def load(rows: PackedRows, indices: Sequence[int]) -> Iterator[Batch]:
        torch.rand(1)
        for index in indices:
            modes.append((model.training, torch.is_grad_enabled()))
            yield rows[index]

    def no_image(_: Any) -> Any:
        raise AssertionError

    train, held_out = (PackedRows([((index,),) for index in used], records, pairs, no_image) for used in ((), (1,)))
    trainer: Any = SimpleNamespace(
        model=model.train(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        train_dataset=train,
        eval_dataset=held_out,
        rows_loader=load,
    )
    state = torch.get_rng_state()
    computed = module._compute(trainer, data_of(lengths=[len(one.input_ids) for one in pairs]))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert set(modes) == {(False, False)}
    for values, used in ((computed["train"], [0, 2, 3]), (computed["validation"], [1])):
        assert values.dtype == torch.float64
        torch.testing.assert_close(values[used], expected[used], rtol=1e-6, atol=1e-5)
        assert values.isnan().sum() == 8 - 2 * len(used)
    trainer.eval_dataset = None
    assert module._compute(trainer, data_of())["validation"].shape == (0, 2)
