"""What is not done here, by the keys and values that people try, and what is offered instead.

The teacher is run once and is then gone: what needs it beside the student, or changes it, is
outside. README's limits name each line.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Outside:
    """One thing that is not done."""

    name: str
    """What the field calls it."""
    keys: str
    """Keys of a recipe, by dotted path or alone, wherever they stand."""
    values: str = ""
    """Values of any field that takes one of several words."""
    instead: str
    """What is offered in its place, a sentence."""


OUTSIDE = (
    Outside(
        name="live distillation",
        keys="online live on_the_fly use_live_teacher teacher_server teacher_url "
        "teacher_model_server_url teacher.online teacher.live "
        "train.teacher train.live_teacher loss.online loss.live score.live score.online",
        values="online live on_the_fly teacher_in_the_loop",
        instead="The teacher is never in the training loop: score: {targets: full} with "
        "storage: {mantissa_bits: 23} stores all that it says, and trains as the live teacher "
        "would.",
    ),
    Outside(
        name="on-policy rounds",
        keys="on_policy rounds lmbda gkd student_data_fraction generate.student generate.on_policy "
        "train.on_policy train.rounds train.rollout buffer_steps",
        values="on_policy gkd minillm",
        instead="A round is a run: generate: {model: 'run:RUN_DIR'} lets the student of another "
        "run write, the teacher scores what it wrote, and the next student learns from that.",
    ),
    Outside(
        name="mutual distillation",
        keys="mutual dml peers peer peer_models co_distillation codistillation collaborative "
        "students student.peers loss.mutual train.mutual",
        values="mutual dml deep_mutual codistillation collaborative",
        instead="Students do not teach one another while they train: teacher: {model: "
        "'run:RUN_DIR'} lets one that is trained teach the next, and recipes with one storage.dir "
        "train any number of students from the same rows.",
    ),
    Outside(
        name="dynamic teachers",
        keys="trainable requires_grad update_teacher teacher_update freeze_teacher mean_teacher "
        "momentum_teacher ema ema_decay ema_teacher sync_ref_model teacher.train teacher.freeze "
        "teacher.learning_rate teacher.momentum train.teacher_learning_rate",
        values="dynamic ema mean_teacher momentum_teacher",
        instead="A teacher does not change while it teaches: train it first and name the result, "
        "or let the student of each run be the next teacher (teacher: {model: 'run:RUN_DIR'}).",
    ),
    Outside(
        name="gradient alignment",
        keys="gradient gradients gradient_matching gradient_alignment gradient_weight jacobian "
        "jacobian_matching sobolev input_gradients loss.gradient loss.gradients",
        values="gradient gradients gradient_alignment gradient_matching jacobian sobolev",
        instead="No gradient of the teacher is stored: loss: {features: [{match: hidden}]} and the "
        "other matches of stages/losses/features/ compare what its layers say.",
    ),
    Outside(
        name="cross-modal teachers",
        keys="cross_modal modality modalities teacher.modality student.modality teacher.processor "
        "vision_teacher image_teacher audio_teacher image_column audio_column data.images "
        "data.audio",
        values="cross_modal multimodal image_text image_text_to_text vision audio speech",
        instead="Teacher and student read the same input: let the teacher caption or answer "
        "elsewhere, and train on that text (data: {format: completion}, no `score`).",
    ),
    Outside(
        name="teachers of other vocabularies",
        keys="cross_tokenizer uld use_uld_loss uld_loss gold align_vocab vocab_mapping "
        "token_alignment vocabulary_alignment dskd teacher.tokenizer teacher_tokenizer "
        "teacher_tokenizer_name_or_path student.tokenizer student_tokenizer",
        values="uld gold dskd cross_tokenizer wasserstein sinkhorn",
        instead="Teacher and student share a tokenizer: let the other teacher write, and give its "
        "text as data (format: completion, no `score`) to a recipe whose teacher.model has the "
        "student's.",
    ),
    Outside(
        name="data-free distillation",
        keys="data_free generator generator_model dataset_distillation condense",
        values="data_free generated_data",
        instead="Prompts come from you (`data`); the teacher writes what follows (`generate`).",
    ),
    Outside(
        name="pruning and quantised students",
        keys="prune pruning sparsity quantize quantization quantization_config load_in_4bit "
        "load_in_8bit qat student.prune student.quantize",
        values="pruned quantized int4 int8 nf4",
        instead="A teacher may be quantised while it is loaded (teacher.quantize: nf4 or int8). A "
        "student is trained in floats: prune it before (student.model), or keep some layers "
        "(student.from_teacher_layers), and quantise it after.",
    ),
)

# Where the recipe means a chain of students, and only the word is another.
_NAMED_OTHERWISE = {
    "self_distillation born_again generations teacher_assistant assistant assistants": (
        "The student of one run is the teacher of the next: teacher: {model: 'run:RUN_DIR'}."
    ),
    "seq_kd sequence_level kd_text": (
        "Leave the section `score` out: then the student learns from the teacher's text alone."
    ),
}


def outside_key(path: str) -> str | None:
    """What to say of an unknown key; None where nobody is known to try it.

    Args:
        path: Dotted, from the recipe's top.
    """
    for names, said in _KEYS:
        if path in names or path.rpartition(".")[2] in names:
            return said
    return None


def outside_value(found: Any) -> str | None:
    """What to say of a value that a field does not take; as `outside_key`."""
    if not isinstance(found, str):
        return None
    word = found.lower().replace("-", "_").replace(" ", "_")
    return next((said for names, said in _VALUES if word in names), None)


def _said(line: Outside) -> str:
    return f"Not supported: {line.name}. {line.instead}"


_KEYS = [
    *((frozenset(line.keys.split()), _said(line)) for line in OUTSIDE),
    *((frozenset(names.split()), said) for names, said in _NAMED_OTHERWISE.items()),
]
_VALUES = [(frozenset(line.values.split()), _said(line)) for line in OUTSIDE]
