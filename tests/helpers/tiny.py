"""A LLaVA and a tokenizer small enough to be built inside a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lora_llava.formats.processor import save_processor

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0 to 6, in this order."""
UNK_ID, BOS_ID, EOS_ID, PAD_ID, IMAGE_ID, IM_START_ID, IM_END_ID = range(7)

IMAGE_SIZE = 28
NUM_IMAGE_TOKENS = 4
IMAGE_MEAN, IMAGE_STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
VOCAB_SIZE = 304
"""Ids of the tokenizer's 287 tokens and some to spare, as real models have."""

# Enough merges that a token is not always a byte: token counts then differ from byte counts, as in real life.
_MERGES = [
    ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "a"), ("Ġ", "i"), ("Ġi", "s"), ("i", "n"), ("e", "r"),
    ("a", "t"), ("o", "n"), ("Ġ", "w"), ("Ġw", "h"), ("Ġwh", "at"), ("h", "at"), ("W", "hat"), ("y", "e"),
    ("ye", "s"), ("n", "o"), ("U", "S"), ("US", "E"), ("USE", "R"), ("S", "S"), ("Ġ", "A"), ("ĠA", "SS"),
]  # fmt: skip


def tiny_tokenizer(*, add_bos: bool = True, more_merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer; it puts `<s>` first (as Llama's does) unless `add_bos` is false."""
    merges = [*_MERGES, *more_merges]
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(symbol, len(vocab))
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )


def tiny_config(layers: int = 2) -> LlavaConfig:
    """Describe a LLaVA of 28-pixel images (4 tokens each), width 48 and grouped key-value heads."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def tiny_llava(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> LlavaForConditionalGeneration:
    """Build a random LLaVA in evaluation mode, the same for the same seed, on the CPU.

    Weights are drawn wider than at a real start, so that outputs depend visibly on image and text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(layers)
        config._attn_implementation = "sdpa"
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.Module.to(model, dtype=dtype)
    torch.nn.Module.eval(model)
    return model


def save_tiny_base(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write `tiny_llava` with tokenizer and processor as a model directory, and return the directory."""
    model = tiny_llava(seed=seed, dtype=dtype)
    model.save_pretrained(directory)
    pixels = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    save_processor(directory, tiny_tokenizer(), model.config, pixels)
    return directory
