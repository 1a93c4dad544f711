"""What the Hub asks of a model card, restated from its documentation (huggingface/hub-docs, modelcard.md)."""

from __future__ import annotations

import re

import yaml

from lora_llava.shipping.hub.licenses import LICENSES


def card_errors(text: str) -> list[str]:
    """Say what is wrong with a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    texts = ("license", "license_name", "library_name", "pipeline_tag", "base_model_relation")
    errors = [f"{key} must be a string" for key in texts if not isinstance(data.get(key, ""), str)]
    if data.get("license", "mit") not in LICENSES or (data.get("license") == "other" and "license_name" not in data):
        errors.append("license must be one of the list; other needs license_name")
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append("base_model_relation must be one of the list")
    names = [*([data["base_model"]] if "base_model" in data else []), *data.get("datasets", [])]
    errors += [f"{name} is no repository" for name in names if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)]
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags must be strings")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")):
                errors.append("a result needs a task, and a data set with type and name")
            if not all("type" in one and isinstance(one.get("value"), float | int) for one in result["metrics"]):
                errors.append("a metric needs type and value")
        if not model.get("name"):
            errors.append("model-index needs a name")
    return errors
