"""The trainers that are compared, each set up as its documentation says, with the same model and the same work.

All but the kit are a `transformers.Trainer`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.model import ReusedModel, build_model, make_config
from benchmarks.work import Shapes, Work, pixels
from lora_llava.conversation.encode import IGNORE_INDEX
from lora_llava.data.packing import PlanItem, RowSettings, make_plan, sample_steps
from lora_llava.data.rows import Batch, PackedRows, build_row
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import drop_unused_layers, undo_double_quantization
from lora_llava.modeling.fused.layer import fuse_layers, remove_trunk
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.structure import TREES, VISION_TOWER
from lora_llava.planning.attention import pick_attention
from lora_llava.planning.calibration import measure_speed
from lora_llava.planning.memory import Recompute
from lora_llava.planning.memory_plan import MemoryPlan, StageShapes, has_room_for_scales, plan_memory, usable_bytes
from lora_llava.planning.speed import Machine
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import GradientCheckpointing
from lora_llava.training.checks.faster_paths import try_graphs
from lora_llava.training.checks.monitor import StageMonitor
from lora_llava.training.checks.non_finite import NonFiniteGuard
from lora_llava.training.feature_cache import FeatureTower
from lora_llava.training.trainer import PackedTrainer


@dataclass(frozen=True, slots=True)
class Task:
    """The work, model and machine of a trainer."""

    work: Work
    shapes: Shapes
    steps: int
    micro_batch: int
    """Conversations that the other kits pass at a time; ours takes as many tokens, or what the planner says."""
    device: torch.device
    dtype: torch.dtype
    nf4: bool
    checkpointing: bool
    """Whether the other kits recompute whole layers."""
    cap: int | None
    """Bytes of the card that the kit's planner plans for; None: what is free."""
    models: ReusedModel


@dataclass(frozen=True, slots=True)
class Variant:
    """The kit with some of what makes it fast, for the measurement of each part."""

    separate: bool = False
    """Every conversation in its own row."""
    shared: bool = True
    """Conversations of one image share it."""
    recompute: GradientCheckpointing = False
    nf4: bool = False
    dequantized: bool = False
    cached: bool = False
    """Features of the vision tower are kept."""


def plan_items(work: Work) -> list[PlanItem]:
    """Describe a step's conversations to the kit's planner."""
    return [
        PlanItem(len(sample.input_ids), sample.prefix_length, -1 if image is None else image)
        for sample, image in zip(work.conversations, work.images, strict=True)
    ]


class Rows(PackedRows):
    """Our rows of a step, again and again; the images are made, not read."""

    def __init__(self, task: Task, tokens: int, variant: Variant, read: Callable[[int], torch.Tensor]) -> None:
        self.work, self.steps, self.read = task.work, task.steps, read
        self.sources = ()
        items = plan_items(task.work)
        settings = RowSettings(
            tokens,
            branches_per_tree=len(items) if variant.shared else 1,
            packing="none" if variant.separate else "tree",
        )
        plan = make_plan(items, settings, batch_size=len(items), num_steps=1, seed=0)
        self.rows = plan.steps[0]
        self.computed_tokens = plan.num_computed_tokens

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index % len(self.rows)]
        batch = build_row([[self.work.conversations[index] for index in tree] for tree in row])
        images = [self.work.images[tree[0]] for tree in row]
        if shown := [self.read(image) for image in images if image is not None]:
            batch["pixel_values"] = torch.stack(shown)
        return batch


class Conversations(Dataset[dict[str, Any]]):
    """The conversations of a step one by one, again and again, as the peers take them."""

    def __init__(self, task: Task) -> None:
        self.work, self.shapes, self.steps = task.work, task.shapes, task.steps
        self.computed_tokens = sum(len(sample.input_ids) for sample in task.work.conversations)

    def __len__(self) -> int:
        return self.steps * len(self.work.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index %= len(self.work.conversations)
        sample, image = self.work.conversations[index], self.work.images[index]
        shown = {} if image is None else {"pixel_values": pixels(image, self.shapes)}
        return {"input_ids": sample.input_ids, "labels": sample.labels, **shown}


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right, as Hugging Face's collators do."""
    longest = max(len(example["input_ids"]) for example in examples)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in examples])

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    if images := [example["pixel_values"] for example in examples if "pixel_values" in example]:
        batch["pixel_values"] = torch.stack(images)
    return batch


def arguments(kind: type[TrainingArguments], task: Task, accumulation: int, micro_batch: int, **more: Any) -> Any:
    """Make the arguments that all have in common."""
    return kind(
        output_dir="unused",
        max_steps=task.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=task.device.type == "cpu",
        bf16=task.dtype == torch.bfloat16,
        seed=0,
        **more,
    )


def ours(task: Task, variant: Variant | None = None) -> tuple[PackedTrainer, int]:
    """Build the kit's trainer as its planner has it.

    A variant, and what recomputes layers as the peers do, has rows of as many tokens as their micro-batches.
    """
    parts = variant or Variant(nf4=task.nf4, recompute=task.checkpointing)
    longest = max(len(sample.input_ids) for sample in task.work.conversations)
    tokens, attention, optim, graphs = task.micro_batch * longest, TREES, "adamw_torch", False
    recompute, dequantized, has_room = Recompute(parts.recompute), parts.dequantized, True
    if variant is None and not task.checkpointing:
        attention, plan = planned(task, longest)
        tokens, optim, recompute = plan.tokens_per_micro_batch, plan.optim, plan.recompute
        dequantized, graphs = plan.keep_dequantized, plan.graphs
        has_room = has_room_for_scales(plan, make_config(task.shapes))
    stage = task.work.stage

    def build() -> Any:
        model = build_model(task.shapes, stage, task.device, task.dtype, nf4=parts.nf4, dequantized=dequantized)
        drop_unused_layers(model.get_base_model())
        if has_room:
            undo_double_quantization(model)
        if reason := fuse_layers(model):
            sys.stderr.write(f"not fused: {reason}\n")
        return model

    model = task.models.get((stage, parts.nf4, dequantized, has_room), build)
    remove_trunk(model)
    llava = model.get_base_model()
    set_recompute(model, recompute.policy, recompute.full_layers)
    set_attention(llava, attention)
    read: Callable[[int], torch.Tensor] = partial(pixels, shapes=task.shapes)
    if parts.cached:
        read = cached_features(llava, task)
    rows = Rows(task, tokens, parts, read)
    if graphs:
        sys.stderr.write(f"{try_graphs(model, rows, plan_items(task.work), task.dtype)}\n")
    args = arguments(TrainingArguments, task, len(rows.rows), 1, label_names=["labels"], optim=optim)
    guard = NonFiniteGuard(rows, dtype=task.dtype)
    checks = [guard, StageMonitor(skipped=guard.skipped)]
    return PackedTrainer(model, args, rows, None, mm_projector_lr=None, checks=checks), rows.computed_tokens


def planned(task: Task, longest: int) -> tuple[str, MemoryPlan]:
    """Let the kit's planner choose for a card of `cap` bytes."""
    config = make_config(task.shapes)
    stage = task.work.stage
    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "base": {"model_name_or_path": "random"},
            "quantization": {"type": "nf4" if task.nf4 else "none"},
            "adapter": {"r": task.shapes.rank, "lora_alpha": 2.0 * task.shapes.rank},
            "stages": {stage: {"data": {"path": "none.json"}}},
        }
    )
    attention, why = pick_attention("auto", config.text_config, task.device, task.dtype)
    count = len(task.work.conversations)
    steps = sample_steps(plan_items(task.work), RowSettings(longest, count), batch_size=count, num_steps=1, seed=0)
    settings = recipe.stage(stage)
    shapes = StageShapes(stage, settings, recipe.quantization, recipe.adapter, config, task.dtype, longest, steps)
    # As a run does: on CUDA the planner measures.
    speed, line = measure_speed(shapes, attention, task.device) if task.device.type == "cuda" else (None, "")
    plan = plan_memory(shapes, Machine(task.device.type, usable_bytes(task.device.type, task.cap), attention, speed))
    sys.stderr.write(f"{plan}; {attention}: {why}; {line}\n")
    return attention, plan


def cached_features(llava: Any, task: Task) -> Callable[[int], torch.Tensor]:
    """Compute the features of the images once, and put what passes them on in the tower's place."""
    tower, layer = llava.get_submodule(VISION_TOWER), int(llava.config.vision_feature_layer)
    images = sorted({image for image in task.work.images if image is not None})
    with torch.no_grad():
        shown = torch.stack([pixels(image, task.shapes) for image in images]).to(task.device, task.dtype)
        features = tower(shown, output_hidden_states=True).hidden_states[layer].cpu()
    llava.set_submodule(VISION_TOWER, FeatureTower(tower, layer))
    return dict(zip(images, features, strict=True)).__getitem__


def peer_arguments(kind: type[TrainingArguments], task: Task, **more: Any) -> Any:
    """Make the arguments of the other kits."""
    accumulation = len(task.work.conversations) // task.micro_batch
    return arguments(
        kind,
        task,
        accumulation,
        task.micro_batch,
        gradient_checkpointing=task.checkpointing,
        # Every step the same conversations, each once.
        train_sampling_strategy="sequential",
        **more,
    )


def peer_model(task: Task) -> Any:
    """Build the model as the other kits take it."""

    def build() -> Any:
        model = build_model(task.shapes, task.work.stage, task.device, task.dtype, nf4=task.nf4)
        if task.checkpointing:
            model.enable_input_require_grads()
        return model

    return task.models.get((task.work.stage, task.nf4, task.checkpointing), build)


def hugging_face(task: Task) -> tuple[Trainer, int]:
    """Build `transformers.Trainer` over a PEFT model with a padding collator."""
    data = Conversations(task)
    args = peer_arguments(TrainingArguments, task)
    return Trainer(model=peer_model(task), args=args, train_dataset=data, data_collator=padded), data.computed_tokens


def trl(task: Task) -> tuple[Trainer, int]:
    """Build TRL's `SFTTrainer` as its vision examples do: our own collator, no preparation."""
    from datasets import Dataset as HubDataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    data = Conversations(task)
    args = peer_arguments(SFTConfig, task, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, "<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    indices = HubDataset.from_dict({"index": list(range(len(data)))})

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return padded([data[row["index"]] for row in rows])

    trainer = SFTTrainer(
        model=peer_model(task), args=args, train_dataset=indices, data_collator=collate, processing_class=tokenizer
    )
    return trainer, data.computed_tokens


def unsloth(task: Task) -> tuple[Trainer, int]:
    """Build TRL's `SFTTrainer` after Unsloth's patches, over the same model made ready by Unsloth."""
    from unsloth import FastVisionModel

    trainer, computed = trl(task)
    FastVisionModel.for_training(trainer.model)
    return trainer, computed


def llama_factory(task: Task) -> tuple[Trainer, int]:
    """Build LLaMA-Factory's trainer over the same model, with a padding collator."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from transformers import Seq2SeqTrainingArguments

    data = Conversations(task)
    trainer = CustomSeq2SeqTrainer(
        finetuning_args=FinetuningArguments(),
        processor=None,
        model=peer_model(task),
        args=peer_arguments(Seq2SeqTrainingArguments, task),
        train_dataset=data,
        data_collator=padded,
    )
    return trainer, data.computed_tokens


PEERS: dict[str, Callable[[Task], tuple[Trainer, int]]] = {
    "lora-llava": ours,
    "hf-trainer": hugging_face,
    "trl": trl,
    "unsloth": unsloth,
    "llama-factory": llama_factory,
}
"""Makers of a trainer, and of the tokens that it computes in a step, by name."""

PACKAGES = {"trl": "trl", "unsloth": "unsloth", "llama-factory": "llamafactory"}
"""What a peer needs besides the kit's own packages."""

LADDER: dict[str, Callable[[Task], tuple[Trainer, int]]] = {
    "hf-trainer": hugging_face,
    "supervised rows": partial(ours, variant=Variant(separate=True)),
    "packed rows": partial(ours, variant=Variant(shared=False)),
    "trees": partial(ours, variant=Variant()),
    "trees, features kept": partial(ours, variant=Variant(cached=True)),
    "trees, recomputing selectively": partial(ours, variant=Variant(recompute="selective")),
    "trees, recomputing layers": partial(ours, variant=Variant(recompute=True)),
    "trees, NF4": partial(ours, variant=Variant(nf4=True)),
    "trees, NF4 dequantized once": partial(ours, variant=Variant(nf4=True, dequantized=True)),
}
"""What each part brings, from the plain Trainer on."""
