"""Check before the first step that a packed row gives the same logits as its conversations one by one.

The tests prove it for the versions they ran with. A new transformers, another attention kernel or a driver can break it
silently, and the loss would still fall.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_llava.conversation.encode import IGNORE_INDEX
from lora_llava.data.packing import Row, Tree
from lora_llava.data.rows import PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import to_device, with_sdpa
from lora_llava.modeling.packed import llava_in, packed_logits
from lora_llava.system.device import autocast
from lora_llava.system.progress import phase
from lora_llava.system.text import counted, listed
from lora_llava.training.checks.non_finite import non_finite_tensors
from lora_llava.training.validation import has_finite_image

MAX_CONVERSATIONS = 3
"""Conversations to compare: enough for one to have neighbors on both sides."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed relative difference of the logits at the supervised positions, by dtype."""


def check_first_row(
    model: Any, rows: PackedRows, dtype: torch.dtype, device: torch.device, may_skip: bool = False
) -> float | None:
    """Compare the logits of the first row that has several conversations with theirs one by one.

    One by one, conversations go through the model's standard forward pass, without our mask, position ids and last
    layer. Returns the relative difference; None if every row holds one conversation. Raises TrainingError if it exceeds
    the tolerance of `dtype`, or if a weight or an image is not finite; with `may_skip` such an image is left to the
    non-finite guard, which skips its step.
    """
    trees = _first_trees(rows)
    if not trees:
        return None
    phase("Checking the packed forward pass on the first row")
    pairs = rows.encoded[trees[0][0]].rejected is not None
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        batch = to_device(rows.with_rows([trees])[0], device)
        packed = packed_logits(model, batch).float()
        alone = torch.cat([_logits_alone(model, rows, index, device) for tree in trees for index in tree])
    model.train(was_training)
    difference = float((packed - alone).norm() / alone.norm())
    # `not <=` instead of `>`: NaN must fail.
    if not difference <= TOLERANCE[dtype]:
        if _finds_non_finite_image(model, rows, trees, may_skip):
            return None
        advice = "Report" if pairs else "Set packing: none to train without it, and report"
        raise TrainingError(
            f"{counted(sum(map(len, trees)), 'pair' if pairs else 'conversation')} "
            f"({rows.records[trees[0][0]].where} and others) have other logits "
            f"packed than one by one: relative difference {difference:.1e}, allowed {TOLERANCE[dtype]:.0e}. Weights "
            f"and images are finite, so torch or transformers computes packed rows differently on this {device.type}. "
            f"{advice} the versions that `lora-llava env` prints."
        )
    return difference


def _finds_non_finite_image(model: Any, rows: PackedRows, trees: Row, may_skip: bool) -> bool:
    """Raise TrainingError if a weight or an image is not finite, which would look like wrong packing.

    With `may_skip`, return True for an image instead.
    """
    if broken := non_finite_tensors(model):
        raise TrainingError(
            f"the model holds NaN or infinity before its first step: {listed(broken)}. Its base, or start_from, is "
            "damaged or was saved after a failed training: replace it"
        )
    for index in (tree[0] for tree in trees):
        if not has_finite_image(rows.with_rows([((index,),)])[0]):
            if may_skip:
                return True
            raise TrainingError(
                f"{rows.records[index].where}: its image holds NaN or infinity. Replace it, or exclude the record"
            )
    return False


def _first_trees(rows: PackedRows) -> Row:
    """Choose trees of one row that hold a few conversations, the widest first; empty if no row holds several."""
    first = next((row for row in rows.rows if row), ())
    # A pair is one record and two conversations.
    least = 2 if not first or len(rows.encoded[first[0][0]].branches) == 1 else 1
    row = next((row for row in rows.rows if sum(map(len, row)) >= least), ())
    trees: list[Tree] = []
    left = MAX_CONVERSATIONS
    for tree in sorted(row, key=len, reverse=True):
        if left:
            trees.append(tree[:left])
            left -= len(trees[-1])
    return tuple(trees)


def _logits_alone(model: Any, rows: PackedRows, index: int, device: torch.device) -> torch.Tensor:
    """Return the logits (S, vocabulary) of a record at the positions that predict its supervised tokens."""
    record, at_targets = rows.records[index], list[torch.Tensor]()
    pixels = {} if record.image is None else {"pixel_values": rows.read_image(record)[None].to(device)}
    for conversation in rows.encoded[index].branches:
        ids = torch.tensor([conversation.input_ids], device=device)
        with with_sdpa(llava_in(model)):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0].float()
        labels = enumerate(conversation.labels)
        at_targets.append(
            logits[[position - 1 for position, label in labels if label != IGNORE_INDEX and position > 0]]
        )
    return torch.cat(at_targets)
