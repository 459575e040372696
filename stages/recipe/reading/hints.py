"""What people write who know other tools, and what it is called here.

These are hints at an unknown key of a recipe.
"""

from .outside import outside_key

_TOKENS_PER_STEP = (
    "A step is measured in tokens: train.tokens_per_step (positions per optimizer step), of which "
    "train.tokens_per_pass go through the model at once."
)
_WEIGHTS = (
    "Two weights, each used as given, they need not add up to 1: loss.soft_weight of the "
    "divergence (the teacher), loss.hard_weight of the cross-entropy (the text)."
)
_LENGTH = (
    "data.max_tokens is the longest row; data.too_long says whether a longer one is rejected or "
    "cut."
)
_LORA_SCALE = "student.lora.scale is what the update is multiplied by: lora_alpha / r."
_HIDDEN = (
    "score.features stores hidden states of the teacher, loss.features matches them: "
    "[{match: hidden, layers: last, weight: 1.0}]."
)
_LOSS_TEMPERATURE = "Write loss.temperature."
_LAYERS = (
    "student.from_teacher_layers: [0, 2, 4] begins with copies of these layers of the teacher, and "
    "of its embeddings and head."
)
_TEACHERS = (
    "Several teachers are named in place of `teacher`: teachers: [{name, model, weight}, ...]."
)
_DURATION = "Training ends after train.tokens positions, or after train.epochs passes."

# By dotted path, or by the key alone, wherever it stands.
_HINTS = {
    "alpha": _WEIGHTS,
    "loss.beta": "loss.jsd_weight is the teacher's share in the mixture of jsd.",
    "kd_ratio": _WEIGHTS,
    "loss.hidden_weight": _HIDDEN,
    "loss.hidden_loss": _HIDDEN,
    "student.layers": _LAYERS,
    "student.init_from_teacher": _LAYERS,
    "student.num_layers": "Write it in student.config, by the architecture's own name.",
    "teacher_layers": _LAYERS,
    "teacher_models": _TEACHERS,
    "teacher.models": _TEACHERS,
    "teacher.weights": _TEACHERS,
    "multi_teacher": _TEACHERS,
    "ensemble": _TEACHERS,
    "teacher_weights": (
        "Write the weight of each entry of teachers; loss.teacher_weights is another setting."
    ),
    "teacher.load_in_4bit": "Write teacher.quantize: nf4.",
    "teacher.load_in_8bit": "Write teacher.quantize: int8.",
    "teacher.quantization": "Write teacher.quantize: nf4 or int8.",
    "teacher.quantization_config": "Write teacher.quantize: nf4 or int8.",
    "teachers.load_in_4bit": "Write quantize: nf4.",
    "teachers.load_in_8bit": "Write quantize: int8.",
    "train.temperature": "loss.temperature softens the distributions; generate.temperature samples "
    "text.",
    "lora_alpha": _LORA_SCALE,
    "student.lora.alpha": _LORA_SCALE,
    "r": "Write student.lora.rank.",
    "lora_rank": "Write student.lora.rank.",
    "lora_r": "Write student.lora.rank.",
    "lora_dropout": "Write student.lora.dropout.",
    "train.batch_size": _TOKENS_PER_STEP,
    "per_device_train_batch_size": _TOKENS_PER_STEP,
    "gradient_accumulation_steps": _TOKENS_PER_STEP,
    "data.max_length": _LENGTH,
    "train.max_length": _LENGTH,
    "generate.max_length": "Write generate.max_tokens.",
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "lr": "Write train.learning_rate.",
    "lr_scheduler_type": "Write train.schedule.",
    "warmup_ratio": "Write train.warmup_fraction.",
    "max_grad_norm": "Write train.clip_norm.",
    "num_epochs": _DURATION,
    "num_train_epochs": _DURATION,
    "max_steps": _DURATION,
    "max_new_tokens": "Write generate.max_tokens.",
    "kd_weight": _WEIGHTS,
    "loss.T": _LOSS_TEMPERATURE,
    "loss.tau": _LOSS_TEMPERATURE,
    "generate.do_sample": "generate.temperature: 0 is greedy; above 0 the text is sampled.",
    "generate.top_k": "The text is sampled by generate.temperature and generate.top_p alone.",
    "score.top_k": "Write score.k.",
    "score.bits": "Write storage.mantissa_bits.",
    "train.bf16": "Write student.dtype: bfloat16.",
    "train.fp16": "Write student.dtype; training in float16 is not supported.",
    "train.seed": "Write run.seed.",
    "data.seed": "Write run.seed; what is held out is chosen by hash.",
    "train.warmup_steps": "Write train.warmup_fraction, a share of the steps.",
    "train.save_steps": "Write train.checkpoint_every_steps.",
    "train.optimizer": "It is AdamW, always: train.betas and train.weight_decay are its settings.",
    "train.loss": "Write loss.divergence.",
    "evaluate.holdout": "Write data.holdout, or name rows of your own by evaluate.source.",
    "evaluate.metric": "Write evaluate.generate.metric.",
}

# What other libraries call a setting of an entry of `score.features` or `loss.features`.
_PARTS = {
    "score.features": {
        "type kind name feature": (
            "Write what: hidden, queries, keys, values, pooled or embeddings."
        ),
        "dtype precision num_bits": "Write bits: 8, 16 or 32.",
        "pool": "Write pooling: mean, cls or last.",
        "dim proj proj_dim projection": "Write project: numbers of a projected value.",
    },
    "loss.features": {
        "alpha beta gamma lambda factor coef coefficient scale loss_weight": (
            "Write weight: it is used as given, of each pair of blocks."
        ),
        "layer blocks layer_map layer_mapping layer_mappings layer_T layer_S teacher_layer "
        "student_layer teacher_layers student_layers": (
            "Write layers: {teacher's block: student's block}, uniform or last."
        ),
        "type kind name what loss loss_type criterion objective": (
            "Write match: what is compared; of hidden states `distance` says how."
        ),
        "metric": "Write distance: mse, cosine or smooth_l1, of hidden states.",
        "proj projector projection adapter regressor": (
            "Write nothing: where widths differ a linear map is trained, and dropped on save."
        ),
        "num_relation_heads split_heads": "Write relation_heads.",
        "pool": "Write pooling: mean, cls or last.",
        "T tau nce_t": "Write temperature, of infonce.",
        "group_size": "Write group.",
    },
}
_HINTS |= {
    f"{section}.{name}": said
    for section, of_section in _PARTS.items()
    for names, said in of_section.items()
    for name in names.split()
}


def hint_at(path: str) -> str | None:
    """What to write in place of an unknown key; None where nobody is known to write it.

    Args:
        path: Dotted, from the recipe's top.
    """
    path = ".".join(part for part in path.split(".") if not part.isdigit())  # any entry of a list
    return _HINTS.get(path) or _HINTS.get(path.rpartition(".")[2]) or outside_key(path)
