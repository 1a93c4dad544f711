"""The recipe: everything that decides a run, typed. Its stages are in `recipe_stages`, the file in `recipe_file`.

Names are those that users know from Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from lora_llava.recipe.fields import Count, Form, Names, OnResume, Positive, Settings
from lora_llava.recipe.stages import AlignSettings, AspectRatio, DataSettings, InstructSettings, StageName

_TRACKERS = Form("none or a list of trackers, such as [tensorboard]")
_LAYERS = Form("'all-linear' or a list of layers, such as [q_proj, v_proj]")
_NAME = Form("a name of a-z, 0-9, _ and -, such as my-model_2")


def _one_as_list(value: Any) -> Any:
    """Take the name of one tracker for a list of it."""
    return [value] if isinstance(value, str) and value != "none" else value


MetricSetting = Literal["auto", "exact_match", "vqa_v2", "token_f1"]
"""How answers are scored; see `evaluation.metrics`."""
LocalPath = Annotated[Path, Field(strict=False)]


class BaseModelSettings(Settings):
    """The model to start from: a converted LLaVA, or the parts to make a fresh one of."""

    example = "{model_name_or_path: DIRECTORY} or {language_model: DIRECTORY, vision_tower: DIRECTORY}"

    model_name_or_path: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH_OR_ID] = None
    """A LLaVA in the llava-hf layout: hub id or directory."""
    revision: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Commit, branch or tag of the hub repository `model_name_or_path`."""
    language_model: Annotated[str | None, OnResume.FIXED, Names.PATH_OR_ID] = None
    """A Llama-family language model: hub id or directory."""
    gguf_file: Annotated[str | None, OnResume.FIXED, Names.TEXT] = None
    """Name of the GGUF file in `language_model`, if it is one."""
    vision_tower: Annotated[str | None, OnResume.FIXED, Names.PATH_OR_ID] = None
    """A CLIP vision tower: hub id, directory, or `package:vision_tower`, the small one that ships with the package."""
    mm_projector_type: Annotated[Literal["mlp2x_gelu", "linear"], OnResume.FIXED] = "mlp2x_gelu"
    """Shape of a fresh projector: two layers with GELU, as in LLaVA-1.5, or one."""
    projector_init: Annotated[Literal["llava", "embeddings"], OnResume.FIXED] = "llava"
    """Where a fresh one starts: as in LLaVA, or with outputs among the language model's word embeddings."""
    vision_feature_layer: Annotated[int, OnResume.FIXED] = -2
    """Hidden state of the vision tower that is projected."""
    vision_feature_select_strategy: Annotated[Literal["default", "full"], OnResume.FIXED] = "default"
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

    type: Annotated[Literal["nf4", "none"], OnResume.FORM] = "nf4"
    """`nf4`: 4 bits, as QLoRA does; `none`: the compute precision."""
    double_quant: Annotated[bool, OnResume.FORM] = True
    """Quantise the scales too: 0.4 bits a weight less."""
    keep_dequantized: Annotated[bool | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Hold the quantised weights in the compute precision: the same numbers, faster, for four times their memory.
    `auto`: where there is memory to spare."""


class AdapterSettings(Settings):
    """LoRA on the language model, in stage `instruct`."""

    type: Annotated[Literal["lora", "rslora", "dora"], OnResume.FIXED] = "lora"
    """LoRA, rank-stabilized LoRA, or DoRA."""
    r: Annotated[Count, OnResume.FIXED] = 128
    """Rank: more of it learns more, and takes more memory."""
    lora_alpha: Annotated[Positive, OnResume.FIXED] = 256.0
    """Scale of what the LoRA adds: lora_alpha / r, or / sqrt(r) for rslora."""
    lora_dropout: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.0
    """Share of the LoRA's inputs that is dropped in training."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], _LAYERS, OnResume.FIXED
    ] = "all-linear"
    """Names of the language model's linear layers, such as q_proj."""


class ImageSettings(Settings):
    """How an image becomes a square."""

    image_aspect_ratio: Annotated[AspectRatio, OnResume.FORM] = "pad"
    """`pad` with the mean colour (LLaVA-1.5, stage 2), or `square`: resize and cut the middle out (stage 1)."""


class StagesSettings(Settings):
    """The stages of a run, in the order in which they run."""

    example = "{align: {data: {path: FILE}}, instruct: {data: {path: FILE}}}, or one of the two"

    align: AlignSettings | None = None
    instruct: InstructSettings | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.align is None and self.instruct is None:
            raise ValueError("give align, instruct, or both")
        return self


class EvaluationSettings(Settings):
    """Questions to answer after training, with the base and the tuned model."""

    example = "{data: {path: FILE}}"

    data: DataSettings
    max_new_tokens: Annotated[Count, OnResume.AGAIN] = 16
    """Tokens of an answer; longer answers are cut, and counted."""
    batch_size: Annotated[Count, OnResume.AGAIN] = 64
    """Questions decoded at a time."""
    metric: Annotated[MetricSetting, OnResume.AGAIN] = "auto"
    """How answers are scored; `auto`: by exact match, or by token F1 where at least half of the references have more
    than five words. See docs/evaluation.md."""
    by: Annotated[list[str], OnResume.AGAIN] = Field(default_factory=list)
    """Keys or columns of the data, such as [patient, modality], by which accuracies are given too."""
    base_questions: Annotated[Count | None, OnResume.AGAIN] = 300
    """Questions that the base is asked, of whole images spread over the set; null: all."""
    blind_questions: Annotated[Count | None, OnResume.AGAIN] = None
    """Questions asked once more with the mean colour in place of the image; null: none."""

    @model_validator(mode="after")
    def _asked_as_they_are(self) -> Self:
        if self.data.validation or self.data.merge_turns:
            key = "validation" if self.data.validation else "merge_turns"
            raise ValueError(f"data.{key} has no meaning here; remove it")
        return self


class CardSettings(Settings):
    """What the model card says that the run cannot know; nothing here changes what is trained."""

    license: Annotated[str | None, Names.TEXT] = None
    """The Hub's id of the licence under which the trained weights are given, such as apache-2.0 or llama2."""
    license_name: Annotated[str | None, Names.TEXT] = None
    """With `license: other`: its name."""
    base_license: Annotated[str | None, Names.TEXT] = None
    """Licence of the base, in words."""
    data_license: Annotated[str | None, Names.TEXT] = None
    """Licences of the data, in words."""
    intended_use: Annotated[str | None, Names.TEXT] = None
    """What the model is for."""
    limits: Annotated[str | None, Names.TEXT] = None
    """What it cannot do, and where it fails."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the model on the Hub."""


class Recipe(Settings):
    """A whole run."""

    version: Annotated[Literal[1], OnResume.FIXED] = 1
    """Version of the recipe's form."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$"), _NAME, OnResume.FIXED]
    """Name of the run, in its directory, its trackers and the card."""
    output_dir: Annotated[LocalPath | None, OnResume.FREE, Names.PATH] = None
    """Directory of the run; null: runs/<name> below the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32), OnResume.ORDER] = 42
    """Seed of the order of the records, of validation shares, and of fresh weights."""
    precision: Annotated[Literal["auto", "bf16", "fp32"], OnResume.RESOLVED] = "auto"
    """`auto`: bf16 on CUDA, fp32 on a CPU."""
    attn_implementation: Annotated[Literal["auto", "sdpa", "flex_attention"], OnResume.RESOLVED] = "auto"
    """Attention of the language model in training; `auto`: on CUDA the faster, both being tried; on a CPU sdpa."""
    report_to: Annotated[Literal["none"] | list[str], BeforeValidator(_one_as_list), _TRACKERS, OnResume.FREE] = "none"
    """Trackers of transformers, such as [tensorboard]."""
    start_from: Annotated[LocalPath | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Artifact whose projector, and LoRA if it has one, the first stage starts from."""
    base: BaseModelSettings
    quantization: QuantizationSettings = QuantizationSettings()
    adapter: AdapterSettings = AdapterSettings()
    images: ImageSettings = ImageSettings()
    stages: StagesSettings
    evaluation: Annotated[EvaluationSettings | None, OnResume.AGAIN] = None
    card: Annotated[CardSettings, OnResume.CARD] = CardSettings()

    @model_validator(mode="after")
    def _seen_alike(self) -> Self:
        trained = self.stage(self.stage_names[-1]).data.window
        if self.evaluation is not None and self.evaluation.data.window != trained:
            raise ValueError(
                f"evaluation.data.window {self.evaluation.data.window} is not that of the last stage, {trained}: "
                "images would be asked about in other shades than they were trained in; write the same"
            )
        return self

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
