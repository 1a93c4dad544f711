"""The recipe: every setting of a run, typed. `stages` has the settings of a stage, `file` the YAML.

Names follow Hugging Face, PEFT and LLaVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from lora_llava.recipe.choices import MetricSetting
from lora_llava.recipe.fields import (
    KEYS_OF_MIX,
    WINDOW_FORM,
    Count,
    Form,
    Names,
    OfNewModel,
    OnResume,
    Positive,
    Settings,
    Window,
    check_window,
    key_of_mix,
)
from lora_llava.recipe.stages import (
    STAGES,
    AlignSettings,
    AspectRatio,
    DataSettings,
    InstructSettings,
    PreferSettings,
    StageName,
    StageSettings,
)

_TRACKERS = Form("none or a list of trackers, such as [tensorboard]")
_LAYERS = Form("'all-linear' or a list of layers, such as [q_proj, v_proj]")
_NAME = Form("a name of a-z, 0-9, _ and -, such as my-model_2")


def _name_as_list(value: Any) -> Any:
    """Turn the name of a single tracker into a list."""
    return [value] if isinstance(value, str) and value != "none" else value


_LocalPath = Annotated[Path, Field(strict=False)]

PROJECTOR_ACTIVATIONS = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""By `mm_projector_type`: `projector_hidden_act` in config.json."""


def _with_window(content: dict[str, Any], window: Any) -> dict[str, Any]:
    """Return the content of a recipe in which all data that set no window have this one."""

    def filled(section: Any) -> Any:
        if not isinstance(section, dict) or "data" not in section:
            return section
        data = section["data"]
        return {**section, "data": [of(source) for source in data] if isinstance(data, list) else of(data)}

    def of(source: Any) -> Any:
        is_open = isinstance(source, dict) and source.get("window") is None
        return {**source, "window": window} if is_open else source

    stages = content.get("stages")
    if isinstance(stages, dict):
        content = {**content, "stages": {name: filled(stage) for name, stage in stages.items()}}
    return {**content, "evaluation": filled(content["evaluation"])} if "evaluation" in content else content


class BaseModelSettings(Settings):
    """The base model: a LLaVA, or a language model and a vision tower to assemble a new one from."""

    example = "{model_name_or_path: DIRECTORY} or {language_model: DIRECTORY, vision_tower: DIRECTORY}"

    model_name_or_path: Annotated[str | None, OnResume.SAME_CONTENT, Names.PATH_OR_ID] = None
    """A LLaVA in the llava-hf layout: Hub id or directory."""
    revision: Annotated[str | None, OnResume.SAME_CONTENT, Names.TEXT] = None
    """Commit, branch or tag of the Hub repository `model_name_or_path`."""
    language_model: Annotated[str | None, OnResume.FIXED, Names.PATH_OR_ID] = None
    """A Llama-family language model: Hub id or directory."""
    gguf_file: Annotated[str | None, OnResume.FIXED, Names.TEXT] = None
    """File name in `language_model`, if the language model is a GGUF file."""
    vision_tower: Annotated[str | None, OnResume.FIXED, Names.PATH_OR_ID] = None
    """A CLIP vision tower: Hub id, directory, or `package:vision_tower`, a small one that ships with the package."""
    mm_projector_type: Annotated[
        Literal["mlp2x_gelu", "linear"], OnResume.FIXED, OfNewModel("projector_hidden_act", "gelu")
    ] = "mlp2x_gelu"
    """Architecture of a new projector: two linear layers with a GELU, as in LLaVA-1.5, or one linear layer."""
    projector_init: Annotated[Literal["llava", "embeddings"], OnResume.FIXED, OfNewModel()] = "llava"
    """Initialization of a new projector: as in LLaVA, or with outputs that match the statistics of the language model's
    word embeddings."""
    vision_feature_layer: Annotated[int, OnResume.FIXED, OfNewModel("vision_feature_layer", -2)] = -2
    """Index of the vision tower's hidden state to project."""
    vision_feature_select_strategy: Annotated[
        Literal["default", "full"], OnResume.FIXED, OfNewModel("vision_feature_select_strategy", "default")
    ] = "default"
    """`default` drops the class token; `full` keeps it."""

    @classmethod
    def of_new_model(cls) -> dict[str, OfNewModel]:
        """Return the settings that apply only to a model assembled from parts, with their notes."""
        notes = ((name, note) for name, field in cls.model_fields.items() for note in field.metadata)
        return {name: note for name, note in notes if isinstance(note, OfNewModel)}

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        parts = [name for name in ("language_model", "vision_tower", "gguf_file") if getattr(self, name)]
        if self.model_name_or_path and parts:
            raise ValueError(f"model_name_or_path and {', '.join(parts)} exclude each other; give one or the other")
        if not self.model_name_or_path and not (self.language_model and self.vision_tower):
            raise ValueError("give model_name_or_path, or both language_model and vision_tower")
        if self.revision and not self.model_name_or_path:
            raise ValueError("revision needs model_name_or_path; language_model and vision_tower have no revision")
        return self


class QuantizationSettings(Settings):
    """Precision of the language model's frozen linear layers."""

    type: Annotated[Literal["nf4", "none"], OnResume.FORM] = "nf4"
    """`nf4`: 4 bits, as in QLoRA; `none`: the compute precision."""
    double_quant: Annotated[bool, OnResume.FORM] = True
    """Quantize the scales too, which saves 0.4 bits per weight."""
    keep_dequantized: Annotated[bool | Literal["auto"], OnResume.RESOLVED] = "auto"
    """Keep the dequantized weights in memory: same results, faster, four times the memory. `auto`: if it fits."""


class AdapterSettings(Settings):
    """LoRA on the language model, in stages `instruct` and `prefer`."""

    type: Annotated[Literal["lora", "rslora", "dora"], OnResume.FIXED] = "lora"
    """LoRA, rank-stabilized LoRA, or DoRA."""
    r: Annotated[int, Field(ge=1, le=65_536), OnResume.FIXED] = 128
    """Rank; a higher rank learns more and needs more memory."""
    lora_alpha: Annotated[Positive, OnResume.FIXED] = 256.0
    """The LoRA update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) for rslora."""
    lora_dropout: Annotated[FiniteFloat, Field(ge=0, lt=1), OnResume.LATER] = 0.0
    """Fraction of the LoRA inputs that is dropped during training."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], _LAYERS, OnResume.FIXED
    ] = "all-linear"
    """Linear layers of the language model to adapt, such as q_proj."""


class ImageSettings(Settings):
    """How an image becomes a square of 8-bit colors."""

    image_aspect_ratio: Annotated[AspectRatio, OnResume.FORM] = "pad"
    """`pad`: pad with the mean color (stage 2 of LLaVA-1.5); `square`: resize and center-crop (stage 1)."""
    window: Annotated[Window, WINDOW_FORM, OnResume.FORM] = "auto"
    """What becomes black and white in gray images of more than 8 bits. `auto`: the lowest and highest value of each
    image; `full`: 0 and 65535; or two values, such as [0, 4095]."""

    @model_validator(mode="after")
    def _low_and_high(self) -> Self:
        check_window(self.window)
        return self


class DistributedSettings(Settings):
    """How the processes of a run with several GPUs share its memory."""

    example = "{shard: true}, or {engine: deepspeed, offload: true}"

    shard: Annotated[bool, OnResume.FREE] = False
    """Keep only a part of the language model's frozen weights on each GPU, and gather those of a layer when it computes
    (FSDP2). Needs several processes; for models that do not fit one GPU, since gathering takes time."""
    engine: Annotated[Literal["torch", "deepspeed"], OnResume.FREE] = "torch"
    """What adds up gradients and updates the trained weights. `deepspeed`: ZeRO-2, with `offload: true`; needs several
    processes and the extra `lora-llava[deepspeed]`."""
    offload: Annotated[bool, OnResume.FREE] = False
    """With `engine: deepspeed`: divide gradients and the optimizer's state between the processes, and keep them in the
    host's memory. Saves up to 12 bytes for each trained weight of a GPU."""

    @model_validator(mode="after")
    def _engine_and_offload(self) -> Self:
        if self.engine == "deepspeed" and not self.offload:
            raise ValueError(
                "engine: deepspeed needs offload: true: with the optimizer on the GPUs, ZeRO-2 adds a copy of the "
                "trained weights, and needs more memory than AdamW in 8 bits (stages.instruct.optim: adamw_8bit)"
            )
        if self.offload and self.engine != "deepspeed":
            raise ValueError(
                "offload: true needs engine: deepspeed; for an optimizer whose state moves to the host when memory is "
                "short, set stages.instruct.optim: paged_adamw_8bit"
            )
        if self.offload and self.shard:
            raise ValueError(
                "shard: true and engine: deepspeed cannot be combined; shard divides the frozen weights, deepspeed "
                "gradients and optimizer: take the one that docs/several_gpus.md names for your GPUs"
            )
        return self


class StagesSettings(Settings):
    """The stages of a run, in order."""

    example = "{align: {data: {path: FILE}}, instruct: {data: {path: FILE}}}, or one of the two, or prefer"

    align: AlignSettings | None = None
    instruct: InstructSettings | None = None
    prefer: PreferSettings | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if all(getattr(self, name) is None for name in STAGES):
            raise ValueError("give align, instruct or prefer, or several of them")
        return self


class EvaluationSettings(Settings):
    """Questions to ask the tuned model and its base after training."""

    example = "{data: {path: FILE}}"

    data: DataSettings
    max_new_tokens: Annotated[Count, OnResume.AGAIN] = 16
    """Maximum tokens per answer; longer answers are cut off and counted."""
    batch_size: Annotated[Count | Literal["auto"], OnResume.AGAIN] = 64
    """Maximum number of questions decoded at once; on CUDA fewer where the memory is short. `auto`: on CUDA as many as
    the free memory holds, up to 256; on a CPU 64. Answers do not depend on it."""
    metric: Annotated[MetricSetting, OnResume.AGAIN] = "auto"
    """How answers are scored. `auto`: exact match, or token F1 if at least half of the references have more than five
    words. See docs/evaluation.md."""
    by: Annotated[list[str], OnResume.AGAIN] = Field(default_factory=list)
    """Keys or columns of the data to break accuracy down by, such as [patient, modality]."""
    base_questions: Annotated[Count | None, OnResume.AGAIN] = 300
    """Number of questions to ask the base, taken from whole images across the set; null: all."""
    blind_questions: Annotated[Count | None, OnResume.AGAIN] = None
    """Number of questions to ask again with a mean-color image; null: none."""

    @property
    def broken_down_by(self) -> list[str]:
        """Columns to break accuracy down by: those of `by`, and the `type` of `data.columns`."""
        types = [source.columns.type for source in self.data.sources if source.columns is not None]
        return list(dict.fromkeys([*self.by, *filter(None, types)]))

    @model_validator(mode="after")
    def _no_training_keys(self) -> Self:
        if not self.data.others and self.data.source is not None:
            raise ValueError("data.source is for one of several sources; write data as a list of them, or remove it")
        for number, source in enumerate(self.data.sources):
            where = f"data.{number}" if number else "data"
            if (mixed := key_of_mix(source)) in ("weight", "share"):
                raise ValueError(f"{where}.{mixed}: an evaluation asks each question once; remove it")
            if source.validation or source.merge_turns:
                key = "validation" if source.validation else "merge_turns"
                raise ValueError(f"{where}.{key} applies to training only; remove it")
        return self


class CardSettings(Settings):
    """Text for the model card that the run cannot know; nothing here affects training."""

    license: Annotated[str | None, Names.TEXT] = None
    """License of the trained weights, as a Hub license id such as apache-2.0 or llama2."""
    license_name: Annotated[str | None, Names.TEXT] = None
    """Name of the license, with `license: other`."""
    base_license: Annotated[str | None, Names.TEXT] = None
    """License of the base, as text."""
    data_license: Annotated[str | None, Names.TEXT] = None
    """Licenses of the data, as text."""
    intended_use: Annotated[str | None, Names.TEXT] = None
    """What the model is for."""
    limits: Annotated[str | None, Names.TEXT] = None
    """What it cannot do and where it fails."""
    tags: list[str] = Field(default_factory=list)
    """Tags for the model on the Hub."""


def _as_written(data: dict[str, Any]) -> Any:
    """Return a source as a recipe has it, several as a list; keys of a mix that are not used are left out."""
    others = data.pop("others")
    data = {key: value for key, value in data.items() if value is not None or key not in KEYS_OF_MIX}
    return [data, *map(_as_written, others)] if others else data


class Recipe(Settings):
    """A whole run: base model, stages, evaluation and card."""

    version: Annotated[Literal[1], OnResume.FIXED] = 1
    """Version of the recipe format."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$"), _NAME, OnResume.FIXED]
    """Name of the run, for its directory, its trackers and the card."""
    output_dir: Annotated[_LocalPath | None, OnResume.FREE, Names.PATH] = None
    """Directory of the run; null: runs/<name> in the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32), OnResume.ORDER] = 42
    """Seed for the order of records, validation splits, and new weights."""
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], OnResume.RESOLVED] = "auto"
    """`auto`: bf16 on CUDA, fp16 on cards without bf16 (T4, V100, RTX 20), fp32 on CPU."""
    attn_implementation: Annotated[Literal["auto", "sdpa", "flex_attention"], OnResume.RESOLVED] = "auto"
    """Attention kernel of the language model in training. `auto`: the faster one on CUDA, measured; sdpa on CPU."""
    report_to: Annotated[Literal["none"] | list[str], BeforeValidator(_name_as_list), _TRACKERS, OnResume.FREE] = "none"
    """Trackers supported by transformers, such as [tensorboard]."""
    start_from: Annotated[_LocalPath | None, OnResume.SAME_CONTENT, Names.PATH] = None
    """Artifact whose projector (and LoRA, if any) the first stage starts from: directory or USER/REPO[@REVISION]."""
    base: BaseModelSettings
    quantization: QuantizationSettings = QuantizationSettings()
    adapter: AdapterSettings = AdapterSettings()
    distributed: DistributedSettings = DistributedSettings()
    images: ImageSettings = ImageSettings()
    stages: StagesSettings
    evaluation: Annotated[EvaluationSettings | None, OnResume.AGAIN] = None
    card: Annotated[CardSettings, OnResume.CARD] = CardSettings()

    @model_validator(mode="before")
    @classmethod
    def _window_of_all(cls, content: Any) -> Any:
        """Give `images.window` to all data that set no window."""
        images = content.get("images") if isinstance(content, dict) else None
        window = images.get("window") if isinstance(images, dict) else None
        return content if window in (None, "auto") else _with_window(content, window)

    @model_validator(mode="after")
    def _same_window(self) -> Self:
        trained = self.stage(self.stage_names[-1]).data
        if self.evaluation is not None and self.evaluation.data.gray_window != trained.gray_window:
            raise ValueError(
                f"evaluation.data.window {self.evaluation.data.window} differs from the last stage's {trained.window}: "
                "the model would see other shades of gray than in training; use the same window, in images.window"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_of_engine(self) -> Self:
        for name in self.stage_names if self.distributed.offload else ():
            if (optim := self.stage(name).optim) not in ("auto", "adamw_torch"):
                raise ValueError(
                    f"stages.{name}.optim is {optim}, but distributed.engine: deepspeed updates the weights with "
                    "adamw_torch, on the host; set auto or adamw_torch"
                )
        return self

    @property
    def stage_names(self) -> list[StageName]:
        """Names of the stages to run, in order."""
        return [name for name in STAGES if getattr(self.stages, name) is not None]

    def stage(self, name: StageName) -> StageSettings:
        """Return the settings of one stage. Raises KeyError if the recipe does not have it."""
        settings: StageSettings | None = getattr(self.stages, name)
        if settings is None:
            raise KeyError(name)
        return settings

    @property
    def resolved_output_dir(self) -> Path:
        """Directory of the run, by default runs/<name>."""
        return self.output_dir or Path.cwd() / "runs" / self.name

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain values, as YAML writes them."""
        values = self.model_dump(mode="json")
        stages = values["stages"].values()
        for holder in (*stages, values["evaluation"]):
            if holder is not None:
                holder["data"] = _as_written(holder["data"])
        return values
