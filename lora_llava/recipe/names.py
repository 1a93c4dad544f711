"""Suggest the setting that a user meant by an unknown key: by section, by other tools' names, by spelling."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.recipe.fields import Settings, settings_of
from lora_llava.recipe.settings import Recipe
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.text import listed

_DOCS = "docs/settings.md"
_MAX_LISTED_KEYS = 8
"""Sections with more keys than this are not listed in an error."""

_SYNONYMS = {
    "stages.instruct.learning_rate": "lr rate base_lr max_lr initial_lr peak_lr init_lr learning_rates",
    "stages.instruct.mm_projector_lr": "projector_lr aligner_lr mm_projector_learning_rate projector_learning_rate",
    "stages.instruct.num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs num_training_epochs",
    "stages.instruct.max_steps": "steps num_steps max_train_steps total_steps train_steps iterations max_iters iters",
    "stages.instruct.batch_size": "batch bs batch_sizes train_batch_size micro_batch_size per_device_train_batch_size "
    "per_gpu_train_batch_size per_device_batch_size device_batch_size global_batch_size effective_batch_size "
    "total_batch_size micro_train_batch_size",
    "stages.instruct.lr_scheduler_type": "scheduler lr_scheduler schedule lr_schedule scheduler_type lr_decay_style",
    "stages.instruct.weight_decay": "wd decay l2",
    "stages.instruct.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val max_norm "
    "max_gradient_norm grad_norm",
    "stages.instruct.adam_beta1": "beta1 adam_betas betas",
    "stages.instruct.adam_beta2": "beta2",
    "stages.instruct.optim": "optimizer optimiser",
    "stages.instruct.max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_len seq_length max_len "
    "model_max_length max_tokens context_length max_model_len block_size",
    "stages.instruct.template": "chat_template conv_template conversation_template prompt_template prompt_format "
    "conv_mode conv_type conv_version chat_format",
    "stages.instruct.system": "system_prompt default_system system_message system_text",
    "stages.prefer.beta": "dpo_beta pref_beta preference_beta",
    "stages.prefer.loss": "loss_type dpo_loss pref_loss preference_loss",
    "stages.prefer.sft_weight": "rpo_alpha pref_ftx sft_alpha sft_loss_weight",
    "stages.instruct.packing": "sample_packing pack group_by_length group_by_modality_length multipack",
    "stages.instruct.tokens_per_micro_batch": "micro_batch_tokens tokens_per_batch batch_tokens",
    "stages.instruct.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing recompute "
    "checkpoint_activations grad_checkpointing",
    "stages.instruct.logging_steps": "log_steps log_every log_interval logging_interval log_every_n_steps",
    "stages.instruct.eval_steps": "eval_every eval_interval evaluation_steps eval_strategy evaluation_strategy "
    "val_check_interval evals_per_epoch validation_steps",
    "stages.instruct.save_steps": "save_every save_interval save_strategy checkpoint_steps checkpointing_steps "
    "saves_per_epoch",
    "stages.instruct.save_total_limit": "max_checkpoints keep_checkpoints checkpoints_total_limit",
    "stages.instruct.dataloader_num_workers": "num_workers workers dataloader_workers num_proc dataset_num_proc "
    "preprocessing_num_workers",
    "stages.instruct.image_aspect_ratio": "image_resize aspect_ratio image_padding pad_images",
    "stages.instruct.data": "dataset datasets training_data",
    "stages.instruct.data.path": "data_path dataset_path dataset_name train_file train_data train_dataset data_files "
    "annotations annotation_file json_path data_file files file",
    "stages.instruct.data.image_root": "image_folder image_dir images_dir image_path img_dir img_root image_prefix "
    "media_dir image_directory images_folder images_path img_folder root",
    "stages.instruct.data.max_records": "max_samples num_samples max_train_samples max_examples limit subset",
    "stages.instruct.data.validation": "val valid dev holdout validation_set",
    "stages.instruct.data.validation.share": "val_set_size val_size validation_split val_split val_ratio test_size "
    "split_dataset_ratio validation_size validation_ratio eval_ratio ratio fraction",
    "stages.instruct.data.validation.path": "eval_dataset val_dataset validation_file eval_data val_data eval_file "
    "validation_data eval_data_path val_data_path validation_dataset",
    "stages.align": "pretrain pretraining stage1 alignment",
    "stages.instruct": "train training finetune tune sft stage2 instruction instruct_tuning",
    "stages.prefer": "dpo preference stage3 rlhf",
    "adapter": "lora peft lora_config peft_config qlora lora_enable use_lora use_peft",
    "adapter.r": "lora_r lora_rank rank lora_dim lora_dimension",
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.target_modules": "lora_target lora_target_modules target targets modules lora_modules lora_target_linear",
    "adapter.type": "use_rslora use_dora rslora dora lora_type peft_type finetuning_type tuner_type train_type",
    "quantization": "bnb_config bitsandbytes quantization_config",
    "quantization.type": "bits load_in_4bit load_in_8bit quant quant_type quant_bits quant_method quantization_bit "
    "bnb_4bit_quant_type nf4 quantize",
    "quantization.double_quant": "double_quantization bnb_4bit_use_double_quant use_double_quant",
    "distributed.shard": "fsdp fsdp_config fsdp2 fully_shard full_shard sharding sharding_strategy",
    "precision": "fp16 bf16 fp32 tf32 dtype torch_dtype mixed_precision compute_dtype bnb_4bit_compute_dtype half amp",
    "attn_implementation": "flash_attn flash_attention use_flash_attn use_flash_attention_2 attn attn_impl attention "
    "sdp_attention xformers_attention eager_attention flash_attention_2",
    "base": "models",
    "base.model_name_or_path": "model base_model model_name model_id model_path model_dir checkpoint_path "
    "pretrained_model_name_or_path base_model_name_or_path llava",
    "base.language_model": "llm language text_model lm language_model_name_or_path",
    "base.vision_tower": "vision_model vision_encoder image_encoder vit clip mm_vision_tower vision",
    "base.mm_projector_type": "projector_type projector mm_projector",
    "base.vision_feature_layer": "mm_vision_select_layer select_layer vision_layer vision_select_layer",
    "base.vision_feature_select_strategy": "mm_vision_select_feature select_feature feature_select_strategy",
    "start_from": "adapter_name_or_path adapters adapter_path lora_path lora_model_dir lora_weights ckpt checkpoint "
    "resume_from_checkpoint pretrain_mm_mlp_adapter init_from load_from pretrained",
    "output_dir": "output out out_dir save_dir output_path output_directory run_dir results_dir logging_dir save_path",
    "name": "run_name experiment experiment_name exp_name job_name project title id",
    "report_to": "wandb use_wandb wandb_project tensorboard logger loggers log_to tracker trackers mlflow swanlab "
    "trackio comet",
    "seed": "random_seed manual_seed data_seed rng_seed",
    "evaluation": "eval test evaluate eval_config benchmark do_eval",
    "evaluation.batch_size": "eval_batch_size per_device_eval_batch_size",
    "evaluation.max_new_tokens": "max_answer_tokens generation_max_length max_generated_tokens",
    "evaluation.data": "test_data test_set test_dataset",
    "evaluation.data.path": "test_file test_path",
    "evaluation.blind_questions": "blind",
    "card.license": "licence model_license",
}
"""Names for a setting in LLaVA, LLaMA-Factory, axolotl, ms-swift, TRL, unsloth, Lightning and by users."""

_REPLACED = {
    "gradient_accumulation_steps grad_accum accumulation_steps gradient_accumulation accumulate_grad_batches": (
        "batch_size counts the conversations of a whole optimizer step, and the micro-batch follows from the memory: "
        "set stages.instruct.batch_size, and remove this"
    ),
    "warmup warmup_steps num_warmup_steps lr_warmup_steps": (
        "set stages.instruct.warmup_ratio, the fraction of the steps, such as 0.03"
    ),
    "freeze_backbone freeze_vision_tower freeze_vit freeze_llm freeze_language_model freeze_aligner "
    "tune_mm_mlp_adapter train_projector train_vision train_mm_mlp_adapter unfreeze trainable freeze modules_to_save": (
        "the stage decides what is trained: align trains the projector, instruct and prefer the LoRA and the projector"
    ),
    "deepspeed deepspeed_config ds_config zero zero_stage zero_optimization zero2 cpu_offload offload_optimizer": (
        "set distributed: {engine: deepspeed, offload: true}, which is ZeRO-2 with the optimizer on the host; the rest "
        "of a DeepSpeed configuration follows from the recipe"
    ),
    "zero3 offload_param": (
        "ZeRO-3 is refused: it replaces the frozen weights, so the checks that they have not changed fail, and lm_head "
        "is gathered only inside the model's own forward pass. Set distributed.shard: true to divide the frozen "
        "weights between GPUs (FSDP2)"
    ),
    "num_gpus gpus devices tensor_parallel_size nproc_per_node world_size num_processes accelerator strategy ddp": (
        "give the number of GPUs on the command line, as in lora-llava finetune RECIPE --gpus 2; remove it"
    ),
    "augment augmentation augmentations image_augmentation data_augmentation transforms random_crop flip": (
        "images are not augmented; add augmented copies to the data instead"
    ),
    "trust_remote_code": "code from model repositories is never run; remove it",
    "token hf_token hub_token push_to_hub hub_model_id hub_private_repo": (
        "a run uploads nothing; publish the result with: lora-llava push"
    ),
    "resume resume_training auto_resume": "resume with: lora-llava finetune RECIPE --resume",
    "overwrite overwrite_output_dir": "replace an earlier run with: lora-llava finetune RECIPE --overwrite",
    "train_on_inputs mask_inputs train_on_input assistant_only_loss completion_only_loss": (
        "the loss always covers only the answers; remove it"
    ),
    "shuffle": "records are always shuffled each epoch, using seed; remove it",
    "image_size resolution image_resolution max_pixels min_pixels": (
        "the vision tower determines the image size; choose another with base.vision_tower"
    ),
    "merge merge_lora save_merged": "merge a finished artifact with: lora-llava merge",
    "device cuda gpu": "the GPU is used if there is one; remove it",
}
"""Settings of other tools that this one replaces by something else."""

_KEY_OF = {name: key for key, names in _SYNONYMS.items() for name in names.split()}
_TEXT_OF = {name: text for names, text in _REPLACED.items() for name in names.split()}


def meant_by(above: Sequence[str], name: str, section: type[Settings] | None) -> str:
    """Return a hint, to follow the message, for the key `name` that `section`, at the path `above`, does not have."""
    word = name.strip().lower().replace("-", "_")
    if word in _TEXT_OF:
        return f"; {_TEXT_OF[word]}"
    fields = list(section.model_fields) if section else []
    key = _in_other_section(above, word) or _by_synonym(above, word) or _by_spelling(above, word, fields)
    section_key = ".".join(above)
    if key is not None:
        return f". {did_you_mean(key.removeprefix(f'{section_key}.'))}"
    if fields and len(fields) <= _MAX_LISTED_KEYS:
        return f"; {section_key or 'a recipe'} has {listed(fields)}"
    return f"; {_DOCS} lists every setting"


def all_keys() -> list[str]:
    """List all dotted keys of a recipe, sections included."""
    keys = [setting.key for setting in settings_of(Recipe)]
    sections = [key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)]
    return list(dict.fromkeys([*keys, *sections]))


def _by_synonym(above: Sequence[str], word: str) -> str | None:
    """Return the setting that other tools call `word`, if possible in the stage that the key is in."""
    key = _KEY_OF.get(word)
    return None if key is None else _nearest([key, *_counterparts(key)], above)


def _counterparts(key: str) -> list[str]:
    """List the settings of the same name in the other stages and the evaluation."""
    short = key.removeprefix("stages.instruct.")
    return [f"stages.align.{short}", f"stages.prefer.{short}", f"evaluation.{short}"] if short != key else []


def _in_other_section(above: Sequence[str], word: str) -> str | None:
    """Return a setting with exactly this name in another section."""
    return _nearest([key for key in all_keys() if key.rpartition(".")[2] == word], above)


def _by_spelling(above: Sequence[str], word: str, fields: list[str]) -> str | None:
    """Return a key with a similar spelling: in this section, then in all, then among other tools' names."""
    if near := similar(word, fields):
        return ".".join([*above, near])
    if near := similar(word, {key.rpartition(".")[2] for key in all_keys()}, 0.75):
        return _in_other_section(above, near)
    near = similar(word, _KEY_OF, 0.8)
    return _by_synonym(above, near) if near else None


def _nearest(keys: Sequence[str], above: Sequence[str]) -> str | None:
    """Return the key that shares the longest prefix with `above`; among equals, prefer training and short keys."""
    known = set(all_keys())

    def distance(key: str) -> tuple[int, bool, int, bool]:
        names = key.split(".")
        shared = next((n for n, pair in enumerate(zip(names, above, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(names), len(above)) if shared is None else shared
        return -shared, names[0] in ("evaluation", "card"), len(names), "instruct" not in names

    return min((key for key in keys if key in known), key=distance, default=None)
