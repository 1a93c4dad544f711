"""Damage a directory of a model as an accident or an attacker would, the same way for the same seed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENDLESS = Path("/dev/zero")
TEXTS = [
    "", " ", "a\0b", "\ud800", "../../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/x", "x" * 5_000, "1e999",
    'main"); print("x") #', "</script>", "\x1b[2J", "(a+)+$", "(.*)*!", "[red]", "{{7*7}}", "null", "llama", "LORA",
    "{% for x in range(10**9) %}{% endfor %}", "IA3", "linear", "default", "full", "all-linear", "nf4", "int8",
    "model.safetensors",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**18, -(10**18), 10**400, 0.5, 1e300, -1e-300, float("nan"), float("inf"),
]  # fmt: skip
KEYS = [
    "auto_map", "quantization_config", "text_config", "vision_config", "rope_scaling", "rope_parameters", "model_type",
    "peft_type", "megatron_core", "megatron_config", "transformers_weights", "architectures", "tokenizer_class",
    "gguf_file", "_attn_implementation", "attn_implementation", "dtype", "torch_dtype", "chat_template", "format",
    "processor_class", "eos_token_id", "layer_types", "per_layer_config", "adapters", "id2label", "use_bfloat16",
]  # fmt: skip
JSON = (".json", ".jsonl")
_CELL = re.compile(r'(?:="|(?<=[;\n]))([^";\n]*)')


def nested(rng: random.Random) -> Any:
    """Return a list or mapping within itself, up to beyond what Python's parser follows."""
    value: Any = 0
    for _ in range(rng.choice([2, 30, 400])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def any_value(rng: random.Random) -> Any:
    """Draw a value of JSON that stands where another belongs."""
    kind = rng.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind in (2, 3):
        return rng.choice(NUMBERS)
    if kind in (4, 5):
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.choice([[], {}, [None], {"": None}, [[]], [1, 2], ["a", "b"], {"a": {"b": 1}}])
    return nested(rng)


def damage_json(rng: random.Random, data: Any) -> Any:
    """Replace, remove, add or exchange a value somewhere in the content of a JSON file."""
    holders = [data] if isinstance(data, dict | list) else []
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        if len(holders) < 2_000:
            holders += [value for value in inner if isinstance(value, dict | list) and value]
    if not holders or rng.random() < 0.03:
        return any_value(rng)
    # Those near the top decide more than the ten thousandth token.
    holder = rng.choice(holders[: rng.choice([1, 3, 20, 2_000])])
    places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    action = rng.randrange(6)
    if not places or action == 0:
        if isinstance(holder, dict):
            holder[rng.choice([*KEYS, *TEXTS])] = any_value(rng)
        else:
            holder.append(any_value(rng))
        return data
    place = rng.choice(places)
    if action == 1:
        del holder[place]
    elif action == 2:
        holder[place] = holder[rng.choice(places)]
    elif action == 3 and isinstance(holder[place], int | float) and not isinstance(holder[place], bool):
        holder[place] = rng.choice([-holder[place], holder[place] * 2, holder[place] + 1, holder[place] * 10**6, 0.5])
    else:
        holder[place] = any_value(rng)
    return data


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, cut off, remove, repeat, blank or insert bytes; in every second case near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        length = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        start = rng.randrange(length)
        end = min(len(changed), start + rng.choice([1, 2, 8, 64, 4_096]))
        action = rng.randrange(6)
        if action == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[start:]
        elif action == 2:
            del changed[start:end]
        elif action == 3:
            changed[start:start] = changed[start:end] * rng.randint(1, 4)
        elif action == 4:
            changed[start:end] = bytes(end - start) if rng.random() < 0.5 else b"\xff" * (end - start)
        else:
            changed[start:start] = rng.randbytes(rng.randint(1, 16))
    return bytes(changed)


def damage_tensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file: names, types, shapes and positions of its tensors."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        name, other = rng.choice(names), rng.choice(names)
        entry = header[name]
        action = rng.randrange(7)
        if action == 0:
            header[f"{rng.choice(['x.', 'base_model.model.', ''])}{name}{rng.choice(['', '.default', 's'])}"] = (
                header.pop(name)
            )
        elif action == 1:
            header[name], header[other] = header[other], entry
        elif action == 2:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", 5])
        elif action == 3:
            entry["shape"] = rng.choice(
                [[], [0], [-1], [2**63], [1, *entry["shape"]], entry["shape"][::-1], None, ["a"]]
            )
        elif action == 4:
            entry["data_offsets"] = rng.choice(
                [[0, 0], [0, 2**63], [8, 4], [-8, 0], header[other]["data_offsets"], "x"]
            )
        elif action == 5:
            del header[name]
        else:
            header = damage_json(rng, header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return damage_bytes(rng, data)
    text = dumped(header)
    size = rng.choice([len(text)] * 8 + [0, len(text) - 1, 2**40])
    return size.to_bytes(8, "little") + text + data[8 + length :]


def dumped(data: Any) -> bytes:
    """Return JSON, with the numbers and surrogates that only Python's parser takes."""
    try:
        return json.dumps(data).encode()
    except (RecursionError, ValueError):
        return b"[" * 3_000


def damage_cells(rng: random.Random, data: bytes) -> bytes:
    """Replace quoted values of XML, or fields between delimiters and lines of CSV, by others."""
    text = data.decode("utf-8", "replace")
    spans = [match.span(1) for match in _CELL.finditer(text)]
    for start, end in sorted(rng.sample(spans, min(len(spans), rng.randint(1, 3))), reverse=True):
        value = rng.choice([*TEXTS, *map(str, NUMBERS), text[slice(*rng.choice(spans))]])
        text = text[:start] + value + text[end:]
    return text.encode("utf-8", "replace")


def damage_file(rng: random.Random, path: Path, others: list[Path]) -> None:
    """Damage one file by its kind, or put something else at its path; other links to the file keep its content."""
    data, action = path.read_bytes(), rng.randrange(20)
    path.unlink()
    if action == 0:
        return
    if action == 1:
        path.write_bytes(b"")
    elif action == 2:
        path.write_bytes(data if (other := rng.choice(others)) == path else other.read_bytes())
    elif action == 3:
        rng.choice(_REPLACEMENTS)(path)
    elif action <= 8:
        path.write_bytes(damage_bytes(rng, data))
    elif path.suffix == ".safetensors":
        path.write_bytes(damage_tensors(rng, data))
    elif path.suffix in (".xml", ".csv") and rng.random() < 0.7:
        path.write_bytes(damage_cells(rng, data))
    elif path.suffix in JSON:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            path.write_bytes(damage_bytes(rng, data))
        else:
            path.write_bytes(dumped(damage_json(rng, value)))
    elif path.suffix in (".yaml", ".jinja", ".md") and rng.random() < 0.5:
        path.write_text(data.decode("utf-8", "replace") + rng.choice(TEXTS), "utf-8", "replace")
    else:
        path.write_bytes(damage_bytes(rng, data))


_REPLACEMENTS: list[Callable[[Path], object]] = [
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to(ENDLESS),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/etc/hostname"),
]


def damaged_copy(source: Path, target: Path, seed: int | None) -> list[str]:
    """Copy a directory by hard links and damage one to three of its files, none without a seed; return their names."""
    rng = random.Random(seed)
    if target.is_symlink() or target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    names: list[str] = []
    for _ in range(0 if seed is None else rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in target.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        path = rng.choice(files)
        damage_file(rng, path, files)
        names.append(str(path.relative_to(target)))
    return names
