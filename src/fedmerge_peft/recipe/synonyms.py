"""Other programs' names for keys and values of recipes, so that errors can suggest the right ones.

The names come from transformers, PEFT, TRL, scikit-learn and programs of federated learning. They
are compared without case, hyphens, underscores, dots and spaces (``util.text.folded``).
"""

from __future__ import annotations

from collections.abc import Iterable

from fedmerge_peft.plugins import TASKS
from fedmerge_peft.util.text import closest, folded

_KEYS = {
    "name": "run_name experiment experiment_name",
    "seed": "random_seed random_state",
    "rounds": "num_rounds n_rounds nrounds communication_rounds comm_rounds global_rounds",
    "tracking": "report_to logger loggers trackers",
    "strategy": "method algorithm algo aggregator",
    "task.num_labels": "num_classes n_classes nclasses classes n_labels",
    "task.max_length": "max_seq_length max_seq_len max_len seq_len model_max_length cutoff_len",
    "task.max_new_tokens": "max_tokens generation_max_length",
    "task.do_sample": "sample sampling",
    "task.stop_strings": "stop_sequence stop_sequences",
    "task.loss": "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt",
    "task.system_prompt": "system system_message default_system",
    "task.chat_template": "chat_template_path template_path",
    "task.messages": "conversations messages_column",
    "task.label": "label_column target_column",
    "task.text": "text_column sentence",
    "task.image": "image_column",
    "task.spans": "entities entities_column span_column",
    "task.audio": "audio_column audio_column_name sound",
    "task.max_seconds": "max_length_seconds",
    "task.class_weights": "class_weight weights pos_weight label_weights",
    "task.focal_gamma": "gamma focal focal_loss",
    "task.anchor": "query sentence1 anchor_column",
    "task.positive": "positive_column",
    "task.negative": "negative_column hard_negative",
    "task.question": "question_column",
    "task.context": "context_column",
    "task.answers": "answer answer_column",
    "task.no_answer": "version_2_with_negative",
    "task.stride": "doc_stride",
    "task.prefix": "source_prefix",
    "task.source": "source_column document article",
    "task.target": "summary summary_column",
    "task.source_language": "source_lang src_lang",
    "task.target_language": "target_lang tgt_lang",
    "task.max_target_length": "val_max_target_length",
    "backbone.model": "model_name model_name_or_path base_model pretrained model_id checkpoint",
    "backbone.tokenizer": "tokenizer_name tokenizer_name_or_path processor",
    "backbone.dtype": "torch_dtype",
    "backbone.attention": "attn_implementation",
    "backbone.quantization": "load_in_4bit load_in_8bit quant bits",
    "lora.r": "rank lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "target targets modules lora_target_modules",
    "lora.exclude_modules": "exclude excluded",
    "lora.layers_to_transform": "layers",
    "lora.use_rslora": "rslora",
    "lora.use_dora": "dora",
    "lora.init_lora_weights": "init",
    "data.path": "dataset dataset_name data_path file files",
    "data.config": "dataset_config dataset_config_name subset",
    "data.validation_split": "val_split eval_split valid_split",
    "data.partition": "partitioner",
    "data.partition.scheme": "partition_by partition_method",
    "data.partition.clients": "num_clients n_clients nclients client_num num_users",
    "data.partition.alpha": "dirichlet_alpha concentration beta",
    "strategy.adapters": "num_adapters n_adapters soup_size num_models num_clusters n_clusters k",
    "strategy.temperature": "temp tau",
    "strategy.server_lr": "server_learning_rate eta_s global_lr",
    "strategy.weights_lr": "weights_learning_rate",
    "training.learning_rate": "lr eta rate step_size local_lr client_lr",
    "training.batch_size": "per_device_train_batch_size train_batch_size local_batch_size bs batch",
    "training.gradient_accumulation": "gradient_accumulation_steps accumulation_steps grad_accum",
    "training.epochs": "num_train_epochs num_epochs local_epochs local_ep",
    "training.steps": "max_steps local_steps num_steps",
    "training.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "training.warmup": "warmup_ratio warmup_steps",
    "training.max_grad_norm": "clip grad_clip clip_grad gradient_clipping max_norm grad_norm",
    "training.weight_decay": "wd decay l2",
    "training.optimizer": "optim",
    "training.proximal": "mu proximal_mu prox prox_mu",
    "training.mixed_precision": "fp16 bf16 amp precision",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size test_batch_size",
    "evaluation.every": "eval_every eval_steps eval_interval",
    "clients.fraction": "participation participation_rate client_fraction sample_fraction "
    "fraction_fit sample_rate",
    "clients.min_clients": "min_fit_clients min_available_clients",
    "privacy.noise": "noise_multiplier sigma",
    "privacy.clip": "clipping_norm clip_norm max_update_norm",
    "robustness.aggregation": "defense defence aggregation_rule",
}
"""Words of other programs, separated by spaces, by the dotted key that they stand for."""

_VALUES = {
    "fedavg": "fedit average",
    "local": "standalone individual",
    "iid": "uniform random homogeneous",
    "dirichlet": "dir lda non-iid noniid label-skew",
    "shards": "pathological",
    "natural": "column by_column user users",
    "clusters": "grouped",
    "adamw": "adam",
    "float32": "fp32 float full",
    "bfloat16": "bf16",
    "float16": "fp16 half",
    "bf16": "bfloat16",
    "fp16": "float16 half",
    "flash_attention_2": "flash flash_attention fa2",
    "4bit": "int4 nf4 4",
    "8bit": "int8 8",
    "constant": "none",
    "accuracy": "acc",
    "perplexity": "ppl",
    "rougeL": "rouge",
    "bleu": "sacrebleu",
    "chrf": "chrf++",
    "exact_match": "em",
    "entity_f1": "seqeval ner_f1 overall_f1",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "micro_f1": "f1_micro",
    "average_precision": "ap map auprc",
    "matthews_correlation": "mcc mathews",
    "expected_calibration_error": "ece calibration",
    "f1": "f1_score f1_macro macro_f1",
    "mean": "average fedavg",
}
"""Words of other programs, separated by spaces, by the value that they stand for.

The words for names of tasks are in ``TaskRecipe.other_names``.
"""


_KEYS_BY_WORD: dict[str, list[str]] = {}
for _key, _words in _KEYS.items():
    for _word in _words.split():
        _KEYS_BY_WORD.setdefault(folded(_word), []).append(_key)


def keys_for(word: str) -> list[str]:
    """Return the dotted keys that a word of another program stands for; empty if it has none."""
    return _KEYS_BY_WORD.get(folded(word), [])


def closest_value(word: str, words: Iterable[str]) -> str | None:
    """Return the one of ``words`` that a wrong word probably stands for; None without a candidate.

    Candidates are the words that equal the wrong word when both are ``folded``, then words with a
    synonym that does, then close words (``util.text.closest``).
    """
    known, meant = list(words), folded(word)
    exact = next((choice for choice in known if folded(choice) == meant), None)
    synonym = next((choice for choice in known if meant in map(folded, _synonyms(choice))), None)
    return exact or synonym or closest(word, known)


def _synonyms(value: str) -> list[str]:
    """Return the words of other programs for a value, which may be the name of a task."""
    names = TASKS.sections()[value].other_names if value in TASKS else ""
    return [*_VALUES.get(value, "").split(), *names.split()]
