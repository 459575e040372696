"""Attention rebuilt from recorded queries and keys is the model's own.

Where it is not, it is refused by name.
"""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_models import CONFIGS, SIZES, V, build
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    ModernBertConfig,
    MPNetConfig,
    MptConfig,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from stillroom.stages.losses.features.attention import attention_kl
from stillroom.stages.models.attention.flat import attend_apart, flat_inputs
from stillroom.stages.models.attention.maps import maps
from stillroom.stages.models.attention.recorded import attention_layers, recording
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
ENCODER = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
MODELS = {
    "bert": BertConfig(**ENCODER, num_attention_heads=4, max_position_embeddings=64),
    "modernbert": ModernBertConfig(
        **ENCODER, num_attention_heads=4, local_attention=6, pad_token_id=0
    ),
    "gpt2": CONFIGS["gpt2"],
    "llama": CONFIGS["llama"].__class__(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(
        **GROUPED | {"num_hidden_layers": 6}, sliding_window=4, query_pre_attn_scalar=5
    ),
}
OTHERS = {
    "gpt_oss": (GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), "sinks"),
    "gemma2": (CONFIGS["gemma2"], "soft-capped scores"),
    "mpt": (
        MptConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=2, max_seq_len=64),
        "0 of its 2",
    ),
    "llama4_text": (
        Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=32,
            num_local_experts=2,
            attention_chunk_size=4,
        ),
        "rebuilt, that of layer 0 is off by",
    ),
    "mpnet": (MPNetConfig(**ENCODER, num_attention_heads=4), "0 of its 3"),
    "t5": (
        T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "position biases",
    ),
    "mamba": (
        MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2),
        "0 of its 2",
    ),
}
LENGTHS = [9, 5, 12]


def model_of(name, seed=0):
    """Heads are sharp enough that a wrong mask, scale or order shows."""
    config = copy.deepcopy(MODELS[name] if name in MODELS else OTHERS[name][0])
    if "bert" in name or name == "mpnet":
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    elif name == "t5":
        model = T5EncoderModel(config).eval()
    else:
        model = build(config)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in label:
                weight.mul_(16)
    return model


def padded(side="right"):
    """Ids [B, T] and which of them are text."""
    longest = max(LENGTHS)
    ids = torch.randint(3, V, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(1))
    places = torch.arange(longest)
    lengths = torch.tensor(LENGTHS)[:, None]
    return ids, places < lengths if side == "right" else places >= longest - lengths


@pytest.mark.parametrize("name", MODELS)
def test_rebuilt_attention_of_a_padded_batch_is_the_models_eager_one(name):
    """Every layer, every head and every token that is no padding is compared.

    They are recorded with the attention that is used.
    """
    model = model_of(name)
    layers = attention_layers(model)
    ids, mask = padded()
    with torch.no_grad(), recording(model) as kept:
        model(input_ids=ids, attention_mask=mask.long())
    assert list(kept) == layers
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(input_ids=ids, attention_mask=mask.long(), output_attentions=True).attentions
    sharpest = 0.0
    for found, right in zip(kept.values(), eager, strict=True):
        rebuilt = maps(found.scores(mask.flatten()), LENGTHS)
        for row, size, own in zip(right, LENGTHS, rebuilt, strict=True):
            torch.testing.assert_close(own, row[:, :size, :size], rtol=0, atol=1e-5)
            sharpest = max(sharpest, float(own[:, -1].max()))
    assert sharpest > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_rounding_is_no_reason_to_refuse(name, dtype):
    model = model_of(name).to(dtype)
    assert len(attention_layers(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", OTHERS)
def test_attention_that_is_more_is_refused_by_name_and_cause(name):
    model = model_of(name)
    own = model.config._attn_implementation
    with pytest.raises(UsageError, match=rf"\({name}\): its attention is not .*{OTHERS[name][1]}"):
        attention_layers(model)
    assert model.config._attn_implementation == own


def test_eager_attention_is_refused_as_it_is_not_recorded():
    model = model_of("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match="loaded with eager attention"):
        attention_layers(model)


def test_recording_changes_nothing_and_ends():
    model = model_of("qwen3")
    ids, mask = padded()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask.long()).logits
        with recording(model) as kept, recording(model) as inner:
            within = model(input_ids=ids, attention_mask=mask.long()).logits
        count = len(kept), len(inner)
        first = next(iter(kept.values())).queries
        after = model(input_ids=ids, attention_mask=mask.long()).logits
    assert torch.equal(before, within)
    assert torch.equal(before, after)
    assert count == (2, 2) == (len(kept), len(inner))
    assert next(iter(kept.values())).queries is first


def test_another_models_pass_is_not_recorded():
    model, other = model_of("llama"), model_of("llama")
    with torch.no_grad(), recording(model) as kept:
        other(input_ids=padded()[0])
    assert not kept


def test_of_packed_samples_the_same_is_recorded_as_of_each_alone():
    model = model_of("llama")
    alone, (ids, mask) = copy.deepcopy(model), padded()
    assert attend_apart(model, max(LENGTHS), torch.float32) is None
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(size) for size in LENGTHS])[None]
    with torch.no_grad(), recording(model) as kept:
        model(
            input_ids=ids[mask][None],
            position_ids=positions,
            use_cache=False,
            **flat_inputs(edges, max(LENGTHS)),
        )
    for number, (start, stop) in enumerate(pairwise(edges.tolist())):
        with torch.no_grad(), recording(alone) as own:
            alone(input_ids=ids[number : number + 1, : stop - start])
        for packed, one in zip(kept.values(), own.values(), strict=True):
            for part in ("queries", "keys", "values"):
                found, right = getattr(packed, part)[:, :, start:stop], getattr(one, part)
                torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_students_gradient_goes_through_what_is_recorded(checkpointing):
    """Towards a teacher of other grouping; a step along it brings the student nearer."""
    teacher, student = model_of("llama"), model_of("qwen3")
    if checkpointing:
        student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        student.train()
    ids, mask = padded()
    with torch.no_grad(), recording(teacher) as right:
        teacher(input_ids=ids, attention_mask=mask.long())
    wanted = list(right.values())[-1].scores(mask.flatten())
    layer = attention_layers(student)[-1]

    def loss():
        with recording(student) as kept:
            student(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return attention_kl(wanted, kept[layer].scores(mask.flatten()), LENGTHS).mean()

    first = loss()
    first.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        for weight in student.parameters():
            if weight.grad is not None:
                weight -= 1e-4 * weight.grad
    assert loss() < first
