"""`lora-llava check` on what questions, answers and images say: each fault is found, and nothing like it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lora_llava.doctor.catalogue import KINDS
from lora_llava.doctor.compare import normalized
from lora_llava.doctor.content.scripts import script_of
from tests.helpers.faulty import encoded, entry, scene, sound_data, write_recipe
from tests.helpers.workbook import write_workbook
from tests.unit.data.test_grayscale import SCAN
from tests.unit.doctor.test_doctor import check, found_in, report_in


def checked(directory: Path, base: Path, *data: Any, args: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """Return the report of a check."""
    (directory / "run/check/check.json").unlink(missing_ok=True)
    result = check(str(write_recipe(directory, base, *data, **settings)), *args)
    assert (directory / "run/check/check.json").exists(), result.output
    return report_in(directory / "run" / "check")


def problems(report: dict[str, Any], kind: str) -> dict[str, str]:
    """Return the problems of a kind by the ids of their records."""
    found = [one for finding in report["findings"] if finding["kind"] == kind for one in finding["records"]]
    return {str(one["id"]): one["problem"] for one in found}


TAGS = ["<|image_pad|>", "<img>", "[IMG]", "<image_0>", "<|vision_start|>", "<IMAGE>", "<ImageHere>", "<image-1>",
        "<|image_1|>", '<img src="a.png">', "[IMG_BREAK]", "</img>", "<images>"]  # fmt: skip
NO_TAGS = ["<b>", "[image of a cat]", "a < b > c", "imaging", "[1]", "<|im|>", "<imagine>", "img"]


def test_image_tags_of_other_tools_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, tag in enumerate([*TAGS, *NO_TAGS]):
        train.append(entry(f"tag-{number}", f"{number % 8}.png", f"{tag} What is in number {number}?", "a thing"))
    found = problems(checked(tmp_path, tiny_base, images, train, tested), "image_tag")
    assert set(found) == {f"tag-{number}" for number in range(len(TAGS))}
    assert found["tag-0"].endswith("user text holds <|image_pad|>")


VOID = ["-", "...", "?", "nan", "NaN", "#N/A", "null", "\N{EM DASH}"]
ANSWERS = ["+", "=", "0", "\N{CJK UNIFIED IDEOGRAPH-662F}", "None", "no", "A.", "\N{DEGREE SIGN}", "\N{PILE OF POO}"]


def test_answers_that_say_nothing_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, answer in enumerate([*VOID, *ANSWERS]):
        train.append(entry(f"answer-{number}", f"{number % 8}.png", f"What is number {number}?", answer))
    report = checked(tmp_path, tiny_base, images, train, tested)
    assert set(problems(report, "void_answer")) == {f"answer-{number}" for number in range(len(VOID))}


def test_an_empty_training_answer_is_named(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    train[5]["conversations"][1]["value"] = ""
    report = checked(tmp_path, tiny_base, images, train, tested)
    assert problems(report, "record")[train[5]["id"]].startswith("train.json, record 6 (id ")


def test_letters_without_a_choice_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, (lines, answer) in enumerate(
        [
            ("A. cat\nB. dog", "C"),
            ("A) cat\nB) dog\nC) cow", "(D)"),
            ("A. cat\nB. dog", "B."),
            ("(A) cat\n(B) dog", "A"),
            ("Vitamin\nC. is what?", "D"),
            ("A. cat\nB. dog", "dog"),
        ]
    ):
        train.append(entry(f"choice-{number}", f"{number}.png", f"Which is it?\n{lines}", answer))
    found = problems(checked(tmp_path, tiny_base, images, train, tested), "choice")
    assert set(found) == {"choice-0", "choice-1"}
    assert found["choice-0"].endswith("the answer is C, the choices are A, B")


def test_boxes_off_the_image_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    boxes = ["[0.1, 0.2, 1.2, 0.9]", "[0.5, 0.2, 0.4, 0.9]", "[-0.1,0,0.5,0.5]", "[34.5, 20, 90.5, 80]"]
    boxes += ["[0.1, 0.2, 0.3, 0.4]", "[0, 0, 1, 1]", "[1, 2, 3, 4]", "[0.1, 2.5]"]
    for number, box in enumerate(boxes):
        train.append(entry(f"box-{number}", f"{number}.png", f"Where is {number}?", box))
    found = problems(checked(tmp_path, tiny_base, images, train, tested), "box")
    assert set(found) == {f"box-{number}" for number in range(4)}
    assert "[0.1, 0.2, 1.2, 0.9] leaves the image, which is 0 to 1" in found["box-0"]
    assert "has no area" in found["box-1"]


def test_boxes_in_pixels_are_one_finding(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number in range(6):
        train.append(entry(f"box-{number}", f"{number}.png", f"Where is {number}?", f"[{number}, 20, 336, 80]"))
    report = checked(tmp_path, tiny_base, images, train, tested)
    (finding,) = [finding for finding in report["findings"] if finding["kind"] == "box"]
    assert finding["count"] == 6
    assert "6 boxes up to 336, such as [0, 20, 336, 80]" in finding["records"][0]["problem"]


def test_skewed_answers_have_their_baseline(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, one in enumerate(tested):
        one["conversations"][1]["value"] = "No." if number % 4 else "yes"
    (found,) = problems(checked(tmp_path, tiny_base, images, train, tested), "skewed_answers").values()
    assert found == "evaluation: 'no' is 75% of 24 answers; always answering it is right as often"


def test_questions_that_tell_their_answers_have_their_baseline(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for entries in (train, tested):
        for number, one in enumerate(entries):
            one["conversations"][0]["value"] = f"<image>\nWhat color has {number % 12}?"
            one["conversations"][1]["value"] = f"color {number % 12}" if number else "another"
    (found,) = problems(checked(tmp_path, tiny_base, images, train, tested), "skewed_answers").values()
    assert found.startswith("evaluation: 9")
    assert found.endswith("questions are answered right by the most frequent answer to the same question in training")


def test_too_few_steps_are_named_with_what_they_can_move(tiny_base: Path, tmp_path: Path) -> None:
    steps = ("stages.instruct.num_train_epochs=1", "stages.instruct.learning_rate=0.001")
    report = checked(tmp_path, tiny_base, *sound_data(), args=steps)
    (found,) = problems(report, "few_steps").values()
    # Warmup 1/2, then the cosine's 1 and 1/2.
    assert (
        found
        == "instruct: 3 optimizer steps; the learning rates add up to 0.002, the farthest that Adam moves a weight"
    )
    enough = checked(tmp_path, tiny_base, *sound_data(), args=("stages.instruct.max_steps=20",))
    assert problems(enough, "few_steps") == {}


def bilingual() -> tuple[dict[str, bytes], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a set as SLAKE's: clean by image in each language, but the images of one test are in the other's training.

    English trains on images 0 to 4 and tests on 5 to 7; Chinese trains on 3 to 7 and tests on 0 to 2.
    """
    images = {f"xmlab{number}/source.jpg": encoded(scene(number), "JPEG", quality=95) for number in range(8)}
    asked = {"en": "What organ is in part {}?", "zh": "\u56fe\u4e2d\u7b2c{}\u90e8\u5206\u662f\u4ec0\u4e48\u5668\u5b98?"}
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number in range(8):
        for language, trained in (("en", range(5)), ("zh", range(3, 8))):
            for part in range(3):
                side = sides["train" if number in trained else "test"]
                identity = f"{language}-{number}-{part}"
                record = entry(identity, f"xmlab{number}/source.jpg", asked[language].format(part), f"o{number}{part}")
                side.append(record | {"q_lang": language})
    return images, sides["train"], sides["test"]


def test_slake_leaks_over_all_languages_and_is_clean_in_one(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = bilingual()
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / f"images/xmlab{number}").mkdir()
    report = checked(tmp_path, tiny_base, images, train, tested)
    leaks = problems(report, "language_leak")
    assert len(leaks) == 6
    assert "is in the training set too" in next(iter(leaks.values()))
    assert leaks["en-5-0"].endswith(", with questions in Chinese")
    assert leaks["zh-0-0"].endswith(", with questions in Latin")
    mixed = next(one for one in report["findings"] if one["kind"] == "mixed_languages")["records"]
    assert [one["problem"] for one in mixed] == [
        "instruct training: 15 records in Chinese, 15 records in Latin",
        "evaluation: 9 records in Chinese, 9 records in Latin",
    ]
    only_english = ("stages.instruct.data.where={q_lang: en}", "evaluation.data.where={q_lang: en}")
    english = checked(tmp_path, tiny_base, images, train, tested, args=only_english)
    assert found_in(english) == set()


def test_an_image_that_leaks_in_its_own_language_is_a_plain_leak(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    tested.append(entry("leak", "0.png", "\u56fe\u4e2d\u662f\u4ec0\u4e48?", "a"))
    tested.append(entry("too", "0.png", "What is this?", "b"))
    report = checked(tmp_path, tiny_base, images, train, tested)
    assert set(problems(report, "image_leak")) == {"leak"}
    assert problems(report, "language_leak") == {}


@pytest.mark.parametrize(
    ("text", "script"),
    [("What is it?", "Latin"), ("\u0427\u0442\u043e \u044d\u0442\u043e, CT?", "Cyrillic"), ("", None),
     ("12 + 3?", None),
     ("\u3053\u308c\u306f\u4f55\u3067\u3059\u304b", "Japanese"), ("CT\u56fe\u50cf\u4e2d\u7684\u5668\u5b98", "Chinese"),
     ("\uc774\uac83\uc740", "Hangul"), ("\u0645\u0627 \u0647\u0630\u0627", "Arabic")],
)  # fmt: skip
def test_scripts(text: str, script: str | None) -> None:
    assert script_of(text) == script


def test_nearly_black_and_white_images_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    dark = (SCAN >> 8).astype(np.uint8)
    spotted = np.full((200, 200), 40, dtype=np.uint8)
    spotted[0, :15] = 255
    page = np.full((200, 200), 255, dtype=np.uint8)
    page[90:100, 20:60] = 0
    made = {"dark": dark, "bright": 255 - dark, "spotted": spotted, "page": page, "night": dark * np.uint8(3)}
    for name, values in made.items():
        images[f"{name}.png"] = encoded(Image.fromarray(values))
        train.append(entry(name, f"{name}.png", "What?", "something"))
    found = problems(checked(tmp_path, tiny_base, images, train, tested), "blank_image")
    assert set(found) == {"dark", "bright", "spotted"}
    assert "dark.png is nearly black: 99.9% of its values are at most 15 of 255" in found["dark"]
    assert "bright.png is nearly white: 99.9% of its values are at least 240 of 255" in found["bright"]
    assert "has values at most 0 of 255 apart in 99.9% of its pixels" in found["spotted"]


def test_12_bit_images_keep_their_levels_and_their_range_is_named(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number in range(3):
        images[f"scan{number}.png"] = encoded(Image.fromarray(SCAN // np.uint16(number + 1)))
        train.append(entry(f"scan{number}", f"scan{number}.png", "What?", f"scan {number}"))
    report = checked(tmp_path, tiny_base, images, train, tested)
    assert problems(report, "few_levels") == {}
    (problem,) = problems(report, "gray_range").values()
    assert problem.endswith(
        "3 images of more than 8 bits; their lowest values are 0 to 0, their highest 1365 to 4095; each is scaled by "
        "its own range"
    )
    full = checked(tmp_path, tiny_base, images, train, tested, args=("images.window=full",))
    # 4095 of 65535 is 16 of 256.
    assert set(problems(full, "few_levels") | problems(full, "blank_image")) == {f"scan{number}" for number in range(3)}
    cut = checked(tmp_path, tiny_base, images, train, tested, args=("images.window=[0, 2000]",))
    assert "; values of 2 images lie outside and are clipped" in problems(cut, "gray_range")["None"]


def test_another_extension_is_a_note(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for one in train:
        if one["image"] == "3.png":
            one["image"] = "3.JPG"
    report = checked(tmp_path, tiny_base, images, train, tested)
    assert found_in(report) == {("other_extension", "instruct", "r3-0")}
    assert problems(report, "other_extension")["r3-0"].endswith("3.JPG is 3.png")


@pytest.mark.parametrize(("empty", "said"), [(0, None), (2, "record 2 (line 3): image is empty, as in 2 records of 6")])
def test_records_without_an_image_are_a_note_where_others_have_one(
    tiny_base: Path, tmp_path: Path, empty: int, said: str | None
) -> None:
    images, train, tested = sound_data()
    path = write_recipe(tmp_path, tiny_base, images, train, tested)
    rows = [["image", "question", "answer"], *([f"{number}.png", "What?", f"thing {number}"] for number in range(6))]
    for row in rows[2 : 2 + empty]:
        # As in the second row of merged cells.
        row[0], row[1] = None, f"What, {row[2]}?"
    write_workbook(tmp_path / "t.xlsx", {"A": rows})
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    columns = {"image": "image", "question": "question", "answer": "answer"}
    recipe["stages"]["instruct"]["data"] = {"path": "t.xlsx", "image_root": "images", "columns": columns}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    check(str(path), "evaluation=null")
    report = report_in(tmp_path / "run" / "check")
    found = {kind["kind"]: kind for kind in report["findings"]}
    assert ("no_image" in found) is (said is not None)
    if said is not None:
        assert found["no_image"]["count"] == empty
        assert said in found["no_image"]["records"][0]["problem"]


def test_every_kind_says_what_to_do_and_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert kind.advice.endswith(".")
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("text", ["Yes", " yes. ", "yes.\n", "\n YES ."])
def test_answers_are_compared_without_case_space_and_final_periods(text: str) -> None:
    assert normalized(text) == "yes"
