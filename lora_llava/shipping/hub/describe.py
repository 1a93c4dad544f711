"""Write the parts of the card from what is known of a model; a part is empty if nothing is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from lora_llava.evaluation.outcome import TUNED, TUNED_ON_BLIND
from lora_llava.evaluation.report import accuracy_markdown
from lora_llava.evaluation.scoring.metrics import ALL, METRIC_NAMES, Accuracy
from lora_llava.formats.adapter_config import read_adapter_config
from lora_llava.formats.names import ADAPTER_CONFIG
from lora_llava.recipe.fields import data_name, is_local
from lora_llava.recipe.stages import STAGES, trains_lora
from lora_llava.recipe.start import adapter_of
from lora_llava.run_directory import output
from lora_llava.shipping.hub.facts import Facts
from lora_llava.system.table import markdown_table
from lora_llava.system.text import code_span, counted, markdown

_KIT = "[lora-llava](https://github.com/lora-llava/lora-llava)"
_FORMS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
_LOSSES = {"sigmoid": "DPO", "ipo": "IPO", "hinge": "hinge"}
_BASE_KEYS = ("language_model", "vision_tower")


def card_settings(facts: Facts) -> dict[str, Any]:
    """Return the `card` section of the recipe."""
    return facts.recipe.get("card") or {}


def nf4(facts: Facts) -> bool:
    """Tell whether the base was in NF4 in training."""
    return facts.manifest is not None and facts.manifest.quantization["type"] == "nf4"


def adapter_form(facts: Facts) -> dict[str, Any]:
    """Return `type`, `r`, `lora_alpha` of the LoRA; empty without one."""
    if facts.manifest is None or not trains_lora(facts.manifest.stage):
        return {}
    path = facts.directory / ADAPTER_CONFIG
    if facts.is_adapter and path.is_file():
        return adapter_of(read_adapter_config(facts.directory).to_dict())
    return facts.recipe.get("adapter") or {"type": "lora"}


def opening(facts: Facts) -> str:
    """Return one paragraph that says what the model is."""
    form = adapter_form(facts)
    trained = f"{_FORMS[form['type']]} and projector" if form else "the projector"
    if facts.manifest is None:
        return f"A LLaVA-1.5-style vision-language model in the layout of llava-hf, written by {_KIT}."
    on = _hub_link(facts.base_id) if facts.base_id else "a local base"
    what = f"{trained} for a LLaVA-1.5-style vision-language model" if facts.is_adapter else "A vision-language model"
    how = "" if facts.is_adapter else f", with {trained} merged in"
    return f"{what[0].upper()}{what[1:]}, trained on {on} with {_KIT}{how}."


def base_note(facts: Facts) -> str:
    """Return a note on a base that is not on the Hub, or that was changed by quantization."""
    if facts.manifest is None:
        return ""
    base = facts.manifest.base
    if facts.is_adapter and facts.base_id is None:
        return (
            f"**The base is not on the Hub:** it was a local directory{_parts(facts)}. Its weights have the sha256 "
            f"{code_span(base['weights_sha256'])} (of tensors by name, as the kit computes it); the adapter "
            "does not work on any other base."
        )
    if not facts.is_adapter and nf4(facts):
        kind = (facts.merge or {}).get("base", "dequantized")
        return f"Merged into the {markdown(str(kind))} base: it was trained on the base in NF4."
    return ""


def _parts(facts: Facts) -> str:
    base = facts.recipe.get("base") or {}
    parts = [str(base[key]) for key in _BASE_KEYS if base.get(key) and not is_local(str(base[key]))]
    return f", assembled from {' and '.join(map(code_span, parts))}" if parts else ""


def metric(facts: Facts) -> str:
    """Return how answers were scored; old results do not record the metric, which was that of VQA v2."""
    name = facts.accuracy.get("metric")
    if name is None:
        return "accuracy in %: exact match after the normalization of VQA v2"
    return "token F1 in %" if name == "token_f1" else f"accuracy in %: {METRIC_NAMES[name]}"


def score_table(facts: Facts, *names: str) -> str:
    """Return a Markdown table of the models' accuracies; empty if the last model was not evaluated."""
    tables = {name: facts.accuracy.get(name) for name in names}
    if not tables[names[-1]]:
        return ""
    shown = {TUNED_ON_BLIND: TUNED}
    return accuracy_markdown({shown.get(name, name): _accuracies(table) for name, table in tables.items() if table})


def _accuracies(table: Mapping[str, Any]) -> dict[str, Accuracy]:
    rows = {ALL: table, **{markdown(name): row for name, row in table["by_type"].items()}}
    return {name: Accuracy(row["correct"], row["questions"], row["low"], row["high"]) for name, row in rows.items()}


def tested(facts: Facts) -> str:
    """Return the number of test questions and images, and their dataset."""
    count, images = facts.accuracy.get("questions") or 0, facts.accuracy.get("images") or 0
    path = str(((facts.recipe.get("evaluation") or {}).get("data") or {}).get("path", ""))
    return f"{counted(count, 'question')} about {counted(images, 'image')}" + (
        f" of {_data_link(path)}" if path else ""
    )


def _data_link(path: str) -> str:
    """Return the name of a dataset in Markdown, as a link if it is on the Hub."""
    return code_span(data_name(path)) if is_local(path) else _hub_link(path, "datasets/")


def _hub_link(name: str, kind: str = "") -> str:
    return f"[{markdown(name)}](https://huggingface.co/{kind}{quote(name)})"


def data_sets(facts: Facts) -> list[str]:
    """Return the hub ids of the training datasets."""
    paths = [str(stage["data"]["path"]) for stage in _stages(facts).values()]
    return list(dict.fromkeys(path for path in paths if not is_local(path)))


def _stages(facts: Facts) -> dict[str, dict[str, Any]]:
    """Return the settings of the stages that trained the model, in order."""
    stages = facts.recipe.get("stages") or {}
    last = list(STAGES).index(facts.manifest.stage) if facts.manifest else len(STAGES)
    return {name: stages[name] for name in list(STAGES)[: last + 1] if stages.get(name)}


def _seen(facts: Facts, stage: str) -> dict[str, Any]:
    seen: dict[str, Any] = dict(facts.summary.get(stage) or {})
    if facts.manifest and facts.manifest.stage == stage:
        seen |= facts.manifest.seen | facts.manifest.metrics
    return seen


def settings_table(facts: Facts) -> str:
    """Return a Markdown table of the stages' settings; empty without a recipe."""
    stages = _stages(facts)
    if not stages:
        return ""
    columns = [_settings(facts, name, stage) for name, stage in stages.items()]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return markdown_table(["", *stages], [row for row in rows if any(row[1:])])


def _settings(facts: Facts, name: str, stage: Mapping[str, Any]) -> dict[str, str]:
    seen = _seen(facts, name)
    size: int | str = seen.get("batch_size", stage["batch_size"])
    epochs = counted(stage["num_train_epochs"], "epoch")
    length = counted(stage["max_steps"], "step") if stage["max_steps"] > 0 else epochs
    aspect = stage["image_aspect_ratio"] or facts.recipe["images"]["image_aspect_ratio"]
    return {
        "trained": f"{_FORMS[facts.recipe['adapter']['type']]}, projector" if trains_lora(name) else "projector",
        "learning rate": f"{stage['learning_rate']:g}",
        "projector learning rate": f"{rate:g}" if (rate := stage.get("mm_projector_lr")) else "",
        "schedule": f"{stage['lr_scheduler_type']}, warmup {stage['warmup_ratio']:g}",
        "length": length,
        "preference loss": _preference_loss(stage) if "beta" in stage else "",
        "conversations per step": (f"{size:,}" if isinstance(size, int) else size) + " pairs" * ("beta" in stage),
        "weight decay": f"{stage['weight_decay']:g}",
        "max. tokens per conversation": f"{stage['max_length']:,}",
        "template": stage["template"],
        "system prompt": markdown(stage["system"] or ""),
        "images": aspect,
        **{
            label: f"{seen[key]:,}" if seen.get(key) is not None else ""
            for key, label in (("steps", "optimizer steps"), ("conversations", "conversations"))
        },
        "supervised tokens": f"{count:,}" if (count := seen.get("supervised_tokens")) is not None else "",
        "final loss": f"{seen['train_loss']:.4g}" if seen.get("train_loss") is not None else "",
        "validation loss": _validation_loss(seen),
    }


def _preference_loss(stage: Mapping[str, Any]) -> str:
    """Return the loss of stage `prefer` and its settings, without those that are 0."""
    weights = ((stage["sft_weight"], "SFT weight"), (stage["label_smoothing"], "label smoothing"))
    added = [f", {label} {value:g}" for value, label in weights if value]
    return f"{_LOSSES[stage['loss']]}, beta {stage['beta']:g}" + "".join(added)


def _validation_loss(seen: Mapping[str, Any]) -> str:
    """Return the validation loss of the saved weights, with those of the best and the last step if they differ."""
    if seen.get("eval_loss") is None:
        return ""
    saved = f"{seen['eval_loss']:.4g}"
    best, last = seen.get("best_step"), seen.get("last_step")
    losses = seen.get("best_eval_loss"), seen.get("last_eval_loss")
    if None in (best, last, *losses) or best == last:
        return saved
    figures = f"best {losses[0]:.4g} at step {best:,}, last {losses[1]:.4g} at step {last:,}"
    return f"{saved} ({figures})"


def made_of(facts: Facts) -> str:
    """Return what was trained, in which form and precision."""
    if facts.manifest is None:
        return "Its directory does not record how it was trained."
    quantization = facts.manifest.quantization
    form = adapter_form(facts)
    parts = ["The vision tower was frozen; the projector was trained in full"]
    if form:
        size = f" (r {form['r']}, alpha {form['lora_alpha']:g})" if "r" in form else ""
        parts.append(f"the language model was trained by {_FORMS[form['type']]}{size}")
    double = ", double quantized" if quantization["double_quant"] else ""
    precision = f", computed in {quantization['compute_dtype']}" if "compute_dtype" in quantization else ""
    parts.append(f"its base was in NF4{double}{precision}" if nf4(facts) else f"its base was not quantized{precision}")
    before = " It started from an earlier artifact, whose training is not described here."
    return "; ".join(parts) + "." + (before if facts.recipe.get("start_from") else "")


def data_table(facts: Facts) -> str:
    """Return a Markdown table of each stage's training data; empty without a recipe."""
    rows = []
    for name, stage in _stages(facts).items():
        own = facts.manifest.data if facts.manifest and facts.manifest.stage == name else {}
        count = f"{own['records']:,}" if own.get("records") is not None else ""
        path = str(stage["data"]["path"])
        split = "" if is_local(path) else markdown(str(stage["data"].get("split") or ""))
        rows.append([name, _data_link(path), split, count])
    return markdown_table(["stage", "data", "split", "conversations"], rows) if rows else ""


def machine(facts: Facts) -> list[str]:
    """Return lines on hardware, training time, peak memory and library versions."""
    summary = facts.summary
    lines = []
    if hardware := summary.get("hardware"):
        lines.append(f"Hardware: {markdown(str(hardware))}")
    # Without the time of what came later: further stages, and their evaluation.
    later = {*STAGES} - {*_stages(facts)} | ({output.EVALUATION} if not facts.accuracy else set())
    if seconds := {name: value for name, value in (summary.get("seconds") or {}).items() if name not in later}:
        phases = ", ".join(f"{markdown(name)} {_duration(value)}" for name, value in seconds.items())
        lines.append(f"Time: {_duration(sum(seconds.values()))} ({phases})")
    if peak := summary.get("peak_memory_bytes"):
        lines.append(f"Peak memory: {peak / 2**30:.1f} GiB")
    if facts.manifest and facts.manifest.versions:
        versions = (markdown(f"{name} {value}") for name, value in facts.manifest.versions.items())
        lines.append(f"Versions: {', '.join(versions)}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def license_note(facts: Facts) -> str:
    """Return what is known of the licenses of base, data and weights."""
    card = card_settings(facts)
    lines = [
        f"Base: {card['base_license']}." if card.get("base_license") else "",
        f"Data: {str(card['data_license']).rstrip('.')}." if card.get("data_license") else "",
    ]
    own = card.get("license_name") or card.get("license")
    lines.append(f"These weights: {own}." if own else "No license is stated for these weights; ask their author.")
    lines.append("The licenses of the base and of the data apply to them too.")
    return " ".join(line for line in lines if line)
