"""What is in a GGUF file, and what a reader computes from that alone, as llama.cpp's graphs have it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch.nn import functional as F

State = dict[str, torch.Tensor]


class GGUFContent:
    """Metadata and tensors of a file, in fp32."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields: dict[str, Any] = {
            key: one.contents() for key, one in reader.fields.items() if not key.startswith("GGUF.")
        }
        self.kinds = {one.name: one.tensor_type.name for one in reader.tensors}
        self.raw = {one.name: one.data for one in reader.tensors}
        self.tensors: State = {
            one.name: torch.from_numpy(dequantize(one.data, one.tensor_type).copy()).reshape(one.shape.tolist()[::-1])
            for one in reader.tensors
        }

    def with_lora(self, lora: GGUFContent) -> GGUFContent:
        """Add an adapter: `W + alpha / rank * B A`."""
        names = [name.removesuffix(".lora_a") for name in lora.tensors if name.endswith(".lora_a")]
        for name in names:
            a, b = lora.tensors[f"{name}.lora_a"], lora.tensors[f"{name}.lora_b"]
            self.tensors[name] = self.tensors[name] + lora.fields["adapter.lora.alpha"] / a.shape[0] * b @ a
        return self


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _linear(x: torch.Tensor, tensors: State, name: str) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn neighbours 2i and 2i + 1, (heads, length, width), by angles (length, width / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1
    ).flatten(-2)


def text_logits(content: GGUFContent, ids: list[int]) -> torch.Tensor:
    """Logits of llama.cpp's `llama`, (length, vocabulary)."""
    fields = {key.removeprefix("llama."): value for key, value in content.fields.items()}
    tensors = content.tensors
    heads, shared = fields["attention.head_count"], fields["attention.head_count_kv"]
    width, eps = fields["rope.dimension_count"], fields["attention.layer_norm_rms_epsilon"]
    frequencies = fields["rope.freq_base"] ** (-torch.arange(0, width, 2) / width)
    frequencies = frequencies / tensors.get("rope_freqs.weight", 1) / fields.get("rope.scaling.factor", 1)
    angles = torch.arange(len(ids))[:, None] * frequencies
    x = tensors["token_embd.weight"][ids]
    for number in range(fields["block_count"]):
        block = f"blk.{number}."
        h = _rms(x, tensors[f"{block}attn_norm.weight"], eps)
        q, k, v = (
            _linear(h, tensors, f"{block}attn_{one}").view(len(ids), count, -1).transpose(0, 1)
            for one, count in (("q", heads), ("k", shared), ("v", shared))
        )
        q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = (one.repeat_interleave(heads // shared, 0) for one in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + _linear(mixed, tensors, f"{block}attn_output")
        h = _rms(x, tensors[f"{block}ffn_norm.weight"], eps)
        gated = F.silu(_linear(h, tensors, f"{block}ffn_gate")) * _linear(h, tensors, f"{block}ffn_up")
        x = x + _linear(gated, tensors, f"{block}ffn_down")
    x = _rms(x, tensors["output_norm.weight"], eps)
    return F.linear(x, tensors.get("output.weight", tensors["token_embd.weight"]))


def image_features(content: GGUFContent, pixels: torch.Tensor, *, class_last: bool = False) -> torch.Tensor:
    """Image tokens of one image (3, size, size), (patches, width of the language model).

    `class_last` is llama.cpp's defect: the class token comes last, while positions and the choice of the patches are
    as if it came first.
    """
    fields = {key.removeprefix("clip.vision."): value for key, value in content.fields.items()}
    tensors, eps = content.tensors, fields["attention.layer_norm_epsilon"]
    heads = fields["attention.head_count"]
    wide = fields["embedding_length"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (wide,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    patches = F.conv2d(pixels[None], tensors["v.patch_embd.weight"], stride=fields["patch_size"])[0].flatten(1).T
    row = tensors["v.class_embd"][None]
    x = torch.cat([patches, row] if class_last else [row, patches])
    x = norm(x + tensors["v.position_embd.weight"], "v.pre_ln")
    # The feature layer is that before block n, and n blocks run.
    (runs,) = fields["feature_layer"]
    for number in range(runs):
        block = f"v.blk.{number}."
        h = norm(x, f"{block}ln1")
        q, k, v = (_linear(h, tensors, f"{block}attn_{one}").view(len(h), heads, -1).transpose(0, 1) for one in "qkv")
        scores = (q @ k.transpose(1, 2) / math.sqrt(wide // heads)).softmax(-1)
        x = x + _linear((scores @ v).transpose(0, 1).flatten(1), tensors, f"{block}attn_out")
        h = _linear(norm(x, f"{block}ln2"), tensors, f"{block}ffn_up")
        h = F.gelu(h) if content.fields["clip.use_gelu"] else h * torch.sigmoid(1.702 * h)
        x = x + _linear(h, tensors, f"{block}ffn_down")
    return _linear(F.gelu(_linear(x[1:], tensors, "mm.0")), tensors, "mm.2")
