"""The recipe: one pydantic model per YAML section, every default in this one place.

Errors of shape (unknown key, wrong type, out of range) come from these models; combinations that
cannot work are in `stages/recipe/checks/together.py`. `stages/recipe/load.py` turns both into
messages with a file and a line.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from .divergences import DivergenceSettings
from .engines import Generate
from .evaluate import Evaluate
from .features import FeatureLoss
from .fields import NO_TEMPLATE_ARGUMENTS, Kernel, Options, Schedule, Scheduled, Section, Tail
from .formats import FORMATS, Format, FormatName
from .kinds import Score
from .stages import Compute
from .tasks import TASKS, TaskName


class Run(Section):
    """Where a run's students and reports go."""

    dir: str
    """Folder of the run: students, logs and the report."""
    seed: int = 0
    """Seed of the student's initial weights and of the order of samples; the text has its own."""
    task: TaskName = "causal_lm"
    """What the models do."""


class Storage(Section):
    """The store: the cache of teacher outputs, shared by any number of recipes."""

    dir: str
    """Folder of the store, or its URL (`s3://bucket/path`)."""
    sources: list[str] = Field([])
    """Read-only: stores and published folders whose rows serve as well, by folder, URL or
    `hf://datasets/USER/NAME`."""
    commit_rows: int = Field(256, ge=1)
    """Commit a shard after this many finished rows ..."""
    commit_seconds: float = Field(30.0, gt=0)
    """... or after this many seconds, whichever comes first."""
    mantissa_bits: int = Field(10, ge=1, le=23)
    """Bits of mantissa kept in stored floats; 23 is exact float32."""


class Teacher(Section):
    """The large model."""

    model: str
    """Folder or Hub id; or `run:RUN_DIR`, the student that another run has trained last; or, as in
    `data.source`, a store that holds the rows of one teacher."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the checkpoint is stored."""
    adapter: str | None = None
    """Folder or Hub id of a LoRA adapter on the teacher."""
    trust_remote_code: bool = False
    """Run the code that the model's folder brings along (auto_map), with all that you may do here.
    Its files are then part of the teacher's identity. No other model's code is ever run."""
    quantize: Literal["nf4", "int8"] | None = None
    """Quantise its float weights while they are loaded, by bitsandbytes, to 4 or 8 bits; `dtype` is
    then that of all else. That is another teacher than the float one. null: as it is stored."""
    device_map: str | None = None
    """`auto` spreads a teacher that is larger than one GPU over all of them."""

    later = ("trust_remote_code", "quantize")


class OneTeacher(Teacher):
    """One of several teachers: what it scores, and what its word weighs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=32)
    """Its name in lines, logs and results: letters, digits, `-` and `_`."""
    weight: Scheduled = 1.0
    """Of its divergence, used as given; a number or a schedule."""
    where: str | None = None
    """SQL condition over the columns of `prompts`: it scores their texts alone. null: all."""
    budget_tokens: int | None = Field(None, ge=1)
    """Scored tokens to train on, at most, that it is asked for (one text at least), by hash."""
    license: str | None = None
    """Its licence, for report and card; it decides nothing."""

    @property
    def alone(self) -> Teacher:
        """The section `teacher` of a recipe that has no other; fields that nobody wrote stay so."""
        fields = set(Teacher.model_fields)
        return Teacher.model_validate(self.model_dump(include=fields, exclude_unset=True))

    @property
    def is_plain(self) -> bool:
        """Whether it scores everything, at weight 1."""
        return (self.weight, self.where, self.budget_tokens) == (1.0, None, None)


class Lora(Section):
    """A LoRA student (PEFT)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    scale: float = Field(2.0, gt=0)
    """The update is multiplied by this (PEFT's lora_alpha / r)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter."""
    keep_adapter: bool = False
    """Keep the adapter alone too, in `adapter/` beside `student/`, whose weights have it merged
    in."""


class Student(Section):
    """The small model: an existing one, fresh weights of a config, or layers of the teacher."""

    model: str | None = None
    """Folder or Hub id; or `run:RUN_DIR`, the student of another run."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward and backward passes compute in; weights and optimizer state stay float32."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What `student/` is stored in; auto: as the base was stored, fresh weights in float32. The
    base of copied layers is the teacher."""
    config: Options | None = None
    """Fresh weights: the teacher's config with these overrides, and the teacher's tokenizer. With
    another `model_type`, the overrides are to the defaults of that one."""
    from_teacher_layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """Begin with copies of these layers of the teacher, counted from 0, in ascending order, and of
    its embeddings, norms and head. `config` may change what leaves them as they are."""
    lora: Lora | None = None
    """Train an adapter in place of the weights."""
    factory: str | None = Field(None, pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """Fresh weights of a module that `file.py:function` or `module:function` makes; of tasks that
    classify whole texts or images. Its code is run where the command says --allow-code."""
    args: Options | None = None
    """Keywords for `factory`, besides what it is told of the task; files from its folder."""

    @field_validator("config")
    @classmethod
    def _no_code(cls, overrides: dict[str, Any] | None) -> dict[str, Any] | None:
        if "auto_map" in (overrides or {}):
            raise ValueError("'auto_map' names code, and no student's code is ever run. Remove it")
        return overrides

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        copies = self.from_teacher_layers is not None
        if self.factory is not None:
            self._alone()
            return self
        if self.args is not None:
            raise ValueError("`args` are of a `factory`, and there is none. Remove them")
        if (self.model is None) == (self.config is None and not copies):
            raise ValueError(
                "name either `model` (an existing student), or `config` (fresh weights) or "
                "`from_teacher_layers` (copies of the teacher's), not both or neither"
            )
        if self.lora is not None and self.model is None and not copies:
            raise ValueError(
                "`lora` needs an existing `model` or `from_teacher_layers`; an adapter on fresh "
                "weights learns next to nothing"
            )
        return self

    def _alone(self) -> None:
        """Refuse what a factory's student cannot have."""
        others = ("model", "revision", "config", "from_teacher_layers", "lora")
        if named := [name for name in others if getattr(self, name) is not None]:
            raise ValueError(
                f"`factory` makes the student, without `{named[0]}`. Remove one of them"
            )
        if self.save_dtype not in ("auto", "float32"):
            raise ValueError("a `factory`'s student is stored in float32. Remove `save_dtype`")

    later = ("save_dtype", "from_teacher_layers", "factory", "args")


class Data(Section):
    """Where prompts or texts come from."""

    source: str
    """File, glob, folder (JSON, JSONL, CSV, text, packed or not, Parquet; .md only by file or glob)
    or Hub dataset id. Or `storage.dir` or one of `storage.sources`: its rows are the data, and
    nothing is written or scored."""
    split: str = "train"
    """Split of a Hub dataset or saved folder; of local files whose names have train, validation or
    test in them, those of this split."""
    format: FormatName
    """What one record is."""
    columns: dict[str, str] = Field({})
    """Our field name -> the source's column, where they differ."""
    chat_template_kwargs: Options = Field({})
    """Arguments of the tokenizer's chat template."""
    turns: Literal["all", "last"] | None = None
    """Which turns of the assistant are scored; null: all where the data bring the answers, the last
    where `generate` writes them."""
    window_tokens: int | None = Field(None, ge=8)
    """text: cut documents into windows of this many tokens; null: the teacher's context."""
    max_tokens: int | None = Field(None, ge=8)
    """All other formats: tokens of a row at most, special tokens included; of a prompt, where
    `generate` goes on from it. null: the teacher's context."""
    too_long: Literal["reject", "cut"] = "reject"
    """What becomes of a longer row. cut: its end is left out, but for what the tokenizer puts
    there; of a pair the longer text's."""
    masks: Literal["bert", "all"] = "bert"
    """masked_lm: what stands where a token is hidden, of 15 in 100. bert: the mask token at 8 of
    10, another token at 1, the token itself at 1. all: the mask token."""
    limit: int | None = Field(None, ge=1)
    """Use the first records only."""
    holdout: int = Field(200, ge=0)
    """Prompts kept for evaluation, chosen by hash; none where `evaluate` names held-out rows."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_the_template(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(NO_TEMPLATE_ARGUMENTS.keys() & arguments.keys()):
            who = NO_TEMPLATE_ARGUMENTS[name]
            raise ValueError(f"{name!r} is {who}, no argument of the template. Remove it")
        return arguments

    later = ("turns", "max_tokens", "too_long", "masks")

    @property
    def records(self) -> Format:
        """What a record of this format holds, and what it is to the stages."""
        return FORMATS[self.format]


class Select(Section):
    """Which generations go on to be scored and trained on."""

    where: str | None = None
    """SQL condition over the columns of `generations`."""


class Loss(DivergenceSettings):
    """What the student minimises: soft_weight * divergence + hard_weight * cross-entropy."""

    temperature: Scheduled = 1.0
    """Softens both distributions in the divergence; a number above 0, or a schedule."""
    unstored_temperature: Literal["refuse", "approximate"] = "refuse"
    """approximate: where a temperature was not stored, the tail counts as one id."""
    tail: Tail = "bucket"
    """What becomes of the teacher's mass outside the entries; sampled, full targets have none."""
    soft_weight: Scheduled = 1.0
    """Weight of the divergence, used as given; a number or a schedule."""
    hard_weight: Scheduled = 0.1
    """Weight of the cross-entropy, as given; without `score` the loss is cross-entropy alone."""
    features: list[FeatureLoss] = Field([])
    """What the student matches of the features that `score` stores."""
    teachers: Literal["sum", "mixture"] = "sum"
    """Of several teachers. sum: the divergence from each, times its weight. mixture: the divergence
    from the mean of their distributions; of full and sampled targets."""
    teacher_weights: Literal["fixed", "entropy", "likelihood"] = "fixed"
    """Of several teachers, at each token. entropy: more to those that are sure. likelihood: more to
    those that find the token likely. The sum of the weights stays."""

    def unhashed(self) -> set[str]:
        """Fields that a student's hash leaves out."""
        later = {"features", "teachers", "teacher_weights"}
        return super().unhashed() | (later - self.changed)

    @property
    def changed(self) -> set[str]:
        """Fields that are not at their default."""
        defaults = Loss()
        return {n for n in Loss.model_fields if getattr(self, n) != getattr(defaults, n)}

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, setting: float | Schedule) -> float | Schedule:
        if 0 in (
            (setting.start, setting.end, setting.peak)
            if isinstance(setting, Schedule)
            else (setting,)
        ):
            raise ValueError("must be greater than 0 (got 0). 1.0 is the distributions as they are")
        return setting


class Train(Section):
    """The student's training."""

    tokens: int | None = Field(None, ge=1)
    """Stop after this many positions fed. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Stop after this many passes over the snapshot."""
    tokens_per_step: int = Field(8192, ge=1)
    """Positions per optimizer step."""
    tokens_per_pass: int = Field(8192, ge=1)
    """Positions per forward pass; a step takes as many passes as needed (gradient accumulation)."""
    row_tokens: int | None = Field(None, ge=8)
    """Most positions of a packed row. null: a pass is a single row without padding where the
    student can attend within samples (most can), else rows of about the longest sample of a step,
    at least 128."""
    learning_rate: float = Field(1.0e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps that warm up."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """cosine, linear, wsd: the last learning rate over the peak."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradient norm is clipped to this."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""
    kernel: Kernel | None = None
    """Who makes the loss's passes over the vocabulary; null: Triton on an NVIDIA GPU, else torch.
    Same numbers."""
    snapshot: str | None = None
    """Train on this snapshot id; null: make one from what the recipe selects."""
    evaluate_every_tokens: int | None = Field(None, ge=1)
    """Validate this often, on prompts taken out of the training split."""
    validation_prompts: int = Field(64, ge=1)
    """Prompts of that validation split (only with evaluate_every_tokens)."""
    audit: Literal["refuse", "warn"] = "refuse"
    """What becomes of a training whose first rows' text, tokens and targets do not belong
    together."""
    checkpoint_every_seconds: float = Field(600.0, gt=0)
    """Seconds between checkpoints."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, besides the seconds."""
    wandb: str | None = Field(None, min_length=1)
    """Project of Weights & Biases that gets the scalars too; null: TensorBoard alone.
    WANDB_MODE=offline works."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either `tokens` or `epochs`, not both or neither")
        return self


def _one_or_several(schema: dict[str, Any]) -> None:
    """Tell editors that a recipe has `teacher` or `teachers`."""
    schema["required"].remove("teacher")
    schema["anyOf"] = [{"required": [name]} for name in ("teacher", "teachers")]


class Recipe(Section):
    """A whole recipe."""

    model_config = ConfigDict(json_schema_extra=_one_or_several)

    run: Run
    storage: Storage
    teacher: Teacher
    """The first one, where `teachers` names them."""
    teachers: list[OneTeacher] = Field([])
    """In place of `teacher`: several, each scored under its own identity."""
    student: Student | None = None
    """Without it and `train` a recipe is stage one alone: prompts, text and targets to export."""
    data: Data
    generate: Generate | None = None
    select: Select = Select()
    score: Score | None = None
    loss: Loss = Loss()
    train: Train | None = None
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    @model_validator(mode="before")
    @classmethod
    def _with_the_first(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not tree.get("teachers") or "teacher" in tree:
            return tree
        try:
            first = OneTeacher.model_validate(tree["teachers"][0]).alone
        except (ValidationError, LookupError, TypeError):
            first = Teacher(model="")  # what is wrong is said of the entry itself
        return tree | {"teacher": first}

    @property
    def masks(self) -> str | None:
        """What stands where a token is hidden from teacher and student; None: none is."""
        return self.data.masks if TASKS[self.run.task].structure.masked else None

    @property
    def several(self) -> list[OneTeacher]:
        """The teachers, unless there is one that scores all at weight 1: that is as `teacher`."""
        one = len(self.teachers) == 1 and self.teachers[0].is_plain
        return [] if one else self.teachers

    @property
    def scoring_engine(self) -> str | None:
        """The one engine whose rows are wanted; None: any."""
        return None if self.score is None else self.score.engine_for(self.loss.teacher_weights)

    def of_teacher(self, one: OneTeacher) -> Self:
        """The same with this teacher alone, and what it scores."""
        return self.model_copy(update={"teacher": one.alone, "teachers": [one]})
