"""The torch dataset.

It has the same global batches for any ranks and workers, from any of them on, and one can train
with it.
"""

import math
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import write_recipe
from objectives import objective_of
from tiny_store import make_store, random_texts, snapshot_of
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.samples import Samples
from stillroom.stages.loader.torch_dataset import Collator, SnapshotDataset, batch_of
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.storage.errors import UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.keys import content_id

TEXTS = [list(text) for text in dict.fromkeys(map(tuple, random_texts(60)))][:50]  # no two alike
README = Path(__file__).parents[3].joinpath("stages", "loader", "README.md").read_text()
B = 12
V = 24
SIZES = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stillroom.storage.tables.shard.ROW_GROUP_BYTES", 1
        )  # a row group per row: several windows an epoch
        return make_store(folder / "store", folder / "teacher", texts=TEXTS)


@pytest.fixture(scope="module")
def samples(store):
    return Samples(store, snapshot_of(store), soft=True, seed=3)


def names(batch):
    """What is in the samples of a batch: the text, and all of its targets."""
    return [
        content_id(
            "sample",
            ids=s.token_ids.tobytes(),
            ids_of=s.targets.ids.tobytes(),
            logs=s.targets.logprobs.tobytes(),
        )
        for s in batch
    ]


def global_batches(samples, state, *, workers, ranks, count, **options):
    """`count` global batches after a state, put together from all ranks."""
    parts = []
    for rank in range(ranks):
        dataset = SnapshotDataset(samples, global_batch=B, rank=rank, world_size=ranks)
        dataset.load_state_dict(state)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, **options)
        parts.append([names(batch) for batch in islice(loader, count)])
    return [list(chain(*batches)) for batches in zip(*parts, strict=True)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_stopped_and_resumed_on_other_ranks_and_workers_the_batches_are_the_same(samples):
    """One run stops at random batches.

    It goes on with every number of workers and ranks in turn.
    """
    rng = np.random.default_rng(0)
    # Each number of workers and of ranks comes twice or so. A worker is a fork of all that is
    # loaded here.
    places = [(0, 1), (0, 4), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]
    rng.shuffle(places)
    counts = rng.integers(2, 7, len(places)).tolist()
    dataset = SnapshotDataset(samples, global_batch=B)
    whole = [names(batch) for batch in islice(dataset, sum(counts))]
    found, done = [], 0
    for (workers, ranks), count in zip(places, counts, strict=True):
        found += global_batches(
            samples, dataset.state_at(done), workers=workers, ranks=ranks, count=count
        )
        done += count
    assert found == whole
    stream = list(chain(*found))
    epochs = [stream[i : i + len(TEXTS)] for i in range(0, len(stream) - len(TEXTS), len(TEXTS))]
    assert len(epochs) >= 5
    everything = sorted(names(samples.read(0, len(TEXTS))))
    assert len(set(everything)) == len(TEXTS)
    assert all(sorted(epoch) == everything for epoch in epochs)  # 0 missing, 0 duplicated
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_a_worker_that_is_spawned_reads_the_same(samples):
    dataset = SnapshotDataset(samples, global_batch=B)
    whole = [names(batch) for batch in islice(dataset, 7)]
    options = {"multiprocessing_context": "spawn"}
    assert (
        global_batches(samples, dataset.state_at(3), workers=1, ranks=1, count=4, **options)
        == whole[3:]
    )


def test_the_state_is_that_of_what_was_handed_out(samples):
    dataset = SnapshotDataset(samples, global_batch=B)
    batches = iter(dataset)
    for number in range(1, 8):
        next(batches)
        assert dataset.state_dict() == dataset.state_at(number)
    assert dataset.state_dict() == {
        "snapshot": samples.snapshot.id,
        "seed": 3,
        "epoch": 1,
        "samples": 7 * B,
    }
    batches.close()
    again = SnapshotDataset(samples, global_batch=B)
    again.load_state_dict(dataset.state_dict())
    assert names(next(iter(again))) == names(next(iter(dataset)))


def test_a_state_of_another_order_is_refused(samples, store):
    state = SnapshotDataset(samples, global_batch=B).state_at(3)
    for change in ({"snapshot": "other"}, {"seed": 4}, {"samples": 3 * B + 1}):
        with pytest.raises(
            UsageError,
            match=f"expected snapshot {samples.snapshot.id}, seed 3 and a multiple of {B}",
        ):
            SnapshotDataset(samples, global_batch=B).load_state_dict(state | change)


@pytest.mark.parametrize(("rank", "world_size", "batch"), [(0, 5, B), (2, 2, B), (0, 1, 0)])
def test_ranks_that_cannot_share_a_batch_are_refused(samples, rank, world_size, batch):
    with pytest.raises(UsageError, match="cannot be shared equally"):
        SnapshotDataset(samples, global_batch=batch, rank=rank, world_size=world_size)


def test_ranks_come_from_torch_distributed(samples, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    half = next(iter(SnapshotDataset(samples, global_batch=B)))
    assert names(half) == names(samples.read(B // 2, B))


def test_the_state_is_not_asked_of_a_worker(samples, monkeypatch):
    dataset = SnapshotDataset(samples, global_batch=B)
    monkeypatch.setattr("stillroom.stages.loader.torch_dataset.get_worker_info", object)
    with pytest.raises(UsageError, match="state_at"):
        dataset.state_dict()


def test_the_state_is_not_asked_of_an_object_whose_workers_read(samples):
    dataset = SnapshotDataset(samples, global_batch=B)
    next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
    with pytest.raises(UsageError, match="state_at"):
        dataset.state_dict()


def test_a_resumed_dataset_opens_the_files_of_its_batch_only(samples, monkeypatch):
    opened = []
    real = LocalFiles.source
    monkeypatch.setattr(
        LocalFiles, "source", lambda self, name: opened.append(name) or real(self, name)
    )
    dataset = SnapshotDataset(samples, global_batch=4)
    for number in (0, 3, 11, 30):
        dataset.load_state_dict(dataset.state_at(number))
        opened.clear()
        batches = iter(dataset)
        batch = next(batches)
        assert len(opened) == len(batch)  # a row group per row here, and each is opened by itself
        batches.close()


def collator():
    return Collator(Packing(tokens_per_pass=1, vocab_size=V))


def student():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def loss_of(model, inputs):
    """Sum of the losses of a batch."""
    batch = batch_of(inputs)
    states = hidden_states(model, input_ids=batch.token_ids, position_ids=batch.position_ids)
    predicting = states.flatten(0, 1)[batch.predicting]
    aim = Aim(objective=objective_of(), soft_weight=1.0, hard_weight=0.0)
    return linear_distillation(predicting, split_head(model), batch.targets, aim=aim).total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_collator_gives_batches_as_packing_does(samples, temperature):
    chosen = list(samples.read(0, 9))
    packing = Packing(tokens_per_pass=10_000, vocab_size=V, unstored_temperature="approximate")
    found = batch_of(Collator(packing, temperature=temperature)(chosen))
    (expected,) = packing.batches(chosen, temperature)
    for name in ("token_ids", "position_ids", "predicting"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("labels", "ids", "logprobs", "tail_logprob"):
        assert torch.equal(getattr(found.targets, name), getattr(expected.targets, name))
    plain = Samples(samples._store, samples.snapshot, soft=False)
    assert set(collator()(list(plain.read(0, 2)))) == {
        "input_ids",
        "position_ids",
        "predicting",
        "labels",
    }


def test_a_plain_loop_learns(samples):
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(
        SnapshotDataset(samples, global_batch=B, collate=collator()), batch_size=None
    )
    losses = []
    for inputs in islice(loader, math.ceil(6 * len(samples) / B)):
        loss = loss_of(model, inputs) / len(inputs["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


class DistillationTrainer(Trainer):
    """What a user of `transformers.Trainer` writes: the loader and the loss."""

    def get_train_dataloader(self):
        return DataLoader(
            self.train_dataset, batch_size=None, num_workers=self.args.dataloader_num_workers
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return loss_of(model, inputs) / num_items_in_batch


class StopAt(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self._step


def train(samples, folder, *, stop=8, workers=0, resume=None):
    """Losses of the optimizer steps of this call, two global batches each.

    It stops after step `stop` of 8.
    """
    accumulation = 2
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=8,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=stop,
        dataloader_num_workers=workers,
        ignore_data_skip=True,  # the dataset goes on by itself
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = SnapshotDataset(samples, global_batch=B, collate=collator())
    trainer = DistillationTrainer(student(), arguments, train_dataset=dataset)
    if resume is not None:
        dataset.load_state_dict(dataset.state_at(resume * accumulation))
    if stop < 8:
        trainer.add_callback(StopAt(stop))
    trainer.train(
        resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}")
    )
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer_trains_and_resumes_to_the_same_losses(samples, tmp_path):
    whole = train(samples, tmp_path / "whole")
    assert whole[-1] < whole[0]
    train(samples, tmp_path / "stopped", stop=3)
    resumed = train(samples, tmp_path / "stopped", resume=3, workers=1)
    assert resumed == whole


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_loop_of_the_readme_runs(store, samples, tmp_path, monkeypatch):
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "example").symlink_to(store.root)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, tmp_path / "teacher", tmp_path, storage={"dir": "stores/example"})
    section = README.split("## Reading a snapshot from another training loop")[1]
    code = section.split("```python\n")[1].split("```")[0]
    names = {"snapshot_id": samples.snapshot.id, "model": student(), "done": 2, "total": 4}
    exec(code, names)
    assert names["loss"].soft.shape == names["inputs"]["labels"].shape
    assert torch.isfinite(names["model"].lm_head.weight.grad).all()
