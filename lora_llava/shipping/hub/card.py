"""Write the model card: the Hub's metadata, then what was trained on which data, the results, and how to use it."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from lora_llava.errors import ArtifactError
from lora_llava.evaluation.outcome import BASE, BLIND, START, TUNED, TUNED_ON_BLIND
from lora_llava.evaluation.scoring.metrics import ALL, METRIC_NAMES, YES_NO
from lora_llava.recipe.choices import Metric
from lora_llava.recipe.fields import data_name, is_local
from lora_llava.shipping.hub import describe
from lora_llava.shipping.hub.facts import Facts
from lora_llava.shipping.hub.licenses import LICENSES, OTHER
from lora_llava.shipping.hub.usage import gguf_commands, python_code, vllm_commands
from lora_llava.system.text import counted

_TASK = "visual-question-answering"
_SIGNATURE = "<!-- Made by lora-llava from the run; sha256 of the above: "
_INTENDED_USE = "To answer questions about images like those it was trained on."
_LIMITS = (
    "Its answers can be wrong and sound confident. It is untested on images unlike its training and test data. "
    "It has the biases and errors of its base and of its data."
)


def make_card(facts: Facts, repo_id: str) -> str:
    """Return the card of a model for the repository `repo_id`. Raises ArtifactError for an unknown license id."""
    name = repo_id.rpartition("/")[2]
    card = describe.card_settings(facts)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - Markdown
    template = environment.from_string(
        resources.files("lora_llava.shipping.hub").joinpath("card.md.jinja").read_text(encoding="utf-8")
    )
    body = template.render(
        name=name,
        opening=describe.opening(facts),
        base_note=describe.base_note(facts),
        scores=describe.score_table(facts, BASE, START, TUNED),
        blind_scores=describe.score_table(facts, TUNED_ON_BLIND, BLIND),
        tested=describe.tested(facts),
        metric=describe.metric(facts),
        pictures=facts.pictures,
        intended_use=card.get("intended_use") or _INTENDED_USE,
        limits=card.get("limits") or _LIMITS,
        is_adapter=facts.is_adapter,
        code=python_code(facts, repo_id),
        vllm=vllm_commands(facts, repo_id),
        gguf=gguf_commands(facts, repo_id),
        made_of=describe.made_of(facts),
        settings=describe.settings_table(facts),
        data=describe.data_table(facts),
        machine=describe.machine(facts),
        license=describe.license_note(facts),
    )
    text = f"---\n{_metadata(facts, name).to_yaml()}\n---\n\n{body}\n"
    return f"{text}{_SIGNATURE}{_digest(text)} -->\n"


def is_unedited(text: str) -> bool:
    """Tell whether the kit wrote the card and nobody edited it."""
    above, mark, rest = text.rpartition(_SIGNATURE)
    return bool(mark) and rest == f"{_digest(above)} -->\n"


def check_card(text: str, where: str) -> None:
    """Raise ArtifactError if a hand-written card has unreadable metadata or an unknown license id."""
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{where}: its metadata, between the --- lines, cannot be read: {reason}") from error
    _check_license(data.get("license"), where)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(facts: Facts, name: str) -> ModelCardData:
    """Return the metadata, with the keys of the Hub's model card."""
    card = describe.card_settings(facts)
    _check_license(card.get("license"), "recipe.yaml, card.license")
    if card.get("license") == OTHER and not card.get("license_name"):
        raise ArtifactError("recipe.yaml: card.license is other; name the license in card.license_name")
    form = describe.adapter_form(facts)
    tags = ["llava", *([form["type"]] if form else []), *(["qlora"] if form and describe.nf4(facts) else [])]
    results = _results(facts)
    # The Hub's word for a model with a merged adapter; its `merge` means a merge of several models.
    relation = "adapter" if facts.is_adapter else "finetune"
    return ModelCardData(
        license=card.get("license"),
        license_name=card.get("license_name"),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[*tags, "lora-llava", *(card.get("tags") or [])],
        base_model=facts.base_id,
        base_model_relation=relation if facts.base_id else None,
        datasets=describe.data_sets(facts) or None,
        metrics=[results[0].metric_type] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _check_license(license_id: object, where: str) -> None:
    if license_id is not None and license_id not in LICENSES:
        raise ArtifactError(
            f"{where}: {license_id!r} is not a license id of the Hub; use one of "
            f"huggingface.co/docs/hub/repositories-licenses, such as apache-2.0, mit or llama2, or {OTHER}"
        )


def _results(facts: Facts) -> list[EvalResult]:
    """Return the tuned model's accuracies, over all questions and by type, with their intervals in the name."""
    tuned = facts.accuracy.get(TUNED)
    if not tuned:
        return []
    source: dict[str, Any] = (facts.recipe.get("evaluation") or {}).get("data") or {}
    path = str(source.get("path", ""))
    local = not path or is_local(path)
    results = []
    # Old results do not record the metric, which was that of VQA v2.
    metric: Metric = facts.accuracy.get("metric") or "vqa_v2"
    # yes/no is another name of closed.
    by_type = {kind: figures for kind, figures in tuned["by_type"].items() if kind != YES_NO}
    for kind, figures in {ALL: tuned, **by_type}.items():
        interval = f"95 % interval {100 * figures['low']:.1f} to {100 * figures['high']:.1f} %"
        results.append(
            EvalResult(
                task_type=_TASK,
                task_name="Visual question answering",
                # The Hub requires a dataset type; a local dataset has none.
                dataset_type="custom" if local else path,
                dataset_name=data_name(path) if path else "test questions",
                dataset_config=source.get("name"),
                dataset_split=None if local else source.get("split"),
                dataset_revision=source.get("revision"),
                metric_type="f1" if metric == "token_f1" else "accuracy",
                metric_name=f"{METRIC_NAMES[metric]}, {kind}, {counted(figures['questions'], 'question')} ({interval})",
                metric_value=figures["accuracy"],
            )
        )
    return results
