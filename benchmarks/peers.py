"""The peers, each as its documentation has it, over the same model and the same work.

All three are a `transformers.Trainer`; they differ in what they make of sixteen conversations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from benchmarks.work import IMAGE_ID, Shapes, Work, pixels
from lora_llava.conversation import IGNORE_INDEX
from lora_llava.data.batch import Batch, PackedRows, build_row
from lora_llava.data.packing import PlanItem, make_plan
from lora_llava.modeling.base import drop_unused_layers
from lora_llava.modeling.stages import build_stage
from lora_llava.recipe import AdapterSettings
from lora_llava.training.trainer import PackedTrainer


def build_model(shapes: Shapes, stage: Any, seed: int = 0) -> Any:
    """Build the model with random weights, its LoRA and its projector to train, as PEFT makes them."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=shapes.vision_hidden_size,
        intermediate_size=4 * shapes.vision_hidden_size,
        num_hidden_layers=shapes.vision_layers,
        num_attention_heads=max(1, shapes.vision_hidden_size // 64),
        image_size=shapes.image_size,
        patch_size=shapes.patch_size,
    )
    text = LlamaConfig(
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_hidden_layers=shapes.num_layers,
        num_attention_heads=shapes.num_heads,
        num_key_value_heads=shapes.num_heads,
        vocab_size=shapes.vocab_size,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, attn_implementation="sdpa")
    model = LlavaForConditionalGeneration(config)
    model.config.use_cache = False
    model = build_stage(model, stage, AdapterSettings(r=shapes.rank, lora_alpha=2.0 * shapes.rank))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Not zero: else the gradients of A would be, and a peer that forgot them would not be noticed.
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


class Rows(PackedRows):
    """Our rows of a step, again and again; the images are made, not read."""

    def __init__(self, work: Work, shapes: Shapes, steps: int, tokens: int) -> None:
        self.work, self.shapes, self.steps = work, shapes, steps
        items = [
            PlanItem(len(one.input_ids), one.prefix_length, -1 if image is None else image)
            for one, image in zip(work.conversations, work.images, strict=True)
        ]
        plan = make_plan(
            items,
            batch_size=len(items),
            tokens_per_row=tokens,
            branches_per_tree=len(items),
            packing="tree",
            num_train_epochs=1.0,
            max_steps=1,
            seed=0,
        )
        self.rows = plan.steps[0]
        self.computed_tokens = plan.num_computed_tokens

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index % len(self.rows)]
        batch = build_row([[self.work.conversations[place] for place in tree] for tree in row])
        images = [self.work.images[tree[0]] for tree in row]
        if shown := [pixels(image, self.shapes) for image in images if image is not None]:
            batch["pixel_values"] = torch.stack(shown)
        return batch


class Conversations(Dataset[dict[str, Any]]):
    """The conversations of a step one by one, again and again, as the peers take them."""

    def __init__(self, work: Work, shapes: Shapes, steps: int) -> None:
        self.work, self.shapes, self.steps = work, shapes, steps
        self.computed_tokens = sum(len(one.input_ids) for one in work.conversations)

    def __len__(self) -> int:
        return self.steps * len(self.work.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index % len(self.work.conversations)
        one, image = self.work.conversations[place], self.work.images[place]
        shown = {} if image is None else {"pixel_values": pixels(image, self.shapes)}
        return {"input_ids": one.input_ids, "labels": one.labels, **shown}


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right, as Hugging Face's collators do."""
    longest = max(len(one["input_ids"]) for one in examples)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*one[key], *[value] * (longest - len(one[key]))] for one in examples])

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(one["input_ids"]) for one in examples])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    if images := [one["pixel_values"] for one in examples if "pixel_values" in one]:
        batch["pixel_values"] = torch.stack(images)
    return batch


def arguments(kind: type[TrainingArguments], steps: int, accumulation: int, micro_batch: int, **more: Any) -> Any:
    """Make the arguments that all have in common."""
    return kind(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        **more,
    )


def ours(work: Work, shapes: Shapes, steps: int, micro_batch: int) -> tuple[Trainer, int]:
    """Build the kit's trainer; rows hold as many tokens as the peers' micro-batches."""
    model = build_model(shapes, work.stage)
    drop_unused_layers(model.get_base_model())
    longest = max(len(one.input_ids) for one in work.conversations)
    rows = Rows(work, shapes, steps, micro_batch * longest)
    made = arguments(TrainingArguments, steps, len(rows.rows), 1, label_names=["labels"])
    return PackedTrainer(model, made, rows, None, mm_projector_lr=None), rows.computed_tokens


def hugging_face(work: Work, shapes: Shapes, steps: int, micro_batch: int) -> tuple[Trainer, int]:
    """Build `transformers.Trainer` over a PEFT model with a padding collator."""
    data = Conversations(work, shapes, steps)
    made = arguments(TrainingArguments, steps, len(work.conversations) // micro_batch, micro_batch)
    model = build_model(shapes, work.stage)
    return Trainer(model=model, args=made, train_dataset=data, data_collator=padded), data.computed_tokens


def trl(work: Work, shapes: Shapes, steps: int, micro_batch: int) -> tuple[Trainer, int]:
    """Build TRL's `SFTTrainer` as its vision examples do: a collator of one's own, no preparation."""
    from datasets import Dataset as HubDataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    data = Conversations(work, shapes, steps)
    made = arguments(
        SFTConfig,
        steps,
        len(work.conversations) // micro_batch,
        micro_batch,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, "<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    places = HubDataset.from_dict({"place": list(range(len(data)))})

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return padded([data[row["place"]] for row in rows])

    trainer = SFTTrainer(
        model=build_model(shapes, work.stage),
        args=made,
        train_dataset=places,
        data_collator=collate,
        processing_class=tokenizer,
    )
    return trainer, data.computed_tokens


PEERS: dict[str, Callable[[Work, Shapes, int, int], tuple[Trainer, int]]] = {
    "lora-llava": ours,
    "hf-trainer": hugging_face,
    "trl": trl,
}
"""Makers of a trainer, and of the tokens that it computes in a step, by name."""
