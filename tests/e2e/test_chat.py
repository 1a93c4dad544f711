"""A talk with a model: with an image or none, streamed, on a terminal, moved, and made elsewhere."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from lora_llava.artifact import load_model, read_usage
from lora_llava.cli import cli
from lora_llava.cli.chat import write_piece
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.encode import Turn
from lora_llava.conversation.templates import get_template
from lora_llava.data.record import ImageSource, Record
from lora_llava.errors import ArtifactError, DataError
from lora_llava.generation.answers import PromptFormat, generate_answers
from lora_llava.generation.chat import AnswerWriter, Chat
from lora_llava.modeling.base import hash_weights
from lora_llava.shipping.merge.run import merge_artifact
from tests.helpers.artifacts import CPU, as_earlier, make_artifact
from tests.helpers.speaking import QUESTION, chain_of, prompt_of, say, write_artifact, write_base
from tests.helpers.tiny import EOS_ID, IM_END_ID, NUM_IMAGE_TOKENS, save_tiny_base, tiny_tokenizer

LLAMA_FORM = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' "
    "else c['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def run(*args: object, input: str | None = None) -> Result:  # noqa: A002  # as CliRunner has it
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=input)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.new("RGB", (28, 40), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return make_artifact(tiny_base, tmp_path_factory.mktemp("chat") / "instruct")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in chatml that says two words, after an image as after a question without one."""
    directory = tmp_path_factory.mktemp("speaker")
    tokenizer, template = tiny_tokenizer(), get_template("chatml")
    base = write_base(directory / "base", tokenizer, EOS_ID)
    chain = chain_of(template, tokenizer, IM_END_ID)
    assert prompt_of(template, tokenizer)[-1] == prompt_of(template, tokenizer, with_image=False)[-1] == chain[0]
    say(base, chain)
    return write_artifact(base, directory / "run" / "instruct", "chatml")


def words() -> str:
    tokenizer = tiny_tokenizer()
    return str(tokenizer.decode(chain_of(get_template("chatml"), tokenizer, IM_END_ID)[1:3])).strip()


def test_k15_a_question_about_no_picture_is_answered_without_image_tokens(speaker: Path, artifact: Path) -> None:
    assert run("chat", speaker, QUESTION).stdout == words() + "\n"
    loaded, usage = load_model(artifact, device=CPU, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    loaded.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    answer = Chat(loaded, usage, None, 6).ask(QUESTION)
    assert seen[0].tolist()[0] == prompt_of(get_template("vicuna_v1"), loaded.tokenizer, with_image=False)
    record = Record("q", None, (Turn("user", QUESTION),), "a question")
    asked: dict[str, Any] = {"form": PromptFormat(get_template("vicuna_v1"), "pad"), "max_new_tokens": 6}
    assert [answer] == generate_answers(loaded, [record], **asked)


def test_k15_several_images_are_refused(artifact: Path, picture: Path) -> None:
    result = run("chat", artifact, "--image", picture, "--image", picture, QUESTION)
    assert result.exit_code == 2
    assert "given 2 times; LLaVA-1.5 is trained on one image per conversation" in result.stderr
    assert result.stdout == ""


def test_k15_a_folder_is_no_image(artifact: Path, picture: Path) -> None:
    result = run("chat", artifact, "--image", picture.parent, QUESTION)
    assert result.exit_code == 2
    assert f"needs a file; {picture.parent} is a folder" in result.stderr


def test_k15_answers_come_in_pieces_and_are_those_of_eval(artifact: Path, picture: Path) -> None:
    loaded, usage = load_model(artifact, device=CPU, dtype=torch.float32)
    source = ImageSource("a", picture, None)
    chat, turns = Chat(loaded, usage, source, 12), ()
    for question in ("What is it?", "Is it red?", "And why is that so?"):
        pieces: list[str] = []
        answer = chat.ask(question, pieces.append)
        assert "".join(pieces) == answer
        assert len(pieces) > 2
        turns = (*turns, Turn("user", question if turns else f"<image>\n{question}"))
        asked: dict[str, Any] = {"form": PromptFormat(get_template("vicuna_v1"), "pad"), "max_new_tokens": 12}
        assert [answer] == generate_answers(loaded, [Record("q", source, turns, "a question")], **asked)
        turns = (*turns, Turn("assistant", answer))


def test_k26_a_later_question_does_not_compute_the_image_again(artifact: Path, picture: Path) -> None:
    loaded, usage = load_model(artifact, device=CPU, dtype=torch.float32)
    chat = Chat(loaded, usage, ImageSource("a", picture, None), 4)
    widths: list[int] = []
    images: list[int] = []
    loaded.model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    loaded.model.get_base_model().model.vision_tower.register_forward_pre_hook(lambda _, __: images.append(1))
    chat.ask("What is the colour of the thing in the middle?")
    first, shown = widths[0], len(widths)
    chat.ask("Why?")
    assert images == [1]
    assert first > NUM_IMAGE_TOKENS + 100
    assert widths[shown] < 60


def test_k26_an_interrupted_answer_leaves_a_chat_that_works(artifact: Path, picture: Path) -> None:
    loaded, usage = load_model(artifact, device=CPU, dtype=torch.float32)

    def chat() -> Chat:
        return Chat(loaded, usage, ImageSource("a", picture, None), 6)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    broken = chat()
    with pytest.raises(KeyboardInterrupt):
        broken.ask(QUESTION, stop)
    assert broken.ask(QUESTION) == chat().ask(QUESTION)


@pytest.mark.parametrize("end", ["exit", "quit", "/exit", "EXIT ", ""])
def test_k65_a_talk_ends_at_exit_and_at_an_empty_line(speaker: Path, end: str) -> None:
    result = run("chat", speaker, input=f"{QUESTION}\n{end}\n{QUESTION}\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == words() + "\n"
    assert run("chat", speaker, input=QUESTION).stdout == words() + "\n", "the end of the input ends it too"


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\rb", "\x07", "\x9b31m", "a\u202eb", "\x1b]0;title\x07"])
def test_k29_a_terminal_shows_control_characters_and_does_not_obey(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    write_piece(text + "\nsecond line")
    assert all(one.isprintable() or one == "\n" for one in terminal.getvalue())
    assert terminal.getvalue().endswith("\nsecond line")
    monkeypatch.setattr(sys, "stdout", pipe)
    write_piece(text)
    assert pipe.getvalue() == text


def test_k15_no_piece_holds_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    writer = AnswerWriter(tokenizer, frozenset({EOS_ID}), pieces.append)
    tokens = [*tokenizer(" é日 \n ok  ", add_special_tokens=False).input_ids, EOS_ID]
    for token in tokens:
        writer.add(token)
    assert pieces[0] == "é"
    assert writer.finish(tokens) == "".join(pieces) == "é日 \n ok"


def moved(artifact: Path, directory: Path) -> Path:
    return Path(shutil.copytree(artifact, directory / "a" / "b" / "c" / "moved"))


COMMANDS = {
    "chat": ["chat", "{}", QUESTION],
    "eval": ["eval", "{}", "--data", "{}/../data.json", "--no-base", "--output", "{}/../eval"],
    "merge": ["merge", "{}", "{}/../out"],
    **{name: ["export", "{}", "{}/../out", "--format", name] for name in ("hf", "llava", "vllm", "gguf")},
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_k24_a_moved_artifact_names_the_base_that_it_needs(
    artifact: Path, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    here = moved(artifact, tmp_path)
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "1"}]
    (here.parent / "data.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    command = [part.format(here) for part in COMMANDS[name]]
    result = run(*command)
    assert result.exit_code == 1
    for said in ("was moved away from its base", "--base-model DIR", hash_weights(tiny_base), "tiny-llava"):
        assert said in result.stderr
    assert "/../" not in result.stderr.replace(str(here), "")
    if name in ("chat", "eval", "merge"):
        for option in ("--base-model", "--base"):
            shutil.rmtree(here.parent / "out", ignore_errors=True)
            shutil.rmtree(here.parent / "eval", ignore_errors=True)
            assert run(*command, option, tiny_base).exit_code == 0


def test_k24_a_wrong_base_and_a_typo_are_named(artifact: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = run("chat", moved(artifact, tmp_path), QUESTION, "--base-model", "typo")
    assert "--base-model typo: the directory does not exist" in result.stderr
    assert hash_weights(tiny_base) in result.stderr
    other = save_tiny_base(tmp_path / "other", seed=9)
    result = run("chat", artifact, QUESTION, "--base-model", other)
    assert "was trained on another base" in result.stderr
    assert "--base-model DIR" in result.stderr


def test_k24_a_published_artifact_does_not_look_for_its_base_on_the_hub(artifact: Path, tmp_path: Path) -> None:
    here = moved(artifact, tmp_path)
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["base"]["path"] = None
    (here / "manifest.json").write_text(json.dumps(manifest))
    result = run("chat", here, QUESTION)
    assert "was trained on a local directory, and its manifest does not say which" in result.stderr
    assert "--base-model DIR" in result.stderr


@pytest.mark.parametrize("command", ["chat", "eval", "merge", "export", "import"])
def test_k24_one_name_for_the_base_in_every_command(command: str) -> None:
    shown = run(command, "--help").stdout
    assert "--base-model DIR" in shown
    assert "--base " not in shown


def test_k24_what_to_merge_onto_has_a_name_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct", nf4=True)
    for number, option in enumerate((["--onto", "original"], ["--base", "original", "--base-model", tiny_base])):
        assert run("merge", made, tmp_path / str(number), *option).exit_code == 0
        report = json.loads((tmp_path / str(number) / "merge_report.json").read_text())
        assert report["base"] == "original"
        assert "--onto" in report["reason"]


def test_k10_a_merged_model_without_its_report_is_asked_as_it_was_trained(
    speaker: Path, tmp_path: Path, picture: Path
) -> None:
    merge_artifact(speaker, tmp_path / "merged")
    known = read_usage(tmp_path / "merged")
    (tmp_path / "merged" / "merge_report.json").unlink()
    found = read_usage(tmp_path / "merged")
    assert found.prompt_template == known.prompt_template == get_template("chatml")
    assert found.image_aspect_ratio == known.image_aspect_ratio
    assert run("chat", tmp_path / "merged", "--image", picture, QUESTION).stdout == words() + "\n"


def test_k10_a_foreign_template_is_used_as_it_is(tmp_path: Path, picture: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = write_base(tmp_path / "base", tokenizer, EOS_ID)
    chain = chain_of(get_template("chatml"), tokenizer, IM_END_ID)
    [last] = tokenizer("]", add_special_tokens=False).input_ids
    say(base, [last, *chain[1:]])
    (base / "chat_template.jinja").write_text(LLAMA_FORM)
    loaded, usage = load_model(base, device=CPU, dtype=torch.float32)
    assert usage.template is None
    # Its end is that of the template it brings, though its generation_config.json does not name it.
    assert Chat(loaded, usage, ImageSource("a", picture, None), 9).ask(QUESTION) == words()
    with pytest.raises(DataError, match="contains the special token </s>"):
        Chat(loaded, usage, None, 9).ask("a</s>")
    data = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": words()}]
    records = [{"id": "1", "image": picture.name, "conversations": data}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = ["--data", tmp_path / "data.json", "--image-root", picture.parent, "--output", tmp_path / "eval"]
    assert run("eval", base, *options).exit_code == 0
    accuracy = json.loads((tmp_path / "eval" / "accuracy.json").read_text())
    assert accuracy["tuned"]["correct"] == 1


def test_k10_a_model_that_says_nothing_is_refused_with_the_way_to_name_its_template(
    tmp_path: Path, picture: Path
) -> None:
    tokenizer = tiny_tokenizer()
    base = write_base(tmp_path / "base", tokenizer, EOS_ID)
    say(base, chain_of(get_template("chatml"), tokenizer, IM_END_ID))
    result = run("chat", base, "--image", picture, QUESTION)
    assert result.exit_code == 1
    assert "does not name its template" in result.stderr
    assert "--template plain or vicuna_v1 or chatml" in result.stderr
    named = run("chat", base, "--image", picture, QUESTION, "--template", "chatml")
    assert named.stdout == words() + "\n"
    assert "Did you mean chatml" in run("chat", base, QUESTION, "--template", "chatlm").stderr


def test_k10_a_template_is_not_forced_upon_an_artifact(speaker: Path) -> None:
    with pytest.raises(ArtifactError, match="leave --template out"):
        read_usage(speaker, "vicuna_v1")


@pytest.mark.parametrize(("aspect", "expected"), [("pad", "pad"), ("square", "square")])
def test_k10_the_models_own_processor_says_whether_images_are_padded(
    tiny_base: Path, tmp_path: Path, aspect: str, expected: str
) -> None:
    made = make_artifact(tiny_base, tmp_path / "instruct")
    manifest = json.loads((made / "manifest.json").read_text())
    as_earlier(made, images={**manifest["images"], "image_aspect_ratio": aspect})
    merge_artifact(made, tmp_path / "merged")
    (tmp_path / "merged" / "merge_report.json").unlink()
    assert read_usage(tmp_path / "merged").image_aspect_ratio == expected


def test_k10_an_export_of_a_foreign_model_keeps_its_own_template(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tiny_tokenizer(), EOS_ID)
    (base / "chat_template.jinja").write_text(LLAMA_FORM)
    result = run("export", base, tmp_path / "hf", "--format", "hf")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == LLAMA_FORM
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [EOS_ID, IM_END_ID]
    result = run("export", base, tmp_path / "gguf", "--format", "gguf")
    assert result.exit_code == 0, result.output
    assert "the Modelfile has no TEMPLATE" in result.output
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "TEMPLATE" not in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    (base / "chat_template.jinja").write_text(chat_template(get_template("chatml"), "</s>"))
    result = run("export", base, tmp_path / "known", "--format", "gguf")
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system' in (tmp_path / "known" / "Modelfile").read_text()
