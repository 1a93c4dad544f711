"""The weight files of a model directory that transformers loads, found as transformers finds them. Without torch.

`model.safetensors` comes first, then the shards that `model.safetensors.index.json` names; any other file is ignored.
Whatever hashes, checks, merges or exports weights reads these files, so that it reads what is loaded.
Source: `_get_resolved_checkpoint_files` in transformers' `modeling_utils.py`.
"""

from __future__ import annotations

from pathlib import Path

from lora_llava.errors import ModelError
from lora_llava.formats.names import ADAPTER_CONFIG
from lora_llava.system.files import find_json
from lora_llava.system.text import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model*.bin"
_OTHER_PICKLED = ("*.pt", "*.pth")
_OTHER_WEIGHTS = "transformers_weights"
"""Key of config.json with which transformers loads another file."""
_NUM_NAMED = 3


class NoWeightsError(ModelError):
    """A directory has no weights that the kit reads; the message says why and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}. {fix}")
        self.what, self.fix = what, fix


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from a model directory, sorted.

    Raises NoWeightsError if there are none, if a shard of the index is missing, or if transformers would load anything
    else: pickled weights, another file that config.json names, or an adapter on top.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        what = f"{directory} holds {ADAPTER_CONFIG}, so transformers would load an adapter onto its weights"
        raise NoWeightsError(what, "Move the adapter's files to another directory.")
    if (other := (find_json(directory / "config.json") or {}).get(_OTHER_WEIGHTS)) is not None:
        what = f"{directory}: config.json names other weights ({_OTHER_WEIGHTS}: {other!r:.80}), which are not read"
        raise NoWeightsError(what, f"Rename that file to {SINGLE}, and remove the key.")
    # Also next to a single file: the directory is then a mixture of two models.
    names = _shards(directory / INDEX) if (directory / INDEX).is_file() else []
    if missing := [name for name in names if not (directory / name).is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        what = f"{directory}: {listed(missing, _NUM_NAMED)} of its index {verb} missing"
        raise NoWeightsError(what, "Download the model again.")
    if (directory / SINGLE).is_file():
        names = [SINGLE]
    if not names:
        raise _no_weights(directory)
    return [directory / name for name in names]


def pickled_files(directory: Path) -> list[Path]:
    """Return the pickled files, sorted, that transformers loads where it finds no others; no base is read from them."""
    return sorted(directory.glob(_PICKLED))


def has_safetensors(directory: Path) -> bool:
    """Tell whether a directory holds any safetensors file, loaded or not."""
    return any(directory.glob("*.safetensors"))


def _shards(index: Path) -> list[str]:
    """Return the names of the files in an index, sorted."""
    weight_map = (find_json(index) or {}).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names:
        raise NoWeightsError(f"{index} is damaged: it names no files", "Download the model again.")
    if outside := [name for name in names if Path(name).name != name]:
        what = f"{index} names {listed(outside, _NUM_NAMED)}, which is outside its directory"
        raise NoWeightsError(what, "Take the model from a source you trust.")
    return names


def _no_weights(directory: Path) -> NoWeightsError:
    """Return why a directory without weights that transformers loads has none."""
    files = [path for pattern in (_PICKLED, *_OTHER_PICKLED) for path in directory.glob(pattern)]
    pickled = listed(sorted(path.name for path in files), _NUM_NAMED)
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        what = (
            f"{directory} holds {listed(others, _NUM_NAMED)}, but neither {SINGLE} nor {INDEX}: transformers does not "
            f"load it{f', but {pickled}, which is pickled and can run code' if pickled else ''}"
        )
        fix = f"Rename it to {SINGLE} if it holds the whole model; else download the model again."
        return NoWeightsError(what, fix)
    if pickled:
        return NoWeightsError(
            f"{directory} holds only pickled weights ({pickled}); they can run code and are not read",
            "Convert them to safetensors first: load the model with transformers, then save_pretrained(...).",
        )
    return NoWeightsError(f"{directory} holds no weights (.safetensors)", "Download the whole model.")
