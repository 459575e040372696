"""Where a config caps attention scores, models are loaded with an attention that does it.

That holds for teachers and students.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import SIZES, build
from transformers import FalconConfig, Gemma2Config, Gemma3Config, VaultGemmaConfig

from stillroom.stages.models.attention.cap import attend_capped, caps
from stillroom.stages.models.attention.flat import attend_apart
from stillroom.stages.models.causal_lm import KIND, load_causal_lm

pytestmark = pytest.mark.numeric

CAPPED = {"query_pre_attn_scalar": 8, "initializer_range": 0.5, "attn_logit_softcapping": 2.0}


@pytest.mark.parametrize("config", [Gemma2Config, VaultGemmaConfig])
def test_the_cap_is_applied(config, tmp_path):
    build(config(**SIZES, **CAPPED)).save_pretrained(tmp_path)
    right = build(config(**SIZES, **CAPPED), attn_implementation="eager")
    dropped = build(config(**SIZES, **CAPPED), attn_implementation="sdpa")
    who = SimpleNamespace(
        folder=tmp_path, dtype="float32", adapter=None, runs_code=False, quantize=None, quantized=""
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = right(input_ids=ids).logits
        assert not torch.allclose(dropped(input_ids=ids).logits, expected, atol=1e-2)
        for model in (load_causal_lm(who), KIND.student(tmp_path).eval(), KIND.fresh(right.config)):
            assert model.config._attn_implementation == "eager"
        for model in (load_causal_lm(who), KIND.student(tmp_path).eval()):
            assert torch.equal(model(input_ids=ids).logits, expected)
        # Samples of a flat row would lose it again.
        assert attend_apart(model, 20, torch.float32) is not None
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_cap_inside_of_a_config_counts_and_no_other_model_is_changed():
    assert caps(Gemma3Config(text_config={"attn_logit_softcapping": 50.0}))
    assert not caps(Gemma3Config())
    falcon = build(FalconConfig(vocab_size=24, hidden_size=16, num_attention_heads=2, alibi=True))
    before = falcon.config._attn_implementation
    attend_capped(falcon)
    assert falcon.config._attn_implementation == before != "eager"
