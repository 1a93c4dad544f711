"""Write adapter_config.json, and read that of any adapter: what PEFT would act on is checked before PEFT reads it.

An adapter may come from a stranger. Numbers that would fill the memory, patterns that would never end, and settings
that name modules to import are refused here, and everything that is wrong is one ArtifactError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import write_json
from lora_llava.formats.manifest import is_number
from lora_llava.formats.names import ADAPTER_CONFIG
from lora_llava.system.files import read_json
from lora_llava.system.text import first_line

_MAX_RANK = 100_000
"""Largest rank; that of a weight is at most its smaller side."""
_MAX_ENTRIES = 2_000
"""Largest number of entries of a list or a mapping: a decoder has a few hundred linear layers."""
_MAX_QUANTIFIERS, _MAX_GROUPS = 3, 2
_ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]])*\]", re.DOTALL)
"""Escaped characters and sets of characters, in which no symbol has its meaning."""
_LOOK_AHEAD = re.compile(r"\(\?(?:[:=!]|<[=!])")
_REPEATED_GROUP = re.compile(r"\)\s*[*+?{]")
_QUANTIFIER = re.compile(r"[*+?]|\{[\d,]*\}")

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of LoRA that subtract it from the base's weights first: the adapter fits only the changed base."""

_OTHER_FORMS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "target_parameters",
    "trainable_token_indices", "lora_bias", "arrow_config", "fan_in_fan_out", "megatron_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
"""PEFT's settings that make LoRA, DoRA apart, anything but `W + scale * B A`."""

_ALWAYS_WRITTEN = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
    "modules_to_save", "inference_mode",
)  # fmt: skip
"""Settings of LoRA that every version of PEFT knows, and that other readers look up without a default."""

_SINCE_0_14 = ("exclude_modules", "eva_config", "lora_bias")
_SINCE_0_15 = ("corda_config", "trainable_token_indices", "peft_version")
"""Settings by the version of PEFT that first wrote them: it writes all that it knows."""

_LLAVA_HF = {
    "base_model_class": "LlavaForConditionalGeneration",
    "parent_library": "transformers.models.llava.modeling_llava",
}
"""What PEFT records of a base that is no text model; `AutoPeftModel` builds that class."""


def read_adapter_config(directory: Path) -> LoraConfig:
    """Return PEFT's settings of the LoRA, rsLoRA or DoRA adapter in a directory. Raises ArtifactError for any other."""
    path = directory / ADAPTER_CONFIG
    data = read_json(path, ArtifactError, "take it from its source again")
    # Before PEFT reads it: from_pretrained would build the settings class that the file names.
    if (kind := data.get("peft_type")) != "LORA":
        raise ArtifactError(f"{path}: peft_type {kind!r:.80}; only LoRA, rsLoRA and DoRA are read")
    if (problem := next(_problems(data), None)) is not None:
        raise ArtifactError(f"{path}: {problem}. Take the adapter from its source again.")
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(directory))
    except Exception as error:
        raise ArtifactError(
            f"{path}: PEFT cannot read it: {first_line(error)}. Save the adapter again with the PEFT that wrote it."
        ) from error
    _check_form(config, directory)
    # Null in the file; PEFT's own default is an empty mapping.
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    return config


def write_adapter_config(
    directory: Path, config: LoraConfig, base: str, revision: str | None = None, *, auto_class: bool = True
) -> None:
    """Write adapter_config.json so that every version of PEFT from 0.10 on reads it.

    PEFT up to 0.13 refuses settings that it does not know, `peft_version` included, and 0.14 may forget the others. So
    only those are written that differ from today's defaults. `base`: absolute path or hub id. `auto_class`: name the
    class of the base for `AutoPeftModel`, which needs that instead of a task type.
    """
    defaults = LoraConfig().to_dict()
    settings = {
        key: value
        for key, value in config.to_dict().items()
        if key in _ALWAYS_WRITTEN or (key != "peft_version" and value != defaults.get(key))
    }
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    if revision is not None:
        settings["revision"] = revision
    if auto_class:
        settings.pop("task_type", None)
        settings["auto_mapping"] = _LLAVA_HF
    # PEFT holds some lists as sets, whose order differs from process to process.
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_json(directory / ADAPTER_CONFIG, dict(sorted(settings.items())))


def ranks_and_alphas(directory: Path, config: LoraConfig, modules: Iterable[str]) -> Mapping[str, tuple[int, float]]:
    """Return rank and alpha of layers, by their names in the adapter, as the PEFT that wrote the settings read them.

    The keys of `rank_pattern` and `alpha_pattern` are regular expressions. PEFT up to 0.14 puts `.*` and a dot before
    the key, without a group: the second layer of `q_proj|v_proj` is never found. Up to 0.13, the first key of both
    mappings that matches decides rank and alpha.
    """
    written = read_json(directory / ADAPTER_CONFIG).keys()
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    both = [*ranks, *alphas]
    # A key that begins with ^ matches nothing in older versions, so it was not written for them.
    is_new = not written.isdisjoint(_SINCE_0_15) or any(key.startswith("^") for key in both)
    matching = get_pattern_key if is_new else _old_pattern_key
    is_shared = not is_new and written.isdisjoint(_SINCE_0_14)
    values = {}
    for module in modules:
        rank = ranks.get(matching(both if is_shared else list(ranks), module), config.r)
        alpha = alphas.get(matching(both if is_shared else list(alphas), module), config.lora_alpha)
        values[module] = (int(rank), float(alpha))
    return values


def _old_pattern_key(keys: Sequence[str], module: str) -> str:
    """Return the key that PEFT up to 0.14 takes for a layer; the layer's name if none matches."""
    return next((key for key in keys if re.match(rf".*\.{key}$", module)), module)


def _check_form(config: LoraConfig, where: Path) -> None:
    """Raise ArtifactError for an adapter that is not LoRA, rsLoRA or DoRA on an unchanged base."""
    unsupported = [name for name in _OTHER_FORMS if getattr(config, name, None)]
    initialization = str(config.init_lora_weights).lower()
    if initialization.startswith(_CHANGES_THE_BASE):
        raise ArtifactError(
            f"{where}: init_lora_weights is {initialization!r}, which changes the base that the adapter is made for. "
            "Convert it to plain LoRA first: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    if config.bias != "none":
        unsupported.append(f"bias={config.bias!r}")
    if unsupported:
        raise ArtifactError(
            f"{where}: adapters with {', '.join(unsupported)} cannot be read; only LoRA, rsLoRA and DoRA"
        )


def is_quick(pattern: str) -> bool:
    """Tell whether matching a regular expression against the name of a layer ends soon, whatever the name.

    Backtracking grows with every quantifier, and without bound where a group is repeated.
    """
    bare = _LOOK_AHEAD.sub("(", _ESCAPED.sub("x", pattern))
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    groups, quantifiers = bare.count("("), len(_QUANTIFIER.findall(bare))
    if not groups and not quantifiers:
        return True
    return (
        len(pattern) <= _MAX_ENTRIES
        and groups <= _MAX_GROUPS
        and quantifiers <= _MAX_QUANTIFIERS
        and not _REPEATED_GROUP.search(bare)
    )


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings whose values PEFT could not use, or could not use within bounds."""
    for name, (is_valid, words) in _VALUES.items():
        if name in data and not is_valid(data[name]):
            yield f"{name} is {data[name]!r:.80}, must be {words}"
    for name in _NAMES:
        if not _are_names(data.get(name)):
            yield f"{name} is {data.get(name)!r:.80}, must be a list of at most {_MAX_ENTRIES:,} names, or one pattern"
            continue
        for pattern in _listed(data.get(name)):
            if not is_quick(pattern):
                yield f"{name}: the pattern {pattern!r:.80} is invalid, or could take forever to match"
    for name, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", is_number)):
        values = data.get(name)
        if values is None:
            continue
        if not isinstance(values, dict) or len(values) > _MAX_ENTRIES or not all(map(is_valid, values.values())):
            yield f"{name} is {values!r:.80}, must map at most {_MAX_ENTRIES:,} layers to numbers"
        elif slow := next((pattern for pattern in values if not is_quick(pattern)), None):
            yield f"{name}: the pattern {slow!r:.80} is invalid, or could take forever to match"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_RANK


def _is_boolean(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _are_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or (len(numbers) <= _MAX_ENTRIES and all(type(number) is int for number in numbers))


def _are_names(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= _MAX_ENTRIES and all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, f"an integer of 1 to {_MAX_RANK:,}"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number of 0 to below 1"),  # type: ignore[operator]
    "use_dora": (_is_boolean, "true or false"),
    "use_rslora": (_is_boolean, "true or false"),
    "layers_to_transform": (_are_layers, f"at most {_MAX_ENTRIES:,} integers"),
}
"""What a setting must be, and in words."""
