"""Kinds of findings in data: severity, title, meaning, and what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
"""`error`: a run would stop or train incorrectly; `warning`: it would train worse, or its score would mislead."""


class Kind(NamedTuple):
    """One kind of finding."""

    severity: Severity
    title: str
    meaning: str
    advice: str


KINDS: dict[str, Kind] = {
    "data_file": Kind(
        "error",
        "Data that cannot be read at all",
        "The file or data set is missing or damaged, so nothing in it was checked.",
        "Correct the path, or repair the file where the message says.",
    ),
    "key": Kind(
        "error",
        "Keys that no record has",
        "A setting names a key or column that the records do not have.",
        "Correct the name, or take it out of the setting.",
    ),
    "record": Kind(
        "error",
        "Records of the wrong form",
        "A record lacks a field, has turns out of order, an empty answer, or a misplaced image tag.",
        "Correct the records, or leave them out with `exclude`.",
    ),
    "form": Kind(
        "error",
        "Records in an unknown form",
        "The records do not have LLaVA's keys (`id`, `image`, `conversations`), and no `columns` name theirs.",
        "Set `columns` as the message says, or convert the file; docs/data.md shows the forms.",
    ),
    "image_path": Kind(
        "error",
        "Image paths that are not allowed",
        "An image is named by a URL, or by a path outside the image root.",
        "Copy the image into `image_root` and name it by its relative path.",
    ),
    "missing_image": Kind(
        "error",
        "Missing images",
        "The record names an image that does not exist.",
        "Restore the files, correct `image_root`, or leave the records out with `exclude`.",
    ),
    "bad_image": Kind(
        "error",
        "Records whose image cannot be decoded",
        "The file is empty, truncated, damaged, far too large, or of a format that is not allowed.",
        "Download or export the image again, or leave its records out with `exclude`.",
    ),
    "unsupervised": Kind(
        "error",
        "Conversations without a supervised token",
        "All answers are beyond `max_length`, so no token would be trained on.",
        "Raise `max_length`, shorten the question, or leave the records out with `exclude`.",
    ),
    "pair": Kind(
        "error",
        "Records that are no pair",
        "Stage prefer trains on a chosen and a rejected answer; the record has one only, or two that do not differ.",
        "Write a worse answer as `rejected`, or leave the records out with `exclude`.",
    ),
    "micro_batch": Kind(
        "error",
        "A micro-batch too small for the data",
        "`tokens_per_micro_batch` is below the length of the longest conversation, so a run would stop.",
        "Raise `tokens_per_micro_batch` or set it to auto, or lower `max_length`.",
    ),
    "blank_image": Kind(
        "warning",
        "Images that show nothing",
        "The image has one color, such as black or white, or nearly so: the model sees nothing.",
        "Look at the images. Nearly black ones are often 12 or 16 bits cut to 8: export them again as 16-bit PNG or "
        "TIFF. Leave records of empty images out with `exclude`.",
    ),
    "few_levels": Kind(
        "warning",
        "Images that lose their gray levels",
        "The image has more than 8 bits, and hardly any of its levels are left in the 8 bits that the model sees.",
        "Set `images.window: [low, high]` to the range that matters. Save 16-bit color, or gray "
        "with transparency, as 16-bit grayscale.",
    ),
    "group_leak": Kind(
        "error",
        "Groups in both training and test",
        "Records of one `group`, which must not be split, are in training and in validation or test.",
        "Move all records of a group to one side, or let `validation.share` draw them.",
    ),
    "source_leak": Kind(
        "error",
        "Images or groups that one source holds out and another trains on",
        "A run over several sources stops there: its validation loss would be of images that it is trained on.",
        "Leave the records out of one source with `exclude`, or hold them out of both with `validation.path`.",
    ),
    "image_leak": Kind(
        "warning",
        "Images in both training and test",
        "The same image is in training and in validation or test, so the score is better than on new images.",
        "Remove it from one of the two sides. Where `validation.share` drew them, the image is stored under two names: "
        "keep one file, or give both records the same value in a column and name that as `group`.",
    ),
    "language_leak": Kind(
        "warning",
        "Images in training and test in another language",
        "The same image is in training and in validation or test, with questions in another script. Splits that are "
        "clean in each language often leak across them.",
        "Take one language with `where`, such as `where: {q_lang: en}`, or split by image over all of them.",
    ),
    "near_leak": Kind(
        "warning",
        "Near duplicates in both training and test",
        "A test image looks like a training image: a copy in another size, format or quality.",
        "Look at the pairs; where both show the same thing, remove one.",
    ),
    "contradiction": Kind(
        "warning",
        "Contradictory answers",
        "The same question about the same image has different answers; the model can only guess.",
        "Decide which answer is right and remove the others.",
    ),
    "length_bias": Kind(
        "warning",
        "Chosen and rejected answers of unlike length",
        "If chosen answers are mostly longer, or mostly shorter, the model learns the length instead of what is right.",
        "Add pairs in which it is the other way round, or rewrite answers until both kinds have similar lengths.",
    ),
    "truncated": Kind(
        "warning",
        "Truncated conversations",
        "The conversation is longer than `max_length`; the rest is neither context nor supervised.",
        "Raise `max_length`, or split the conversation.",
    ),
    "long_reference": Kind(
        "warning",
        "References longer than the model's answers may be",
        "The reference has more tokens than `evaluation.max_new_tokens`, so every answer is cut too early to match.",
        "Raise `evaluation.max_new_tokens` to the longest reference.",
    ),
    "void_reference": Kind(
        "warning",
        "References that the metric ignores",
        "The reference normalizes to nothing under `evaluation.metric`, so its score means nothing.",
        "Correct the answer, or choose another metric: `vqa_v2` drops options such as A.",
    ),
    "void_answer": Kind(
        "warning",
        "Answers that say nothing",
        "The answer is punctuation alone, or what spreadsheets and data frames write for an empty cell, such as nan. "
        "The model learns to write that.",
        "Write the answers, or leave the records out with `exclude`.",
    ),
    "image_tag": Kind(
        "warning",
        "Image tags of other tools in the text",
        "A text holds the image placeholder of another model or of HTML. It is trained on as letters, which no user "
        "writes.",
        "Remove the tags; `<image>` marks the position of the image.",
    ),
    "choice": Kind(
        "warning",
        "Answers that are none of the choices",
        "The answer is a letter, and the question lists choices with other letters.",
        "Correct the answer, or add the choice that is missing.",
    ),
    "box": Kind(
        "warning",
        "Boxes that are not on the image",
        "LLaVA's boxes are [x1, y1, x2, y2], from 0 to 1, of the image after padding to a square. These leave it, have "
        "no area, or are in other units.",
        "Divide by the longer side after adding the padding, as `lora-llava convert` does for detection data.",
    ),
    "skewed_answers": Kind(
        "warning",
        "Answers that need no image",
        "One answer, or the most frequent answer to the same question, is right for most of the records. A model can "
        "score as much without looking at the image.",
        "Compare the accuracy with this number, not with 0; balance the answers, or ask more of the rare ones.",
    ),
    "few_steps": Kind(
        "warning",
        "Fewer optimizer steps than can learn",
        "Adam moves a weight by about the learning rate in a step, so no weight moves farther than the sum of the "
        "learning rates, however large the gradients. LLaVA-1.5 takes 2,181 and 5,198 steps.",
        "Lower `batch_size`, raise `num_train_epochs`, or get more records.",
    ),
    "duplicate_id": Kind(
        "warning",
        "Duplicate ids",
        "Two records have the same id, so messages and results are ambiguous.",
        "Give every record a unique id.",
    ),
    "duplicate_record": Kind(
        "note",
        "Duplicate records",
        "Image, question and answer equal those of another record, which counts twice.",
        "Keep one, unless the double weight is intended.",
    ),
    "duplicate_image": Kind(
        "note",
        "Images stored twice",
        "Two files have the same bytes. A run treats them as two images: it computes both, and `validation.share` "
        "may put one in each split.",
        "Keep one file and name it in all records.",
    ),
    "no_image": Kind(
        "note",
        "Records without an image, where others have one",
        "The column of the image is empty, as it is below the first row of merged cells in a workbook. The records are "
        "trained on as text alone.",
        "Nothing, if they are questions about no image; otherwise fill in the column.",
    ),
    "mixed_languages": Kind(
        "note",
        "Questions in several languages",
        "The questions are in several scripts. Languages that share a script are not told apart.",
        "Nothing, if it is intended; or take one language with `where`, and test each alone with `evaluation.by`.",
    ),
    "gray_range": Kind(
        "note",
        "Gray images of more than 8 bits",
        "They are converted to 8 bits by `images.window`. With auto, a value may have two shades in two images.",
        "Nothing, if only the picture matters. If values mean the same in all images, set `images.window` to "
        "[low, high].",
    ),
    "other_extension": Kind(
        "note",
        "Images with another extension than in the data",
        "The file differs from the name in the data in the case or kind of its extension, or in the form in which "
        "Unicode has its accents; it is used.",
        "Correct the names: other software does not find these files.",
    ),
    "transparent": Kind(
        "note",
        "Transparent images",
        "Transparency is dropped and the stored color shows; black text may end up on black.",
        "Look at the images; if they are wrong, flatten them onto the right background.",
    ),
    "special_text": Kind(
        "note",
        "Texts that look like prompt markup",
        "A text contains a special token such as </s>, or USER: or ASSISTANT:. It is encoded as plain text and has "
        "no effect.",
        "Nothing, unless it is there by mistake.",
    ),
    "no_answer": Kind(
        "note",
        "Questions without an answer",
        "The evaluation skips a last question without an answer: there is no reference.",
        "Add the answers, or remove the records.",
    ),
}
"""In the order of the report; `DataError.kind` is one of these keys."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXCLUDABLE = frozenset({"record", "form", "image_path", "missing_image", "bad_image", "unsupervised", "pair"})
"""Kinds by which single records stop a run; those records may be left out."""
