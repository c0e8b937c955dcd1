"""What other tools call what a recipe says: data for hints only."""

from __future__ import annotations

# peftcli's key -> what others call it (PEFT, TRL, transformers, Axolotl, LLaMA-Factory, torchtune, LitGPT, Unsloth).
OTHER_NAMES: dict[str, str] = {
    "model.name": "model_name_or_path base_model model_name model_id pretrained_model_name_or_path hf_model"
    " checkpoint_dir base_model_name_or_path base model_path",
    "model.revision": "model_revision base_model_revision revision_of_model commit",
    "model.dtype": "torch_dtype model_dtype weights_dtype",
    "model.attn_implementation": "flash_attn flash_attention use_flash_attn use_flash_attention_2 flash_attn_2"
    " attention sdp_attention sdpa_attention eager_attention attn",
    "model.gguf_file": "gguf gguf_path",
    "model.task": "task_type task_name problem pipeline_tag",
    "model.num_labels": "num_classes n_labels n_classes num_class",
    "data.train": "dataset datasets dataset_name train_file train_files train_dataset train_path train_data"
    " training_data data_path dataset_path dataset_id dataset_mixer data_files",
    "data.eval": "eval_dataset eval_file validation_file validation validation_data test_datasets test_file val_data"
    " eval_data test_data valid test",
    "data.eval_fraction": "val_set_size val_size validation_split validation_split_percentage test_size eval_size"
    " val_split_fraction eval_split test_split",
    "data.format": "dataset_type dataset_format data_format template chat_format prompt_style prompt_format",
    "data.columns": "column_mapping field_mapping column_map rename_columns dataset_text_field text_column"
    " field_messages text_field",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length block_size seq_len"
    " seq_length context_length sequence_length",
    "data.overlong": "truncation overflow excess_length_strategy truncate drop_long_seq",
    "data.train_on": "train_on_inputs train_on_prompt train_on_input mask_prompt completion_only_loss"
    " assistant_only_loss train_on_responses_only train_on_completions roles_to_train",
    "data.padding_free": "remove_padding use_padding_free",
    "data.packing": "sample_packing packed neat_packing multipack use_packing",
    "model": "base_model_config model_config model_args model_arguments",
    "data": "data_args data_arguments data_module datamodule data_config dataset_config",
    "method": "lora peft lora_config peft_config adapter_config use_peft lora_args tuner",
    "quantization": "load_in_4bit load_4bit quantize quantization_config quantization_bit bnb bnb_config use_qlora"
    " qlora bits load_in_8bit load_8bit int8",
    "quantization.type": "bnb_4bit_quant_type quant_type quantization_method",
    "quantization.double_quant": "bnb_4bit_use_double_quant double_quantization use_double_quant nested_quant",
    "quantization.compute_dtype": "bnb_4bit_compute_dtype compute_type",
    "quantization.storage_dtype": "bnb_4bit_quant_storage quant_storage",
    "quantization.outlier_threshold": "llm_int8_threshold int8_threshold threshold",
    "quantization.skip_modules": "llm_int8_skip_modules modules_to_not_convert ignored_layers",
    "training": "trainer training_args training_arguments train_config training_config hyperparameters",
    "method.type": "peft_type adapter finetuning_type tuner_type train_type peft_method adapter_type use_dora",
    "method.r": "lora_r lora_rank rank lora_dim init_r vera_r vera_rank",
    "method.target_r": "target_rank adalora_target_r",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout vera_dropout vblora_dropout adapter_dropout",
    "method.target_modules": "lora_target lora_target_modules lora_target_linear lora_modules target lora_attn_modules",
    "method.exclude_modules": "lora_exclude_modules freeze_modules",
    "method.layers": "layers_to_transform lora_layers_to_transform num_layers lora_layers",
    "method.rslora": "use_rslora peft_use_rslora lora_use_rslora",
    "method.init": "init_lora_weights lora_init peft_init_lora_weights init_weights prompt_tuning_init init_method",
    "method.loraplus_lr_ratio": "loraplus_ratio lora_plus loraplus",
    "method.lora_fa": "use_lora_fa lorafa use_lorafa",
    "method.warmup_steps": "tinit",
    "method.final_steps": "tfinal",
    "method.interval": "deltat mask_interval",
    "method.orthogonality": "orth_reg_weight orth_reg",
    "method.projection_prng_key": "vera_seed projection_seed",
    "method.save_topk_only": "save_only_topk_weights",
    "method.feedforward_modules": "target_feedforward_modules ia3_feedforward_modules ff_modules",
    "method.biases": "bias_terms trainable_bias_terms",
    "method.num_heads": "lora_nums lora_num num_experts num_loras expert_num",
    "method.variant": "adapter_variant bottleneck_type use_parallel_adapter use_adapterp",
    "method.bottleneck_size": "adapter_size bottleneck_dim adapter_dim adapter_hidden_size reduction_factor",
    "method.activation": "non_linearity adapter_act adapter_non_linearity",
    "method.num_virtual_tokens": "prompt_length prompt_len prefix_length prefix_len pre_seq_len num_prompt_tokens"
    " prefix_sequence_length soft_prompt_length",
    "method.init_text": "prompt_tuning_init_text",
    "method.reparametrize": "prefix_projection reparameterize reparametrization reparameterization",
    "method.prefix_hidden_size": "encoder_hidden_size prefix_projection_size",
    "method.num_prompts": "num_ensemble ensemble_size",
    "training.num_train_epochs": "num_epochs epochs epoch n_epochs max_epochs",
    "training.max_steps": "max_train_steps max_iters num_steps steps train_steps iterations max_steps_per_epoch",
    "training.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size"
    " bs per_device_batch_size global_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size val_batch_size",
    "training.gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps"
    " grad_accumulation_steps gradient_accumulation_iters accumulate_grad_batches",
    "training.group_by_length": "train_sampling_strategy length_grouped group_by_seq_length",
    "training.learning_rate": "lr base_lr max_lr peak_lr learningrate",
    "training.head_learning_rate": "head_lr classifier_lr classifier_learning_rate lr_head",
    "training.lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type decay_lr",
    "training.warmup_ratio": "warmup lr_warmup_ratio warmup_fraction warmup_proportion",
    "training.warmup_steps": "num_warmup_steps lr_warmup_steps warmup_iters",
    "training.weight_decay": "wd decay",
    "training.adam_beta1": "beta1 betas adam_betas",
    "training.adam_beta2": "beta2",
    "training.adam_epsilon": "adam_eps epsilon eps",
    "training.max_grad_norm": "gradient_clipping clip_grad_norm grad_clip gradient_clip_val max_norm clip_grad"
    " max_gradient_norm",
    "training.optim": "optimizer optimiser optimizer_name opt",
    "training.mixed_precision": "bf16 fp16 precision amp half float16 bfloat16 tf32 pure_bf16",
    "training.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing"
    " enable_activation_checkpointing disable_gradient_checkpointing",
    "training.activation_offloading": "activation_offload offload_activations enable_activation_offloading"
    " gradient_checkpointing_offload",
    "training.torch_compile": "compile use_compile torchcompile compile_model use_torch_compile regional_compilation",
    "training.use_liger_kernel": "liger liger_kernel liger_kernels enable_liger_kernel use_liger",
    "training.logging_steps": "log_every log_every_n_steps log_interval logging_interval",
    "training.eval_steps": "eval_every eval_interval evals_per_epoch evaluation_steps eval_freq",
    "training.save_steps": "save_every save_interval saves_per_epoch checkpoint_every save_freq checkpointing_steps",
    "training.save_total_limit": "keep_last max_checkpoints keep_checkpoints max_to_keep",
    "training.load_best_at_end": "load_best_model_at_end save_best load_best_model best_model",
    "training.early_stopping_patience": "early_stopping patience early_stop",
    "training.seed": "random_seed data_seed manual_seed random_state rng_seed",
    "distributed.strategy": "fsdp fsdp_config ddp fsdp_version distributed_type parallelism",
    "distributed.num_processes": "num_gpus n_gpu devices nproc_per_node num_proc_per_node gpus",
    "distributed.timeout": "ddp_timeout dist_timeout",
    "distributed.deepspeed_config": "deepspeed ds_config deepspeed_config_file hf_ds_config",
    "evaluation.generate": "generation generation_config gen_kwargs sampling",
    "evaluation.generate.max_new_tokens": "max_tokens max_generation_length num_new_tokens",
    "evaluation.generate.do_sample": "sample sampling_enabled",
    "logging.report_to": "logger loggers log_with tracker trackers",
    "output_dir": "out_dir output output_path save_dir output_directory run_dir checkpoint_output_dir",
    "extends": "base_config defaults include includes inherit inherits inherit_from _base_ parent",
}

# A remark to go with a name whose value differs too.
REMARKS: dict[str, str] = {
    "bf16": "write mixed_precision: bf16",
    "fp16": "write mixed_precision: fp16",
    "lora_target_linear": "write target_modules: all-linear",
    "train_on_inputs": "true is train_on: all, false is train_on: assistant",
    "train_on_prompt": "true is train_on: all, false is train_on: assistant",
    "use_dora": "write type: dora",
    **dict.fromkeys(
        ("load_in_4bit", "load_4bit", "quantize", "quantization_config", "quantization_bit", "bnb", "bits"),
        "write quantization: {type: nf4}",
    ),
    **dict.fromkeys(("load_in_8bit", "load_8bit", "int8"), "write quantization: {type: int8}"),
    **dict.fromkeys(("use_qlora", "qlora"), "write quantization: {type: nf4}, or method.type: qlora"),
    "reduction_factor": "write the model's hidden size divided by it",
    "use_parallel_adapter": "write variant: parallel",
    "use_adapterp": "write variant: pfeiffer",
    "flash_attention": "write attn_implementation: flash_attention_2",
    "flash_attn": "write attn_implementation: flash_attention_2",
    "train_sampling_strategy": "write group_by_length: true",
    "global_batch_size": "the step's batch is this times gradient_accumulation_steps times the number of devices",
}

_PARALLEL = "a model is spread over processes by distributed.strategy: fsdp2 or deepspeed, in no other way"
_MACHINES = "the number of machines is not the recipe's: peftcli train --nnodes N, or torchrun"
_PACKS = "packs hold whole examples, best-fit-decreasing, and are filled up no further than a batch's longest"
_CODE = "never accepted from a recipe: peftcli runs no code from a model repository"
_TRACKER = "logging.report_to takes tensorboard; other trackers are not in this version, metrics.jsonl has every number"
_CONTENT = (
    "encoded data is kept by its content, so there is nothing to overwrite or to name; data.cache: false keeps none"
)
_ALL_CORES = "there is nothing to set: the tokenizer uses all cores of the machine"
_MAPPED = (
    "a hub dataset is downloaded before training; nothing long is held in memory: lines of local files are read as they"
    " are encoded, and tokens are mapped from the disk"
)
_OUTPUT = "the run's files all go to output_dir, which is never overwritten"

# What peftcli does not have -> the other names for it.
UNAVAILABLE: dict[str, str] = {
    _PARALLEL: "tensor_parallel_size context_parallel_size pipeline_parallel_size",
    _MACHINES: "num_nodes nnodes num_machines",
    "there is nothing to set: gradients are added up once a step": "ddp_backend ddp_find_unused_parameters"
    " ddp_bucket_cap_mb ddp_broadcast_buffers find_unused_parameters accelerator_config",
    _PACKS: "packing_strategy pad_to_sequence_len sample_packing_bin_size sample_packing_group_size",
    "an evaluation takes examples in order of length, which leaves hardly any padding": "eval_packing"
    " eval_sample_packing",
    _CODE: "trust_remote_code trust_remote remote_code",
    "training.torch_compile compiles each layer with torch's default settings": "torch_compile_mode"
    " torch_compile_backend compile_mode compile_backend",
    _TRACKER: "wandb wandb_project wandb_entity use_wandb mlflow mlflow_tracking_uri comet swanlab wandb_name",
    "a run is resumed from its own folder, which the recipe does not name": "resume resume_from_checkpoint"
    " auto_resume_from_checkpoints resume_from",
    _OUTPUT: "overwrite_output_dir overwrite",
    _CONTENT: "overwrite_cache load_from_cache_file dataset_prepared_path tokenized_path",
    _ALL_CORES: "dataset_num_proc preprocessing_num_workers dataset_processes num_proc map_num_proc",
    _MAPPED: "streaming",
    "a recipe does not upload anything": "push_to_hub hub_model_id hub_token hf_token hub_strategy use_auth_token"
    " token",
    "training further modules in full is not in this version": "modules_to_save additional_target"
    " lora_modules_to_save unfreeze trainable_modules",
    "it follows from the model": "token_dim num_transformer_submodules num_attention_heads fan_in_fan_out"
    " tokenizer_name_or_path tokenizer_kwargs num_transformer_layers",
    "it follows from training.max_steps or training.num_train_epochs": "total_step",
    "the bank and the logits start as in the paper": "init_vector_bank_bound init_logits_std",
    "waveft has Haar's wavelet alone, PEFT's db1": "wavelet_family wavelet",
    "Liger's kernels replace all they can but the head and the loss, which are peftcli's": "liger_kernel_config"
    " liger_rope liger_rms_norm liger_glu_activation liger_swiglu liger_layer_norm liger_cross_entropy"
    " liger_fused_linear_cross_entropy",
    "the chat template is the tokenizer's own": "chat_template tokenizer_config",
    "the tokenizer is the model's own": "tokenizer tokenizer_name tokenizer_type tokenizer_path special_tokens",
    "a recipe gives no reward or preference data: peftcli trains on examples": "rl dpo beta reward_model loss_type"
    " stage",
    "examples are shuffled by training.seed": "shuffle shuffle_seed",
}

_DTYPES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "full", "torch.float32"), "float32"),
}

# Field -> a value that other tools use for it -> what to do; a bare choice is what to write.
OTHER_VALUES: dict[str, dict[str, str]] = {
    "task": {
        **dict.fromkeys(("causal_lm", "text-generation", "clm", "sft", "lm"), "causal-lm"),
        **dict.fromkeys(
            ("seq_2_seq_lm", "seq2seq", "seq2seq_lm", "text2text-generation", "summarization"), "seq2seq-lm"
        ),
        **dict.fromkeys(
            ("seq_cls", "text-classification", "sequence_classification", "classification", "regression"),
            "sequence-classification",
        ),
        **dict.fromkeys(("token_cls", "ner", "token_classification", "pos"), "token-classification"),
        **dict.fromkeys(("image_classification", "vision", "image"), "image-classification"),
    },
    "dtype": _DTYPES,
    "compute_dtype": _DTYPES,
    "type": {
        **dict.fromkeys(("4bit", "4", "int4", "bnb", "bitsandbytes", "normal_float4"), "nf4"),
        **dict.fromkeys(("8bit", "8", "llm_int8", "llm.int8"), "int8"),
        "fp8": "a base in fp8 is not in this version; quantization.type int8 has 8 bits, nf4 and fp4 have 4",
    },
    "mixed_precision": {
        **dict.fromkeys(("false", "fp32", "float32", "none", "off", "32", "null"), "no"),
        **dict.fromkeys(("bfloat16", "bf16-mixed"), "bf16"),
        **dict.fromkeys(("float16", "fp16-mixed", "half"), "fp16"),
        "true": "auto",
    },
    "optim": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam", "adamw_fused"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit", "adam_8bit", "adam8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "pagedadamw", "pagedadamw32bit"), "paged_adamw_32bit"),
        "pagedadamw8bit": "paged_adamw_8bit",
        **dict.fromkeys(("lion", "lion_32bit", "lion8bit", "paged_lion_8bit", "paged_lion_32bit"), "lion_8bit"),
    },
    "lr_scheduler_type": {
        "constant_with_warmup": "constant",
        **dict.fromkeys(("cosine_annealing", "cosine_with_min_lr", "cosine_with_restarts"), "cosine"),
    },
    "format": {
        **dict.fromkeys(("alpaca",), "instruction"),
        **dict.fromkeys(("sharegpt", "chat", "chatml", "conversations", "openai", "chat_template"), "messages"),
        **dict.fromkeys(("completion", "prompt_completion", "input_output"), "prompt-completion"),
        **dict.fromkeys(("raw", "pretraining", "plain"), "text"),
        **dict.fromkeys(("sequence-classification", "text-classification", "labels", "glue"), "classification"),
        **dict.fromkeys(("tokens", "ner", "conll", "tags"), "token-classification"),
        **dict.fromkeys(("imagefolder", "image-classification", "images", "image_folder"), "image"),
    },
    "problem_type": {
        "single_label_classification": "single-label",
        "multi_label_classification": "multi-label",
    },
    "train_on": {**dict.fromkeys(("completion", "answers", "last"), "assistant"), "everything": "all"},
    "report_to": {
        "none": "leave report_to out",
        **dict.fromkeys(("wandb", "mlflow", "comet_ml", "trackio", "swanlab", "all"), _TRACKER),
    },
}
