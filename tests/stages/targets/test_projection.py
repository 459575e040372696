"""Projection to fewer numbers: orthonormal, right in the mean, and the same bits for everybody."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.stages.targets.features import projection
from stillroom.stages.targets.features.projection import kept_projection, orthonormal
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
