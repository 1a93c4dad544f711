"""Every loader of a stranger's directory, with a valid directory to damage; what each must do with a damaged one."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_llava.artifact import load_artifact, load_model
from lora_llava.errors import LoraLlavaError
from lora_llava.formats.names import MERGE_REPORT
from lora_llava.modeling.assemble import assemble
from lora_llava.planning.preflight.shipping import refuse_model, refuse_source
from lora_llava.recipe.settings import BaseModelSettings
from lora_llava.run_directory import output
from lora_llava.run_directory.written import read_written
from lora_llava.shipping.export.gguf.model import export_gguf
from lora_llava.shipping.export.llava import export_llava
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.hub.push import prepare
from lora_llava.shipping.importers import import_any
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.shipping.merge.run import merge_artifact, open_source
from lora_llava.training.checkpoints.files import find_latest
from tests.fuzz.damage import damaged_copy
from tests.helpers.artifacts import CPU, make_artifact, plain_peft
from tests.helpers.tiny import save_tiny_base, tiny_llava

SECONDS = 5
"""Longest time of a loader; ten times that of an undamaged directory."""
MOST_KIB = 2**20
EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier_run"

LOADERS = ("adapter", "peft", "base", "original", "pickled", "gguf", "checkpoint", "run")

Load = Callable[[Path, Path], object]
"""Reads a damaged directory, the first path; may write to the second, which does not exist."""


@dataclass(frozen=True, slots=True)
class Loader:
    """A loader, and a directory that it loads."""

    source: Path
    load: Load


class Endless(BaseException):
    """A loader took too long. Not an Exception, so that nothing turns it into a message."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Endless after `SECONDS`, not counting those in which the machine is busy with others.

    Assert that the memory of the process grows by less than a GiB.
    """

    def stop(number: int, frame: object) -> None:
        raise Endless

    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # A process that waits for a pipe takes no time of its processor.
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
    before, start = _reset_peak(), _seconds()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, handlers[0])
        signal.signal(signal.SIGALRM, handlers[1])
    if _seconds() - start > SECONDS:
        raise Endless
    assert _peak() - before < MOST_KIB


def _seconds() -> float:
    """Return the time that this process has worked or slept: without that in which it waited for a processor."""
    waited = int(Path("/proc/self/schedstat").read_bytes().split()[1])
    return time.monotonic() - waited / 1e9


def _reset_peak() -> int:
    """Let the peak of the process's memory begin at what it holds now, in KiB."""
    Path("/proc/self/clear_refs").write_bytes(b"5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmHWM:")[2].split()[0])


class Sandbox:
    """A directory with a damaged copy in it, and a file that nobody may touch."""

    def __init__(self, root: Path, loader: Loader) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.load = root, loader.load
        # On the file system of the copies, which are links to it.
        self.source = root.with_name(f"{root.name}-source")
        shutil.copytree(loader.source, self.source)
        (root / "private.txt").write_text("mine", encoding="utf-8")
        self.private = _state(root)
        assert self.try_one(None) is None

    def try_one(self, seed: int | None) -> str | None:
        """Load a copy damaged by `seed`; return the message of a refusal. The undamaged one must load."""
        copy, out = self.root / "copy", self.root / "out"
        self._clear()
        names = damaged_copy(self.source, copy, seed)
        before = _state(copy)
        message = None
        try:
            with bounded():
                self.load(copy, out)
        except LoraLlavaError as error:
            message = str(error)
            assert message.strip(), names
            assert "weights_only" not in message, names
            assert "trust_remote_code" not in message, names
            assert not out.exists(), names
        except Exception as error:
            raise AssertionError(f"seed {seed}, {names}: {type(error).__name__}: {error}") from error
        assert _state(copy) == before, names
        shutil.rmtree(copy)
        shutil.rmtree(out, ignore_errors=True)
        assert _state(self.root) == self.private, names
        return message

    def _clear(self) -> None:
        """Remove what the case before left behind if it was a fault."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "private.txt":
                path.unlink()


def _state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return which files a directory holds, and when each was written."""
    paths = sorted(directory.rglob("*"))
    stats = [(path, path.lstat()) for path in paths]
    return {str(path): (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats}


def make_loaders(directory: Path) -> dict[str, Loader]:
    """Write a tiny model in every form below `directory`; return the loader of each form, by name."""
    base = save_tiny_base(directory / "base")
    artifact = _artifact(base, directory / "artifact")
    merged = directory / "merged"
    merge_artifact(artifact, merged)
    original, pickled = directory / "original", directory / "pickled"
    export_llava(merged, original, ExportOptions())
    shutil.copytree(original, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    peft = directory / "peft"
    plain_peft(tiny_llava(), peft)
    (peft / "README.md").unlink(missing_ok=True)
    return {
        "adapter": Loader(artifact, _load_adapter(base)),
        "peft": Loader(peft, _import(ImportOptions(base_model=str(base)))),
        "base": Loader(_without_identity(merged, directory / "whole"), _load_base),
        "original": Loader(original, _import(ImportOptions())),
        "pickled": Loader(pickled, _import(ImportOptions())),
        "gguf": Loader(_gguf(merged, directory), _load_gguf(original / "vision_tower")),
        "checkpoint": Loader(EARLIER / "stopped" / "checkpoints" / "instruct", _load_checkpoint),
        "run": Loader(_with_scores(EARLIER / "finished", directory / "run"), _load_run),
    }


def _artifact(base: Path, directory: Path) -> Path:
    """Write an artifact whose base is where its manifest says, from any copy."""
    made = make_artifact(base, directory)
    path = made / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["base"]["path"] = str(base)
    path.write_text(json.dumps(data), encoding="utf-8")
    # Not a recipe that could be read; without one, the card is written from the rest.
    (made / "recipe.yaml").unlink()
    return made


def _with_scores(finished: Path, directory: Path) -> Path:
    """Copy a run, and add the scores of an evaluation, which the card shows."""
    shutil.copytree(finished, directory)
    figures = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "correct": 2, "questions": 4}
    table = {**figures, "by_type": {"closed": figures}}
    scores = {"questions": 4, "images": 2, "metric": "exact_match", "base": table, "tuned": table, "blind": table}
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "accuracy.json").write_text(json.dumps(scores), encoding="utf-8")
    return directory


def _without_identity(merged: Path, directory: Path) -> Path:
    """Copy a merged model as an earlier version wrote it: else most damage is refused before anything reads it."""
    shutil.copytree(merged, directory)
    path = directory / MERGE_REPORT
    report = json.loads(path.read_text(encoding="utf-8"))
    del report["identity"]
    path.write_text(json.dumps(report), encoding="utf-8")
    return directory


def _gguf(merged: Path, directory: Path) -> Path:
    """Export the text side of a model as a directory with nothing else in it."""
    export_gguf(merged, directory / "ggufs", ExportOptions(outtype="f32"))
    text = next(path for path in sorted((directory / "ggufs").glob("*.gguf")) if "mmproj" not in path.name)
    (directory / "gguf").mkdir()
    shutil.copyfile(text, directory / "gguf" / "model.gguf")
    return directory / "gguf"


def _load_adapter(base: Path) -> Load:
    def load(copy: Path, out: Path) -> None:
        refuse_model(copy, str(base))
        load_artifact(copy, device=CPU, dtype=torch.float32, base=str(base))
        open_source(copy, str(base))
        prepare(copy, "someone/model")

    return load


def _import(options: ImportOptions) -> Load:
    def load(copy: Path, out: Path) -> None:
        refuse_source(copy)
        import_any(copy, out, options)

    return load


def _load_base(copy: Path, out: Path) -> None:
    refuse_model(copy, None)
    load_model(copy, device=CPU, dtype=torch.float32)


def _load_gguf(tower: Path) -> Load:
    def load(copy: Path, out: Path) -> None:
        settings = BaseModelSettings(language_model=str(copy), gguf_file="model.gguf", vision_tower=str(tower))
        assemble(settings, out, seed=0)

    return load


def _load_checkpoint(copy: Path, out: Path) -> None:
    find_latest(copy, lambda _: None)


def _load_run(copy: Path, out: Path) -> None:
    prepare(copy / "instruct", "someone/model", run=copy)
    output.read_summary(copy)
    read_written(copy)
