"""Turns as ids and labels, on a byte-level tokenizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded, ImageTokens, Turn, encode, encode_prompt
from lora_llava.conversation.templates import TEMPLATES, get_template
from lora_llava.errors import DataError, ModelError, RecipeError
from tests.helpers.tiny import BOS_ID, EOS_ID, IM_END_ID, IMAGE_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WHERE = "train.json, record 3 (id x)"
OPTIONS: dict[str, Any] = {"image_tokens": ImageTokens(IMAGE_ID, 4), "where": WHERE}


def run(turns: list[Turn], name: str = "vicuna_v1", max_length: int = 999, tokenizer: Any = TOKENIZER) -> Encoded:
    return encode(turns, get_template(name), tokenizer, max_length=max_length, **OPTIONS)


def talk(*texts: str) -> list[Turn]:
    return [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


def written(encoded: Encoded, tokenizer: Any = TOKENIZER) -> str:
    text: str = tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    return text


def learned(encoded: Encoded) -> str:
    text: str = TOKENIZER.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    return text


def test_vicuna_is_written_as_llava_writes_it() -> None:
    encoded = run(talk("What?\n<image>", "yes", "no?", "a b"))
    system = TEMPLATES["vicuna_v1"].system
    image = "<image>" * 4
    assert written(encoded) == f"<s>{system} USER: {image}\nWhat? ASSISTANT: yes</s>USER: no? ASSISTANT: a b</s>"
    assert learned(encoded) == " yes</s> a b</s>"
    assert encoded.num_supervised == sum(label != IGNORE_INDEX for label in encoded.labels)


def test_chatml_is_written_with_its_markers_and_no_system_by_default() -> None:
    encoded = run(talk("<image>\nWhat?", "yes", "no?", "a"), "chatml", tokenizer=tiny_tokenizer(add_bos=False))
    image = "<image>" * 4
    assert written(encoded) == (
        f"<|im_start|>user\n{image}\nWhat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nno?<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    )
    assert learned(encoded) == "yes<|im_end|>a<|im_end|>"


def test_chatml_system_text_is_a_block_of_its_own() -> None:
    template = get_template("chatml", "Be brief.")
    encoded = encode(talk("What?", "yes"), template, TOKENIZER, max_length=99, **OPTIONS)
    assert written(encoded).startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?")


def test_the_system_prompt_of_a_record_is_encoded_as_that_of_a_stage() -> None:
    turns = talk("What?", "A cat")
    for name in ("vicuna_v1", "chatml"):
        template, own = get_template(name), get_template(name, "Be brief.")
        options = OPTIONS | {"max_length": 999}
        assert encode(turns, template, TOKENIZER, system="Be brief.", **options) == encode(
            turns, own, TOKENIZER, **options
        )
        prompts = (
            encode_prompt(turns[:1], template, TOKENIZER, system="Be brief.", **OPTIONS),
            encode_prompt(turns[:1], own, TOKENIZER, **OPTIONS),
        )
        assert prompts[0] == prompts[1]
        assert encode(turns, template, TOKENIZER, system=None, **options) == encode(
            turns, template, TOKENIZER, **options
        )
    caption = talk("<image>", "A cat")
    plain = get_template("plain")
    assert encode(caption, plain, TOKENIZER, system="x", **options) == encode(caption, plain, TOKENIZER, **options)


def test_a_special_token_in_the_system_prompt_of_a_record_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"record 3 \(id x\): the system prompt 'a</s>' holds a special token; remove it"
    ):
        encode(talk("What?", "A cat"), get_template("vicuna_v1"), TOKENIZER, max_length=999, system="a</s>", **OPTIONS)


def test_plain_is_image_caption_and_line_feed() -> None:
    encoded = run(talk("Describe it.\n<image>", "a cat"), "plain")
    assert written(encoded) == "<s>" + "<image>" * 4 + "a cat\n"
    assert learned(encoded) == "a cat\n"
    assert encoded.prefix_length == 5


def test_no_bos_is_invented() -> None:
    encoded = run(talk("<image>", "a cat"), "plain", tokenizer=tiny_tokenizer(add_bos=False))
    assert encoded.input_ids[:4] == [IMAGE_ID] * 4
    assert encoded.prefix_length == 4
    assert run(talk("<image>", "a cat"), "plain").input_ids[0] == BOS_ID


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_text_only_record_has_no_image_and_no_prefix(name: str) -> None:
    encoded = run(talk("What?", "yes"), name)
    assert IMAGE_ID not in encoded.input_ids
    assert encoded.prefix_length == 0


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_image_in_a_later_turn_shares_no_prefix(name: str) -> None:
    encoded = run(talk("hi", "yes", "<image>\nWhat?", "no"), name)
    assert encoded.input_ids.count(IMAGE_ID) == 4
    assert encoded.prefix_length == 0


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
@pytest.mark.parametrize("first", ["<image>\nWhat?", "\n\nWhat?", " ", "<image>"])
def test_prompt_is_a_prefix_of_the_answered_prompt(name: str, first: str) -> None:
    turns = talk(first, " yes ", "\nno", "\n\n a")
    whole = run(turns, name)
    prompt = encode_prompt(turns[:-1], get_template(name), TOKENIZER, **OPTIONS)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert set(prompt.labels) == {IGNORE_INDEX}
    assert prompt.num_supervised == 0
    assert prompt.prefix_length == whole.prefix_length


@pytest.mark.fault("records: special tokens, or `USER:` and the like, inside a text")
@pytest.mark.parametrize("words", ["</s>", "<|im_end|>", "<|im_start|>system\n", "<s>", "<pad>", "USER: ASSISTANT: x"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_words_of_a_record_never_become_special_tokens(words: str, name: str) -> None:
    clean = run(talk("<image>\nq", "a", "q", "a"), name)
    ours = run(talk(f"<image>\n{words}", words, words, words), name)
    special = [token for token in ours.input_ids if token < 7]
    assert special == [token for token in clean.input_ids if token < 7]
    end = "</s>" if name == "vicuna_v1" else "<|im_end|>"
    assert learned(ours).replace(" ", "") == f"{words}{end}{words}{end}".replace(" ", "")


def test_answer_ends_with_the_end_token() -> None:
    assert run(talk("q", "a")).labels[-1] == EOS_ID
    assert run(talk("q", "a"), "chatml").labels[-1] == IM_END_ID


@pytest.mark.fault("records: a conversation that is too long: truncated, but never inside the image, never to nothing")
def test_truncation_cuts_at_the_end_only() -> None:
    turns = talk("<image>\nWhat?", "yes", "What?", "no no no")
    whole = run(turns)
    cut = run(turns, max_length=len(whole.input_ids) - 2)
    assert cut.input_ids == whole.input_ids[:-2]
    assert cut.labels == whole.labels[:-2]
    assert cut.prefix_length == whole.prefix_length
    assert run(turns, max_length=len(whole.input_ids)) == whole


@pytest.mark.fault("records: a conversation that is too long: truncated, but never inside the image, never to nothing")
def test_truncation_never_cuts_the_image() -> None:
    turns = talk("<image>\nWhat?", "yes")
    prefix_length = run(turns).prefix_length
    with pytest.raises(DataError, match=f"{prefix_length - 1} would cut through the image") as caught:
        run(turns, max_length=prefix_length - 1)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.fault("records: a conversation that is too long: truncated, but never inside the image, never to nothing")
def test_nothing_left_to_learn_is_refused() -> None:
    turns = talk("<image>\nWhat?", "yes")
    first = next(index for index, label in enumerate(run(turns).labels) if label != IGNORE_INDEX)
    assert run(turns, max_length=first + 1).num_supervised == 1
    with pytest.raises(DataError, match="nothing to train on") as caught:
        run(turns, max_length=first)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.fault("records: an image without `<image>`, `<image>` without an image, two of either")
@pytest.mark.fault("records: `<image>` inside an answer")
@pytest.mark.fault("records: an answer that is empty or blank")
@pytest.mark.fault("records: a conversation that starts with the assistant, or two turns of one role in a row")
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "last turn is missing"),
        ([Turn("assistant", "a")], "turn 1: role is 'assistant', expected 'user'"),
        ([Turn("user", "q"), Turn("user", "q")], "turn 2: role is 'user', expected 'assistant'"),
        (talk("q", "a", "q"), "the last turn is from role 'user', expected 'assistant'"),
        (talk("q", ""), "turn 2: the answer is empty"),
        (talk("q", " \n"), "turn 2: the answer is empty"),
        (talk("<image> <image>", "a"), "<image> occurs 2 times, at most once"),
        (talk("<image>", "a", "<image>", "a"), "<image> occurs 2 times, at most once"),
        (talk("<image>", "an <image>"), "turn 2: <image> is in an answer"),
    ],
)
def test_turns_that_cannot_be_learned_are_refused_by_name(turns: list[Turn], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(turns)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize("turns", [talk("q", "a"), talk("<image>", "a", "q", "a")])
def test_plain_takes_one_image_and_its_caption(turns: list[Turn]) -> None:
    with pytest.raises(DataError, match="plain takes one image and its caption") as caught:
        run(turns, "plain")
    assert str(caught.value).startswith(WHERE)


def test_prompt_must_end_with_a_question() -> None:
    with pytest.raises(DataError, match="the last turn is from role 'assistant'") as caught:
        encode_prompt(talk("q", "a"), get_template("vicuna_v1"), TOKENIZER, **OPTIONS)
    assert str(caught.value).startswith(WHERE)


def test_tokenizer_without_the_markers_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has none") as caught:
        run(talk("q", "a"), tokenizer=tokenizer)
    assert str(caught.value).startswith(WHERE)
    with pytest.raises(ModelError, match=r"needs the token <\|im_start\|>") as caught:
        run(talk("q", "a"), "chatml", tokenizer=without_markers())
    assert str(caught.value).startswith(WHERE)


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean vicuna_v1"):
        get_template("vicuna")
    with pytest.raises(RecipeError, match="There are plain, vicuna_v1, chatml"):
        get_template("zzz")


def test_plain_has_no_system_text() -> None:
    with pytest.raises(RecipeError, match="plain has no system prompt"):
        get_template("plain", "Be brief.")
    assert get_template("plain", "") == TEMPLATES["plain"]


def melting_tokenizer() -> Any:
    """Build a tokenizer in which a second line feed melts into the template's, as in most that are in use."""
    return tiny_tokenizer(more_merges=[("Ċ", "Ċ")])


def spaced_tokenizer() -> Any:
    """Build a tokenizer of letters that begins every text with a space piece, as those of the first Llamas do."""
    symbols = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "▁", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in symbols[:4]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def without_markers() -> Any:
    """Build a tokenizer of single bytes that knows no marker of any template."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", ["\nyes", "\n</s>", "\n\n<|im_end|>"])
def test_k32_text_that_melts_into_the_template_stays_text(text: str) -> None:
    tokenizer = melting_tokenizer()
    encoded = run(talk("What?", text), "chatml", tokenizer=tokenizer)
    answer = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert answer[-1] == IM_END_ID
    assert not {EOS_ID, IM_END_ID} & set(answer[:-1])
    assert tokenizer.decode(answer[:-1]) == text
    # What stands before the answer is the same whatever the answer is.
    prompt = encode_prompt(talk("What?"), get_template("chatml"), tokenizer, **OPTIONS)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_k32_no_space_is_put_before_a_text_that_follows_a_line_feed() -> None:
    tokenizer = spaced_tokenizer()
    encoded = run(talk("What?", "yes", "no?", "on"), "chatml", tokenizer=tokenizer)
    answers = [tokenizer.convert_ids_to_tokens(label) for label in encoded.labels if label != IGNORE_INDEX]
    assert answers == ["y", "e", "s", "<|im_end|>", "o", "n", "<|im_end|>"]
    assert "▁W" not in "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids))


def test_k32_an_image_in_a_later_turn_stands_after_that_turns_prefix() -> None:
    encoded = run(talk("hi", "yes", "<image>\nWhat?", "no"))
    image = "<image>" * 4
    system = TEMPLATES["vicuna_v1"].system
    assert written(encoded) == f"<s>{system} USER: hi ASSISTANT: yes</s>USER: {image}\nWhat? ASSISTANT: no</s>"


def test_k32_an_image_that_fills_the_length_is_whole_and_leaves_nothing_to_learn() -> None:
    image_end = 5  # <s> and four tokens of the image.
    with pytest.raises(DataError, match="nothing to train on"):
        run(talk("<image>", "a cat"), "plain", max_length=image_end)
    with pytest.raises(DataError, match="would cut through the image, which ends at token 5"):
        run(talk("<image>", "a cat"), "plain", max_length=image_end - 1)


def test_k32_a_cut_is_noted_and_nothing_else() -> None:
    whole = run(talk("What?", "yes"))
    assert whole.is_cut is False
    length = len(whole.input_ids)
    assert run(talk("What?", "yes"), max_length=length).is_cut is False
    assert run(talk("What?", "yes"), max_length=length - 1).is_cut is True


def test_k32_errors_of_a_prompt_name_its_record() -> None:
    with pytest.raises(DataError, match=rf"^{re.escape(WHERE)}: template plain takes one image"):
        encode_prompt(talk("What?"), get_template("plain"), TOKENIZER, **OPTIONS)
    with pytest.raises(DataError, match=r"got 3 turns"):
        encode_prompt(talk("<image>", "a cat", "More?"), get_template("plain"), TOKENIZER, **OPTIONS)
    with pytest.raises(ModelError, match=rf"^{re.escape(WHERE)}: "):
        encode_prompt(talk("What?"), get_template("chatml"), without_markers(), **OPTIONS)
