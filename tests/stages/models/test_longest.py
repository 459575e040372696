"""Texts share a pass only where none changes another.

One changes another where frequencies follow the longest text, or by mixing of any kind.
"""

import numpy as np
import pytest
import torch
from tiny_models import SIZES, build
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Phi3Config,
)

from stillroom.stages.models.attention.longest import Company, changes_beyond
from stillroom.stages.models.causal_lm import KIND
from stillroom.stages.models.classification import Inputs, class_company

pytestmark = pytest.mark.numeric

ORIGINAL = 16
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 16.0, 32.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {
    "longrope": Phi3Config(
        **SIZES,
        rope_parameters=dict(LONG),
        original_max_position_embeddings=ORIGINAL,
        pad_token_id=0,
        initializer_range=0.5,
    ),
    "dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": ORIGINAL},
        rope_parameters=DYNAMIC,
        initializer_range=0.5,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_on_both_sides_of_the_threshold(kind):
    company = Company(build(KINDS[kind]))
    assert company.may_share([5, 12, ORIGINAL])
    assert not company.may_share([5, ORIGINAL + 1])
    assert company.may_share([ORIGINAL + 1] * 2)
    assert company.may_share([5, ORIGINAL]), "what is refused once says nothing of shorter texts"


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_itself_says_so_where_no_table_does(kind, monkeypatch):
    monkeypatch.setattr("stillroom.stages.models.attention.longest.changes_beyond", lambda _: None)
    company = Company(build(KINDS[kind]))
    assert company.may_share([5, 12, ORIGINAL])
    assert not company.may_share([10, 40])


def test_a_model_that_mixes_the_rows_of_a_pass_is_noticed():
    model = build(LlamaConfig(**SIZES)).train()
    assert Company(model).may_share([5, 40])
    model.model.layers[0].register_forward_hook(lambda *a: a[2] + a[2].mean(0, keepdim=True))
    assert not Company(model).may_share([5, 40])
    assert model.training


def test_texts_that_no_memory_holds_together_are_not_said_to_change_one_another():
    def read(lengths):
        if len(lengths) > 1:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return [torch.ones(n, 2) for n in lengths]

    company = Company(build(LlamaConfig(**SIZES)), read)
    assert not company.may_share([5, 40])
    assert company.apart == (
        "texts of 5 and 40 tokens could not be read together "
        "(OutOfMemoryError: tried to allocate 80 GiB)"
    )


def test_the_model_is_asked_once_for_lengths_it_was_asked():
    asked = []
    model = build(LlamaConfig(**SIZES))

    def read(lengths):
        asked.append(list(lengths))
        return [torch.ones(n, 2) for n in lengths]

    company = Company(model, read)
    assert company.may_share([30, 10])
    assert company.may_share([12, 29, 11])
    assert len(asked) == 4, "three alone, one pass of all"
    assert company.may_share([9, 20])
    assert asked[-1] == [9, 15, 30]


def test_frequencies_of_each_kind_of_layer_count():
    class Layered:
        max_position_embeddings = 64

        def __init__(self, **kinds):
            self.rope_parameters = kinds

        def get_text_config(self):
            return self

    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert changes_beyond(Layered(full_attention=plain, sliding_attention=plain)) is None
    assert changes_beyond(Layered(full_attention=LONG, sliding_attention=plain)) == ORIGINAL
    assert changes_beyond(Layered(full_attention=plain, sliding_attention=DYNAMIC)) == 64


def test_a_model_forgets_the_long_texts_that_it_has_read(tmp_path):
    """It is unlike transformers here.

    That keeps the frequencies of the longest text for all beyond the original context.
    """
    build(KINDS["dynamic"]).save_pretrained(tmp_path)
    model = KIND.student(tmp_path).eval()
    plain = [AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2)]
    text, long = torch.arange(20)[None], (torch.arange(60) % 24)[None]
    with torch.no_grad():
        right = plain[0](input_ids=text).logits
        for one in (model, plain[1]):
            one(input_ids=long)
        assert torch.equal(model(input_ids=text).logits, right)
        assert not torch.allclose(plain[1](input_ids=text).logits, right, atol=1e-3)


def test_classifiers_are_asked_by_their_logits():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(KINDS["longrope"]).eval()
    company = class_company(model, Inputs(padding=0, separator=None))
    assert company.may_share([5, ORIGINAL])
    assert not company.may_share(np.array([5, 40]).tolist())
