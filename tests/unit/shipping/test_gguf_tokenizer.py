"""Tokenizers in GGUF: what llama.cpp is told makes the tokens of training."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from lora_llava.conversation.templates import get_template
from lora_llava.errors import ArtifactError, ModelError
from lora_llava.shipping.export.gguf import tokenizer as gguf_tokenizer
from lora_llava.shipping.export.gguf.ollama import modelfile
from lora_llava.shipping.export.gguf.tokenizer import has_space_prefix, tokenizer_fields
from tests.helpers.tiny import tiny_tokenizer

VICUNA = Path(__file__).parents[2] / "fixtures" / "llava_v15_encoding" / "tokenizer"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = (
    "What is the capital of France?", "a  chat   between\n\n\ttwo", "12345 don't 3.14", "日本語 and Ωμέγα 🙂",
    "def f(x):\n    return x", "USER: <x> ASSISTANT:",
)  # fmt: skip


def fields_of(directory: Path, vocabulary: int, template: str = "vicuna_v1") -> dict[str, Any]:
    fields = tokenizer_fields(directory, vocabulary, get_template(template))
    return {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}


def saved(directory: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's tokenizer, as a base made from Vicuna has it."""
    tokenizer = AutoTokenizer.from_pretrained(VICUNA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["zzqq"])
    tokenizer.pad_token = tokenizer.unk_token
    return saved(tmp_path_factory.mktemp("vicuna"), tokenizer)


@pytest.fixture(scope="module")
def fields(vicuna: Path) -> dict[str, Any]:
    return fields_of(vicuna, 32064)


def sentencepiece_ids(fields: dict[str, Any], text: str) -> list[int]:
    """Tokenise as llama.cpp does for `llama`: join the neighbours of the best score, the leftmost first; then bytes."""
    index = {token: number for number, token in enumerate(fields["tokens"])}
    text = (" " if fields["add_space_prefix"] else "") + text
    pieces: list[str | None] = list(text.replace(" ", "\u2581"))
    following = [*range(1, len(pieces)), -1]
    before = [-1, *range(len(pieces) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def propose(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = f"{pieces[left]}{pieces[right]}"
            if joined in index:
                heapq.heappush(queue, (-fields["scores"][index[joined]], left, right, joined))

    for place in range(len(pieces) - 1):
        propose(place, place + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if pieces[left] is None or pieces[right] is None or f"{pieces[left]}{pieces[right]}" != joined:
            continue
        pieces[left], pieces[right] = joined, None
        following[left] = following[right]
        if following[left] >= 0:
            before[following[left]] = left
        propose(before[left], left)
        propose(left, following[left])
    ids = []
    for piece in pieces:
        if piece is not None:
            ids += [index[piece]] if piece in index else [index[f"<0x{one:02X}>"] for one in piece.encode()]
    return ids


def test_vicunas_tokens_types_and_scores(fields: dict[str, Any]) -> None:
    theirs = SentencePieceProcessor(str(VICUNA / "tokenizer.model"))
    assert (fields["model"], fields["pre"], fields["add_space_prefix"]) == ("llama", "default", True)
    assert fields["tokens"][:32000] == [theirs.id_to_piece(one) for one in range(32000)]
    assert fields["tokens"][32000:32003] == ["<image>", "zzqq", "[PAD32002]"]
    kinds = fields["token_type"]
    assert kinds[:5] == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    assert kinds[32000:] == [CONTROL, USER_DEFINED, *[UNUSED] * 62]
    assert kinds.count(BYTE) == 256
    # Pieces of spaces alone have a score of their own there; transformers merges them first, and so did training.
    differing = [one for one in range(32000) if fields["scores"][one] != theirs.get_score(one)]
    assert all(set(fields["tokens"][one]) == {"\u2581"} for one in differing)
    assert len(differing) == 15
    special = {key: value for key, value in fields.items() if key.endswith("_id") or key.startswith("add_")}
    assert special == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }


def test_llama_cpps_algorithm_makes_vicunas_tokens(vicuna: Path, fields: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(vicuna)
    for text in TEXTS:
        assert sentencepiece_ids(fields, text) == tokenizer(text, add_special_tokens=False).input_ids, text


LLAMA3 = pre_tokenizers.Split(Regex(gguf_tokenizer._LLAMA3), "isolated")
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
UNCUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


@pytest.mark.parametrize(
    ("cutter", "name"),
    [
        (PLAIN, "gpt-2"),
        (sequence(PLAIN), "gpt-2"),
        (sequence(pre_tokenizers.Digits(individual_digits=True), PLAIN), "smollm"),
        (sequence(LLAMA3, UNCUT), "llama-bpe"),
    ],
)
def test_byte_level_tokenizers(tmp_path: Path, cutter: Any, name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = cutter
    tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
    fields = fields_of(saved(tmp_path, tokenizer), 304)
    assert (fields["model"], fields["pre"], fields["add_bos_token"]) == ("gpt2", name, True)
    assert fields["merges"][:2] == ["Ġ t", "Ġt h"]
    assert "scores" not in fields
    assert fields["token_type"] == [CONTROL] * 7 + [NORMAL] * 280 + [UNUSED] * 17
    assert "<__media__>" in fields["tokenizer.chat_template"]
    assert fields_of(saved(tmp_path / "b", tiny_tokenizer(add_bos=False)), 304)["add_bos_token"] is False


@pytest.mark.parametrize(
    "cutter",
    [
        UNCUT,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        sequence(pre_tokenizers.Digits(individual_digits=False), PLAIN),
        sequence(LLAMA3, UNCUT),
        pre_tokenizers.Whitespace(),
        None,
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path, cutter: Any) -> None:
    """The one before the last is Llama 3's, but without its way to skip the merges."""
    tokenizer = tiny_tokenizer()
    if cutter is None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = cutter
    with pytest.raises(ModelError, match=r"none of those known from llama\.cpp"):
        fields_of(saved(tmp_path, tokenizer), 304)


@pytest.mark.parametrize(
    ("normalizer", "cutter", "prefix"),
    [
        (None, {"type": "Metaspace", "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "prepend_scheme": "never", "split": False}, False),
        ({"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}, None, True),
        ({"type": "Sequence", "normalizers": [{"type": "Replace"}]}, None, False),
        (None, {"type": "Metaspace", "prepend_scheme": "first", "split": True}, None),
        (None, {"type": "Whitespace"}, None),
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace"}]}, None, None),
    ],
)
def test_the_space_before_a_text(normalizer: Any, cutter: Any, prefix: bool | None) -> None:
    backend = {"normalizer": normalizer, "pre_tokenizer": cutter}
    if prefix is not None:
        assert has_space_prefix(backend) is prefix
        return
    with pytest.raises(ModelError, match="treats spaces differently"):
        has_space_prefix(backend)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.backend_tokenizer.model = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    with pytest.raises(ModelError, match="a WordLevel tokenizer"):
        fields_of(saved(tmp_path, words), 304)


def test_the_token_that_ends_an_answer(tmp_path: Path) -> None:
    directory = saved(tmp_path, tiny_tokenizer())
    assert "eot_token_id" not in fields_of(directory, 304)
    assert fields_of(directory, 304, "chatml")["eot_token_id"] == 6


def test_a_modelfile() -> None:
    assert modelfile(["text.gguf", "mmproj.gguf"], get_template("chatml", "Be brief."), "</s>") == (
        "FROM ./text.gguf\nFROM ./mmproj.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n'
        '{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""\n'
        'SYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>user"\n'
    )
    vicuna = modelfile(["text.gguf"], get_template("vicuna_v1"), "</s>")
    assert "USER: {{ .Prompt }} ASSISTANT:{{ .Response }}</s>" in vicuna
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "USER:"\n' in vicuna
    assert 'PARAMETER stop """\n"""' in modelfile(["text.gguf"], get_template("plain"), "</s>")
    with pytest.raises(ArtifactError, match="cannot hold"):
        modelfile([], get_template("vicuna_v1", 'Say """x"""'), "</s>")
