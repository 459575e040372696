"""What generate and score do with rows that fail, and with rows that others do meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_jobs import generation_job
from tiny_store import SilentProgress

from stillroom.stages.engines.base import Request
from stillroom.stages.engines.hf import HfEngine
from stillroom.stages.engines.opening import open_engine
from stillroom.stages.engines.vllm import VllmEngine
from stillroom.stages.generate import stage as generate
from stillroom.stages.models.device import check_device
from stillroom.stages.models.identity import Identity
from stillroom.stages.recipe.engines import Generate
from stillroom.stages.workers import share
from stillroom.stages.workers.clock import Clock
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.stages.workers.journal import Journal, mark_seen, new_journal
from stillroom.storage.errors import EngineDied, StillroomError, Stopped
from stillroom.storage.store.store import Store

ROWS = 24


@pytest.fixture
def work(tmp_path: Path, tiny_llama: Callable[..., Path]) -> tuple[Job, Identity]:
    """Commits of two batches."""
    return generation_job(tiny_llama, tmp_path, rows=ROWS, storage={"commit_rows": 8})


def table(job: Job, name: Any, *columns: str) -> list[dict[str, Any]]:
    return Store.open(job.recipe.storage.dir).index(name, columns).to_pylist()


class Beside(StopFlag):
    """Lets other work happen at a look."""

    def __init__(self, at: int, what: Callable[[], object]) -> None:
        super().__init__()
        self.looks, self._at, self._what = 0, at, what

    def check(self) -> None:
        self.looks += 1
        if self.looks == self._at:
            self._what()
        super().check()


def test_a_worker_leaves_when_others_have_committed_what_it_has_in_flight(
    work: tuple[Job, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, author = work
    monkeypatch.setattr(share, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(share, "LOOK_SHARE", 0)
    other: list[int] = []
    at = (
        1 + 4 * 10 + 2
    )  # one look after loading, ten steps in a batch: in the midst of the fifth of six
    stop = Beside(at, lambda: other.append(generate.run(job, author).rows))
    mine = generate.run(replace(job, stop=stop), author)
    # Four batches are done; the last of them may be in a shard that is still in the making, and is
    # then the other's.
    assert mine.rows in (8, 16)
    assert other == [ROWS - mine.rows]
    assert stop.looks == at  # and not to the end of the batch
    assert len(table(job, "generations", "key")) == ROWS


def test_rows_that_others_committed_are_not_started(
    work: tuple[Job, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "LOOK_SECONDS", 1e9)
    job, author = work
    stop = Beside(3, lambda: generate.run(replace(job, progress=SilentProgress()), author))
    mine = generate.run(replace(job, stop=stop), author)
    assert mine.rows == 0
    assert stop.looks == 1 + 2 * 10  # its first block, without a look, and no other
    assert job.progress.done == ROWS  # type: ignore[attr-defined]


def test_suspects_come_last_and_alone_and_what_kills_is_rejected(
    work: tuple[Job, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, author = work
    batches: list[int] = []
    whole = generate.open_engine

    def noted(*arguments: Any, **named: Any) -> Any:
        engine: Any = whole(*arguments, **named)
        run = engine._run

        def _run(batch: list[Request], heartbeat: Callable[[], None]) -> Any:
            batches.append(len(batch))
            return run(batch, heartbeat)

        engine._run = _run
        return engine

    monkeypatch.setattr(generate, "open_engine", noted)
    keys = asked(job)
    died(job, keys[:5])
    died(job, keys[:1], alone=True)
    generate.run(job, author)
    assert batches == [4] * 4 + [3] + [1] * 4
    (rejected,) = table(job, "rejects", "reason", "attempts")
    assert (rejected["reason"], rejected["attempts"]) == ("engine_died", 2)
    assert len(table(job, "generations", "key")) == ROWS - 1


def test_where_the_engine_fails_on_every_row_none_is_rejected(
    work: tuple[Job, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong driver, say; on a machine that is well the same command does them all."""
    job, author = work

    def wrong_driver(self: HfEngine, batch: list[Request], heartbeat: Callable[[], None]) -> Any:
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as broken:
        broken.setattr(HfEngine, "_run", wrong_driver)
        with pytest.raises(StillroomError, match=f"all {ROWS} rows .* no kernel for this"):
            generate.run(job, author)
    assert table(job, "rejects", "reason") == []
    assert generate.run(job, author).rows == ROWS


def asked(job: Job) -> list[bytes]:
    """Reuse keys of requests that are still to be done."""
    _, pending = generate._asked(job, Store.open(job.recipe.storage.dir))
    return [request.reuse_key for block in pending.blocks for request in pending.read(block)]


def died(job: Job, keys: list[bytes], *, alone: bool = False) -> None:
    path = new_journal(Path(job.recipe.run.dir), "generate")
    with suppress(EngineDied), Journal(path) as journal:
        journal.take(keys, alone=alone)
        raise EngineDied
    mark_seen(path)


def test_a_batch_that_fails_is_halved_down_to_the_row_it_fails_on(
    work: tuple[Job, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, author = work
    engine: Any = open_engine("hf", author, Generate(engine="hf", temperature=0.0, max_tokens=4))
    requests = [Request(n, [1, 4 + n], seed=n) for n in range(11)]
    whole = {c.number: c for c in engine.generate(requests, lambda: None)}
    run = engine._run

    def poisoned(batch: list[Request], heartbeat: Callable[[], None]) -> Any:
        if any(r.number == 7 for r in batch):
            raise RuntimeError("no kernel for this")
        return run(batch, heartbeat)

    engine._run = poisoned
    found = {c.number: c for c in engine.generate(requests, lambda: None)}
    failed = found.pop(7)
    del whole[7]
    assert found == whole
    assert (failed.error, failed.token_ids) == ("RuntimeError: no kernel for this", [])
    assert failed.attempts == 5  # 11, 6, 3, 2 and 1 rows


def test_a_device_that_takes_no_more_work_is_an_engine_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_device(torch.device("cpu"), "a row's own fault")

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "zeros", lost)
    with pytest.raises(EngineDied, match="takes no more work: index out of range"):
        check_device(torch.device("cpu"), "index out of range")


class FakeVllm:
    """An LLMEngine that holds what it is given; `steps` says what each step does."""

    def __init__(self, steps: Iterator[Callable[[], list[Any]]]) -> None:
        self.held: list[str] = []
        self.aborted: list[str] = []
        self.most = 0
        self.step = lambda: next(steps)()
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))

    def add(self, number: int) -> None:
        self.held.append(str(number))
        self.most = max(self.most, len(self.held))

    def finish(self) -> list[Any]:
        text = SimpleNamespace(token_ids=[5], text="cat", finish_reason="stop", logprobs=None)
        return [SimpleNamespace(finished=True, request_id=f"{self.held.pop(0)}-x", outputs=[text])]

    def has_unfinished_requests(self) -> bool:
        return bool(self.held)

    def get_num_unfinished_requests(self) -> int:
        return len(self.held)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += sorted(names, key=int)


def vllm_on(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm, engine._clock = SimpleNamespace(llm_engine=fake), Clock()
    engine._settings, engine._vocab_size = Generate(max_tokens=4), 9
    engine._tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    monkeypatch.setattr(VllmEngine, "_submit", lambda self, request: fake.add(request.number))
    return engine


def test_vllm_holds_a_quarter_more_than_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(iter([]))
    fake.step = fake.finish
    requests = [Request(n, [1], seed=n) for n in range(40)]
    found = list(vllm_on(fake, monkeypatch).generate(requests, lambda: None))
    assert [c.number for c in found] == list(range(40))
    assert fake.most == 8 + 2


def test_a_step_of_vllm_that_raises_is_the_engines_death(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Any]:
        raise ValueError("EngineCore encountered an issue")

    fake = FakeVllm(iter([lambda: fake.finish(), broken]))
    found = vllm_on(fake, monkeypatch).generate(
        [Request(n, [1], seed=n) for n in range(3)], lambda: None
    )
    assert next(found).number == 0
    with pytest.raises(EngineDied, match="vLLM: ValueError: EngineCore encountered an issue"):
        next(found)


def test_what_vllm_holds_when_it_is_left_is_taken_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(iter([lambda: fake.finish()]))
    beats = iter([None, None])

    def heartbeat() -> None:
        if next(beats, Stopped) is not None:
            raise share.DoneByOthers

    found = vllm_on(fake, monkeypatch).generate(
        [Request(n, [1], seed=n) for n in range(3)], heartbeat
    )
    fake.step = lambda: fake.finish() if len(fake.held) > 2 else []
    assert next(found).number == 0
    with pytest.raises(share.DoneByOthers):
        next(found)
    assert fake.aborted == ["1", "2"]


class BusyVllm(FakeVllm):
    """Rows take steps of their own number; eight run at once, in the order in which they came."""

    def __init__(self, see: Callable[[], int]) -> None:
        super().__init__(iter([]))
        self.step = self._step
        self._left: dict[str, int] = {}
        self._see = see
        self.seen: list[tuple[int, int, int]] = []
        """At each step: rows that came so far, rows that run, rows in the store."""

    def _step(self) -> list[Any]:
        running = self.held[: self.vllm_config.scheduler_config.max_num_seqs]
        self.seen.append((len(self._left), len(running), self._see()))
        for name in running:
            self._left[name] -= 1
        done = [name for name in running if not self._left[name]]
        self.held = [name for name in self.held if name not in done]
        text = SimpleNamespace(token_ids=[5], text="cat", finish_reason="stop", logprobs=None)
        return [
            SimpleNamespace(finished=True, request_id=f"{name}-x", outputs=[text]) for name in done
        ]

    def add(self, number: int) -> None:
        super().add(number)
        self._left[str(number)] = 3 + 7 * number % 11


def test_vllm_is_full_across_blocks_and_rows_are_committed_while_others_run(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks hold eight rows, as many as run at once.

    A barrier between two would show as rows that do not run.
    """
    rows = 64
    job, author = generation_job(tiny_llama, tmp_path, rows=rows, storage={"commit_rows": 4})
    fake = BusyVllm(lambda: len(table(job, "generations", "key")))
    engine = vllm_on(fake, monkeypatch)
    monkeypatch.setattr(generate, "open_engine", lambda *_, **__: engine)
    assert generate.run(job, author).rows == rows
    claims = list((Path(job.recipe.storage.dir) / "claims").rglob("*.json"))
    assert len(claims) == rows // 8
    came, running, stored = zip(*fake.seen, strict=True)
    assert {r for c, r in zip(came, running, strict=True) if c < rows} == {8}
    assert min(came) == 8 + 2  # those that run, and those at the door
    under_way = [s for c, s in zip(came, stored, strict=True) if c < rows]
    assert under_way[-1] >= rows // 2
    assert stored == tuple(sorted(stored))
