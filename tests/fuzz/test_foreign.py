"""Directories of strangers: a loader ends in seconds, with a model or one LoraLlavaError, and writes nothing else."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

from lora_llava.artifact import load_artifact, load_model
from lora_llava.errors import LoraLlavaError
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
from tests.helpers.tiny import tiny_llava

SECONDS = 5
"""Longest time of a loader; ten times that of an undamaged directory."""
MOST_KIB = 2**20
SEEDS = st.integers(0, 2**48)
EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier_run"

# A model is loaded for each example: in the short form, a quarter of the usual number. `bounded` is the deadline.
_EXAMPLES = settings.default.max_examples if settings.default else 60
FEW = settings(max_examples=_EXAMPLES if _EXAMPLES >= 1_000 else _EXAMPLES // 4, deadline=None)

Load = Callable[[Path, Path], object]
"""Reads a damaged directory, the first path; may write to the second, which does not exist."""


class Endless(BaseException):
    """A loader took too long. Not an Exception, so that nothing turns it into a message."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Endless after `SECONDS` of this process's time; assert that its memory grows by less than a GiB."""

    def stop(number: int, frame: object) -> None:
        raise Endless

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    # A process that waits for a pipe takes no time of its processor.
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, handlers[0])
        signal.signal(signal.SIGALRM, handlers[1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    yield
    transformers_logging.set_verbosity(before)


class Sandbox:
    """A directory with a damaged copy in it, and a file that nobody may touch."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.proved: set[str] = set()
        (root / "private.txt").write_text("mine", encoding="utf-8")

    def try_one(self, load: Load, seed: int) -> str | None:
        """Load a copy damaged by `seed`; returns the message of a refusal. The undamaged one must load."""
        if load.__qualname__ not in self.proved:
            self.proved.add(load.__qualname__)
            assert self._try(load, None) is None
        return self._try(load, seed)

    def _try(self, load: Load, seed: int | None) -> str | None:
        copy, out = self.root / "copy", self.root / "out"
        names = damaged_copy(self.source, copy, seed)
        message = None
        try:
            with bounded():
                load(copy, out)
        except LoraLlavaError as error:
            message = str(error)
            assert message.strip(), names
            assert "weights_only" not in message, names
            assert "trust_remote_code" not in message, names
            assert not out.exists(), names
        except Exception as error:
            raise AssertionError(f"seed {seed}, {names}: {type(error).__name__}: {error}") from error
        shutil.rmtree(out, ignore_errors=True)
        assert {path.name for path in self.root.iterdir()} == {"copy", "private.txt"}, names
        assert (self.root / "private.txt").read_text(encoding="utf-8") == "mine"
        return message


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Sandbox]:
    return lambda source: Sandbox(tmp_path_factory.mktemp("sandbox"), source)


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose base is where its manifest says, from any copy."""
    made = make_artifact(tiny_base, tmp_path_factory.mktemp("artifact") / "instruct")
    path = made / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["base"]["path"] = str(tiny_base)
    path.write_text(json.dumps(data), encoding="utf-8")
    # Not a recipe that could be read; without one, the card is written from the rest.
    (made / "recipe.yaml").unlink()
    return made


@pytest.fixture(scope="module")
def merged(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    merge_artifact(artifact, out)
    return out


@pytest.fixture(scope="module")
def artifacts(artifact: Path, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    return fresh(artifact)


@FEW
@given(seed=SEEDS)
def test_adapter_directories(artifacts: Sandbox, tiny_base: Path, seed: int) -> None:
    def load(copy: Path, out: Path) -> None:
        refuse_model(copy, str(tiny_base))
        load_artifact(copy, device=CPU, dtype=torch.float32, base=str(tiny_base))
        open_source(copy, str(tiny_base))
        prepare(copy, "someone/model")

    artifacts.try_one(load, seed)


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    plain_peft(tiny_llava(), directory)
    (directory / "README.md").unlink(missing_ok=True)
    return fresh(directory)


@FEW
@given(seed=SEEDS)
def test_adapters_of_other_tools(peft: Sandbox, tiny_base: Path, seed: int) -> None:
    def load(copy: Path, out: Path) -> None:
        refuse_source(copy)
        import_any(copy, out, ImportOptions(base_model=str(tiny_base)))

    peft.try_one(load, seed)


@pytest.fixture(scope="module")
def bases(merged: Path, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    return fresh(merged)


@FEW
@given(seed=SEEDS)
def test_base_directories(bases: Sandbox, seed: int) -> None:
    bases.try_one(lambda copy, _: refuse_model(copy, None), seed)
    bases.try_one(lambda copy, _: load_model(copy, device=CPU, dtype=torch.float32), seed)


@pytest.fixture(scope="module")
def originals(merged: Path, tmp_path_factory: pytest.TempPathFactory, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    directory = tmp_path_factory.mktemp("original") / "llava"
    export_llava(merged, directory, ExportOptions())
    return fresh(directory)


@FEW
@given(seed=SEEDS)
def test_original_checkpoints(originals: Sandbox, seed: int) -> None:
    def load(copy: Path, out: Path) -> None:
        refuse_source(copy)
        import_any(copy, out, ImportOptions())

    originals.try_one(load, seed)


@pytest.fixture(scope="module")
def pickled(originals: Sandbox, tmp_path_factory: pytest.TempPathFactory, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    """The same, with weights as the original was published: pickled."""
    from safetensors.torch import load_file

    directory = tmp_path_factory.mktemp("pickled") / "llava"
    shutil.copytree(originals.source, directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return fresh(directory)


@FEW
@given(seed=SEEDS)
def test_pickled_checkpoints(pickled: Sandbox, seed: int) -> None:
    pickled.try_one(lambda copy, out: import_any(copy, out, ImportOptions()), seed)


@pytest.fixture(scope="module")
def ggufs(merged: Path, tmp_path_factory: pytest.TempPathFactory, fresh: Callable[[Path], Sandbox]) -> Sandbox:
    directory = tmp_path_factory.mktemp("gguf") / "model"
    export_gguf(merged, directory, ExportOptions(outtype="f32"))
    text = next(path for path in sorted(directory.glob("*.gguf")) if "mmproj" not in path.name)
    alone = tmp_path_factory.mktemp("gguf") / "alone"
    alone.mkdir()
    shutil.copyfile(text, alone / "model.gguf")
    return fresh(alone)


@FEW
@given(seed=SEEDS)
def test_gguf_files(ggufs: Sandbox, originals: Sandbox, seed: int) -> None:
    def load(copy: Path, out: Path) -> None:
        tower = str(originals.source / "vision_tower")
        settings = BaseModelSettings(language_model=str(copy), gguf_file="model.gguf", vision_tower=tower)
        assemble(settings, out, seed=0)

    ggufs.try_one(load, seed)


@pytest.fixture(scope="module")
def checkpoints(fresh: Callable[[Path], Sandbox]) -> Sandbox:
    return fresh(EARLIER / "stopped" / "checkpoints" / "instruct")


@FEW
@given(seed=SEEDS)
def test_checkpoint_directories(checkpoints: Sandbox, seed: int) -> None:
    checkpoints.try_one(lambda copy, _: find_latest(copy, lambda _: None), seed)


@pytest.fixture(scope="module")
def runs(fresh: Callable[[Path], Sandbox]) -> Sandbox:
    return fresh(EARLIER / "finished")


@FEW
@given(seed=SEEDS)
def test_run_directories(runs: Sandbox, seed: int) -> None:
    def load(copy: Path, out: Path) -> None:
        prepare(copy / "instruct", "someone/model", run=copy)
        output.read_summary(copy)
        read_written(copy)

    runs.try_one(load, seed)
