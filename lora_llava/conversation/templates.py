"""Chat templates, and their constant parts as token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from lora_llava.errors import ModelError, RecipeError
from lora_llava.system.names import did_you_mean, similar


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template. Its strings are trusted: special tokens in them are parsed."""

    name: str
    system: str = ""
    """System prompt before the first turn; if empty, `system_prefix` and `system_suffix` are dropped too."""
    system_prefix: str = ""
    system_suffix: str = ""
    user_prefix: str = ""
    assistant_prefix: str = ""
    """Text between a question and its answer."""
    end: str | None = None
    """Supervised end of an answer; None: the end token of the tokenizer."""
    separator: str = ""
    """Text between the end of an answer and the next turn."""
    markers: tuple[str, ...] = ()
    """Special tokens in the strings above; the tokenizer must have them."""
    caption_only: bool = False
    """Whether to drop the question and keep only image and caption (stage 1 of LLaVA)."""

    @property
    def opening(self) -> str:
        """Text before the first user text."""
        system = f"{self.system_prefix}{self.system}{self.system_suffix}" if self.system else ""
        return system + self.user_prefix


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", end="\n", caption_only=True),
    "vicuna_v1": Template(
        "vicuna_v1",
        system=_VICUNA_SYSTEM,
        system_suffix=" ",
        user_prefix="USER: ",
        assistant_prefix=" ASSISTANT: ",
    ),
    "chatml": Template(
        "chatml",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        assistant_prefix="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        # Only between turns: after the last answer, nothing attends to it.
        separator="\n",
        markers=("<|im_start|>", "<|im_end|>"),
    ),
}


def get_template(name: str, system: str | None = None) -> Template:
    """Return a template; `system` replaces its system prompt (empty: none). Raises RecipeError."""
    if name not in TEMPLATES:
        hint = did_you_mean(similar(name, TEMPLATES), f"There are {', '.join(TEMPLATES)}.")
        raise RecipeError(f"template: there is no template {name!r}. {hint}")
    template = TEMPLATES[name]
    if system is None:
        return template
    if template.caption_only and system:
        raise RecipeError(f"system: template {name} has no system prompt; remove it or choose another template")
    return replace(template, system=system)


class Tokenizer(Protocol):
    """The part of a fast tokenizer of transformers that is used here."""

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool,
        return_attention_mask: bool,
    ) -> Any:
        """Tokenize texts; `["input_ids"]` of the result has a list of ids per text."""

    def __hash__(self) -> int:
        """Identify the tokenizer in the cache of `template_pieces`."""


class Anchor(NamedTuple):
    """Template text right before a text of the record, tokenized with it and then dropped.

    Without it, a tokenizer that starts every text with a space token would insert one.
    """

    text: str
    ids: list[int]
    space: str
    """Trailing spaces of the template text, which are tokenized as the start of the following text."""


class Pieces(NamedTuple):
    """The constant parts of a template as token ids."""

    bos: list[int]
    opening: list[int]
    opening_image: list[int]
    """The opening before an image, which keeps the spaces that would otherwise belong to the following text."""
    again: list[int]
    """From the end of an answer (excluded) to the next user text."""
    again_image: list[int]
    assistant_text: str
    """Start of the answer's turn if it is ordinary text, which is tokenized with the question."""
    assistant: list[int]
    """Start of the answer's turn if it begins with a marker."""
    end: list[int]
    end_text: str
    """End of an answer if it is ordinary text, which is tokenized with the answer."""
    user_anchor: Anchor
    answer_anchor: Anchor


NO_ANCHOR = Anchor("", [], "")


def tokenize(tokenizer: Tokenizer, texts: list[str], *, trusted: bool) -> list[list[int]]:
    """Tokenize texts without BOS; parse special tokens in them only if `trusted`."""
    result: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=not trusted, return_attention_mask=False
    )["input_ids"]
    return result


def _anchor(tokenizer: Tokenizer, literal: str, markers: tuple[str, ...]) -> Anchor:
    text = literal
    for marker in markers:
        text = text.rpartition(marker)[2]
    stripped = text.rstrip(" ")
    return Anchor(
        stripped, tokenize(tokenizer, [stripped], trusted=False)[0] if stripped else [], text[len(stripped) :]
    )


def _check_end_text(tokenizer: Any, template: Template, end_text: str) -> None:
    """Raise ModelError unless one token contains the whole end of an answer: decoding cannot stop at half of it."""
    ids = tokenize(tokenizer, [end_text], trusted=False)[0] if end_text else []
    if end_text and not (ids and str(tokenizer.decode(ids[-1:])).endswith(end_text)):
        what = f"makes {len(ids)} tokens of" if len(ids) > 1 else "cannot write"
        raise ModelError(f"template {template.name} ends an answer with {end_text!r}, which the tokenizer {what}")


@lru_cache(maxsize=8)
def template_pieces(tokenizer: Any, template: Template) -> Pieces:
    """Tokenize the parts that are the same in every conversation."""

    def ids(text: str) -> list[int]:
        return tokenize(tokenizer, [text], trusted=True)[0] if text else []

    markers = template.markers
    if template.end is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"template {template.name} ends an answer with the end token; the tokenizer has none")
        markers = (str(tokenizer.eos_token),)
    for marker in markers:
        if len(ids(marker)) != 1:
            raise ModelError(f"template {template.name} needs the token {marker}, which the tokenizer lacks")
    end_text = "" if template.end is None or template.end in markers else template.end
    _check_end_text(tokenizer, template, end_text)
    end = markers[0] if template.end is None else template.end
    again = template.separator + template.user_prefix
    joined = not template.assistant_prefix.startswith(markers)
    answer_anchor = _anchor(tokenizer, template.assistant_prefix.lstrip(" "), markers)
    first = tokenizer([""], add_special_tokens=True)["input_ids"][0][:1]
    return Pieces(
        bos=first if first == [tokenizer.bos_token_id] else [],
        opening=ids(template.opening.rstrip(" ")),
        opening_image=ids(template.opening),
        # Tokenize after the end token, as in the conversation: the start of a text may be tokenized differently.
        again=[] if end_text else ids(end + again.rstrip(" "))[1:],
        again_image=[] if end_text else ids(end + again)[1:],
        assistant_text=template.assistant_prefix.rstrip(" ") if joined else "",
        assistant=[] if joined else ids(template.assistant_prefix),
        end=[] if end_text else ids(end),
        end_text=end_text,
        user_anchor=_anchor(tokenizer, template.user_prefix, markers),
        answer_anchor=answer_anchor,
    )
