"""The recipe: everything that decides a run, typed. Its stages are in `recipe_stages`, the file in `recipe_file`.

Names are those that users know from Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from lora_llava.recipe_stages import (
    AlignSettings,
    AspectRatio,
    Count,
    DataSettings,
    InstructSettings,
    Positive,
    Settings,
    StageName,
)

LocalPath = Annotated[Path, Field(strict=False)]


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
    keep_dequantized: bool | Literal["auto"] = "auto"
    """Hold the quantised weights in the compute precision: the same numbers, faster, for four times their memory.
    `auto`: where there is memory to spare."""


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
    def _asked_as_they_are(self) -> Self:
        if self.data.validation or self.data.merge_turns:
            key = "validation" if self.data.validation else "merge_turns"
            raise ValueError(f"data.{key} has no meaning here; remove it")
        return self


class CardSettings(Settings):
    """What the model card says that the run cannot know; nothing here changes what is trained."""

    license: str | None = None
    """The Hub's id of the licence under which the trained weights are given, such as apache-2.0 or llama2."""
    license_name: str | None = None
    """With `license: other`: its name."""
    base_license: str | None = None
    """Licence of the base, in words."""
    data_license: str | None = None
    """Licences of the data, in words."""
    intended_use: str | None = None
    limits: str | None = None
    tags: list[str] = Field(default_factory=list)


class Recipe(Settings):
    """A whole run."""

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    output_dir: LocalPath | None = None
    """Directory of the run; null: runs/<name> below the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 on CUDA, fp32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "flex_attention"] = "auto"
    """Attention of the language model in training; `auto`: on CUDA the faster, both being tried; on a CPU sdpa."""
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
    card: CardSettings = CardSettings()

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
