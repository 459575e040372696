"""When two tokenizers are one."""

import copy
import json

import pytest

from stillroom.stages.models.inputs.same_tokenizer import compare_specs, compare_tokenizers
from stillroom.storage.errors import UsageError


@pytest.fixture
def bpe():
    """A byte-pair tokenizer.json in miniature."""
    return {
        "added_tokens": [{"id": 5, "content": "<end>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
            "merges": ["a b", "ab c"],
            "byte_fallback": False,
            "unk_token": None,
        },
    }


def change(spec, **parts):
    changed = copy.deepcopy(spec)
    for path, value in parts.items():
        target, _, name = path.rpartition("__")
        (changed[target] if target else changed)[name] = value
    return changed


def test_equal_is_one(bpe):
    assert compare_specs(bpe, copy.deepcopy(bpe)) is None


@pytest.mark.parametrize(
    "parts",
    [
        {"post_processor": {"type": "TemplateProcessing"}, "truncation": {"max_length": 8}},
        {"model__merges": [["a", "b"], ["ab", "c"]]},
        {"model__unk_token": ""},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": True,
            }
        },
        {"added_tokens": [{"id": 5, "content": "<end>"}, {"id": 6, "content": "<think>"}]},
    ],
    ids=[
        "around the text",
        "merges as pairs",
        "empty for none",
        "sequence of one",
        "defaults",
        "more ids at the end",
    ],
)
def test_what_may_differ(bpe, parts):
    assert compare_specs(bpe, change(bpe, **parts)) is None
    assert compare_specs(change(bpe, **parts), bpe) is None


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"model__vocab": {"a": 0, "b": 2, "c": 1, "ab": 3, "abc": 4}},
            "id 1 is 'b' in the first, 'c' in the second",
        ),
        ({"model__merges": ["a b", "b c"]}, "merges differ from number 1"),
        ({"model__merges": ["a b"]}, "merges differ from number 1 on"),
        ({"normalizer": None}, "normalisers differ"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "pre-tokenisers differ",
        ),
        ({"model__byte_fallback": True}, "byte_fallback is False in the first, True in the second"),
        ({"model__type": "WordPiece"}, "the first is BPE, the second WordPiece"),
        (
            {"added_tokens": [{"id": 5, "content": "<stop>"}]},
            "id 5 is '<end>' in the first, '<stop>'",
        ),
        ({"added_tokens": [{"id": 6, "content": "<end>"}]}, "id 5 is '<end>' in the first, None"),
    ],
)
def test_what_may_not(bpe, parts, reason):
    assert reason in compare_specs(bpe, change(bpe, **parts))


def test_scores_of_a_unigram_model_count():
    spec = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    other = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.5]]}}
    assert compare_specs(spec, spec) is None
    assert compare_specs(spec, other) == "the score of id 1 differs"


def test_folders(bpe, tmp_path):
    for name, spec in {"a": bpe, "b": change(bpe, normalizer=None)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(spec))
    assert compare_tokenizers(tmp_path / "a", tmp_path / "a") is None
    assert compare_tokenizers(tmp_path / "a", tmp_path / "b") == "their normalisers differ"
    with pytest.raises(UsageError, match=r"tokenizer\.json: not a readable tokenizer file"):
        compare_tokenizers(tmp_path / "a", tmp_path)


@pytest.mark.assets
def test_real_tokenizers(assets):
    models = assets / "models"
    assert compare_tokenizers(models / "tokenizer-gpt2", models / "tokenizer-gpt2") is None
    reason = compare_tokenizers(
        models / "stories260k-llama-hd32", models / "babyllama-tok105-1m-hd32"
    )
    assert reason.startswith("id 3 is")
