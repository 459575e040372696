"""Benchmarks run one tiny step here, so that they cannot rot; their figures mean nothing at this size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.assets
@pytest.mark.slow
def test_the_tinystories_comparison_runs(tmp_path: Path, assets: Path) -> None:
    words = [sys.executable, str(HERE / "tinystories.py"), "compare", str(tmp_path), "--tiny"]
    environment = os.environ | {"STILLROOM_ASSETS": str(assets)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    result = outcome["results"]["1"]
    assert result["gain"]["kl_teacher"][0] == pytest.approx(
        result["baseline"]["kl_teacher"][0] - result["student"]["kl_teacher"][0]
    )
