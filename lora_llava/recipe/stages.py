"""The settings of a stage and of its data, typed; the recipe that holds them is in `recipe`.

Names are those that users know from Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from lora_llava.recipe.fields import Count, Form, Names, NotNegative, OnResume, Positive, Settings, Share

StageName = Literal["align", "instruct"]

AspectRatio = Literal["pad", "square"]
"""How an image becomes a square; see ImageSettings."""

MAX_EPOCHS = 1000
"""Most epochs of a stage: every step is planned before the first."""
MAX_STEPS = 1_000_000
"""Most optimizer steps of a stage, for the same reason; LLaVA-1.5 takes 5,200 in stage 2."""
MIN_RATE = 1e-9
"""Lowest learning rate: a fp32 weight of 0.01, as a projector has, does not change by less than 5e-10."""
LLAVA_BATCH_SIZE: dict[StageName, int] = {"align": 256, "instruct": 128}
"""Conversations in an optimizer step of LLaVA-1.5; the most that `batch_size: auto` takes."""

GradientCheckpointing = bool | Literal["selective"]
"""What is computed again on the way back: nothing, the cheap part of a layer, or whole layers; see `recompute`."""


class ColumnSettings(Settings):
    """Columns of a table or Hugging Face dataset, or keys of flat JSON records."""

    example = "{image: COLUMN, question: COLUMN, answer: COLUMN} or {image: COLUMN, messages: COLUMN}"

    image: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column of the images, or of their paths; null: text only."""
    question: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column of the questions."""
    answer: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column of the answers."""
    messages: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Column of whole conversations, in place of question and answer."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages and (self.question or self.answer):
            raise ValueError("messages excludes question and answer")
        if not self.messages and not (self.question and self.answer):
            raise ValueError("give question and answer, or messages")
        return self


class ValidationSettings(Settings):
    """Records held out of training."""

    example = "{share: 0.1} or {path: FILE}"

    path: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH_OR_ID] = None
    """A file or data set of the same form as the training data."""
    share: Annotated[Share | None, OnResume.VALIDATION] = None
    """Share of the training records, split by image, and by `data.group` if that is given."""
    exclude: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Records of `path` to leave out, as `data.exclude`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.path is None) == (self.share is None):
            raise ValueError("give path or share")
        if self.exclude and self.path is None:
            raise ValueError("exclude is for records of path; those of a share are left out by data.exclude")
        return self


class DataSettings(Settings):
    """Where records come from."""

    example = "{path: FILE}"

    path: Annotated[str, OnResume.SAME_CONTENT, Names.PATH_OR_ID]
    """LLaVA JSON or JSONL; or, with `columns`, flat JSON or JSONL, CSV, parquet, a directory or a hub id."""
    image_root: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Directory of the images; default: that of the data file."""
    split: Annotated[str, OnResume.SAME_CONTENT, Names.TEXT] = "train"
    """Split of a data set."""
    name: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Configuration of a hub data set."""
    revision: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Commit, branch or tag of a hub data set."""
    columns: ColumnSettings | None = None
    answer_prompt: Annotated[str | None, OnResume.FORM, Names.TEXT] = None
    """Text after each question that says what form the answer takes."""
    max_records: Annotated[Count | None, OnResume.ORDER] = None
    """Take the first so many records only."""
    group: Annotated[str | None, OnResume.ORDER, Names.TEXT] = None
    """Key of a record, or column, such as patient: no value of it is both in training and in validation."""
    on_bad_record: Annotated[Literal["error", "skip"], OnResume.SAME_CONTENT] = "error"
    """`skip` leaves out records that cannot be used; every image is then opened before the run. `error`: stop."""
    max_bad_records: Annotated[Count, OnResume.SAME_CONTENT] = 10
    """With `skip`: more than so many stop the run all the same."""
    exclude: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """JSON Lines of records to leave out, each with its number, as `lora-llava check` writes them."""
    merge_turns: Annotated[Annotated[int, Field(ge=2)] | None, OnResume.ORDER] = None
    """Train on the questions about an image as turns of one conversation, at most so many in each, as LLaVA-1.5
    does; null: on the records as they are. Records held out for validation stay as they are."""
    window: Annotated[
        Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None, Form("[low, high]"), OnResume.FORM
    ] = None
    """Of grey images with more than 8 bits: the values that become black and white, such as [0, 4095]; null: the
    lowest and highest value of each image."""
    validation: ValidationSettings | None = None

    @property
    def grey_window(self) -> tuple[float, float] | None:
        """The window as a pair."""
        return None if self.window is None else (self.window[0], self.window[1])

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window {self.window}: the first value, which becomes black, must be the lower one")
        return self

    @model_validator(mode="after")
    def _form(self) -> Self:
        held_out = self.validation.path if self.validation else None
        for key, path in (("path", self.path), ("validation.path", held_out)):
            if path and not self.columns and not path.endswith((".json", ".jsonl")):
                raise ValueError(
                    f"columns is needed, since {key} is not a .json or .jsonl file; for instance "
                    "columns: {image: COLUMN, question: COLUMN, answer: COLUMN}"
                )
        if self.path.endswith((".json", ".jsonl", ".csv", ".tsv")) and (self.name or self.revision):
            raise ValueError("name and revision are for hub data sets; path is a file")
        return self


class StageSettings(Settings):
    """What both stages have."""

    data: DataSettings
    template: Annotated[Literal["plain", "vicuna_v1", "chatml"], OnResume.FORM]
    """Form in which questions and answers are put to the language model."""
    system: Annotated[str | None, OnResume.FORM, Names.TEXT] = None
    """Replaces the template's system text."""
    image_aspect_ratio: Annotated[AspectRatio | None, OnResume.FORM] = None
    """Replaces that of `images` in this stage."""
    max_length: Annotated[Count, OnResume.ORDER] = 2048
    """Tokens of one conversation, the image's included; text beyond is cut off."""
    packing: Annotated[Literal["tree", "none"], OnResume.ORDER] = "tree"
    """`tree`: questions about one image share its tokens. It changes the speed, never the mathematics."""
    branches_per_tree: Annotated[Count, OnResume.ORDER] = 8
    """Most conversations that share one image in one tree."""
    tokens_per_micro_batch: Annotated[Count | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Most tokens of one forward pass, at least those of the longest conversation; `auto`, here and below: chosen from
    the memory there is."""
    num_train_epochs: Annotated[Positive, OnResume.ORDER] = 1.0
    """Times that every record is trained on."""
    max_steps: Annotated[int, OnResume.ORDER] = -1
    """Optimizer steps; -1: as `num_train_epochs` says."""
    batch_size: Annotated[Count | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Conversations in one optimizer step, however they are packed. `auto`: as LLaVA-1.5 (align 256, instruct 128), or
    the largest power of two below that gives 30 steps."""
    learning_rate: Annotated[Positive, OnResume.LATER]
    """Highest learning rate, after the warm-up."""
    lr_scheduler_type: Annotated[Literal["cosine", "linear", "constant", "constant_with_warmup"], OnResume.LATER] = (
        "cosine"
    )
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.03
    """Share of the steps, at least one step, in which the learning rate rises to `learning_rate`."""
    weight_decay: Annotated[NotNegative, OnResume.LATER] = 0.0
    """Of weights; biases and norms do not decay."""
    max_grad_norm: Annotated[Positive, OnResume.LATER] = 1.0
    """Gradients of a larger norm are scaled down to it."""
    adam_beta1: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.999
    """Decay of AdamW's mean of their squares."""
    on_non_finite: Annotated[Literal["error", "skip"], OnResume.FREE] = "error"
    """A step whose loss or gradient is NaN or infinite: stop before it, or leave it out and go on (`skip`)."""
    max_non_finite_steps: Annotated[Count, OnResume.FREE] = 3
    """With `skip`: more than so many stop the run all the same."""
    optim: Annotated[
        Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"], OnResume.RESOLVED
    ] = "auto"
    """`auto`: in fp32 where that fits."""
    gradient_checkpointing: Annotated[GradientCheckpointing | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Memory for time: `selective` keeps matrix products and attention, true keeps a layer's input alone."""
    gradient_checkpointing_layers: Annotated[int, Field(ge=0), OnResume.RESOLVED] = 0
    """With `selective`: so many layers, from the first, keep their input alone."""
    cache_image_features: Annotated[Literal["off", "memory", "disk"], OnResume.ROUNDING] = "off"
    """Compute what the vision tower makes of an image once, not in every epoch; on disk it stays in the run's
    directory. Worth it from the second epoch on."""
    dataloader_num_workers: Annotated[int, Field(ge=0), OnResume.FREE] = 0
    """Processes that prepare images and rows beside the training; 0: none."""
    logging_steps: Annotated[Count, OnResume.FREE] = 10
    """Optimizer steps from one line of the log to the next; fewer in a short stage, which has ten lines at least."""
    eval_steps: Annotated[Count | Literal["auto"] | None, OnResume.FREE] = "auto"
    """Optimizer steps from one validation to the next. `auto`: ten validations, or fewer so that they take a tenth of
    the time at most; null: at the end only."""
    keep: Annotated[Literal["best", "last"], OnResume.LATER] = "best"
    """Weights that the artifact holds: those of the lowest validation loss, or of the last step. Without validations
    before the end, `best` is the last."""
    early_stopping_patience: Annotated[Count | None, OnResume.LATER] = None
    """Stop the stage after this many validations in a row that are no better than the best; null: train to the end."""
    num_sample_answers: Annotated[int, Field(ge=0), OnResume.FREE] = 4
    """Validation questions answered at each validation."""
    save_steps: Annotated[Count | Literal["auto"], OnResume.FREE] = "auto"
    """Optimizer steps from one checkpoint to the next; `auto`: some minutes of work, so that saving takes little of the
    time. The best by validation loss, and the last step, are saved in any case."""
    save_total_limit: Annotated[int, Field(ge=2), OnResume.FREE] = 2
    """Checkpoints that are kept; the best by validation loss and the last are always among them."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.template == "plain" and self.data.merge_turns:
            raise ValueError("template plain takes one caption an image; take data.merge_turns out or change template")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps must be -1 or at least 1")
        if self.max_steps > MAX_STEPS:
            raise ValueError(
                f"max_steps {self.max_steps:,} is more than {MAX_STEPS:,}; leave it out to train for num_train_epochs"
            )
        if self.early_stopping_patience is not None and (self.data.validation is None or self.eval_steps is None):
            missing = "data.validation" if self.data.validation is None else "eval_steps"
            raise ValueError(f"early_stopping_patience needs {missing}: it counts validations during training")
        if self.num_train_epochs > MAX_EPOCHS:
            raise ValueError(
                f"num_train_epochs {self.num_train_epochs:g} is more than {MAX_EPOCHS:,}; one to ten are usual"
            )
        if self.learning_rate < MIN_RATE:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is so small that fp32 weights cannot change; LLaVA's are 1e-3 "
                "(align) and 2e-4 (instruct)"
            )
        return self


class AlignSettings(StageSettings):
    """Stage 1: the projector alone, on captions."""

    template: Annotated[Literal["plain", "vicuna_v1", "chatml"], OnResume.FORM] = "plain"
    """Form of the captions; `plain`: the image, then the caption."""
    learning_rate: Annotated[Positive, OnResume.LATER] = 1e-3
    """Highest learning rate of the projector."""


class InstructSettings(StageSettings):
    """Stage 2: LoRA and the projector, on conversations."""

    template: Annotated[Literal["vicuna_v1", "chatml"], OnResume.FORM] = "vicuna_v1"
    """Form of the conversations."""
    learning_rate: Annotated[Positive, OnResume.LATER] = 2e-4
    """Highest learning rate of the LoRA."""
    mm_projector_lr: Annotated[Positive | None, OnResume.LATER] = 2e-5
    """Learning rate of the projector; null: that of the rest."""
