"""The benchmark and the check of a card, in their shortest form, without processes."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch

from benchmarks import check, gpu, peer
from benchmarks.measure import EndedEarlyError, Series
from benchmarks.model import ReusedModel
from benchmarks.work import SHAPES
from lora_llava.modeling.fused.layer import fuse_layers

TINY = SHAPES["tiny"]
Said = list[dict[str, Any]]


def job(monkeypatch: pytest.MonkeyPatch, models: ReusedModel, name: str, set_name: str, words: str) -> tuple[Said, Any]:
    """Do a job in this process; return the lines that the parent would read, and the result."""
    said: Said = []
    monkeypatch.setattr(peer, "say", lambda **facts: said.append(facts))
    monkeypatch.setattr(sys, "stdin", io.StringIO(words))
    options = {
        "set": set_name,
        "questions": 4,
        "steps": 9,
        "nf4": True,
        "cap": 24.0,
        "checkpointing": name != "lora-llava",
    }
    return said, peer.train(name, peer.as_task(options, TINY, models))


def losses(said: Said) -> list[float]:
    return [facts["loss"] for facts in said if "loss" in facts]


# The name that older versions of the other kits know, too.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_a_peer_starts_every_job_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[str, list[float]] = {}
    for name in ("lora-llava", "hf-trainer"):
        models = ReusedModel()
        said, facts = job(monkeypatch, models, name, "V4", "go\ngo\nstop\n")
        model, first[name] = models.model, losses(said)
        assert len(first[name]) == 2
        assert first[name][1] < first[name][0]
        assert facts["supervised"] > 0
        assert facts["computed_tokens"] <= facts["separate_tokens"]
        # Another set of the same stage trains the same model again, and the first set starts where it did.
        job(monkeypatch, models, name, "V1", "go\nstop\n")
        again, _ = job(monkeypatch, models, name, "V4", "go\ngo\nstop\n")
        assert models.model is model
        assert losses(again) == pytest.approx(first[name], abs=1e-5)
        # Stage 1 trains other weights.
        job(monkeypatch, models, name, "S1", "go\nstop\n")
        assert models.model is not model
    assert first["lora-llava"] == pytest.approx(first["hf-trainer"], rel=6e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["lora-llava", "hf-trainer"])
def test_a_peer_does_one_job_after_another_in_bf16(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(peer, "pick_dtype", lambda *_: torch.bfloat16)
    models = ReusedModel()
    first, _ = job(monkeypatch, models, name, "V4", "go\nstop\n")
    job(monkeypatch, models, name, "V1", "go\nstop\n")
    again, _ = job(monkeypatch, models, name, "V4", "go\nstop\n")
    assert losses(again) == losses(first)


def test_norms_of_gradients_are_measured_in_the_first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = job(monkeypatch, ReusedModel(), "lora-llava", "V4", "go\ngo\ngo\nstop\n")
    norms = [facts["gradient_norms"] for facts in said if "loss" in facts]
    assert norms[0] == norms[1] == norms[2]
    assert set(norms[0]) == {"lora", "projector"}
    assert min(norms[0].values()) > 0


def test_a_peer_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="the parent is gone"):
        job(monkeypatch, ReusedModel(), "lora-llava", "V4", "go\n")


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_TREES": (1,), "WARMUP": 0, "REPEATS": 1, "BRANCHES": 2}.items():
        monkeypatch.setattr(check, name, value)


def test_rows_of_both_paths_are_timed_and_their_gradients_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)
    kept: dict[str, Any] = {}
    assert check.check_rows(TINY, lambda **facts: kept.update(facts)) == []
    [peft], [fused] = kept["rows_peft"], kept["rows_fused"]
    assert peft["tokens"] == fused["tokens"] > 16
    assert 0 < fused["kernels"] < peft["kernels"]
    assert min(peft["wall_ms"], peft["kernel_ms"], fused["wall_ms"], fused["kernel_ms"]) > 0
    assert kept["gradients"]["peft"]["relative"] == 0
    assert 0 < kept["gradients"]["fused"]["worst"] < 1e-4
    assert kept["waits"] == []
    assert kept["row_allocator_retries"] == 0
    assert any("_OutputAndMLP" in line for line in kept["profile_fused"])
    assert kept["graphs"] == {"failure": "no GPU"}


def test_fused_layers_that_compute_something_else_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)

    def wrongly(model: Any) -> str | None:
        reason = fuse_layers(model)
        with torch.no_grad():
            next(one for name, one in model.named_parameters() if "lora_B" in name).mul_(1.01)
        return reason

    monkeypatch.setattr(check, "fuse_layers", wrongly)
    assert check.check_rows(TINY, lambda **_: None) == ["the fused layers' gradients are less exact than PEFT's"]
    monkeypatch.setattr(check, "fuse_layers", lambda _model: "dropout")
    assert check.check_rows(TINY, lambda **_: None) == ["the layers are not fused: dropout"]


def test_a_row_that_the_card_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)
    monkeypatch.setattr(check, "NUM_TREES", (1, 2))
    timed = check.timed

    def limited(rows: Any, trees: int) -> Any:
        if trees == 2:
            raise torch.OutOfMemoryError
        return timed(rows, trees)

    monkeypatch.setattr(check, "timed", limited)
    kept: dict[str, Any] = {}
    assert check.check_rows(TINY, lambda **facts: kept.update(facts)) == []
    assert [one["trees"] for one in kept["rows_fused"]] == [1]


def test_retries_of_the_allocator_are_named() -> None:
    results = [
        {"set": "V11", "cap": 24.0, "peers": {"lora-llava": {"allocator_retries": 0}}},
        {"set": "V11", "cap": 12.0, "peers": {"lora-llava": {"allocator_retries": 3}}},
        {"set": "V1", "cap": 24.0, "peers": {"hf-trainer": {"allocator_retries": 3}}},
    ]
    assert check.retried(results) == ["the allocator tried again in V11 in 12 GiB"]


class FakePeer:
    """A peer that holds `largest` conversations of a micro-batch, and takes `takes` seconds a step."""

    def __init__(self, name: str, largest: int, clock: list[float], takes: float, done: list[str]) -> None:
        self.name, self.largest, self.clock, self.takes, self.done = name, largest, clock, takes, done
        self.seconds: list[float] = []
        self.size = 0

    def begin(self, options: dict[str, Any]) -> None:
        self.size, self.seconds = options.get("micro_batch", 1), []

    def wait_until_ready(self) -> None:
        self.done.append(f"{self.name} ready")

    def step(self) -> float:
        if self.size > self.largest:
            raise EndedEarlyError("out of memory")
        self.done.append(self.name)
        self.clock[0] += self.takes
        self.seconds.append(self.takes)
        return self.takes

    def end(self) -> dict[str, Any]:
        return {"supervised": 1}

    def result(self, facts: Any, *_: Any) -> dict[str, Any]:
        return {"seconds": self.seconds, **facts}

    def kill(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    return now


def run(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], largest: int, seconds: float, limit: float
) -> tuple[list[str], Any]:
    """Compare the kit with a peer that holds `largest` conversations; return the order of what is done, and results."""
    done: list[str] = []
    fleet = gpu.Fleet("7b")
    fakes = {
        "lora-llava": FakePeer("lora-llava", 99, clock, 0.1, done),
        "hf-trainer": FakePeer("hf-trainer", largest, clock, seconds, done),
    }
    fleet.peer = lambda name: fleet.running.setdefault(name, fakes[name])  # type: ignore[arg-type,method-assign,return-value]
    monkeypatch.setattr(gpu, "matrix_rate", lambda: 1.0)
    monkeypatch.setattr(gpu, "summary", lambda _name, used, rows, *_: {"used": used, "rows": rows})
    options = {name: gpu.options_for(name, 24.0, 32) for name in fakes}
    return done, gpu.compare(fleet, "V1", options, Series(32, 2, 12, "bf16"), limit)


def test_peers_step_in_turn_once_all_are_ready(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    done, results = run(monkeypatch, clock, 16, 1.0, 100.0)
    assert done[:2] == ["lora-llava ready", "hf-trainer ready"]
    assert [one for one in done if not one.endswith("ready")] == ["lora-llava", "hf-trainer"] * 14
    assert [len(one["seconds"]) for one in results["rows"].values()] == [14, 14]


def test_a_peer_that_does_not_fit_halves_its_micro_batch(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    _, results = run(monkeypatch, clock, 5, 1.0, 100.0)
    assert results["used"]["hf-trainer"] == {"nf4": True, "cap": 24.0, "checkpointing": True, "micro_batch": 4}
    assert len(results["rows"]["hf-trainer"]["seconds"]) == 14
    # And one that never fits is left out.
    assert list(run(monkeypatch, clock, 0, 1.0, 100.0)[1]["rows"]) == ["lora-llava"]


def test_slow_peers_do_fewer_steps_but_enough_for_a_median(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    steps = [len(run(monkeypatch, clock, 16, takes, 40.0)[1]["rows"]["lora-llava"]["seconds"]) for takes in (5.0, 50.0)]
    assert steps == [9, 2 + gpu.MIN_STEPS]


def test_options_are_of_the_table_and_divide_the_step() -> None:
    assert gpu.options_for("lora-llava", 12.0, 44) == {"nf4": True, "cap": 12.0}
    assert [gpu.options_for("trl", 24.0, count)["micro_batch"] for count in (32, 44)] == [16, 11]
    assert gpu.options_for("trl", 12.0, 44)["micro_batch"] == 1


def test_what_the_minutes_do_not_allow_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    asked: list[str] = []

    def compare(_fleet: Any, name: str, *_: Any) -> dict[str, Any] | None:
        asked.append(name)
        clock[0] += 100
        return None if name == "V1" else {"set": name}

    monkeypatch.setattr(gpu, "compare", compare)
    comparisons = [("V11", 24.0), ("V1", 24.0), ("S1", 24.0), ("V4", 16.0), ("V11", 12.0)]
    output = tmp_path / "results.json"
    results = gpu.measure_for(6.0, comparisons, ["lora-llava"], "7b", (2, 12), output)
    assert asked == ["V11", "V1", "S1"]
    assert results == [{"set": "V11", "cap": 24.0}, {"set": "S1", "cap": 24.0}]
    assert "left out, for lack of time: V4 in 16 GiB, V11 in 12 GiB" in capsys.readouterr().out
    assert '"set": "S1"' in output.read_text(encoding="utf-8")


def test_peers_without_their_package_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda package: None if package == "unsloth" else object())
    assert gpu.importable(["lora-llava", "trl", "unsloth"]) == ["lora-llava", "trl"]
    assert capsys.readouterr().out == "unsloth: not measured, its package unsloth is not installed\n"
