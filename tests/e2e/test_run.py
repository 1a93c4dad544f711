"""A whole run on a tiny model: both stages, what they change, what they leave behind, and that it is repeatable."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import lora_llava.training.run as run_module
import lora_llava.training.train as train_module
from lora_llava.artifact import load_artifact, read_manifest
from lora_llava.errors import ArtifactError, TrainingError
from lora_llava.evaluation.figures import plot_loss
from lora_llava.formats.names import WEIGHTS
from lora_llava.modeling.base import hash_weights
from lora_llava.recipe.file import load_recipe
from lora_llava.system.files import file_sha256
from tests.helpers.runs import NUM_IMAGES, QUESTIONS_PER_IMAGE, Run, watched_run, write_data, write_recipe
from tests.helpers.tiny import save_tiny_base

PROJECTOR_COPY = "base_model.model.model.multi_modal_projector.modules_to_save.default."
TEN_STEPS = ("stages.instruct.max_steps=10", "stages.instruct.eval_steps=10")


@pytest.fixture(scope="module")
def recipe_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("both")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)})


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_loss", plot_loss)
        return watched_run(recipe_file)


@pytest.fixture(scope="module")
def instruct_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("instruct")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)}, ["instruct"])


@pytest.fixture(scope="module")
def ten_steps(instruct_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return watched_run(instruct_file, *TEN_STEPS, f"output_dir={tmp_path_factory.mktemp('ten') / 'run'}")


def projector(artifact: Path) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.multi_modal_projector."
    return {n.removeprefix(prefix): t for n, t in load_file(artifact / WEIGHTS).items() if n.startswith(prefix)}


@pytest.mark.fault("training: an alignment stage that trains more than the projector")
def test_align_changes_the_projector_and_nothing_else(run: Run) -> None:
    stage = run.stages["align"]
    assert stage.changed == stage.trainable
    assert stage.changed == {f"{PROJECTOR_COPY}linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}


def test_instruct_changes_lora_and_projector_and_nothing_else(run: Run) -> None:
    stage = run.stages["instruct"]
    assert stage.changed == stage.trainable
    lora = {name for name in stage.changed if ".lora_" in name}
    assert len(lora) == 28
    assert all(name.startswith("base_model.model.model.language_model.") for name in lora)
    assert {name.removeprefix(PROJECTOR_COPY) for name in stage.changed - lora} == {
        "linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"
    }  # fmt: skip


@pytest.mark.fault("training: frozen weights that change")
def test_nf4_weights_do_not_change(recipe_file: Path, tmp_path: Path) -> None:
    in_4_bits = ("quantization.type=nf4", "quantization.keep_dequantized=false")
    made = watched_run(recipe_file, *in_4_bits, f"output_dir={tmp_path / 'run'}", "stages.instruct.max_steps=3")
    for stage in made.stages.values():
        assert stage.changed == stage.trainable
    assert sum(one.dtype == torch.uint8 for one in made.stages["instruct"].after.values()) == 14
    losses = made.losses("instruct")
    assert all(math.isfinite(loss) for loss in losses)
    once = watched_run(
        recipe_file, in_4_bits[0], "quantization.keep_dequantized=true", f"output_dir={tmp_path / 'once'}",
        "stages.instruct.max_steps=3",
    )  # fmt: skip
    assert once.losses("instruct") == pytest.approx(losses, rel=1e-5)


def test_bf16_with_nf4(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU would choose: trained parameters in fp32 on a base in bf16, in sample answers too.
    monkeypatch.setattr(train_module, "pick_dtype", lambda *_: torch.bfloat16)
    made = watched_run(
        recipe_file, "quantization.type=nf4", "quantization.keep_dequantized=false", f"output_dir={tmp_path / 'run'}",
        *TEN_STEPS,
    )  # fmt: skip
    for stage in made.stages.values():
        assert stage.changed == stage.trainable
        assert {stage.after[name].dtype for name in stage.trainable} == {torch.float32}
    losses = made.losses("instruct")
    assert losses[-1] < 0.85 * losses[0]
    assert made.losses("instruct", "eval_loss")[-1] < losses[0]


@pytest.mark.fault("training: frozen weights that change")
def test_the_base_is_not_touched(run: Run, tiny_base: Path) -> None:
    assert hash_weights(tiny_base) == read_manifest(run.directory / "instruct").base["weights_sha256"]
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_base).state_dict()
    assert torch.equal(plain["lm_head.weight"], run.stages["instruct"].after["base_model.model.lm_head.weight"])


def test_the_second_stage_starts_from_the_firsts_artifact(run: Run, tiny_base: Path) -> None:
    align = projector(run.directory / "align")
    before = run.stages["instruct"].before
    original = "base_model.model.model.multi_modal_projector.original_module."
    for name, tensor in align.items():
        assert torch.equal(before[PROJECTOR_COPY + name], tensor)
        assert torch.equal(before[original + name], tensor)
    manifest = read_manifest(run.directory / "instruct")
    assert manifest.parent_sha256 == file_sha256(run.directory / "align" / WEIGHTS)
    assert read_manifest(run.directory / "align").parent_sha256 is None
    assert manifest.stage == "instruct"


def test_artifacts_hold_what_was_trained(run: Run) -> None:
    for stage, watched in run.stages.items():
        saved = load_file(run.directory / stage / WEIGHTS)
        trained = {
            name.replace(".modules_to_save.default", "").replace(".default", ""): watched.after[name]
            for name in watched.trainable
        }
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_the_artifact_answers_as_the_trained_model_does(run: Run) -> None:
    loaded, manifest = load_artifact(run.directory / "instruct", device=torch.device("cpu"), dtype=torch.float32)
    after = run.stages["instruct"].after
    for name, parameter in loaded.model.named_parameters():
        # The unused original projector is the base's own again.
        if ".original_module." not in name:
            assert torch.equal(parameter, after[name]), name
    assert manifest.template == {"name": "vicuna_v1", "system": None}


def test_files_of_a_run(run: Run) -> None:
    names = {path.name for path in run.directory.iterdir()}
    assert names - {".lora-llava"} == {
        "align",
        "instruct",
        "checkpoints",
        "recipe.yaml",
        "train_log.jsonl",
        "loss.png",
        "summary.json",
    }
    summary = json.loads((run.directory / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(run.summary))


def test_the_log_has_a_line_for_every_step(run: Run) -> None:
    training = [row for row in run.log if "loss" in row]
    instruct_steps = run.summary["instruct"]["steps"]
    assert [(row["stage"], row["step"]) for row in training] == [
        *(("align", step) for step in range(1, 4)),
        *(("instruct", step) for step in range(1, instruct_steps + 1)),
    ]
    fields = {
        "stage", "step", "loss", "grad_norm", "learning_rate",
        "questions_per_second", "supervised_tokens_per_second", "seconds",
    }  # fmt: skip
    for row in training:
        assert fields <= row.keys()
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0


def test_validation_loss_and_sample_answers_are_logged_and_shown(run: Run) -> None:
    rows = [row for row in run.log if "eval_loss" in row]
    assert {row["stage"] for row in rows} == {"instruct"}
    last = run.summary["instruct"]["steps"]
    assert [row["step"] for row in rows] == sorted({*range(2, last + 1, 2), last})
    for row in rows:
        assert math.isfinite(row["eval_loss"])
        assert [set(sample) for sample in row["samples"]] == [{"question", "answer", "prediction"}] * 2
        assert "<image>" not in row["samples"][0]["question"]
    assert run.summary["instruct"]["eval_loss"] == rows[-1]["eval_loss"]
    assert f"validation loss {rows[-1]['eval_loss']:.4f}" in run.text


def test_what_was_seen_adds_up(run: Run) -> None:
    assert run.summary["align"]["conversations"] == NUM_IMAGES
    instruct = read_manifest(run.directory / "instruct")
    held = instruct.data["validation_records"]
    assert held % QUESTIONS_PER_IMAGE == 0
    assert 2 <= held // QUESTIONS_PER_IMAGE <= 3
    assert instruct.seen["conversations"] == instruct.data["records"] == NUM_IMAGES * QUESTIONS_PER_IMAGE - held
    assert instruct.metrics["train_loss"] == run.losses("instruct")[-1]


def test_training_learns(ten_steps: Run) -> None:
    losses = ten_steps.losses("instruct")
    assert len(losses) == 10
    assert losses[-1] < 0.85 * losses[0]
    assert ten_steps.losses("instruct", "eval_loss")[-1] < 0.9 * losses[0]


@pytest.mark.fault("training: gradient accumulation that changes the loss")
@pytest.mark.parametrize(
    "split",
    [
        ["tokens_per_micro_batch=200"],
        ["tokens_per_micro_batch=4000"],
        ["packing=none"],
        ["gradient_checkpointing=true"],
        ["cache_image_features=memory"],
        ["cache_image_features=disk"],
    ],
    ids=" ".join,
)
def test_cutting_a_step_otherwise_gives_the_same_losses(
    instruct_file: Path, ten_steps: Run, tmp_path: Path, split: list[str]
) -> None:
    overrides = [f"stages.instruct.{one}" for one in split]
    made = watched_run(instruct_file, *TEN_STEPS, *overrides, f"output_dir={tmp_path / 'run'}")
    for key in ("loss", "eval_loss"):
        assert made.losses("instruct", key) == pytest.approx(ten_steps.losses("instruct", key), rel=1e-5)


@pytest.mark.fault("recipe: a resolved recipe that runs again")
def test_the_resolved_recipe_runs_as_it_is(run: Run, tmp_path: Path) -> None:
    again = watched_run(run.directory / "recipe.yaml", f"output_dir={tmp_path / 'again'}")
    for stage in ("align", "instruct"):
        assert again.losses(stage) == run.losses(stage)
        assert file_sha256(again.directory / stage / WEIGHTS) == file_sha256(run.directory / stage / WEIGHTS)
        assert (run.directory / stage / "recipe.yaml").exists()
    copy = load_recipe(run.directory / "instruct" / "recipe.yaml")
    assert copy.model_dump(exclude={"output_dir"}) == run.recipe.model_dump(exclude={"output_dir"})


def test_the_seed_decides_the_run(instruct_file: Path, ten_steps: Run, tmp_path: Path) -> None:
    other = watched_run(instruct_file, *TEN_STEPS, "seed=43", f"output_dir={tmp_path / 'run'}")
    assert other.losses("instruct") != ten_steps.losses("instruct")


@pytest.mark.fault("recipe: an output directory that holds a run, or the user's files")
def test_an_existing_run_is_refused_and_overwrite_keeps_unknown_files(instruct_file: Path, tmp_path: Path) -> None:
    overrides = (f"output_dir={tmp_path / 'run'}", "stages.instruct.max_steps=1")
    watched_run(instruct_file, *overrides)
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    before = file_sha256(tmp_path / "run" / "instruct" / WEIGHTS)
    with pytest.raises(TrainingError, match=r"holds a run already \(.*instruct.*--overwrite"):
        watched_run(instruct_file, *overrides)
    assert file_sha256(tmp_path / "run" / "instruct" / WEIGHTS) == before
    again = watched_run(instruct_file, *overrides, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert len(again.losses("instruct")) == 1


@pytest.mark.fault("training: a projector without its own learning rate")
def test_the_projector_has_a_learning_rate_of_its_own(instruct_file: Path, tmp_path: Path) -> None:
    still = watched_run(
        instruct_file, "stages.instruct.mm_projector_lr=1e-30", f"output_dir={tmp_path / 'still'}", *TEN_STEPS
    ).stages["instruct"]
    for name in still.trainable:
        step = float((still.after[name] - still.before[name]).abs().max())
        assert (step > 1e-3) if ".lora_" in name else (step < 1e-25), name
    stage = watched_run(
        instruct_file, "stages.instruct.mm_projector_lr=null", f"output_dir={tmp_path / 'null'}",
        "stages.instruct.max_steps=1", "stages.instruct.warmup_ratio=0",
    ).stages["instruct"]  # fmt: skip
    name = f"{PROJECTOR_COPY}linear_1.weight"
    # Adam's first step is the learning rate itself.
    assert float((stage.after[name] - stage.before[name]).abs().max()) == pytest.approx(0.005, rel=1e-2)


def test_start_from_goes_on_with_an_artifact(run: Run, instruct_file: Path, tmp_path: Path) -> None:
    for stage in ("align", "instruct"):
        artifact = run.directory / stage
        made = watched_run(
            instruct_file, f"start_from={artifact}", f"output_dir={tmp_path / stage}", "stages.instruct.max_steps=3"
        )
        saved = load_file(artifact / WEIGHTS)
        before = made.stages["instruct"].before
        for name in made.stages["instruct"].trainable:
            plain = name.replace(".modules_to_save.default", "").replace(".default", "")
            if plain in saved:
                assert torch.equal(before[name], saved[plain]), name
        assert sum("lora_" in name for name in saved) == (28 if stage == "instruct" else 0)
        assert made.stages["instruct"].changed == made.stages["instruct"].trainable
        assert read_manifest(made.directory / "instruct").parent_sha256 == file_sha256(artifact / WEIGHTS)


def test_start_from_an_artifact_of_another_base_is_refused(run: Run, instruct_file: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    overrides = [f"base.model_name_or_path={other}", f"start_from={run.directory / 'align'}"]
    with pytest.raises(ArtifactError, match="was trained on another base"):
        watched_run(instruct_file, *overrides, f"output_dir={tmp_path / 'run'}")
