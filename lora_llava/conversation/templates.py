"""The templates: how a conversation is written for the model, and the constant parts of that as ids."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from lora_llava.errors import ModelError, RecipeError


@dataclass(frozen=True, slots=True)
class Template:
    """How turns are written for the model; the strings are trusted, special tokens in them are parsed."""

    name: str
    system: str = ""
    """Text before the first turn; without any, `system_prefix` and `system_suffix` fall away too."""
    system_prefix: str = ""
    system_suffix: str = ""
    user_prefix: str = ""
    assistant_prefix: str = ""
    """Stands between a question and its answer."""
    end: str | None = None
    """Supervised end of an answer; None is the tokenizer's own end token."""
    separator: str = ""
    """Stands between the end of an answer and the next turn."""
    markers: tuple[str, ...] = ()
    """Special tokens of the strings above; the tokenizer must have them."""
    caption_only: bool = False
    """The user's words are dropped: image and caption, nothing else (stage 1 of LLaVA)."""

    @property
    def opening(self) -> str:
        """What stands before the first user text."""
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
        # Only between turns: after the last answer it would be computed and never looked at.
        separator="\n",
        markers=("<|im_start|>", "<|im_end|>"),
    ),
}


def get_template(name: str, system: str | None = None) -> Template:
    """Look up a template; `system` replaces its system text (empty: none). Raises RecipeError."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TEMPLATES)}."
        raise RecipeError(f"template: no template is called {name!r}; {hint}")
    template = TEMPLATES[name]
    if system is None:
        return template
    if template.caption_only and system:
        raise RecipeError(f"system: template {name} has no system text; remove it or choose another template")
    return replace(template, system=system)


class Tokenizer(Protocol):
    """What is needed of a tokenizer: a fast one of transformers."""

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool,
        return_attention_mask: bool,
    ) -> Any:
        """Tokenise texts; `["input_ids"]` of the result holds a list of ids for each."""

    def __hash__(self) -> int:
        """Identify the tokenizer: what depends on it and a template alone is computed once."""


class Anchor(NamedTuple):
    """The template's text right before a record's text: tokenised along with it, then dropped.

    Otherwise a tokenizer that begins every text with a space piece would put one there.
    """

    text: str
    ids: list[int]
    space: str
    """Spaces that end the template's text; they are tokenised as the start of what follows."""


class Pieces(NamedTuple):
    """The constant parts of a template as ids of one tokenizer."""

    bos: list[int]
    opening: list[int]
    opening_image: list[int]
    """As it is before an image: with the spaces that otherwise belong to the following text."""
    again: list[int]
    """From the end of an answer (excluded) to the next user text."""
    again_image: list[int]
    assistant_text: str
    """Start of the answer's turn, where it is plain text and so is tokenised with the question."""
    assistant: list[int]
    """The same where it begins with a marker."""
    end: list[int]
    end_text: str
    """The end of an answer where it is plain text and so is tokenised with the answer."""
    user_anchor: Anchor
    answer_anchor: Anchor


NO_ANCHOR = Anchor("", [], "")


def tokenise(tokenizer: Tokenizer, texts: list[str], *, trusted: bool) -> list[list[int]]:
    """Tokenise texts, without BOS; special tokens in them are parsed only where they are `trusted`."""
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
        stripped, tokenise(tokenizer, [stripped], trusted=False)[0] if stripped else [], text[len(stripped) :]
    )


def _check_end_text(tokenizer: Any, template: Template, end_text: str) -> None:
    """Raise ModelError unless the last token of an answer holds the whole end: at half an end nothing can stop."""
    ids = tokenise(tokenizer, [end_text], trusted=False)[0] if end_text else []
    if end_text and not (ids and str(tokenizer.decode(ids[-1:])).endswith(end_text)):
        what = f"makes {len(ids)} tokens of" if len(ids) > 1 else "cannot write"
        raise ModelError(f"template {template.name} ends an answer with {end_text!r}, which the tokenizer {what}")


@lru_cache(maxsize=8)
def template_pieces(tokenizer: Any, template: Template) -> Pieces:
    """Tokenise what is the same in every conversation."""

    def ids(text: str) -> list[int]:
        return tokenise(tokenizer, [text], trusted=True)[0] if text else []

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
        # Tokenised after the end token, as it will stand, which may differ from the start of a text.
        again=[] if end_text else ids(end + again.rstrip(" "))[1:],
        again_image=[] if end_text else ids(end + again)[1:],
        assistant_text=template.assistant_prefix.rstrip(" ") if joined else "",
        assistant=[] if joined else ids(template.assistant_prefix),
        end=[] if end_text else ids(end),
        end_text=end_text,
        user_anchor=_anchor(tokenizer, template.user_prefix, markers),
        answer_anchor=answer_anchor,
    )
