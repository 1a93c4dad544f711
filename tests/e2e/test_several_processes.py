"""Several processes train what one trains, and end together, whatever happens to one of them."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from lora_llava.formats.names import WEIGHTS
from lora_llava.run_directory import output
from lora_llava.training.checkpoints.files import read_verified
from tests.helpers.pairs import write_preference_project
from tests.helpers.processes import Ended
from tests.helpers.ranks import finetune, full_disk, signalled, spoilt_image
from tests.helpers.resuming import log_of
from tests.helpers.runs import write_data, write_recipe

STAGES = ("align", "instruct")
SETTINGS = (
    "quantization.type=nf4",
    # Steps of 7 and of 9 conversations, in several micro-batches; the last of an epoch is smaller.
    "stages.align.batch_size=7",
    "stages.align.tokens_per_micro_batch=100",
    "stages.instruct.tokens_per_micro_batch=200",
    "stages.instruct.save_steps=2",
    "stages.instruct.eval_steps=4",
    "stages.instruct.num_sample_answers=1",
    "stages.align.cache_image_features=disk",
    "stages.instruct.cache_image_features=memory",
)


EVALUATION = (
    "evaluation.base_questions=5",
    "evaluation.blind_questions=2",
    "evaluation.max_new_tokens=3",
)


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over data of which a third has no image."""
    directory = tmp_path_factory.mktemp("several")
    write_data(directory)
    path = directory / "train.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        if number % 3 == 0:
            del record["image"]
            turn = record["conversations"][0]
            turn["value"] = turn["value"].replace("<image>\n", "")
    path.write_text(json.dumps(records), encoding="utf-8")
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)})


def run(project: Path, directory: Path, count: int, *more: str, act: Any = None) -> list[Ended]:
    arguments = [str(project), *SETTINGS, f"output_dir={directory}", *more]
    return finetune(directory.with_name(f"{directory.name}-output"), arguments, count, act)


@pytest.fixture(scope="module")
def runs(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of one, two and three processes."""
    directory = tmp_path_factory.mktemp("runs")
    for count in (1, 2, 3):
        data = [f"evaluation.data.path={project.parent / 'train.json'}"]
        data += [f"evaluation.data.image_root={project.parent / 'images'}"]
        ended = run(project, directory / str(count), count, *EVALUATION, *data)
        assert [one.code for one in ended] == [0] * count, ended
        # The first speaks.
        assert [bool(one.out) for one in ended] == [True] + [False] * (count - 1)
        assert not any(one.err for one in ended), ended
    return {count: directory / str(count) for count in (1, 2, 3)}


def difference(one: Path, other: Path) -> float:
    """The norm of the difference of two artifacts' weights, relative to that of the weights."""
    here, there = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert here.keys() == there.keys()
    norm = sum(float(weight.double().square().sum()) for weight in here.values()) ** 0.5
    apart = sum(float((weight.double() - there[name].double()).square().sum()) for name, weight in here.items()) ** 0.5
    return apart / norm


def said(ended: Sequence[Ended]) -> list[str]:
    """The errors that the processes printed."""
    return [line for one in ended for line in one.err.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_k27_weights_are_those_of_one_process(runs: dict[int, Path], stage: str, count: int) -> None:
    assert difference(runs[1] / stage, runs[count] / stage) < 1e-6


@pytest.mark.parametrize("count", [2, 3])
def test_log_and_summary_are_those_of_one_process(runs: dict[int, Path], count: int) -> None:
    logs = log_of(runs[1]), log_of(runs[count])
    assert len(logs[0]) == len(logs[1]) > 8
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in ("step", "loss", "eval_loss", "eval_loss_blind", "grad_norm_lora", "grad_norm_projector"):
            assert one.get(key) == (None if key not in other else pytest.approx(other[key], rel=2e-4))
    here, there = (json.loads((runs[number] / output.SUMMARY).read_text()) for number in (1, count))
    assert there["hardware"] == f"{count} x {here['hardware']}"
    for stage in STAGES:
        same = ("steps", "conversations", "questions", "supervised_tokens")
        assert {key: here[stage][key] for key in same} == {key: there[stage][key] for key in same}


@pytest.mark.parametrize("count", [2, 3])
def test_the_questions_of_the_evaluation_are_shared_out(runs: dict[int, Path], count: int) -> None:
    for name in ("predictions.jsonl", "accuracy.json"):
        texts = [(runs[number] / output.EVALUATION / name).read_text(encoding="utf-8") for number in (1, count)]
        assert texts[0] == texts[1]
    summary = json.loads((runs[count] / output.SUMMARY).read_text(encoding="utf-8"))
    assert summary[output.EVALUATION] == json.loads(texts[1])


def test_preferences_of_two_processes_are_those_of_one(tiny_base: Path, tmp_path: Path) -> None:
    """The reference is computed by both, and so are the sums that the log has means of: of all, and of each source."""
    recipe = write_preference_project(tmp_path, tiny_base)
    pairs = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = content["stages"]["prefer"]["data"]
    content["stages"]["prefer"]["data"] = [data, {**data, "path": "replay.json", "validation": None, "share": 0.3}]
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    for name, part in (("pairs", pairs[:20]), ("replay", pairs[20:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    settings = ["quantization.type=nf4", "stages.prefer.logging_steps=1", "stages.prefer.eval_steps=2"]
    for count in (1, 2):
        arguments = [
            str(recipe),
            *settings,
            "stages.prefer.tokens_per_micro_batch=300",
            f"output_dir={tmp_path / str(count)}",
        ]
        ended = finetune(tmp_path / f"{count}-output", arguments, count)
        assert [one.code for one in ended] == [0] * count, ended
    assert difference(tmp_path / "1" / "prefer", tmp_path / "2" / "prefer") < 1e-6
    logs = [log_of(tmp_path / str(count)) for count in (1, 2)]
    assert len(logs[0]) == len(logs[1]) > 4
    names = [name for name in logs[0][0] if name.startswith(("reward", "log_prob", "loss"))]
    assert {"loss/pairs.json", "loss/replay.json"} < set(names)
    assert len(names) == 9
    for one, other in zip(*logs, strict=True):
        for name in (*names, *(f"eval_{name}" for name in names)):
            assert one.get(name) == (pytest.approx(other[name], rel=1e-4, abs=1e-5) if name in other else None)


def stop_after_step_3(project: Path, directory: Path, *settings: str) -> Path:
    """Run two processes, and stop them in stage `instruct`."""
    ended = run(project, directory, 2, *settings, act=signalled(1, "instruct", 3, signal.SIGTERM))
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2, ended
    assert sum(one.err.count("stopped by SIGTERM after step 3 of stage instruct, which is saved") for one in ended) == 1
    return directory


@pytest.fixture(scope="module")
def stopped(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, stopped after step 3 of `instruct`."""
    return stop_after_step_3(project, tmp_path_factory.mktemp("stopped") / "run")


def test_a_signal_to_one_process_ends_all_with_one_checkpoint_and_any_number_resumes(
    project: Path, runs: dict[int, Path], stopped: Path, tmp_path: Path
) -> None:
    steps = sorted(path.name for path in (stopped / output.CHECKPOINTS / "instruct").iterdir())
    assert steps[-1] == "step-3"
    assert read_verified(stopped / output.CHECKPOINTS / "instruct" / "step-3").facts["processes"] == 2
    for count in (1, 2, 3):
        resumed = tmp_path / str(count)
        shutil.copytree(stopped, resumed)
        ended = run(project, resumed, count, "--resume")
        assert [one.code for one in ended] == [0] * count, ended
        assert difference(runs[1] / "instruct", resumed / "instruct") < 1e-6
        words = "resumes exactly" if count == 2 else f"2 processes then, {count} now: the steps hold the same"
        assert sum(one.out.count(words) for one in ended) == 1


SHORT = ("stages.align.max_steps=4", "stages.align.save_steps=1", "stages.align.batch_size=2")


@pytest.mark.fault("checkpoints: `kill -9` during a save")
def test_a_process_that_is_killed_ends_all_and_checkpoints_are_whole(project: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run(project, tmp_path / "run", 3, *SHORT, act=signalled(1, "align", 3, signal.SIGKILL))
    assert time.monotonic() - started < 60
    assert [one.code for one in ended] == [1, -signal.SIGKILL, 1], ended
    [line] = said(ended)
    assert "another process of the run ended; this one was at: align: training for 4 steps" in line
    saved = read_verified(tmp_path / "run" / output.CHECKPOINTS / "align" / "step-2")
    assert saved.progress.step == 2


def test_a_record_that_makes_nan_in_one_process_is_named_once(project: Path, tmp_path: Path) -> None:
    # A step of two conversations: one of the two processes has the record.
    epoch = "stages.align.max_steps=6"
    ended = run(project, tmp_path / "run", 2, *SHORT, epoch, act=spoilt_image("captions.json, record 5 "))
    assert [one.code for one in ended] == [1, 1], ended
    [line] = said(ended)
    assert "the loss of 1 of 2 micro-batches is not finite" in line
    assert "Not finite by themselves are 1 of 1 record: captions.json, record 5 " in line


@pytest.mark.fault("checkpoints: a full disk during a save")
def test_a_full_disk_of_the_first_process_ends_all(project: Path, tmp_path: Path) -> None:
    ended = run(project, tmp_path / "run", 2, *SHORT, act=full_disk())
    assert [one.code for one in ended] == [1, 1], ended
    [line] = said(ended)
    assert "the checkpoint of step 1 could not be written" in line
    assert "No space left on device" in line
    # As it was before the run, but for the features, which a later run can use.
    assert [path.name for path in (tmp_path / "run").iterdir()] == [output.FEATURES]


OFFLOADED = ("distributed.engine=deepspeed", "distributed.offload=true")


@pytest.fixture(scope="module")
def offloaded(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with gradients and optimizer in parts on the host, stopped after step 3 of `instruct`."""
    return stop_after_step_3(project, tmp_path_factory.mktemp("offloaded") / "run", *OFFLOADED)


RESUMED: dict[str, tuple[str, int, Sequence[str], str]] = {
    "offloaded": ("offloaded", 2, OFFLOADED, "the run resumes exactly"),
    "one process": ("offloaded", 1, (), "2 processes then, 1 now; distributed.engine: deepspeed then, torch now: the"),
    "from an ordinary one": ("stopped", 2, OFFLOADED, "distributed.engine: torch then, deepspeed now: the steps hold"),
}
"""The run that is resumed, in how many processes, with which settings, and what is said of it."""


@pytest.mark.parametrize("case", RESUMED)
def test_offloaded_weights_norms_and_states_are_those_of_one_process_and_either_resumes(
    project: Path, runs: dict[int, Path], tmp_path: Path, request: pytest.FixtureRequest, case: str
) -> None:
    start, count, settings, words = RESUMED[case]
    directory = tmp_path / "resumed"
    shutil.copytree(request.getfixturevalue(start), directory)
    ended = run(project, directory, count, *settings, "--resume")
    assert [one.code for one in ended] == [0] * count, ended
    assert not any(one.err for one in ended), ended
    # The first speaks, and DeepSpeed is silent.
    assert not any(one.out for one in ended[1:])
    out = " ".join(ended[0].out.split())
    assert words in out
    assert out.lower().count("deepspeed") == words.count("deepspeed")
    for stage in STAGES:
        assert difference(runs[1] / stage, directory / stage) < 1e-6
    logs = log_of(runs[1]), log_of(directory)
    assert len(logs[0]) == len(logs[1]) > 8
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in ("step", "loss", "eval_loss", "grad_norm", "grad_norm_lora", "grad_norm_projector"):
            assert one.get(key) == (None if key not in other else pytest.approx(other[key], rel=2e-4))
    # What a checkpoint holds of the optimizer has the same names and settings, and the same averages.
    last = [run / output.CHECKPOINTS / "instruct" / "step-5" for run in (runs[1], directory)]
    assert len({(one / "optimizer.json").read_bytes() for one in last}) == 1
    here, there = (load_file(one / "optimizer.safetensors") for one in last)
    for name, tensor in here.items():
        assert float((tensor - there[name]).norm()) <= 1e-5 * float(tensor.norm())


def test_the_guard_leaves_out_the_same_step_of_an_offloaded_run(project: Path, tmp_path: Path) -> None:
    """The gradients of the step are dropped in all processes, and neither weights nor averages see it."""
    settings = (*SHORT, "stages.align.max_steps=6", "stages.instruct=null", "stages.align.on_non_finite=skip")
    warnings = []
    for name, more in {"whole": (), "offloaded": OFFLOADED}.items():
        ended = run(project, tmp_path / name, 2, *settings, *more, act=spoilt_image("captions.json, record 5 "))
        assert [one.code for one in ended] == [0, 0], ended
        warnings.append([row["warning"] for row in log_of(tmp_path / name) if "warning" in row])
    assert "Not finite by themselves are 1 of 1 record: captions.json, record 5 " in warnings[0][0]
    assert warnings[0] == warnings[1]
    assert difference(tmp_path / "whole" / "align", tmp_path / "offloaded" / "align") < 1e-6
