"""The recipe: everything that decides a run, typed. Reading and writing the file is in `recipe_file`.

Names are those that users know from Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

StageName = Literal["align", "instruct"]

AspectRatio = Literal["pad", "square"]
"""How an image becomes a square; see ImageSettings."""

Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Share = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LocalPath = Annotated[Path, Field(strict=False)]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class BaseModelSettings(Settings):
    """The model to start from: a converted LLaVA, or the parts to make a fresh one of."""

    model_name_or_path: str | None = None
    """A LLaVA in the llava-hf layout: hub id or directory."""
    revision: str | None = None
    """Commit, branch or tag of the hub repository `model_name_or_path`."""
    language_model: str | None = None
    """A Llama-family language model: hub id or directory."""
    gguf_file: str | None = None
    """Name of the GGUF file in `language_model`, if it is one."""
    vision_tower: str | None = None
    """A CLIP vision tower: hub id, directory, or `package:vision_tower`, the small one that ships with the package."""
    mm_projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    projector_init: Literal["llava", "embeddings"] = "llava"
    """Where a fresh one starts: as in LLaVA, or with outputs among the language model's word embeddings."""
    vision_feature_layer: int = -2
    """Hidden state of the vision tower that is projected."""
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """`default` drops the class token, `full` keeps it."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        parts = [name for name in ("language_model", "vision_tower", "gguf_file") if getattr(self, name)]
        if self.model_name_or_path and parts:
            raise ValueError(f"model_name_or_path and {', '.join(parts)} exclude each other")
        if not self.model_name_or_path and not (self.language_model and self.vision_tower):
            raise ValueError("give model_name_or_path, or both language_model and vision_tower")
        if self.revision and not self.model_name_or_path:
            raise ValueError("revision is that of model_name_or_path; language_model and vision_tower have none")
        return self


class QuantizationSettings(Settings):
    """Precision of the language model's frozen linear layers."""

    type: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    """Quantise the scales too: 0.4 bits a weight less."""


class AdapterSettings(Settings):
    """LoRA on the language model, in stage `instruct`."""

    type: Literal["lora", "rslora", "dora"] = "lora"
    r: Count = 128
    lora_alpha: Positive = 256.0
    lora_dropout: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the language model's linear layers, such as q_proj."""


class ImageSettings(Settings):
    """How an image becomes a square."""

    image_aspect_ratio: AspectRatio = "pad"
    """`pad` with the mean colour (LLaVA-1.5, stage 2), or `square`: resize and cut the middle out (stage 1)."""


class ColumnSettings(Settings):
    """Columns of a Hugging Face dataset."""

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    messages: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.messages and (self.question or self.answer):
            raise ValueError("messages excludes question and answer")
        if not self.messages and not (self.question and self.answer):
            raise ValueError("give question and answer, or messages")
        return self


class ValidationSettings(Settings):
    """Records held out of training."""

    path: str | None = None
    """A file or data set of the same form as the training data."""
    share: Share | None = None
    """Share of the training records, split by image."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.path is None) == (self.share is None):
            raise ValueError("give path or share")
        return self


class DataSettings(Settings):
    """Where records come from."""

    path: str
    """LLaVA JSON or JSONL; or, with `columns`, a parquet file, a directory or a hub id."""
    image_root: str | None = None
    """Directory of the images; default: that of the data file."""
    split: str = "train"
    name: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    columns: ColumnSettings | None = None
    answer_prompt: str | None = None
    """Text after each question that says what form the answer takes."""
    max_records: Count | None = None
    """Take the first so many records only."""
    validation: ValidationSettings | None = None

    @model_validator(mode="after")
    def _form(self) -> Self:
        is_json = self.path.endswith((".json", ".jsonl"))
        if is_json and self.columns:
            raise ValueError("columns is for parquet and Hugging Face datasets; LLaVA JSON has none")
        if not is_json and not self.columns:
            raise ValueError("columns is needed, since path is not a .json or .jsonl file")
        if is_json and (self.name or self.revision):
            raise ValueError("name and revision are for hub data sets; path is a file")
        held_out = self.validation.path if self.validation else None
        if held_out and held_out.endswith((".json", ".jsonl")) != is_json:
            raise ValueError("validation.path and path must both be LLaVA JSON, or both be read by columns")
        return self


class StageSettings(Settings):
    """What both stages have."""

    data: DataSettings
    template: Literal["plain", "vicuna_v1", "chatml"]
    system: str | None = None
    """Replaces the template's system text."""
    image_aspect_ratio: AspectRatio | None = None
    """Replaces that of `images` in this stage."""
    max_length: Count = 2048
    """Tokens of one conversation, the image's included; text beyond is cut off."""
    packing: Literal["tree", "none"] = "tree"
    """`tree`: questions about one image share its tokens. It changes the speed, never the mathematics."""
    branches_per_tree: Count = 8
    """Most conversations that share one image in one tree."""
    tokens_per_micro_batch: Count = 2048
    """Most tokens of one forward pass."""
    num_train_epochs: Positive = 1.0
    max_steps: int = -1
    """Optimizer steps; -1: as `num_train_epochs` says."""
    batch_size: Count
    """Conversations in one optimizer step, however they are packed."""
    learning_rate: Positive
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.03
    """Share of the steps."""
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    adam_beta1: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.999
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    gradient_checkpointing: bool = False
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    logging_steps: Count = 10
    """Optimizer steps from one line of the log to the next."""
    eval_steps: Count | None = None
    """Optimizer steps from one validation to the next; null: at the end only."""
    num_sample_answers: Annotated[int, Field(ge=0)] = 4
    """Validation questions answered at each validation."""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.tokens_per_micro_batch < self.max_length:
            raise ValueError(
                f"tokens_per_micro_batch {self.tokens_per_micro_batch} is less than max_length {self.max_length}: "
                "a micro-batch must hold the longest conversation"
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps must be -1 or at least 1")
        return self


class AlignSettings(StageSettings):
    """Stage 1: the projector alone, on captions."""

    template: Literal["plain", "vicuna_v1", "chatml"] = "plain"
    batch_size: Count = 256
    learning_rate: Positive = 1e-3


class InstructSettings(StageSettings):
    """Stage 2: LoRA and the projector, on conversations."""

    template: Literal["vicuna_v1", "chatml"] = "vicuna_v1"
    batch_size: Count = 128
    learning_rate: Positive = 2e-4
    mm_projector_lr: Positive | None = 2e-5
    """Learning rate of the projector; null: that of the rest."""


class StagesSettings(Settings):
    """The stages of a run, in the order in which they run."""

    align: AlignSettings | None = None
    instruct: InstructSettings | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.align is None and self.instruct is None:
            raise ValueError("give align, instruct, or both")
        return self


class EvaluationSettings(Settings):
    """Questions to answer after training, with the base and the tuned model."""

    data: DataSettings
    max_new_tokens: Count = 16
    batch_size: Count = 64
    """Questions decoded at a time."""
    blind_questions: Count | None = None
    """Questions asked once more with the mean colour in place of the image; null: none."""

    @model_validator(mode="after")
    def _no_split(self) -> Self:
        if self.data.validation:
            raise ValueError("data.validation has no meaning here")
        return self


class Recipe(Settings):
    """A whole run."""

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    output_dir: LocalPath | None = None
    """Directory of the run; null: runs/<name> below the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 on CUDA, fp32 on a CPU."""
    report_to: Literal["none"] | list[str] = "none"
    """Trackers of transformers, such as [tensorboard]."""
    start_from: LocalPath | None = None
    """Artifact whose projector, and LoRA if it has one, the first stage starts from."""
    base: BaseModelSettings
    quantization: QuantizationSettings = QuantizationSettings()
    adapter: AdapterSettings = AdapterSettings()
    images: ImageSettings = ImageSettings()
    stages: StagesSettings
    evaluation: EvaluationSettings | None = None

    @property
    def stage_names(self) -> list[StageName]:
        """The stages to run, in order."""
        names: list[StageName] = ["align", "instruct"]
        return [name for name in names if getattr(self.stages, name) is not None]

    def stage(self, name: StageName) -> AlignSettings | InstructSettings:
        """Settings of one stage; KeyError if the recipe has none of that name."""
        settings = self.stages.align if name == "align" else self.stages.instruct
        if settings is None:
            raise KeyError(name)
        return settings

    @property
    def resolved_output_dir(self) -> Path:
        """Directory of the run."""
        return self.output_dir or Path.cwd() / "runs" / self.name

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, as they stand in YAML."""
        return self.model_dump(mode="json")
