"""Projection to fewer numbers: orthonormal, right in the mean, and the same bits for everybody."""

from pathlib import Path

import feature_references as definition
import numpy as np
import pytest
import torch

from stillroom.stages.targets.features import projection
from stillroom.stages.targets.features.projection import Projection, kept_projection, orthonormal
from stillroom.storage.store.store import Store


def test_columns_are_orthonormal() -> None:
    p = orthonormal(96, 24, seed=3).astype(np.float64)
    np.testing.assert_allclose(p.T @ p, np.eye(24) * 96 / 24, atol=1e-5)
    assert not np.array_equal(p, orthonormal(96, 24, seed=4))


@pytest.mark.numeric
@pytest.mark.parametrize(("width", "to"), [(64, 32), (128, 32)])
def test_squared_errors_stay_what_they_were(width: int, to: int) -> None:
    """Summed over tokens within a percent; of one token off by about sqrt(2 / d (1 - d / D))."""
    rng = np.random.default_rng(0)
    off = rng.standard_normal((2000, width))
    squares = np.square(off).sum(1)
    ratios = np.array(
        [np.square(off @ orthonormal(width, to, seed=seed)).sum(1) / squares for seed in range(5)]
    )
    assert abs(ratios.mean() - 1) < 0.01
    expected = np.sqrt(2 / to * (1 - to / width))
    assert abs(ratios.std() / expected - 1) < 0.1


def test_what_is_used_is_read_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path / "store", create=True)
    first, matrix = kept_projection(store, 16, 4)
    np.testing.assert_array_equal(matrix, store.matrix(first))
    # Another machine's linear algebra makes other bits.
    monkeypatch.setattr(projection, "orthonormal", lambda *_, seed: np.zeros((16, 4), np.float32))
    again, same = kept_projection(store, 16, 4)
    assert again == first
    np.testing.assert_array_equal(same, matrix)
    other, zeros = kept_projection(store, 16, 8)
    assert other != first
    assert not zeros.any()


def by(width: int, to: int, *, seed: int = 0) -> Projection:
    return Projection("one", torch.from_numpy(orthonormal(width, to, seed=seed)))


@pytest.mark.numeric
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_error_is_that_of_the_cosines_of_all_pairs(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows; a token of zeros is at a right angle to every other, before and after."""
    monkeypatch.setattr(projection, "_ROWS", 4)
    vectors = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(tokens))
    vectors[tokens // 2] *= tokens % 2
    if tokens > 4:
        vectors[3] = 0
    made = by(12, 5)
    expected = definition.cosines_off(vectors.double(), made.matrix.double())
    assert made.error(vectors) == pytest.approx(expected, rel=1e-5)
    assert (expected > 0) == (tokens > 2)


@pytest.mark.numeric
def test_the_error_is_of_directions_alone() -> None:
    vectors = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    made = by(12, 5)
    right = made.error(vectors)
    for size in (1e-30, 1e30):
        assert made.error(vectors * size) == pytest.approx(right, rel=1e-5)
    assert by(12, 11).error(vectors[:1].repeat(6, 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.numeric
def test_the_error_falls_as_the_root_of_the_numbers_that_are_kept() -> None:
    """Vectors of any direction: sqrt((1 - d / D) / d)."""
    vectors = torch.randn(200, 768, generator=torch.Generator().manual_seed(0))
    for to in (16, 64, 256):
        found = np.mean([by(768, to, seed=seed).error(vectors) for seed in range(3)])
        assert found == pytest.approx(((1 - to / 768) / to) ** 0.5, rel=0.05)
