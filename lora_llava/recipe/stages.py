"""The settings of a stage and its data, typed. `settings` has the recipe that contains them.

Names follow Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from lora_llava.recipe.columns import ColumnSettings, Condition, EncodingName, QuestionColumns, Template
from lora_llava.recipe.fields import (
    FULL_WINDOW,
    RECORD_FILES,
    SOURCE_FORM,
    WINDOW_FORM,
    Count,
    Form,
    Names,
    NotNegative,
    OnResume,
    Positive,
    Settings,
    Share,
    SourceName,
    Window,
    check_window,
    key_of_mix,
)

StageName = Literal["align", "instruct", "prefer"]

AspectRatio = Literal["pad", "square"]
"""How an image is made square; see `ImageSettings`."""

_MAX_EPOCHS = 1000
"""Maximum epochs of a stage: every step is planned before the first."""
_MAX_STEPS = 1_000_000
"""Maximum optimizer steps of a stage, for the same reason; stage 2 of LLaVA-1.5 takes 5,200."""
_MIN_RATE = 1e-9
"""Minimum learning rate: an fp32 weight of 0.01, typical of a projector, does not change by less than 5e-10."""

GradientCheckpointing = bool | Literal["selective"]
"""What the backward pass recomputes: nothing (false), cheap ops (`selective`), or whole layers (true)."""


class ValidationSettings(Settings):
    """Records held out of training for validation."""

    example = "{share: 0.1} or {path: FILE}"

    path: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH_OR_ID] = None
    """A file or dataset in the same format as the training data."""
    share: Annotated[Share | None, OnResume.VALIDATION] = None
    """Fraction of the training records, split by image, and by `data.group` if set."""
    exclude: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Records of `path` to leave out, in the format of `data.exclude`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.path is None) == (self.share is None):
            raise ValueError("give path or share")
        if self.exclude and self.path is None:
            raise ValueError("exclude applies to path; for share, use data.exclude")
        return self


class DataSettings(Settings):
    """Where the records come from."""

    example = "{path: FILE}"

    path: Annotated[str, OnResume.SAME_CONTENT, Names.PATH_OR_ID]
    """A file (JSON, JSONL, CSV, TSV, XLSX, parquet), a directory, or a Hub id. Forms that are not known need `columns`;
    see docs/data_forms.md."""
    image_root: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Directory that image paths are relative to; null: the directory of the data file."""
    image_roots: Annotated[list[str], OnResume.SAME_CONTENT, Names.PATH] = Field(default_factory=list)
    """Further directories with images: those that links in `image_root` lead to, or that absolute paths name."""
    split: Annotated[str, OnResume.SAME_CONTENT, Names.TEXT] = "train"
    """Split of the dataset."""
    name: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Configuration of a Hub dataset, or sheet of an .xlsx file; null: the first sheet."""
    revision: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Commit, branch or tag of a Hub dataset."""
    encoding: Annotated[
        EncodingName | None, Form("an encoding, such as utf-16 or cp1252, or null"), OnResume.SAME_CONTENT
    ] = None
    """Encoding of a text file; null: UTF-8, or UTF-16 if it says so, or Windows' Latin encoding where it is certain."""
    records: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Dotted path to the list of records in a .json file, such as `data`; null: the top level. A mapping of records
    gives each its key as `id`."""
    each: Annotated[str | list[str] | None, Form("a column, a list of columns or null"), OnResume.SAME_CONTENT] = None
    """Column of lists: read one record for each element, which adds its keys to those of the row. Several columns have
    lists of one length, read side by side."""
    where: Annotated[
        dict[str, Condition] | None,
        Form("a mapping such as {split: train, language: [en, de]}, or null"),
        OnResume.SAME_CONTENT,
    ] = None
    """Read only records whose column has this value, or one of these."""
    columns: ColumnSettings | None = None
    answer_prompt: Annotated[str | None, OnResume.FORM, Names.TEXT] = None
    """Text appended to each question that states the format of the answer."""
    max_records: Annotated[Count | None, OnResume.ORDER] = None
    """Use only the first N records."""
    group: Annotated[Template | None, OnResume.ORDER, Names.TEXT] = None
    """Key, column or template, such as patient, whose values are never split between training and validation."""
    on_bad_record: Annotated[Literal["error", "skip"], OnResume.SAME_CONTENT] = "error"
    """What to do with an unusable record. `error`: stop; `skip`: leave it out, and open every image before the run."""
    max_bad_records: Annotated[Count, OnResume.SAME_CONTENT] = 10
    """With `on_bad_record: skip`: abort after more than this many."""
    exclude: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """JSON Lines file of records to leave out, by number, as `lora-llava check` writes it."""
    merge_turns: Annotated[Annotated[int, Field(ge=2)] | None, OnResume.ORDER] = None
    """Merge records about the same image into conversations of at most N questions, as LLaVA-1.5 does; null: do not
    merge. Validation records are never merged."""
    window: Annotated[Window | None, WINDOW_FORM, OnResume.FORM] = None
    """Overrides `images.window` for these records."""
    source: Annotated[SourceName | None, SOURCE_FORM, OnResume.FREE] = None
    """Of several sources: its name in the log, in reports and predictions, such as replay; null: that of its path."""
    weight: Annotated[Positive | None, OnResume.ORDER] = None
    """Of several sources: how often its training records are used in an epoch, such as 2 or 0.5; null: once."""
    share: Annotated[Share | None, OnResume.ORDER] = None
    """Of several sources: the fraction of an epoch that its training records make up, such as 0.2 for general data that
    keep a model from forgetting. They are drawn, or repeated, to that number."""
    others: Annotated[list[DataSettings], Form("a list of sources"), OnResume.SAME_CONTENT] = Field(
        default_factory=list
    )
    """Further sources of the stage. Several sources are written as a list, which fills this:
    `data: [{path: A}, {path: B, share: 0.2}]`."""
    validation: ValidationSettings | None = None

    @property
    def sources(self) -> list[DataSettings]:
        """The source itself and the others, each alone."""
        return [self.model_copy(update={"others": []}), *self.others] if self.others else [self]

    @property
    def holds_out(self) -> bool:
        """Whether a source has validation records."""
        return any(source.validation is not None for source in (self, *self.others))

    def with_window(self, window: Window | None) -> Self:
        """Return the settings with this window in all sources."""
        others = [other.model_copy(update={"window": window}) for other in self.others]
        return self.model_copy(update={"window": window, "others": others})

    @property
    def gray_window(self) -> tuple[float, float] | None:
        """The values that become black and white; None: the range of each image."""
        if self.window == "full":
            return FULL_WINDOW
        return (self.window[0], self.window[1]) if isinstance(self.window, list) else None

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        """Turn a list of sources into the first, with the rest as `others`."""
        if isinstance(value, list) and value and all(isinstance(source, dict) for source in value):
            return {**value[0], "others": value[1:]} if len(value) > 1 else value[0]
        return value

    @model_validator(mode="after")
    def _mix(self) -> Self:
        if not self.others:
            return self
        if any(source.others for source in self.others):
            raise ValueError("others: a source has no others; write all sources as one list")
        sources = self.sources
        for source in sources:
            if source.weight is not None and source.share is not None:
                raise ValueError(f"{source.path}: weight and share exclude each other; give one of them")
            if source.window != self.window:
                raise ValueError(f"{source.path}: window must be the same for all sources of a stage")
        names = [source.source for source in sources if source.source is not None]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"source: two sources are named {repeated}; give each another name")
        shares = [source.share for source in sources if source.share is not None]
        if sum(shares) >= 1 or len(shares) == len(sources):
            raise ValueError(f"share: the sources have {sum(shares):g} in all; leave a rest to one without a share")
        return self

    @model_validator(mode="after")
    def _form(self) -> Self:
        if self.each == []:
            raise ValueError("each: is an empty list; name a column of lists, or remove it")
        check_window(self.window)
        is_sheet = self.path.endswith(".xlsx")
        if self.path.endswith(RECORD_FILES) and ((self.name and not is_sheet) or self.revision):
            raise ValueError("name and revision apply to Hub datasets; path is a file")
        if self.records and not self.path.endswith(".json"):
            raise ValueError("records applies to .json files, which hold the list at that path")
        if self.encoding and (is_sheet or not self.path.endswith(RECORD_FILES)):
            raise ValueError("encoding applies to text files: .json, .jsonl, .csv and .tsv; remove it")
        return self


class QuestionSettings(DataSettings):
    """Where questions to answer come from."""

    columns: QuestionColumns | None = None


class StageSettings(Settings):
    """Settings that all stages have."""

    trains_lora: ClassVar[bool]
    """Whether the stage trains a LoRA on the language model; every stage trains the projector."""
    llava_batch_size: ClassVar[int]
    """Conversations per optimizer step in LLaVA-1.5; the maximum for `batch_size: auto`."""
    batch_size_of: ClassVar[str] = "LLaVA"
    """Whose batch size that is."""
    trains_on_pairs: ClassVar[bool] = False
    """Whether a record is a pair of a chosen and a rejected answer."""
    data: DataSettings
    template: Annotated[Literal["plain", "vicuna_v1", "chatml"], OnResume.FORM]
    """Chat format of questions and answers."""
    system: Annotated[str | None, OnResume.FORM, Names.TEXT] = None
    """Replaces the system prompt of the template."""
    image_aspect_ratio: Annotated[AspectRatio | None, OnResume.FORM] = None
    """Overrides `images.image_aspect_ratio` for this stage."""
    max_length: Annotated[Count, OnResume.ORDER] = 2048
    """Maximum tokens per conversation, image tokens included; longer text is cut off."""
    packing: Annotated[Literal["tree", "none"], OnResume.ORDER] = "tree"
    """`tree`: questions about the same image share its tokens. Affects speed only, not the loss."""
    branches_per_tree: Annotated[Count, OnResume.ORDER] = 8
    """Maximum conversations that share one image in a tree."""
    tokens_per_micro_batch: Annotated[Count | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Maximum tokens per forward pass, at least those of the longest conversation. `auto`, here and below: derived from
    the available memory."""
    num_train_epochs: Annotated[Positive, OnResume.ORDER] = 1.0
    """Number of passes over the records."""
    max_steps: Annotated[int, OnResume.ORDER] = -1
    """Number of optimizer steps; -1: from `num_train_epochs`."""
    batch_size: Annotated[Count | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Conversations, or pairs, per optimizer step, independent of packing. `auto`: LLaVA-1.5's (align 256, instruct
    128) or mDPO's (prefer 32), or the largest smaller power of two that gives 30 steps."""
    learning_rate: Annotated[Positive, OnResume.LATER]
    """Peak learning rate, reached after warmup."""
    lr_scheduler_type: Annotated[Literal["cosine", "linear", "constant", "constant_with_warmup"], OnResume.LATER] = (
        "cosine"
    )
    """Learning rate schedule after warmup."""
    warmup_ratio: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.03
    """Fraction of the steps (at least one step) over which the learning rate rises to `learning_rate`."""
    weight_decay: Annotated[NotNegative, OnResume.LATER] = 0.0
    """Weight decay of AdamW; not applied to biases and norms."""
    max_grad_norm: Annotated[Positive, OnResume.LATER] = 1.0
    """Gradients are clipped to this norm."""
    adam_beta1: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.9
    """AdamW's decay rate of the gradient average."""
    adam_beta2: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.999
    """AdamW's decay rate of the squared gradient average."""
    on_non_finite: Annotated[Literal["error", "skip"], OnResume.FREE] = "error"
    """What to do when a loss or gradient is NaN or infinite. `error`: stop before the step; `skip`: skip the step."""
    max_non_finite_steps: Annotated[Count, OnResume.FREE] = 3
    """With `on_non_finite: skip`: abort after more than this many."""
    optim: Annotated[
        Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"], OnResume.RESOLVED
    ] = "auto"
    """Optimizer. `auto`: AdamW with fp32 states if it fits."""
    gradient_checkpointing: Annotated[GradientCheckpointing | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Activation checkpointing, which trades time for memory. `selective`: recompute cheap ops, keep matmuls and
    attention (fused layers do so anyway); true: recompute whole layers."""
    gradient_checkpointing_layers: Annotated[int, Field(ge=0), OnResume.RESOLVED] = 0
    """With `selective`: recompute the first N layers entirely."""
    cuda_graphs: Annotated[Literal["off", "auto"], OnResume.RESOLVED] = "auto"
    """`auto`: on CUDA with flex_attention, decoder layers run as CUDA graphs where the plan is faster with them, since
    kernels take longer to launch than to compute, and a trial before the first step gives the same gradients in less
    time."""
    cache_image_features: Annotated[Literal["off", "memory", "disk"], OnResume.ROUNDING] = "off"
    """Compute the vision tower's features once per image instead of in every epoch; `disk` stores them in the run's
    directory. Pays off from the second epoch."""
    dataloader_num_workers: Annotated[Annotated[int, Field(ge=0, le=1_024)] | Literal["auto"], OnResume.FREE] = "auto"
    """Worker processes that load images and build batches ahead of the step; 0: none. `auto`: two to four on CUDA, none
    on a CPU."""
    logging_steps: Annotated[Count, OnResume.FREE] = 10
    """Optimizer steps between log lines; fewer in a short stage, which gets at least ten lines."""
    eval_steps: Annotated[Count | Literal["auto"] | None, OnResume.FREE] = "auto"
    """Optimizer steps between validations. `auto`: ten validations, or fewer so that they take at most a tenth of the
    time; null: only at the end."""
    keep: Annotated[Literal["best", "last"], OnResume.LATER] = "best"
    """Weights to save in the artifact: those with the lowest validation loss, or those of the last step. Without
    validations before the end, `best` means the last."""
    early_stopping_patience: Annotated[Count | None, OnResume.LATER] = None
    """Stop the stage after this many validations without improvement; null: train to the end."""
    num_sample_answers: Annotated[int, Field(ge=0), OnResume.FREE] = 4
    """Validation questions to answer at each validation."""
    save_steps: Annotated[Count | Literal["auto"], OnResume.FREE] = "auto"
    """Optimizer steps between checkpoints. `auto`: every few minutes, so that saving takes little of the time. The best
    step by validation loss and the last step are always saved."""
    save_total_limit: Annotated[int, Field(ge=2), OnResume.FREE] = 2
    """Number of checkpoints to keep, always including the best by validation loss and the last."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.data.others and (key := key_of_mix(self.data)) is not None:
            raise ValueError(f"data.{key} is for one of several sources; write data as a list of them, or remove it")
        if self.template == "plain" and self.data.merge_turns:
            raise ValueError("template plain takes one caption per image; remove data.merge_turns or change template")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps must be -1 or at least 1")
        if self.max_steps > _MAX_STEPS:
            raise ValueError(
                f"max_steps {self.max_steps:,} is more than {_MAX_STEPS:,}; remove it to train for num_train_epochs"
            )
        if self.early_stopping_patience is not None and (not self.data.holds_out or self.eval_steps is None):
            missing = "eval_steps" if self.data.holds_out else "data.validation"
            raise ValueError(f"early_stopping_patience needs {missing}: it counts validations during training")
        if self.num_train_epochs > _MAX_EPOCHS:
            raise ValueError(
                f"num_train_epochs {self.num_train_epochs:g} is more than {_MAX_EPOCHS:,}; one to ten are usual"
            )
        if self.learning_rate < _MIN_RATE:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is too small to change fp32 weights; LLaVA uses 1e-3 (align) "
                "and 2e-4 (instruct)"
            )
        return self


class AlignSettings(StageSettings):
    """Stage 1: train the projector on captions."""

    trains_lora = False
    llava_batch_size = 256
    template: Annotated[Literal["plain", "vicuna_v1", "chatml"], OnResume.FORM] = "plain"
    """Chat format of the captions; `plain`: the image, then the caption."""
    learning_rate: Annotated[Positive, OnResume.LATER] = 1e-3
    """Peak learning rate of the projector."""


class InstructSettings(StageSettings):
    """Stage 2: train a LoRA and the projector on conversations."""

    trains_lora = True
    llava_batch_size = 128
    template: Annotated[Literal["vicuna_v1", "chatml"], OnResume.FORM] = "vicuna_v1"
    """Chat format of the conversations."""
    learning_rate: Annotated[Positive, OnResume.LATER] = 2e-4
    """Peak learning rate of the LoRA."""
    mm_projector_lr: Annotated[Positive | None, OnResume.LATER] = 2e-5
    """Peak learning rate of the projector; null: `learning_rate`."""


PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]


class PreferSettings(InstructSettings):
    """Stage 3: train LoRA and projector to prefer the chosen answer of each pair to the rejected one."""

    llava_batch_size = 32
    batch_size_of = "mDPO"
    trains_on_pairs = True
    packing: Annotated[Literal["tree"], OnResume.ORDER] = "tree"
    """The two answers of a pair share image, question, and their common beginning."""
    learning_rate: Annotated[Positive, OnResume.LATER] = 1e-5
    """Peak learning rate of the LoRA; 1e-5 as in mDPO (arXiv 2406.11839)."""
    mm_projector_lr: Annotated[Positive | None, OnResume.LATER] = 2e-6
    """Peak learning rate of the projector; null: `learning_rate`."""
    beta: Annotated[Positive, OnResume.LATER] = 0.1
    """Strength of the tie to the model that the stage starts from; a reward is beta times the change of an answer's
    log-probability."""
    loss: Annotated[PreferenceLoss, OnResume.LATER] = "sigmoid"
    """Loss of the margin between the rewards. `sigmoid`: DPO (arXiv 2305.18290); `ipo`: IPO (arXiv 2310.12036), per
    token; `hinge`: SLiC (arXiv 2305.10425)."""
    sft_weight: Annotated[NotNegative, OnResume.LATER] = 0.0
    """Weight of an added loss that keeps the chosen answer likely: its mean cross-entropy per token, as in RPO (arXiv
    2404.19733)."""
    label_smoothing: Annotated[FiniteFloat, Field(ge=0, lt=0.5), OnResume.LATER] = 0.0
    """With `loss: sigmoid`: assumed fraction of pairs whose answers are swapped (conservative DPO)."""

    @model_validator(mode="after")
    def _of_pairs(self) -> Self:
        if self.data.merge_turns:
            raise ValueError("data.merge_turns joins conversations, and prefer trains on pairs; remove it")
        columns = self.data.columns
        if columns is not None and columns.rejected is None:
            raise ValueError(
                "data.columns names no rejected answers; name them: {image: COLUMN, question: COLUMN, chosen: COLUMN, "
                "rejected: COLUMN}"
            )
        return self


STAGES: dict[StageName, type[StageSettings]] = {
    "align": AlignSettings,
    "instruct": InstructSettings,
    "prefer": PreferSettings,
}
"""The stages in the order in which a run trains them."""


def trains_lora(stage: str) -> bool:
    """Tell whether a stage, by its name in a recipe or a manifest, trains a LoRA."""
    return any(name == stage and settings.trains_lora for name, settings in STAGES.items())
