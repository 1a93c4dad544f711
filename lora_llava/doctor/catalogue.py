"""What can be wrong with data, how bad that is, what it means in plain words, and what to do about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
"""`error`: a run would stop, or train something wrong; `warning`: it would train worse, or its score would mislead."""


class Kind(NamedTuple):
    """One kind of finding, for people."""

    severity: Severity
    title: str
    meaning: str
    advice: str


KINDS: dict[str, Kind] = {
    "data_file": Kind(
        "error",
        "Data that cannot be read at all",
        "The file or data set is missing, or broken as a whole, so nothing of it was checked.",
        "Correct the path, or repair the file at the place that is named.",
    ),
    "record": Kind(
        "error",
        "Records of the wrong form",
        "A record lacks something, has turns out of order, an empty answer, or an image tag in the wrong place.",
        "Correct the records, or leave them out with `exclude`.",
    ),
    "form": Kind(
        "error",
        "Records in a form that is not read",
        "The records are not in LLaVA's form (`id`, `image`, `conversations`), and no `columns` say what to take.",
        "Add the `columns` that the message names to the data, or convert the file; docs/data.md shows the forms.",
    ),
    "image_path": Kind(
        "error",
        "Image paths that are not allowed",
        "An image is named by a URL, or by a path that leads out of the image root.",
        "Fetch or copy the image into `image_root` and name it by its relative path.",
    ),
    "missing_image": Kind(
        "error",
        "Missing images",
        "The record names an image that is not there.",
        "Restore the files, correct `image_root`, or leave the records out with `exclude`.",
    ),
    "bad_image": Kind(
        "error",
        "Images that cannot be decoded",
        "The file is empty, cut short, damaged, of a format that is not allowed, or far too large.",
        "Fetch or export the image again, or leave its records out with `exclude`.",
    ),
    "unsupervised": Kind(
        "error",
        "Conversations with nothing to learn",
        "All answers lie beyond `max_length`, so no token of the conversation would be trained on.",
        "Raise `max_length`, shorten the question, or leave the records out with `exclude`.",
    ),
    "micro_batch": Kind(
        "error",
        "A micro-batch too small for the data",
        "`tokens_per_micro_batch` is less than the tokens of the longest conversation, so a run would stop.",
        "Raise `tokens_per_micro_batch` or set it to auto, or lower `max_length`.",
    ),
    "blank_image": Kind(
        "warning",
        "Images that show nothing",
        "The picture is of one color, such as black or white, or so nearly that the model sees nothing.",
        "Look at the pictures; export them again, or leave their records out with `exclude`.",
    ),
    "few_levels": Kind(
        "warning",
        "Images that lose their shades",
        "The picture has more than 8 bits, and hardly any of its shades are left in the 8 bits that the model sees.",
        "Give the values that matter as `window: [low, high]` of the data. Save 16-bit color, or grey "
        "with transparency, as plain 16-bit grey.",
    ),
    "group_leak": Kind(
        "error",
        "Groups on both sides",
        "You named a `group` that must not be split, but its records are in training and are tested on too.",
        "Move all records of a group to one side, or let `validation.share` draw them.",
    ),
    "image_leak": Kind(
        "warning",
        "Images on both sides",
        "The very same picture is in training and is tested on, so the score is better than on new pictures.",
        "Remove it from one of the two sides.",
    ),
    "near_leak": Kind(
        "warning",
        "Nearly the same images on both sides",
        "A picture that is tested on looks like one that is trained on: a copy in another size, format or quality.",
        "Look at the pairs; remove one of each that shows the same thing.",
    ),
    "contradiction": Kind(
        "warning",
        "Contradictory answers",
        "The same question about the same image is answered differently; the model can only learn to guess.",
        "Decide which answer is right and remove the others.",
    ),
    "truncated": Kind(
        "warning",
        "Conversations cut short",
        "The conversation is longer than `max_length`; what is beyond is neither read nor learned.",
        "Raise `max_length`, or split the conversation.",
    ),
    "long_reference": Kind(
        "warning",
        "Test answers longer than the model may answer",
        "The reference has more tokens than `evaluation.max_new_tokens`, so every answer is cut too early to be right.",
        "Raise `evaluation.max_new_tokens` to the longest reference.",
    ),
    "void_reference": Kind(
        "warning",
        "Test answers that the score cannot see",
        "The reference normalizes to nothing under `evaluation.metric`, so the score says nothing about it.",
        "Correct the answer, or choose another metric: `vqa_v2` makes nothing of options such as A.",
    ),
    "duplicate_id": Kind(
        "warning",
        "Ids that occur twice",
        "Two records have one id, so a message or a result cannot tell which of them it is about.",
        "Give every record an id of its own.",
    ),
    "duplicate_record": Kind(
        "note",
        "Records that occur twice",
        "Image, question and answer are the same as in another record; it counts twice.",
        "Keep one, unless the weight is meant.",
    ),
    "duplicate_image": Kind(
        "note",
        "Images stored twice",
        "Two files have the same bytes. The run treats them as two images: it computes both, and `validation.share` "
        "may put one on each side.",
        "Keep one file and name it in all records.",
    ),
    "transparent": Kind(
        "note",
        "Transparent images",
        "Transparency is dropped, and the color that is stored below it is seen; black text may end up on black.",
        "Look at the pictures; if they are not as meant, flatten them on the background you want.",
    ),
    "special_text": Kind(
        "note",
        "Texts that look like markup of the model",
        "A text holds a special token such as </s>, or USER: or ASSISTANT:. It is encoded as plain text and ends or "
        "starts nothing.",
        "Nothing needs to be done, unless it got there by mistake.",
    ),
    "no_answer": Kind(
        "note",
        "Questions without an answer",
        "The evaluation passes over a last question without an answer, since there is nothing to compare with.",
        "Add the answers, or remove the records.",
    ),
}
"""In the order in which they are reported; `DataError.kind` is a key of this."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXCLUDABLE = frozenset({"record", "form", "image_path", "missing_image", "bad_image", "unsupervised"})
"""Kinds that stop a run by a record, which therefore may be left out."""
