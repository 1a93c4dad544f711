"""What several files of tests share: a hub on this machine, a run in somebody's home, runs to stop and go on with."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from huggingface_hub.utils._xet import abort_xet_session

import lora_llava.training.run as run_module
from lora_llava.system.hub import network
from lora_llava.system.hub.network import BOUNDS, Bounds, store_settings
from tests.helpers import loopback_xet
from tests.helpers.artifacts import make_artifact
from tests.helpers.loopback_hub import TOKEN, LoopbackHub
from tests.helpers.publishing import RECIPE, USER
from tests.helpers.resuming import stopped_run, write_project


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Draw no loss, which takes as long as a tiny training; tests of the picture undo it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_loss", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def home(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user with a base, and a run whose artifact lies next to everything that must not be uploaded."""
    home = tmp_path_factory.mktemp("home") / USER
    shutil.copytree(tiny_base, home / "models" / "base")
    made = make_artifact(home / "models" / "base", home / "runs" / "tiny" / "instruct")
    (made / "recipe.yaml").write_text(RECIPE.format(user=USER), encoding="utf-8")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "train_log.jsonl", ".env", "notes.txt"):
        (made / name).write_text(f"{TOKEN} {home}", encoding="utf-8")
    (made / "checkpoint-3").mkdir()
    (made / "checkpoint-3" / "adapter_model.safetensors").write_text("no")
    return home


@pytest.fixture(scope="module")
def artifact(home: Path) -> Path:
    return home / "runs" / "tiny" / "instruct"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the test's own thread waited, in no time; other threads sleep as always."""
    waited: list[float] = []
    sleep = time.sleep

    def wait(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            waited.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", wait)
    return waited


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        # Read from the environment when huggingface_hub is imported, which has been long ago.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Each test has its own settings of hf_xet, which are read with the first use of a session.
        for name, value in {**loopback_xet.SETTINGS, **store_settings(BOUNDS)}.items():
            monkeypatch.setenv(name, value)
        abort_xet_session()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("USER", USER)
        yield hub
        close_session()
        abort_xet_session()


@pytest.fixture
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files go to the older store, as where hf_xet is not installed."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def short_bounds(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """The bounds of all waits, scaled down."""
    bounds = Bounds(
        connect=0.5,
        answer=1,
        patience=2,
        retry_delay=0.02,
        rate_limit=4,
        store_answer=1,
        store_silence=4,
        store_delay=0.05,
    )
    monkeypatch.setattr(network, "BOUNDS", bounds)
    for name, value in store_settings(bounds).items():
        monkeypatch.setenv(name, value)
    return bounds


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal: what runs behind nohup, or in the background of a script, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("resume"), tiny_base)


@pytest.fixture(scope="session")
def halted(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 8 of `instruct`; it has checkpoints of steps 4 and 6."""
    return stopped_run(project, tmp_path_factory.mktemp("halted") / "run", "instruct", 8)


@pytest.fixture
def broken_off(halted: Path, tmp_path: Path) -> Path:
    """A copy of `halted`, to be changed."""
    return Path(shutil.copytree(halted, tmp_path / "run"))
