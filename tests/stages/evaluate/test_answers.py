"""Scores of answers by hand, and greedy batches against one prompt at a time."""

import re
import signal
from fractions import Fraction
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from stillroom.stages.evaluate.quiz import patterns
from stillroom.stages.evaluate.quiz.answers import Question, Quiz, greedy, scorer
from stillroom.stages.evaluate.quiz.normal_forms import number, words
from stillroom.stages.evaluate.quiz.patterns import last_match
from stillroom.stages.recipe.evaluate import EvaluateGenerate
from stillroom.stages.workers.ranks import Ranks
from stillroom.storage.time_limit import time_limit


class Numbers:
    """A tokenizer whose text is the ids; 0 is a special token and 1 ends an answer."""

    eos_token_id = 1

    def batch_decode(self, rows: torch.Tensor, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(i) for i in row.tolist() if i > 1) for row in rows]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        eos_token_id=7,
    )
    return LlamaForCausalLM(config).eval()


def one_by_one(model: LlamaForCausalLM, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (1, 7):
                break
    return ids[len(prompt) :]


def test_a_padded_batch_gives_what_each_prompt_alone_gives(model: LlamaForCausalLM) -> None:
    prompts = [[3, 4, 5], [9, 8, 7, 6, 5, 4], [11], [30, 31]]
    found = greedy(model, Numbers(), prompts, max_tokens=10)  # type: ignore[arg-type]
    expected = [[i for i in one_by_one(model, prompt, 10) if i > 1] for prompt in prompts]
    # An answer that ends early is padded to the length of the others with its end token.
    assert [text.split() for text in found] == [[str(i) for i in ids] for ids in expected]


def test_prompts_that_would_change_one_another_are_answered_alone() -> None:
    """Frequencies of Phi-3 are others where the longest text of a pass has more than 16 tokens."""
    config = Phi3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 4.0, 16.0, 32.0],
        },
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=7,
    )
    torch.manual_seed(0)
    model, prompts = Phi3ForCausalLM(config).eval(), [[*range(8, 16)], [*range(8, 30)]]
    quiz = Quiz(
        settings=EvaluateGenerate(max_tokens=6),
        tokenizer=Numbers(),  # type: ignore[arg-type]
        questions=[Question(prompt_ids=ids, reference="", teacher=None) for ids in prompts],
        against="nothing",
    )
    job: Any = SimpleNamespace(
        agreed_stop=lambda: None,
        ranks=Ranks(),
        stop=SimpleNamespace(check=lambda: None),
        progress=SimpleNamespace(advance=lambda *_, **__: None),
    )
    numbers: Any = Numbers()
    alone = [greedy(model, numbers, [ids], max_tokens=6)[0] for ids in prompts]
    assert greedy(model, numbers, prompts, max_tokens=6) != alone
    assert quiz.answers(model, job) == alone


def test_the_models_own_sampling_settings_play_no_part(model: LlamaForCausalLM) -> None:
    plain = greedy(model, Numbers(), [[3, 4, 5]], max_tokens=8)  # type: ignore[arg-type]
    first = int(plain[0].split()[0])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, suppress_tokens=[first], eos_token_id=[7], max_length=4
    )
    assert greedy(model, Numbers(), [[3, 4, 5]], max_tokens=8) == plain  # type: ignore[arg-type]


def test_answers_stay_within_the_context(model: LlamaForCausalLM) -> None:
    assert len(greedy(model, Numbers(), [[3] * 30], max_tokens=10)[0].split()) <= 2
    assert greedy(model, Numbers(), [[3] * 32], max_tokens=10) == [""]  # type: ignore[arg-type]


def test_positions_behind_that_of_the_padding_are_no_context() -> None:
    """A RoBERTa uses 18 of 20 positions: a longer answer would end in an IndexError."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = RobertaConfig(
        **sizes,
        vocab_size=50,
        num_attention_heads=2,
        max_position_embeddings=20,
        pad_token_id=1,
        is_decoder=True,
    )
    writer = RobertaForCausalLM(config).eval()
    writer.generation_config.eos_token_id = None
    found = greedy(writer, Numbers(), [[3] * 15], max_tokens=10)  # type: ignore[arg-type]
    assert len(found[0].split()) <= 3
    assert greedy(writer, Numbers(), [[3] * 18], max_tokens=10) == [""]  # type: ignore[arg-type]


def score(
    metric: Any, answer: str, reference: str, pattern: str | None = None, normalize: Any = "none"
) -> float:
    settings = EvaluateGenerate(metric=metric, pattern=pattern, normalize=normalize)
    return scorer(settings)(answer, reference)


def test_exact_match_forgives_white_space_only() -> None:
    assert score("exact_match", " a  b\n", "a b") == 1.0
    assert score("exact_match", "A b", "a b") == 0.0


def test_regex_compares_the_last_match_in_both() -> None:
    pattern = r"#### (.*)"
    assert score("regex", "first #### 1\nthen #### 42 ", "because\n#### 42", pattern) == 1.0
    assert score("regex", "#### 42 then #### 1", "#### 42", pattern) == 0.0
    assert score("regex", "42", "#### 42", pattern) == 0.0
    assert score("regex", "none", "none", pattern) == 0.0
    assert score("regex", "it is 7, or 42", "42", r"\d+") == 1.0  # no group: the whole match


def test_rouge_l_by_hand_and_as_the_package_scores_english() -> None:
    # Longest common subsequence "the cat the mat" is 4 words: precision 4/5, recall 4/6, F 8/11.
    answer, reference = "The cat on the mat.", "the cat sat under the mat"
    assert score("rouge_l", answer, reference) == pytest.approx(2 * 4 / (5 + 6))
    package = RougeScorer(["rougeL"], use_stemmer=False)
    for a, r in ((answer, reference), ("", "x"), ("x-y z", "x y z 3"), ("no overlap", "at all")):
        assert score("rouge_l", a, r) == pytest.approx(package.score(r, a)["rougeL"].fmeasure)


def test_rouge_l_sees_other_scripts() -> None:
    assert score("rouge_l", "мама мыла раму", "мама мыла раму") == 1.0
    assert score("rouge_l", "мама ела", "мама мыла") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("same", "value"),
    [
        (["1000", "1,000", "$1,000", "1000.0", "1e3", " 1000.\n", "+1000", "2000/2"], "1000"),
        (["42", "42.", "42.00", "$ 42", "42%", "42 %.", "4.2e1", "42 €", "٤٢"], "42"),
        (["-3", "-$3", "$-3", "\N{MINUS SIGN}3.0", "-6/2"], "-3"),
        (["0.5", ".5", "1/2", "50e-2"], "1/2"),
        (["1,234,567.25"], "4938269/4"),
    ],
)
def test_a_number_is_one_however_it_is_written(same: list[str], value: str) -> None:
    assert {number(text) for text in same} == {Fraction(value)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "forty-two",
        "1,00",
        "1,0000",
        "1.000,5",
        "42 apples",
        "--3",
        "-$-3",
        "1/0",
        "nan",
        "1_000",
        "1e9999",
        "1.2.3",
        "$",
        ".",
        "½",
        "9" * 5000,
        "1/" + "9" * 5000,
    ],
)
def test_what_is_no_number_is_right_nowhere(text: str) -> None:
    assert number(text) is None
    assert score("exact_match", text, text, normalize="number") == 0.0


def test_numbers_are_compared_on_both_sides_whole_or_as_the_pattern_takes_them_out() -> None:
    assert score("exact_match", "1,000", "1000", normalize="number") == 1.0
    assert score("exact_match", "42.", "42", normalize="number") == 1.0
    assert score("exact_match", "42.0001", "42", normalize="number") == 0.0
    for form, expected in (("number", 1.0), ("none", 0.0)):
        assert score("regex", "so 7, or 1,000.", "#### 1000", r"(-?[\d,.]+)", form) == expected


def test_the_pattern_of_the_template_takes_the_last_number_out() -> None:
    template = files("stillroom.pipeline.recipes").joinpath("template.yaml").read_text()
    (line,) = re.findall(r"# generate: ({metric: regex.*})", template)
    settings = EvaluateGenerate(**yaml.safe_load(line))
    for answer, reference, right in (
        ("The answer is 42 apples.", "42", 1.0),
        ("So 7, or 1,000.", "#### 1000", 1.0),
        ("It is -3.50, I think.", "-3.5", 1.0),
        ("Of 3, 4 and 5.", "4", 0.0),
        ("I do not know.", "4", 0.0),
    ):
        assert scorer(settings)(answer, reference) == right, answer


def test_text_is_normalized_as_squad_does() -> None:
    """On ASCII it does as the published script.

    Punctuation of other scripts goes too, and no answer goes whole.
    """
    for answer, reference in (
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an U.S. city", "us city"),
        ("¿Qué?", "qué"),
        ("A", "a."),
        ("theatre", "Theatre"),
    ):
        assert score("exact_match", answer, reference, normalize="text") == 1.0
    for answer, reference in (("the", "a"), ("theatre", "atre"), ("?", "!"), ("1,000", "100")):
        assert score("exact_match", answer, reference, normalize="text") == 0.0
    assert words("The the, cat's-eye  AN apple") == "catseye apple"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "number"}, "normalize 'number' is of metrics 'exact_match' and 'regex'"),
        ({"metric": "exact_match", "pattern": "x"}, "`pattern` is of metric 'regex'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateGenerate(**settings)


SHIPPED = (r"#### (.*)", r"(-?\d+(?:,\d{3})*(?:\.\d+)?)", r"(-?[\d,.]+)", r"\d+")


@pytest.mark.parametrize("pattern", SHIPPED)
@given(text=st.text(st.sampled_from("12,. -#\naé٤"), max_size=40))
def test_the_bound_changes_nothing_of_what_ordinary_patterns_find(pattern: str, text: str) -> None:
    found = [match.group(1 if "(" in pattern else 0) for match in re.finditer(pattern, text)]
    assert last_match(pattern, text) == (found[-1] if found else None, True)


def test_a_pattern_that_backtracks_ends_and_its_answers_count_as_unanswered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    before = signal.getitimer(signal.ITIMER_PROF)
    endless, reference = "a" * 40 + "b", "aaa"
    settings = EvaluateGenerate(metric="regex", pattern=r"((?:a+)+$)")
    asked = [Question(prompt_ids=[], reference=reference, teacher=None, key=k) for k in "xyz"]
    numbers: Any = Numbers()
    quiz = Quiz(settings=settings, tokenizer=numbers, questions=asked, against="r")
    answers = {"student": ["aaa", endless, "b"]}
    job: Any = SimpleNamespace(
        agreed_stop=lambda: None, ranks=Ranks(), stop=SimpleNamespace(check=lambda: None)
    )
    assert quiz.unfinished(answers, job) == {"student": ["y"]}
    assert quiz.scores(answers) == {"student": pytest.approx(1 / 3)}
    # Not even where the reference is the same text.
    assert score("regex", endless, endless, settings.pattern) == 0.0
    assert signal.getitimer(signal.ITIMER_PROF) == before
    signal.raise_signal(signal.SIGPROF)  # one that comes late ends nothing


def test_a_limit_that_has_ended_a_block_gives_it_time_to_end() -> None:
    """A signal between the error and the end of the block would put a second error in its way."""
    ended = []

    def block() -> None:
        try:
            signal.raise_signal(signal.SIGPROF)
        finally:
            signal.raise_signal(signal.SIGPROF)
            ended.append(True)

    with pytest.raises(TimeoutError), time_limit(0):
        block()
    assert ended


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 3000 + ")" * 3000])
def test_what_is_no_expression_is_refused_however_it_fails(pattern: str) -> None:
    with pytest.raises(ValidationError, match="`pattern` is no regular expression"):
        EvaluateGenerate(metric="regex", pattern=pattern)
