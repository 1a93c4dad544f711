"""Ask two models the same questions: compare their logits and their greedy answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlavaConfig

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn, encode_prompt
from lora_llava.conversation.templates import Template
from lora_llava.errors import ArtifactError
from lora_llava.formats.names import EMBEDDINGS, HEAD, canonical_name, split_lora, unwrap_peft
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.generation.answers import end_token_ids
from lora_llava.generation.decoding import greedy_decode
from lora_llava.generation.prompts import Prompt
from lora_llava.modeling.base import BaseIdentity, LoadedModel
from lora_llava.modeling.streamed import empty_llava, stream_weights
from lora_llava.shipping.merge.stream import BaseKind, Read
from lora_llava.system.text import counted

_ANSWER_TOKENS = 8
"""Maximum tokens of a probe answer; each one is a forward pass over all weights."""
_IMAGE_QUESTIONS = ("What is in the image?", "Is it red? Answer yes or no.")
"""Each is asked about a different image."""
_TEXT_QUESTIONS = ("What is the capital of France?", "Name a color.")
# Four rows only: in fp32, keys and values of a 7B model take 1 MB a token, and an image has 576 tokens.
_POSITIONS = 16
"""Positions at the end of each sequence, the answer included, whose logits are compared."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of logits that rounding explains, by the dtype that the merged weights are written in.

A wrong base, a lost projector or a wrong scale give 0.1 and more.
"""


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """How far a model is from its reference."""

    max_abs: float
    """Largest absolute difference of a logit."""
    relative: float
    """L2 norm of the differences over that of the reference's logits, over all compared positions."""
    answers_equal: int
    answers: int

    def __str__(self) -> str:
        return (
            f"largest {self.max_abs:.2g}, relative {self.relative:.2g}; "
            f"{self.answers_equal} of {self.answers} greedy answers the same"
        )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Probe questions with the greedy answers of one model, as token ids."""

    prompts: list[Prompt]
    answers: list[list[int]]


def merged_model(read: Read, config: LlavaConfig) -> Any:
    """Build a model that streams its weights from `read` and computes in fp32."""
    model = empty_llava(config)
    stream_weights(model, lambda name, _: read(_stored(canonical_name(name), config)))
    return model


def adapted_model(read: Read, config: LlavaConfig, adapter: Adapter) -> Any:
    """Build PEFT's model of a base, streamed from `read`, with an adapter; it computes in fp32."""
    form = copy.deepcopy(adapter.config)
    form.base_model_name_or_path = None
    model = get_peft_model(empty_llava(config), form, low_cpu_mem_usage=True).eval()

    def parameter(name: str, _: torch.Tensor) -> torch.Tensor:
        unwrapped = unwrap_peft(name)
        if lora := split_lora(unwrapped):
            weight, part = lora
            keys = adapter.layers[canonical_name(weight)]
            key = {"lora_A": keys.a, "lora_B": keys.b, "lora_magnitude_vector": keys.magnitude}[part]
            assert key is not None
            return adapter.read(key)
        canonical = canonical_name(unwrapped.replace(".base_layer.", "."))
        if ".modules_to_save." in name:
            return adapter.read(adapter.replaced[canonical])
        return read(_stored(canonical, config))

    stream_weights(model, parameter)
    return model


def _stored(name: str, config: LlavaConfig) -> str:
    return EMBEDDINGS if name == HEAD and config.tie_word_embeddings else name


def ask(model: nn.Module, config: LlavaConfig, template: Template, tokenizer_directory: Path) -> Sequences:
    """Let `model` answer the probe questions greedily, in the template of training."""
    tokenizer = read_tokenizer(tokenizer_directory)
    loaded = LoadedModel(model, tokenizer, tokenizer_directory, BaseIdentity("", None, ""), (), (), config)
    texts = () if template.caption_only else _TEXT_QUESTIONS
    prompts = []
    for image, text in [*enumerate(_IMAGE_QUESTIONS), *((None, text) for text in texts)]:
        content = text if image is None else f"{IMAGE_PLACEHOLDER}\n{text}"
        encoded = encode_prompt([Turn("user", content)], template, tokenizer, loaded.image_tokens, where="probe")
        pixels = None if image is None else _noise_image(image, loaded.image_size)
        # No shared prefixes, on purpose: in one batch each answer token is a single pass over the streamed weights.
        prompts.append(Prompt(encoded.input_ids, 0, pixels, image))
    ends = end_token_ids(loaded, template)
    answers = greedy_decode(
        model,
        prompts,
        # A poorly trained model may answer with an image token, which would then need pixels.
        eos_token_ids=ends | {loaded.image_tokens.id},
        max_new_tokens=_ANSWER_TOKENS,
    )
    return Sequences(prompts, answers)


def _noise_image(seed: int, size: int) -> torch.Tensor:
    """Return smooth color noise (3, size, size) of about unit variance, like normalized pixels."""
    coarse = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]


@torch.no_grad()
def logits_of(model: nn.Module, asked: Sequences) -> list[torch.Tensor]:
    """Return the logits at the last positions of each sequence, (at most `_POSITIONS`, vocabulary).

    The answers are part of the input (teacher forcing), so that models are compared on the same text.
    """
    rows = [[*prompt.input_ids, *answer[:-1]] for prompt, answer in zip(asked.prompts, asked.answers, strict=True)]
    # Left padding: the last positions of all rows are then the last columns, which are all that lm_head computes.
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    images = [prompt.pixels() for prompt in asked.prompts if prompt.pixel_values is not None]
    output: Any = model(
        input_ids=ids,
        pixel_values=torch.stack(images),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=min(_POSITIONS, width),
        use_cache=False,
    )
    return [logits[-min(len(row), _POSITIONS) :] for row, logits in zip(rows, output.logits, strict=True)]


def difference(logits: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], asked: Sequences) -> LogitDifference:
    """Compare the logits of a model with those of its reference, each as `logits_of` returns them.

    A greedy answer is the same if the reference's most likely token at each of its positions is the answer's next one.
    """
    ours, theirs = torch.cat(list(logits)), torch.cat(list(reference))
    error = (ours - theirs).double()
    answers_equal = sum(
        rows[-len(answer) :].argmax(-1).tolist() == answer
        for rows, answer in zip(reference, asked.answers, strict=True)
    )
    return LogitDifference(
        max_abs=float(error.abs().max()),
        relative=float(error.norm() / theirs.double().norm()),
        answers_equal=answers_equal,
        answers=len(asked.answers),
    )


def probe_report(
    distance: LogitDifference, asked: Sequences, kind: BaseKind, dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """Return `probe` (the figures) and `tolerance` of a report: the comparison with the artifact on its `kind` base.

    `dtypes`: those of the written weights; the least precise sets the tolerance. Raises ArtifactError if rounding does
    not explain the distance.
    """
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    # Written so that NaN fails too.
    if not distance.relative <= tolerance:
        raise ArtifactError(f"logits differ by {distance}; rounding explains at most {tolerance:g} relative")
    probe = {"questions": len(asked.prompts), "against": f"{kind} base + adapter", **asdict(distance)}
    return {"probe": probe, "tolerance": tolerance}


def probe_line(report: Mapping[str, Any], reference: str) -> str:
    """Return the line that a command shows of a probe report."""
    probe = report["probe"]
    distance = LogitDifference(**{key: probe[key] for key in ("max_abs", "relative", "answers_equal", "answers")})
    return (
        f"against {reference}, logits of {counted(probe['questions'], 'question')}: {distance} "
        f"(rounding explains at most {report['tolerance']:g} relative)"
    )
