"""Greedy answers to held-out prompts, and how they are scored.

They are scored by exact match, a regular expression, or ROUGE-L. A question is what stands before a
row's last scored span, with a reference. The reference is the data's own where there is one; else
it is what the span says, which the student was to learn. For plain text, which has no prompts, the
document goes on where a prefix of it stops.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....storage.errors import IntegrityError, UsageError
from ....storage.store.store import Store
from ....storage.tables.schema import TableName
from ...models.inputs.reads import context_of
from ...models.inputs.rendering import Renderer
from ...recipe.evaluate import EvaluateGenerate
from ...recipe.tasks import TASKS
from ...workers.job import Job
from .normal_forms import NORMAL_FORMS
from .patterns import SECONDS, last_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_PROMPTS = 16
PREFIX_TOKENS = 64
SAMPLES = 8
SAMPLE_CHARACTERS = 600
SAMPLE_TOKENS = 64
"""Of an answer that nobody scores, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One held-out prompt."""

    prompt_ids: list[int]
    reference: str
    teacher: str | None
    """What the teacher wrote, where it did."""
    key: str = ""
    """Of the prompt, in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiz:
    """The questions, asked of each student in turn, and how the answers are scored."""

    settings: EvaluateGenerate
    tokenizer: "PreTrainedTokenizerBase"
    questions: list[Question]
    against: str
    """What the references are, in words."""
    scored: bool = True
    """False: the answers are only to be looked at."""

    def answers(self, model: Any, job: Job) -> list[str]:
        """A model's greedy answers, in batches of prompts of like length.

        A prompt that fills the context gets none. The batches are the same for any number of
        ranks, which have them dealt out.
        """
        job.agreed_stop()
        parts = job.ranks.each(lambda: self._of_rank(model, job))
        found = {number: text for part in parts for number, text in part.items()}
        return [found[number] for number in range(len(self.questions))]

    def _of_rank(self, model: Any, job: Job) -> dict[int, str]:
        """By the question's number."""
        from ...models.attention.longest import Company

        prompts, company = [q.prompt_ids for q in self.questions], Company(model)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found: dict[int, str] = {}
        passed = 0
        for start in range(0, len(order), BATCH_PROMPTS):
            job.stop.check()
            batch = order[start : start + BATCH_PROMPTS]
            lengths = [len(prompts[n]) for n in batch]
            longest = max(lengths) + max(0, _room(model, lengths, self.settings.max_tokens))
            together = len(batch) > 1 and company.may_share([*lengths, longest])
            for part in [batch] if together else [[number] for number in batch]:
                if passed % job.ranks.count == job.ranks.rank:
                    asked = [prompts[n] for n in part]
                    texts = greedy(
                        model, self.tokenizer, asked, max_tokens=self.settings.max_tokens
                    )
                    found |= dict(zip(part, texts, strict=True))
                passed += 1
            job.progress.advance(len(batch), note="answers")
        return found

    def scores(self, answers: dict[str, list[str]]) -> dict[str, float]:
        """Arm -> mean score, 0 to 1; the teacher's too where its text is not the reference."""
        score, answers = scorer(self.settings), self._with_teacher(answers)
        return {
            arm: sum(
                score(text, q.reference) for text, q in zip(texts, self.questions, strict=True)
            )
            / len(texts)
            for arm, texts in answers.items()
        }

    def _with_teacher(self, answers: dict[str, list[str]]) -> dict[str, list[str]]:
        written = [q.teacher for q in self.questions]
        if self.against != GOLD or None in written:
            return answers
        return {"teacher": [str(text) for text in written], **answers}

    def unfinished(self, answers: dict[str, list[str]], job: Job) -> dict[str, list[str]]:
        """Reference and arm -> prompts whose text the pattern came to no end with.

        Such a text is right nowhere.
        """
        found: dict[str, list[str]] = {}
        if self.settings.pattern is None:
            return found
        for who, texts in self._compared_texts(answers).items():
            for question, text in zip(self.questions, texts, strict=True):
                job.stop.check()
                if not last_match(self.settings.pattern, text).ended:
                    found.setdefault(who, []).append(question.key)
        return found

    def about(self, answers: dict[str, list[str]]) -> dict[str, Any]:
        """What the scores mean."""
        about: dict[str, Any] = {"prompts": len(self.questions), "against": self.against}
        if self.settings.normalize == "number":
            about["no_number"] = self._no_number(answers)
        return self.settings.model_dump() | about

    def _no_number(self, answers: dict[str, list[str]]) -> dict[str, int]:
        """Reference and arm -> how many of its texts have no number, and so are right nowhere."""
        compared, texts = _compared(self.settings), self._compared_texts(answers)
        return {who: sum(compared(text) is None for text in of) for who, of in texts.items()}

    def _compared_texts(self, answers: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"reference": [q.reference for q in self.questions], **self._with_teacher(answers)}

    def samples(self, answers: dict[str, list[str]]) -> list[dict[str, str | None]]:
        """The first few prompts with everybody's text, cut to a readable length."""
        return [
            {
                "prompt": _short(str(self.tokenizer.decode(question.prompt_ids))),
                "reference": _short(question.reference),
                "teacher": _short(question.teacher),
                **{arm: _short(texts[number]) for arm, texts in answers.items()},
            }
            for number, question in enumerate(self.questions[:SAMPLES])
        ]


GOLD = "the data's reference"


def prepare_quiz(job: Job, store: Store, rows: Iterable[dict[str, Any]]) -> Quiz | None:
    """Choose the prompts in the order of their keys.

    Keys are hashes, so this is a random sample, and the same for every student. Without
    `evaluate.generate` the prompts are few and nothing is scored. None is given where none are
    asked for, and where no text is continued.

    Args:
        job: Names inputs, teacher and author.
        store: Holds prompts and generations.
        rows: Held-out rows: prompt_key, generation_key, token_ids, spans.

    Raises:
        UsageError: no reference matches `evaluate.generate.pattern`, or is the number that is
            asked for.
    """
    scored, few = job.recipe.evaluate.generate, job.recipe.evaluate.samples
    if scored is None and (few == 0 or TASKS[job.recipe.run.task].structure.in_labels):
        return None
    settings = scored or EvaluateGenerate(prompts=few, max_tokens=SAMPLE_TOKENS)
    tokenizer = Renderer(store.teacher_dir(job.teacher_id), {}).tokenizer
    first: dict[bytes, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["prompt_key"], row)
    chosen = [first[key] for key in sorted(first)]
    if job.recipe.data.records.document:
        questions = [_continuation(row, tokenizer, settings) for row in chosen[: settings.prompts]]
        against = "the rest of the text"
    else:
        questions, against = _questions(
            job, store, chosen=chosen, many=settings.prompts, tokenizer=tokenizer
        )
    _refuse_without_reference(settings, questions, against)
    return Quiz(
        settings=settings,
        tokenizer=tokenizer,
        questions=questions,
        against=against,
        scored=scored is not None,
    )


def _refuse_without_reference(
    settings: EvaluateGenerate, questions: list[Question], against: str
) -> None:
    """Raise UsageError where no answer can be right, because no reference has what is compared."""
    if settings.metric == "rouge_l" or any(
        _compared(settings)(question.reference) is not None for question in questions
    ):
        return
    found = f"{len(questions)} references ({against}; the first is {questions[0].reference[:80]!r})"
    matches = [last_match(settings.pattern or "", q.reference) for q in questions]
    if settings.pattern is None or any(match.text is not None for match in matches):
        raise UsageError(
            f"evaluate.generate.normalize: 'number', but what is compared is a number in none of "
            f"{found}. Take the number out with metric 'regex' and a pattern such as "
            r"'(-?\d+(?:,\d{3})*(?:\.\d+)?)', or normalize text."
        )
    endless = sum(not match.ended for match in matches)
    said = f"; at {endless} of them it came to no end within {SECONDS:g} s" if endless else ""
    raise UsageError(
        f"evaluate.generate.pattern: {settings.pattern!r} matches none of {found}{said}. Write a "
        "pattern that does."
    )


def _questions(
    job: Job,
    store: Store,
    *,
    chosen: list[dict[str, Any]],
    many: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[Question], str]:
    """Questions with their references, and which of two kinds these are.

    They are the data's own references if it has any, else what was written.
    """
    gold = _gold(job, store, {row["prompt_key"] for row in chosen})
    chosen = [r for r in chosen if not gold or r["prompt_key"] in gold][:many]
    rows = _rows(store, "generations", {row["generation_key"] for row in chosen}, ["text"])
    texts = {row["key"]: row["text"] for row in rows}
    by_teacher = job.author_id == job.teacher_id
    questions = []
    for row in chosen:
        start, tokens = row["spans"][-1].tolist()
        written = _text_of(row, texts, store)
        if len(row["spans"]) > 1 or start + tokens < len(row["token_ids"]):
            # The text is all that follows the prompt, other turns too.
            answer = row["token_ids"][start : start + tokens]
            written = str(tokenizer.decode(answer.tolist(), skip_special_tokens=True))
        question = Question(
            prompt_ids=row["token_ids"][:start].tolist(),
            reference=gold.get(row["prompt_key"], written),
            teacher=written if by_teacher else None,
            key=row["prompt_key"].hex(),
        )
        questions.append(question)
    other = "the given completion" if job.recipe.generate is None else "the text that was generated"
    return questions, GOLD if gold else "the teacher's own text" if by_teacher else other


def _text_of(row: dict[str, Any], texts: dict[bytes, str], store: Store) -> str:
    if row["generation_key"] not in texts:
        raise IntegrityError(
            f"{store.root}: the held-out row of prompt {row['prompt_key'].hex()} names the "
            f"generation {row['generation_key'].hex()}, and no commit holds it. Run `stillroom "
            "verify`, then the recipe again."
        )
    return texts[row["generation_key"]]


def _continuation(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", settings: EvaluateGenerate
) -> Question:
    ids = [int(i) for i in row["token_ids"]]
    start = max(1, min(PREFIX_TOKENS, len(ids) // 2))
    rest = tokenizer.decode(ids[start : start + settings.max_tokens], skip_special_tokens=True)
    key = row["prompt_key"].hex()
    return Question(prompt_ids=ids[:start], reference=str(rest), teacher=None, key=key)


def _gold(job: Job, store: Store, prompt_keys: set[bytes]) -> dict[bytes, str]:
    """Prompt key -> the data's reference, for prompts that have one."""
    inputs = store.inputs(job.data_id)
    if inputs is None:
        return _published_gold(store, prompt_keys)
    pairs = zip(inputs["key"].to_pylist(), inputs["prompt_key"].to_pylist(), strict=True)
    keys = {key for key, prompt_key in pairs if prompt_key in prompt_keys}
    rows = _rows(store, "prompts", keys, ["prompt_key", "reference"])
    return {row["prompt_key"]: row["reference"] for row in rows if row["reference"] is not None}


def _published_gold(store: Store, prompt_keys: set[bytes]) -> dict[bytes, str]:
    """The same of published text, which carries its references itself."""
    found: dict[bytes, str] = {}
    for commit in store.commits("generations"):
        shard = store.shard("generations", commit.shard.sha256)
        if "reference" in shard.schema.names:
            rows = shard.read_all(["prompt_key", "reference"]).to_pylist()
            gold = {row["prompt_key"]: row["reference"] for row in rows if row["reference"]}
            found |= {key: gold[key] for key in prompt_keys & gold.keys()}
    return found


def _rows(
    store: Store, table: TableName, keys: set[bytes], columns: list[str]
) -> Iterator[dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for place in store.index(table, ["key"]).to_pylist():
        if place["key"] in keys:
            places.setdefault(place["shard"], []).append(place["row"])
    return store.rows(table, places, ["key", *columns])


def greedy(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]], *, max_tokens: int
) -> list[str]:
    """Greedy continuations of one batch, padded on the left, by a transformers or PEFT model."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    room = _room(model, [longest], max_tokens)
    if room < 1:
        return [""] * len(prompts)
    ends = _end_tokens(model, tokenizer)
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Replaced, not passed: transformers fills what is not given (a repetition penalty, say) from
    # the model's own.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=ends or None, pad_token_id=pad
    )
    with torch.inference_mode():
        found = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)


def _room(model: Any, lengths: list[int], max_tokens: int) -> int:
    """Tokens that an answer to the longest of these prompts may have."""
    context = context_of(model)
    return max_tokens if context is None else min(max_tokens, context - max(lengths))


def _end_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every id that ends an answer: the model's own, and that of the text it was trained on."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})


def scorer(settings: EvaluateGenerate) -> Callable[[str, str], float]:
    """A function of (answer, reference) to a score from 0 to 1."""
    if settings.metric == "rouge_l":
        return _rouge_l_scorer()
    compared = _compared(settings)

    # What is not there is never right, not even where the reference has none either.
    def score(answer: str, reference: str) -> float:
        found = compared(answer)
        return float(found is not None and found == compared(reference))

    return score


def _compared(settings: EvaluateGenerate) -> Callable[[str], Any]:
    """What of a text is compared: the normal form of its last match, or of all of it.

    It is None where there is no match.
    """
    pattern, normal_form = settings.pattern, NORMAL_FORMS[settings.normalize]

    def compared(text: str) -> Any:
        found = text if pattern is None else last_match(pattern, text).text
        return None if found is None else normal_form(found)

    return compared


def _rouge_l_scorer() -> Callable[[str, str], float]:
    """F-measure of the longest common subsequence of words, no stemming.

    Words are runs of letters and digits of any script. The package's own tokenizer keeps a-z and
    0-9 only, which is the same for English and nothing at all for Chinese.
    """
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"[^\W_]+", text.lower())

    rouge = RougeScorer(["rougeL"], tokenizer=Words())
    return lambda answer, reference: float(rouge.score(reference, answer)["rougeL"].fmeasure)


def _short(text: str | None) -> str | None:
    return (
        text
        if text is None or len(text) <= SAMPLE_CHARACTERS
        else text[:SAMPLE_CHARACTERS] + " ..."
    )
