"""What a report shows of held-out rows.

Every bin, mean and probability is held against its definition in float64.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stillroom.stages.evaluate import views as evaluate_views
from stillroom.stages.evaluate.metrics import measure
from stillroom.stages.evaluate.views import (
    BEST,
    CONTEXT,
    ENTROPY_EDGES,
    LADDER,
    MASS_EDGES,
    POSITION_EDGES,
    ROWS,
    TOKENS,
    Views,
    in_bins,
    kept_mass,
    lengths,
)
from stillroom.stages.models.inputs.token_text import Pieces
from stillroom.stages.targets.spec import Kept
from stillroom.storage.tables.soft_targets import SoftTargets

VOCABULARY = 300
TOPK = Kept(kind="topk", k=4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


class HeldOut:
    """Random rows: the teacher's log-probabilities and the student's logits in float64.

    They are given in chunks or whole.
    """

    def __init__(self, spans: list[int], *, rows_per_prompt: int = 1) -> None:
        rng = np.random.default_rng(5)
        self.rows = []
        for number, span in enumerate(spans):
            ids = rng.integers(0, VOCABULARY, 5 + span)
            row = {
                "key": bytes([number]) * 16,
                "prompt_key": bytes([number // rows_per_prompt]) * 16,
            }
            self.rows.append(
                row
                | {"token_ids": ids.astype(np.int32), "spans": np.array([[5, span]])}
                | {"span_tokens": span}
            )
        self.teacher = [log_softmax(rng.normal(size=(n, VOCABULARY)) * 3) for n in spans]
        self.logits = [rng.normal(size=(n, VOCABULARY)) * 3 for n in spans]

    def targets(self, number: int) -> SoftTargets:
        logprobs = self.teacher[number]
        return SoftTargets(
            ids=None,
            logprobs=logprobs.astype(np.float32),
            tail_logprob=np.full(len(logprobs), -np.inf, np.float32),
            token_logprob=logprobs[np.arange(len(logprobs)), self.asked(number)].astype(np.float32),
            entropy=-(np.exp(logprobs) * logprobs).sum(1).astype(np.float32),
        ).normalised()

    def asked(self, number: int) -> np.ndarray:
        return self.rows[number]["token_ids"][5:]

    def kl(self, number: int) -> np.ndarray:
        """From the definition."""
        teacher, student = self.teacher[number], log_softmax(self.logits[number])
        return (np.exp(teacher) * (teacher - student)).sum(1)

    def views(
        self, *, kept: Kept | None = TOPK, chunk: int = 7, scored: bool = True
    ) -> dict[str, Any]:
        """As `evaluate` fills them."""
        views = Views(kept=kept, pieces=Pieces(None))
        for row in self.rows:
            views.add_length(row["span_tokens"])
        for number, row in enumerate(self.rows):
            if scored:
                views.add_teacher(views.of_teacher(row | {"number": number}, self.targets(number)))
            for start in range(0, row["span_tokens"], chunk):
                part = slice(start, start + chunk)
                logits = torch.as_tensor(self.logits[number][part]).float()
                reference = self.targets(number).positions(part) if scored else None
                measures = measure(
                    logits, torch.as_tensor(self.asked(number)[part]).long(), reference
                )
                views.arm("student").add(row, start, measures=measures, logits=logits)
        return views.content()


def test_the_kl_by_position_is_the_mean_of_its_bin_with_the_error_of_the_ratio_estimator() -> None:
    held_out = HeldOut([9, 3, 40, 17, 8, 33], rows_per_prompt=2)
    found = held_out.views()["by_position"]
    assert found["measure"] == "kl_teacher"
    assert found["edges"] == list(POSITION_EDGES)
    assert len(found["arms"]["student"]) == 7  # positions 0, 1, 2-3, 4-7, 8-15, 16-31, 32-63
    for low, high, stated in zip(
        found["edges"], found["edges"][1:], found["arms"]["student"], strict=False
    ):
        by_prompt = [
            np.concatenate([held_out.kl(n)[low:high] for n in (2 * p, 2 * p + 1)]) for p in range(3)
        ]
        units = [values for values in by_prompt if len(values)]
        values = np.concatenate(units)
        assert stated["tokens"] == len(values)
        assert stated["mean"] == pytest.approx(values.mean(), rel=1e-4)
        errors = [unit.sum() - values.mean() * len(unit) for unit in units]
        if len(units) > 1:
            error = math.sqrt(len(units) / (len(units) - 1) * np.square(errors).sum()) / len(values)
            assert stated["se"] == pytest.approx(error, rel=1e-3)
        else:
            assert stated["se"] is None


def test_without_a_teacher_it_is_the_cross_entropy_and_nothing_is_shown_of_one() -> None:
    held_out = HeldOut([9, 12])
    found = held_out.views(kept=None, scored=False)
    assert set(found) == {"lengths", "by_position"}
    assert found["by_position"]["measure"] == "cross_entropy"
    first = [-log_softmax(held_out.logits[n])[0, held_out.asked(n)[0]] for n in range(2)]
    assert found["by_position"]["arms"]["student"][0]["mean"] == pytest.approx(
        np.mean(first), rel=1e-5
    )


def test_texts_that_are_classified_have_no_positions() -> None:
    held_out = HeldOut([1, 1])
    views = Views(kept=None, pieces=Pieces(None))
    for number, row in enumerate(held_out.rows):
        views.add_length(len(row["token_ids"]))
        views.add_teacher(views.of_teacher(row | {"number": number}, held_out.targets(number)))
    views.arm("student")  # whose texts are measured whole
    found = views.content()
    assert set(found) == {"lengths", "entropy"}
    assert sum(found["entropy"]["tokens"]) == 2


def test_chunks_change_nothing() -> None:
    held_out = HeldOut([9, 100, 40, 17])
    whole, pieces = held_out.views(chunk=1000), held_out.views(chunk=1)
    assert whole["rows"] == pieces["rows"]
    assert whole["entropy"] == pieces["entropy"]
    for a, b in zip(*(v["by_position"]["arms"]["student"] for v in (whole, pieces)), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-5)


def test_entropy_and_kept_mass_are_counted_once_per_token() -> None:
    held_out = HeldOut([30, 20])
    found = held_out.views()
    teacher = np.concatenate(held_out.teacher)
    entropy = -(np.exp(teacher) * teacher).sum(1)
    counts = [((entropy >= low) & (entropy < high)).sum() for low, high in pairwise(ENTROPY_EDGES)]
    assert found["entropy"]["tokens"][:-1] == counts
    best = -np.sort(-np.exp(teacher), axis=1)
    mass = best[:, :4].sum(1)
    counts = [((mass >= low) & (mass < high)).sum() for low, high in pairwise(MASS_EDGES)]
    assert found["kept_mass"]["tokens"][:-1] == counts
    assert (found["kept_mass"]["kind"], found["kept_mass"]["k"]) == ("topk", 4)
    assert [line["k"] for line in found["mass_by_k"]["best"]] == list(LADDER)
    for line in found["mass_by_k"]["best"]:
        assert line["mass"] == pytest.approx(best[:, : line["k"]].sum(1).mean(), rel=1e-5)


def test_of_many_tokens_every_so_many_th_is_measured_wherever_rows_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out = HeldOut([30, 1, 20, 2, 47])
    monkeypatch.setattr(evaluate_views, "MASS_TOKENS", 40)
    found = held_out.views()
    chosen = np.concatenate(held_out.teacher)[::3]  # 100 tokens in 34
    assert found["mass_by_k"]["tokens"] == sum(found["kept_mass"]["tokens"]) == len(chosen) == 34
    best = -np.sort(-np.exp(chosen), axis=1)
    assert found["mass_by_k"]["best"][2]["mass"] == pytest.approx(
        best[:, :4].sum(1).mean(), rel=1e-5
    )
    assert sum(found["entropy"]["tokens"]) == 100


def test_topp_keeps_the_fewest_entries_that_hold_its_mass_within_its_bounds() -> None:
    best = np.cumsum([[0.5, 0.3, 0.1, 0.06], [0.9, 0.05, 0.02, 0.01]], axis=1)
    kept = kept_mass(best, Kept(kind="topp", k=4, p=0.8, k_min=1))
    assert kept.tolist() == pytest.approx([0.8, 0.9])
    assert kept_mass(best, Kept(kind="topp", k=4, p=0.85, k_min=2)).tolist() == pytest.approx(
        [0.9, 0.95]
    )
    assert kept_mass(best, Kept(kind="topp", k=3, p=0.99, k_min=1)).tolist() == pytest.approx(
        [0.9, 0.97]
    )


def test_drawn_entries_have_no_kept_mass() -> None:
    found = HeldOut([30]).views(kept=Kept(kind="sampled", k=50, draw="multinomial"))
    assert "kept_mass" not in found
    assert found["mass_by_k"]["tokens"] == 30


def test_rows_are_shown_token_by_token_with_the_best_of_teacher_and_student() -> None:
    held_out = HeldOut([30, 100, 40, 35, 31, 90], rows_per_prompt=2)
    found = held_out.views()
    # Of each prompt the first row that is no shorter than half of all (the median is 40).
    assert [row["key"] for row in found["rows"]] == [(bytes([n]) * 16).hex() for n in (1, 2, 5)]
    for number, row in zip((1, 2, 5), found["rows"], strict=True):
        n = min(TOKENS, held_out.rows[number]["span_tokens"])
        assert row["token_ids"] == held_out.asked(number)[:n].tolist()
        assert row["before"] == held_out.rows[number]["token_ids"][:5].tolist()
        assert row["cut_after"] == held_out.rows[number]["span_tokens"] - n
        parties = {
            "teacher": held_out.teacher[number],
            "student": log_softmax(held_out.logits[number]),
        }
        assert row["arms"]["student"]["kl"] == pytest.approx(
            held_out.kl(number)[:n].tolist(), rel=1e-3
        )
        for name, logprobs in parties.items():
            stated = row["teacher"] if name == "teacher" else row["arms"][name]
            assert len(stated["ids"]) == n
            order = np.argsort(-logprobs[:n], axis=1)[:, :BEST]
            assert stated["ids"] == order.tolist()
            expected = np.exp(np.take_along_axis(logprobs[:n], order, 1))
            assert np.asarray(stated["probabilities"]) == pytest.approx(expected, rel=1e-3)
            there = np.exp(logprobs[np.arange(n), held_out.asked(number)[:n]])
            assert stated["token"] == pytest.approx(there.tolist(), rel=1e-3)
        shown = {
            i
            for party in (row["teacher"], row["arms"]["student"])
            for best in party["ids"]
            for i in best
        }
        assert {str(i) for i in (*shown, *row["token_ids"], *row["before"])} <= set(found["pieces"])


def test_of_a_row_of_several_spans_the_text_between_is_shown_apart() -> None:
    held_out = HeldOut([30])
    ids = np.arange(100, 220).astype(np.int32) % VOCABULARY
    spans = np.array([[5, 10], [15, 2], [20, 3], [90, 15]])  # two touch; before the last are 67
    held_out.rows[0] |= {"token_ids": ids, "spans": spans}
    scored = [*ids[5:17], *ids[20:23], *ids[90:105]]
    held_out.asked = lambda number: np.array(scored)  # type: ignore[method-assign]
    ((row,), pieces) = (held_out.views()[name] for name in ("rows", "pieces"))
    assert (row["before"], row["token_ids"]) == (ids[:5].tolist(), scored)
    assert row["between"] == [
        {"after": 10, "cut": 0, "token_ids": []},
        {"after": 12, "cut": 0, "token_ids": ids[17:20].tolist()},
        {"after": 15, "cut": 67 - CONTEXT, "token_ids": ids[90 - CONTEXT : 90].tolist()},
    ]
    assert {str(i) for gap in row["between"] for i in gap["token_ids"]} <= pieces.keys()


def test_its_size_does_not_grow_with_the_held_out_rows() -> None:
    few, many = (HeldOut([40] * n).views() for n in (ROWS, 6 * ROWS))
    assert len(many["rows"]) == len(few["rows"]) == ROWS
    for name in ("entropy", "kept_mass", "mass_by_k", "lengths"):
        assert [len(v) for v in many[name].values() if isinstance(v, list)] == [
            len(v) for v in few[name].values() if isinstance(v, list)
        ]


@pytest.mark.parametrize(
    "tokens", [[1], [1, 2, 3], [96] * 30 + [5], list(range(1, 1000)), [4096, 17, 2]]
)
def test_every_row_is_in_the_bin_of_its_length(tokens: list[int]) -> None:
    found = lengths(tokens)
    edges = [*found["edges"], math.inf]
    assert found["rows"] == [sum(low <= t < high for t in tokens) for low, high in pairwise(edges)]
    assert len(found["rows"]) <= 25
    assert found["mean"] == pytest.approx(sum(tokens) / len(tokens))


def test_a_value_on_an_edge_begins_the_bin_above_and_what_is_beyond_is_in_the_last() -> None:
    assert in_bins(np.array([-1.0, 0.0, 0.5, 1.0, 7.0]), (0.0, 0.5, 1.0)).tolist() == [
        0,
        0,
        1,
        2,
        2,
    ]


def test_a_token_s_text_keeps_its_space_whatever_the_alphabet() -> None:
    byte_level = Tokenizer(models.BPE({"Ġthe": 0, "the": 1, "Ċ": 2, "Ã": 3}, []))
    byte_level.decoder = decoders.ByteLevel()
    assert [Pieces(byte_level)[i] for i in range(4)] == [" the", "the", "\n", "\ufffd"]
    metaspace = Tokenizer(
        models.Unigram([("▁the", -1.0), ("the", -1.0), ("<0x0A>", -2.0)], 0, byte_fallback=True)
    )
    metaspace.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert [Pieces(metaspace)[i] for i in range(3)] == [" the", "the", "\n"]
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##ing": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    assert [Pieces(wordpiece)[i] for i in (1, 2)] == [" the", "ing"]
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert [Pieces(words)[i] for i in (0, 1, 7)] == [" a", " b", "[7]"]
    assert Pieces(None)[5] == "[5]"
