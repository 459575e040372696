"""A published folder: who can load it, and what its card says.

It also shows what a reader sees while it is made.
"""

import json
import re
import shutil
import site
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from kit import ENVIRONMENT, last_json, stillroom
from published import (
    CLASSES_ABOUT,
    HELD_OUT,
    ROWS,
    TEACHER,
    class_row,
    generation_row,
    make_store,
    samples,
    snapshots_of,
)

from stillroom.pipeline.publish.dataset_card_code import FOLDER
from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.pipeline.publish.provenance import public_name, public_recipe
from stillroom.pipeline.publish.publish import publish
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import IntegrityError, StillroomError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.joined import open_store
from stillroom.storage.published.choice import Choice
from stillroom.storage.published.manifest import current_version, damaged_files, read_manifest
from stillroom.storage.snapshots.snapshot import make_snapshot, save_snapshot
from stillroom.storage.store.store import Store

TRAIN = ROWS - HELD_OUT
GIVEN = {"license": "cc-by-4.0", "model_licenses": ("apache-2.0",), "source_licenses": ("mit",)}


def silent(text: str) -> None:
    """Where nobody listens."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = make_store(tmp_path_factory.mktemp("publish") / "store")
    snapshots_of(made)
    return made


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    """Exported by the real command."""
    folder = tmp_path_factory.mktemp("exported") / "targets"
    words = (
        "--license",
        "cc-by-4.0",
        "--teacher-license",
        "apache-2.0",
        "--source-license",
        "prompts.jsonl=mit",
    )
    more = ("--language", "en", "--teacher", "org/teacher-8b", "--name", "Words", "--json")
    done = last_json(stillroom("export", store.root, folder, *words, *more))
    assert done["rows"] == {"generations": {"train": TRAIN, "test": HELD_OUT}} | {
        "soft_targets": {"train": TRAIN, "test": HELD_OUT}
    }
    return folder


def asked(store, **more):
    return PublishRequest(store=str(store.root), **{**GIVEN, **more})


# Without `site` no .pth file is read, so the editable install is not there: the libraries are,
# Stillroom is not.
WITHOUT_STILLROOM = """
import sys
sys.path += {packages!r}
try:
    import stillroom
except ImportError:
    pass
else:
    raise SystemExit("stillroom can be imported here")
"""
LOADED = """
import json, polars
version = {version!r}
frame = polars.read_parquet({folder!r} + "/" + version + "/soft_targets/train-*.parquet")
print(json.dumps({{
    "generations": load_dataset({folder!r}).num_rows,
    "rows": {{name: len(rows) for name, rows in (("texts", texts), ("targets", targets))}},
    "features": {{name: str(feature) for name, feature in targets.features.items()}},
    "keys": [row["key"].hex() for row in targets],
    "named": [row["generation_key"].hex() for row in targets],
    "texts": [row["key"].hex() for row in texts],
    "messages": texts[0]["messages"],
    "polars": [key.hex() for key in frame["key"]],
    "logprobs": targets[3]["logprobs"],
    "kl": kl.tolist(), "shape": list(logprobs.shape),
}}))
"""


def test_others_load_it_without_stillroom_by_the_code_of_its_card(folder, store, tmp_path):
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert [block.split()[1] for block in blocks] == ["datasets", "duckdb", "torch"]
    loaded = LOADED.format(version=current_version(card), folder=str(folder))
    code = WITHOUT_STILLROOM.format(packages=site.getsitepackages()) + "\n".join(blocks) + loaded
    code = code.replace(FOLDER, str(folder))
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the teacher" in done.stdout  # DuckDB's join, printed
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["generations"] == {"train": TRAIN, "test": HELD_OUT}
    assert found["rows"] == {"texts": TRAIN, "targets": TRAIN}
    assert found["texts"] == found["named"]
    expected = store.index("soft_targets", ["key"])["key"].to_pylist()[:TRAIN]
    assert found["keys"] == found["polars"] == [key.hex() for key in expected]
    row = next(
        iter(store.rows("soft_targets", {store.commits("soft_targets")[0].shard.sha256: [3]}))
    )
    np.testing.assert_array_equal(np.float32(found["logprobs"]), row["logprobs"])
    assert found["features"]["logprobs"] == "List(Value('float32'))"
    first = next(
        iter(store.rows("soft_targets", {store.commits("soft_targets")[0].shard.sha256: [0]}))
    )
    assert found["shape"] == [first["span_tokens"], first["k"]]
    # The student of the card is uniform: its mass in K of V entries is K / V.
    logprobs, tail = (
        first["logprobs"].reshape(found["shape"]).astype(float),
        first["tail_logprob"].astype(float),
    )
    uniform = (np.exp(logprobs) * (logprobs + np.log(50))).sum(1) + np.exp(tail) * (
        tail - np.log(1 - 6 / 50)
    )
    np.testing.assert_allclose(found["kl"], uniform, rtol=1e-4, atol=1e-5)


class TestCard:
    def test_its_tensors_are_of_whole_distributions_too(self, folder):
        """The held-out split is `full`: no ids, no tail."""
        import pyarrow.parquet as pq

        block = re.findall(
            r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL
        )[2]
        (path,) = folder.glob("v-*/soft_targets/test-*.parquet")
        names = {"targets": pq.read_table(path).to_pylist()}
        assert names["targets"][0]["ids"] is None
        exec(block, names)
        logprobs = np.reshape(names["targets"][0]["logprobs"], (-1, 50))
        uniform = (np.exp(logprobs) * (logprobs + np.log(50))).sum(1)
        np.testing.assert_allclose(names["kl"].numpy(), uniform, rtol=1e-4, atol=1e-4)

    def test_its_tensors_are_those_of_several_spans(self, folder):
        import pyarrow.parquet as pq

        block = re.findall(
            r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL
        )[2]
        (path,) = folder.glob("v-*/soft_targets/train-*.parquet")
        rows = [row for row in pq.read_table(path).to_pylist() if row["spans"]]
        names = {"targets": rows}
        exec(block, names)
        start, first, again, more = rows[0]["spans"]
        expected = [*range(start, start + first), *range(again, again + more)]
        assert names["scored"].tolist() == expected
        assert names["student"].shape == (rows[0]["span_tokens"], 50)

    def test_it_says_what_a_stranger_asks(self, folder):
        text = (folder / "README.md").read_text()
        for said in (
            (
                "Rows of kind `full` (all of `test`) are whole distributions: `ids` is null, "
                "`logprobs` has `k` = 50 "
            ),
            "Temperatures at which a student can be trained on train: 1.",
            "Temperatures at which a student can be trained on test: any.",
            (
                "`messages`, with their `message_fields` and `tools` (JSON) where there are any, "
                "became ids by the chat template"
            ),
            f"/teachers/{TEACHER}/`",
            'print(texts[0]["key"].hex())',
        ):
            assert said in text
        assert not re.search(
            r"^\|.*\|  \|.*\n\| ?---", text, flags=re.MULTILINE
        )  # every column of a table has a name

    def test_the_hubs_own_classes_read_it_back(self, folder):
        """Offline: parsed, and written again.

        The Hub's `validate` asks its server, see test_publish_hub.py.
        """
        from datasets.info import DatasetInfosDict
        from datasets.utils.metadata import MetadataConfigs
        from huggingface_hub import DatasetCard, DatasetCardData, metadata_load

        path = folder / "README.md"
        data = metadata_load(path)
        assert DatasetCardData(**data).to_dict() == data
        card = DatasetCard.load(path)
        assert str(card) == path.read_text()
        assert (data["license"], data["language"], data["pretty_name"]) == (
            "cc-by-4.0",
            ["en"],
            "Words",
        )
        assert data["size_categories"] == ["n<1K"]
        assert "knowledge-distillation" in data["tags"]
        configs = MetadataConfigs.from_dataset_card_data(card.data)
        assert list(configs) == ["generations", "soft_targets"]
        assert configs.get_default_config_name() == "generations"
        infos = DatasetInfosDict.from_dataset_card_data(card.data)
        for config, info in infos.items():
            assert {name: split.num_examples for name, split in info.splits.items()} == {
                "train": TRAIN,
                "test": HELD_OUT,
            }
            assert info.dataset_size == sum(split.num_bytes for split in info.splits.values())
            assert info.download_size == sum(
                p.stat().st_size for p in folder.glob(f"v-*/{config}/*.parquet")
            )

    def test_it_says_what_each_column_is_and_where_it_comes_from(self, folder):
        text = (folder / "README.md").read_text()
        manifest = read_manifest(LocalFiles(folder))
        for facts in manifest.tables.values():
            for name in facts["columns"]:
                assert re.search(rf"^\| `{name}` \| `[^`]+` \| .+ \|$", text, flags=re.MULTILINE), (
                    name
                )
        for said in (
            "`org/teacher-8b`",
            "| `prompts.jsonl` | `mit` | 24 |",
            "text 10 of the teacher",
            "user: prompt 10",
        ):
            assert said in text
        assert "not stated" not in text
        assert f"topk {TRAIN}" in text
        assert not re.search(r"\{[{%]|None|nan\b", text)

    def test_nothing_of_this_machine_is_in_it(self, folder, store):
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"/home/somebody" not in content, path
                assert str(store.root).encode() not in content, path

    def test_configs_keep_all_but_paths(self, folder):
        (path,) = folder.glob("v-*/teachers/*/tokenizer_config.json")
        expected = {
            "tokenizer_file": "tokenizer.json",
            "parts": [{"name_or_path": "m"}],
            "name_or_path": None,
        }
        assert json.loads(path.read_text()) == expected

    def test_paths_are_cut_to_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data" / "texts").mkdir(parents=True)
        names = (
            "org/model-8b",
            "/home/me/model",
            "data/texts",
            "hf://datasets/a/b",
            "prompts.jsonl",
        )
        assert [public_name(n) for n in names] == [
            "org/model-8b",
            "model",
            "texts",
            "hf://datasets/a/b",
            "prompts.jsonl",
        ]
        secret = "https://me:hf_secret@host.org/a/b.jsonl?X-Amz-Signature=1"
        assert public_name(secret) == "https://host.org/a/b.jsonl"
        assert public_name("hf://datasets/a/b@main") == "hf://datasets/a/b@main"
        recipe = {
            "run": {"dir": "/a/b", "seed": 0},
            "storage": {"dir": "s3://bucket/runs/s", "sources": ["/x/y"]},
            "teacher": {"model": "/m/t"},
            "generate": {
                "engine_args": {
                    "download_dir": "/home/me/cache",
                    "more": ["~/x"],
                    "max_num_seqs": 4,
                }
            },
        }
        assert public_recipe(recipe) == {
            "run": {"dir": "b", "seed": 0},
            "storage": {"dir": "s", "sources": ["y"]},
            "teacher": {"model": "t"},
            "generate": {
                "engine_args": {"download_dir": "cache", "more": ["x"], "max_num_seqs": 4}
            },
        }

    def test_no_field_of_a_recipe_tells_where_files_lie(self):
        """Whatever is text and no word of its own may be a path: it is cut to a name."""
        words = {
            ("teacher", "revision"),
            ("teacher", "device_map"),
            ("student", "revision"),
            ("data", "split"),
            ("generate", "api_key_env"),
            ("generate", "license"),
            ("select", "where"),
            ("train", "snapshot"),
            ("train", "wandb"),
            ("evaluate", "split"),
        }
        texts = {
            (section, name)
            for section, part in Recipe.model_json_schema()["$defs"].items()
            for name, about in part.get("properties", {}).items()
            if section.lower() in Recipe.model_fields
            and {"type": "string"} in ({"type": about.get("type")}, *about.get("anyOf", ()))
            and "enum" not in about
        }
        named = {(section.lower(), name) for section, name in texts} - words
        assert ("evaluate", "source") in named
        for section, name in named:
            cut = public_recipe({section: {name: "/home/somebody/x.jsonl"}})
            assert cut == {section: {name: "x.jsonl"}}, f"{section}.{name}"


class TestOtherRows:
    """Texts that are classified, and text that nobody scored."""

    def exported(self, tmp_path, table, rows, about, **more):
        store = Store.open(tmp_path / "store", create=True)
        with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
            for index in range(6):
                writer.add(generation_row(index))
        if table == "soft_targets":
            with store.writer(table, about=about) as writer:
                for row in rows:
                    writer.add(row)
        places = {commit.shard.sha256: range(commit.shard.rows) for commit in store.commits(table)}
        save_snapshot(store, make_snapshot(store, table, places, {"split": "train"}))
        return export(asked(store, **more), tmp_path / "out", say=silent)

    def test_classes_are_named(self, tmp_path):
        from huggingface_hub import metadata_load

        done = self.exported(tmp_path, "soft_targets", map(class_row, range(6)), CLASSES_ABOUT)
        assert "the distribution over the classes of each text" in done.card
        assert "metadata: `bad`, `fair`, `good`" in done.card
        assert re.search(
            r"^\| `bad` \| 1\.04\d \| 0\.00 % \| `bad` 0\.500, ", done.card, flags=re.MULTILINE
        )
        assert "import torch" not in done.card
        assert metadata_load(tmp_path / "out" / "README.md")["task_categories"] == [
            "text-classification"
        ]

    def test_targets_over_classes_cannot_be_cut(self, tmp_path):
        with pytest.raises(UsageError, match="targets over classes are whole"):
            self.exported(
                tmp_path,
                "soft_targets",
                map(class_row, range(6)),
                CLASSES_ABOUT,
                choice=Choice(min_k=2),
            )

    def test_text_that_no_model_wrote_is_not_called_its_work(self, tmp_path):
        from huggingface_hub import metadata_load

        about = {**samples.ABOUT, "head": "lm", "class_names": None, "teacher_id": "s" * 32}
        store = Store.open(tmp_path / "store", create=True)
        parts = json.dumps({"config": {"architectures": ["Scorer"]}, "dtype": "float32"}).encode()
        store.put_teacher("s" * 32, {"identity.json": parts})
        rows = (samples.target_row(index) | {"teacher_id": "s" * 32} for index in range(6))
        done = self.exported(tmp_path, "soft_targets", rows, about)
        assert re.search(r"^\| Scorer \(`ssssssss`\) \| targets \| ", done.card, flags=re.MULTILINE)
        assert "synthetic" not in metadata_load(tmp_path / "out" / "README.md")["tags"]

    def test_text_alone_is_one_config(self, tmp_path):
        done = self.exported(tmp_path, "generations", (), {})
        assert list(done.manifest.tables) == ["generations"]
        assert done.manifest.splits["train"].scored_tokens == sum(
            3 + index % 5 for index in range(6)
        )
        assert "soft_targets" not in done.card.split("# Out")[1]
        with pytest.raises(UsageError, match="--min-k: nothing was scored"):
            export(
                asked(Store.open(tmp_path / "store"), choice=Choice(min_k=2)),
                tmp_path / "out",
                say=silent,
            )
        assert current_version(done.card) == done.manifest.version


class TestLicenses:
    def test_without_one_nothing_leaves(self, store, tmp_path):
        done = stillroom("publish", store.root, tmp_path / "out", expect=2)
        for flag in ("--license ID", "--teacher-license ID", "--source-license ID"):
            assert flag in done.stderr
        assert not (tmp_path / "out").exists()

    def test_each_that_is_missing_is_named(self, store, tmp_path):
        with pytest.raises(UsageError) as error:
            publish(asked(store, source_licenses=()), str(tmp_path / "out"), say=silent)
        assert "--source-license" in str(error.value)
        assert "--teacher-license" not in str(error.value)
        with pytest.raises(UsageError, match="--license"):
            export(asked(store, license=None), tmp_path / "out", say=silent)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("license_id", ["Apache 2.0", "MIT", "CC BY"])
    def test_an_id_is_spelt_as_on_the_hub(self, store, tmp_path, license_id):
        with pytest.raises(
            UsageError,
            match=r"not an id as the Hub spells it\. Did you mean (apache-2\.0|mit|cc-by)",
        ):
            export(asked(store, license=license_id), tmp_path / "out", say=silent)

    def test_an_export_without_the_others_warns_its_readers(self, store, tmp_path):
        done = export(
            asked(store, model_licenses=(), source_licenses=()), tmp_path / "out", say=silent
        )
        said = (
            f"Licences not stated: of the model LlamaForCausalLM (`{TEACHER[:8]}`); of the "
            "prompts' source"
        )
        assert f"> **{said} `prompts.jsonl`." in done.card
        half = export(asked(store, source_licenses=()), tmp_path / "my-words_2", say=silent).card
        assert "Licences not stated: of the prompts' source `prompts.jsonl`. Find" in half
        assert "\n# My words 2\n" in half
        provenance = json.loads(
            (tmp_path / "out" / done.manifest.version / "PROVENANCE.json").read_text()
        )
        assert provenance["models"][TEACHER]["license"] == "unknown"

    def test_a_source_that_is_none_is_refused(self, store, tmp_path):
        with pytest.raises(UsageError, match=r"no source prompt\.jsonl. It has: prompts\.jsonl"):
            export(
                asked(store, source_licenses=("prompt.jsonl=mit",)), tmp_path / "out", say=silent
            )

    @pytest.mark.parametrize("strict", [True, False])
    def test_a_model_that_is_none_is_refused(self, store, tmp_path, strict):
        with pytest.raises(UsageError, match=f"deadbeef: no such model.*{TEACHER}"):
            export(
                asked(store, model_licenses=("deadbeef=mit", "mit")),
                tmp_path / "out",
                say=silent,
                strict=strict,
            )
        assert list(tmp_path.glob("out/v-*")) == []

    def test_publishing_asks_for_each_not_for_one(self, store, tmp_path):
        both = make_store(tmp_path / "store")
        snapshots_of(both)
        both.put_inputs(
            "e" * 32, both.inputs("d" * 32), {"source": "/x/more.jsonl", "format": "messages"}
        )
        given = asked(both, source_licenses=("prompts.jsonl=mit",))
        with pytest.raises(UsageError, match=r"--source-license more\.jsonl=ID"):
            publish(given, str(tmp_path / "out"), say=silent)
        assert list(tmp_path.glob("out/v-*")) == []
        export(given, tmp_path / "out", say=silent)  # warns its readers
        with pytest.raises(UsageError, match=r"--source-license more\.jsonl=ID"):
            publish(given, str(tmp_path / "out"), say=silent)
        publish(
            asked(both, source_licenses=("prompts.jsonl=mit", "unknown")),
            str(tmp_path / "out"),
            say=silent,
        )

    def test_two_files_of_one_name_are_counted_both(self, tmp_path):
        two = Store.open(make_store(tmp_path / "store").root)
        snapshots_of(two)
        inputs = two.inputs("d" * 32)
        two.put_inputs(
            "e" * 32, inputs.slice(0, 10), {"source": "/other/prompts.jsonl", "format": "messages"}
        )
        two.put_inputs(
            "f" * 32, inputs.slice(0, 5), {"source": "/other/prompts.jsonl", "format": "messages"}
        )
        done = export(asked(two), tmp_path / "out", say=silent)
        provenance = json.loads(
            (tmp_path / "out" / done.manifest.version / "PROVENANCE.json").read_text()
        )
        assert [source["prompts"] for source in provenance["sources"]] == [ROWS + 10]

    def test_models_and_sources_have_their_own(self, store, tmp_path):
        given = {
            "model_licenses": ("other", f"{TEACHER[:6]}=llama3.1"),
            "source_licenses": ("prompts.jsonl=odc-by",),
        }
        done = export(asked(store, **given), tmp_path / "out", say=silent)
        provenance = json.loads(
            (tmp_path / "out" / done.manifest.version / "PROVENANCE.json").read_text()
        )
        assert provenance["models"][TEACHER]["license"] == "llama3.1"
        assert provenance["sources"] == [
            {"name": "prompts.jsonl", "format": "messages", "prompts": ROWS, "license": "odc-by"}
        ]


class TestFolder:
    def test_another_name_is_another_version_and_the_old_one_stays_as_it_was(self, store, tmp_path):
        out = tmp_path / "out"
        first = export(asked(store, name="one"), out, say=silent).manifest.version
        before = {path: path.read_bytes() for path in (out / first).rglob("*") if path.is_file()}
        second = export(asked(store, name="two"), out, say=silent).manifest.version
        assert first != second
        assert {
            path: path.read_bytes() for path in (out / first).rglob("*") if path.is_file()
        } == before

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"columns": ("nonsense",)}, "no column nonsense"),
            ({"where": "nonsense"}, "--where"),
            ({"min_k": 9}, "leave no row of train"),
        ],
    )
    def test_what_cannot_be_done_leaves_no_folder(self, store, tmp_path, choice, message):
        said: list[str] = []
        with pytest.raises(UsageError, match=message):
            export(asked(store, choice=Choice(**choice)), tmp_path / "out", say=said.append)
        assert not (tmp_path / "out").exists()
        assert "columns" not in choice or said == []

    def test_columns_of_no_name_are_refused(self, store, tmp_path):
        done = stillroom(
            "export", store.root, tmp_path / "out", "--license", "mit", "--columns", "", expect=2
        )
        assert "--columns: names no column" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_it_says_how_many_rows_stay_at_home(self, store, tmp_path):
        said: list[str] = []
        done = export(
            asked(store, choice=Choice(where="completion_tokens < 5")),
            tmp_path / "out",
            say=said.append,
        )
        rows = done.manifest.splits["train"].rows
        assert 0 < rows < TRAIN
        assert f"train: {rows} of {TRAIN} rows" in said

    def test_it_says_how_many_rows_no_snapshot_has(self, tmp_path):
        made, said = make_store(tmp_path / "store"), []
        snapshots_of(made, left_out=(1, 2))
        export(asked(made), tmp_path / "out", say=said.append)
        assert any("other rows of soft_targets that stay in the store: 2." in line for line in said)

    def test_exporting_again_builds_nothing_and_changes_nothing(self, store, tmp_path):
        first = export(asked(store), tmp_path / "out", say=silent)
        before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").rglob("*")}
        again = export(asked(store), tmp_path / "out", say=silent)
        assert (first.built, again.built) == (True, False)
        assert {
            p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").rglob("*")
        } == before

    def test_two_folders_have_the_same_bytes(self, store, tmp_path):
        for name in ("one", "two"):
            export(asked(store, name="same"), tmp_path / name, say=silent)
        files = [
            {
                p.relative_to(tmp_path / n): p.read_bytes()
                for p in (tmp_path / n).rglob("*")
                if p.is_file()
            }
            for n in ("one", "two")
        ]
        assert files[0] == files[1]

    def test_a_damaged_file_is_made_again(self, store, tmp_path):
        out = tmp_path / "out"
        done = export(asked(store), out, say=silent)
        path = next(out.glob("v-*/soft_targets/train-*.parquet"))
        path.write_bytes(path.read_bytes()[:-1])
        assert damaged_files(LocalFiles(out), done.manifest) == [path.relative_to(out).as_posix()]
        again = export(asked(store), out, say=silent)
        assert again.built
        assert again.manifest == done.manifest
        assert damaged_files(LocalFiles(out), done.manifest) == []

    def test_a_card_that_is_no_text_names_no_version(self, tmp_path):
        (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n")
        with pytest.raises(UsageError, match="not a folder that Stillroom published"):
            read_manifest(LocalFiles(tmp_path))

    def test_a_card_that_is_not_ours_is_left_alone(self, store, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        with pytest.raises(UsageError, match=r"holds a README\.md that no export wrote"):
            export(asked(store), tmp_path, say=silent)
        assert (tmp_path / "README.md").read_text() == "# Mine\n"

    def test_what_is_not_an_exports_is_left_alone(self, store, tmp_path):
        (tmp_path / ".part").mkdir()
        (tmp_path / ".part" / "mine").write_text("precious")
        with pytest.raises(UsageError, match=r"holds a \.part that no export made"):
            export(asked(store), tmp_path, say=silent)
        assert (tmp_path / ".part" / "mine").read_text() == "precious"

    def test_a_store_is_no_place_for_a_dataset(self, tmp_path):
        own = make_store(tmp_path / "store")
        snapshots_of(own)
        with pytest.raises(UsageError, match="is a store"):
            export(asked(own), tmp_path / "store", say=silent)
        assert not (tmp_path / "store" / "README.md").exists()

    def test_a_file_is_no_place_for_a_dataset(self, store, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(UsageError, match="is a file"):
            export(asked(store), tmp_path / "out", say=silent)

    def test_export_does_not_take_the_hub_for_a_folder(self, store, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = stillroom("export", store.root, "hf://datasets/a/b", "--license", "mit", expect=2)
        assert "stillroom publish" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_recipe_goes_along_when_its_run_is_named(self, store, tmp_path):
        run = tmp_path / "run" / "train-1"
        run.mkdir(parents=True)
        recipe = {
            "teacher": {"model": "/models/org/big"},
            "data": {"source": "/x/prompts.jsonl"},
            "loss": {"tail": "bucket"},
        }
        (run / "settings.json").write_text(json.dumps({"recipe": recipe}))
        done = export(asked(store, run=tmp_path / "run"), tmp_path / "out", say=silent)
        provenance = json.loads(
            (tmp_path / "out" / done.manifest.version / "PROVENANCE.json").read_text()
        )
        assert provenance["recipe"] == {
            "teacher": {"model": "big"},
            "data": {"source": "prompts.jsonl"},
            "loss": {"tail": "bucket"},
        }
        assert "`big`" in done.card
        with pytest.raises(UsageError, match=r"no settings\.json"):
            export(asked(store, run=tmp_path), tmp_path / "out", say=silent)


class Faults(LocalFiles):
    """A stand-in that fails at a chosen step of putting files in place.

    Before each step a reader looks at the folder.
    """

    steps, fail_at, looks = 0, 0, staticmethod(lambda: None)

    def _step(self):
        type(self).looks()
        type(self).steps += 1
        if type(self).steps == type(self).fail_at:
            raise OSError(5, "Input/output error")

    def _sync_file(self, path):
        self._step()
        super()._sync_file(path)

    def _replace(self, temp, final):
        self._step()
        super()._replace(temp, final)

    def _sync_folder(self, folder):
        self._step()
        super()._sync_folder(folder)


def only_once(monkeypatch, module, kept):
    """What is made before anything is put in place is made once and then copied.

    It is the same each time.
    """
    seen = {}

    def remembered(name):
        make = getattr(module, name)

        def again(first, *others, **named):
            key = name, first.manifest.version if name == "dataset_card" else ""
            if key not in seen:
                seen[key] = make(first, *others, **named)
            return seen[key]

        monkeypatch.setattr(module, name, again)

    def tables(store, snapshots, work, choice):
        if not kept.exists():
            kept.mkdir()
            seen["tables"] = make_tables(store, snapshots, kept, choice)
        shutil.copytree(kept, work, dirs_exist_ok=True)
        files = {work / path.relative_to(kept): file for path, file in seen["tables"].files.items()}
        return replace(seen["tables"], files=files)

    make_tables = module.make_tables
    monkeypatch.setattr(module, "make_tables", tables)
    for name in ("make_provenance", "dataset_card", "selected"):
        remembered(name)


def test_interrupted_at_every_step_a_reader_sees_the_old_version_or_the_new_and_the_next_one_ends(
    store, tmp_path, monkeypatch
):
    from stillroom.pipeline.publish import export as module

    new = asked(store, name="out", choice=Choice(min_k=3))
    finished = export(new, tmp_path / "finished", say=silent).manifest.version
    old = export(asked(store, name="out"), tmp_path / "old", say=silent).manifest.version
    out, seen = tmp_path / "out", []

    def look():
        files = LocalFiles(out)
        manifest = read_manifest(files)
        assert damaged_files(files, manifest) == []
        seen.append(manifest.version)

    monkeypatch.setattr(module, "LocalFiles", Faults)
    only_once(monkeypatch, module, tmp_path / "kept")
    Faults.looks = staticmethod(look)
    steps = 1_000
    at = 0
    while at < steps:
        at += 1
        shutil.copytree(tmp_path / "old", out)
        Faults.steps, Faults.fail_at = 0, at
        with suppress(StillroomError):  # which says that the disk failed
            export(new, out, say=silent)
            steps = at  # it has fewer: this time none failed
        look()
        if at % 5 == 1:  # the same command goes on, from any of them
            Faults.fail_at = 0
            assert export(new, out, say=silent).manifest.version == finished
            look()
            assert seen[-1] == finished
            assert not (out / ".part").exists()
        shutil.rmtree(out)
    assert at > 30
    assert set(seen) == {old, finished}


def test_help_names_units_and_defaults():
    text = " ".join(stillroom("publish", "--help").stdout.split())
    for said in (
        "hf://datasets/USER/NAME",
        "--license",
        "--min-k",
        "--where",
        "--columns",
        "[all]",
        "[as stored]",
    ):
        assert said in text


SECRET = "marker-of-a-secret"


@pytest.mark.parametrize("linked", ["a file", "the folder"])
def test_what_a_link_in_a_store_leads_to_does_not_leave_with_it(store, tmp_path, linked):
    strange = Store.open(shutil.copytree(store.root, tmp_path / "store"))
    outside = tmp_path / "outside"
    teacher = strange.files.path(f"teachers/{TEACHER}")
    if linked == "a file":
        outside.mkdir()
        (outside / "id_rsa").write_text(SECRET)
        (teacher / "vocab.txt").symlink_to(outside / "id_rsa")
    else:
        shutil.move(teacher, outside)
        (outside / "id_rsa").write_text(SECRET)
        teacher.symlink_to(outside)
    with pytest.raises(IntegrityError, match=r"teachers/.*: a link that leads out of the store"):
        export(asked(strange), tmp_path / "out", say=silent)
    assert not list(tmp_path.glob("out/v-*"))


@pytest.mark.parametrize("name", ["PROVENANCE.json", "generations", "generations/train-*"])
def test_a_published_folder_whose_names_lead_out_of_it_is_refused(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = copy.glob(f"v-*/{name}")
    moved = shutil.move(path, tmp_path / "outside")
    path.symlink_to(moved)
    with pytest.raises(IntegrityError, match="a link that leads out of the folder"):
        open_store(tmp_path / "new", [str(copy)])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "x\nerror: y"}, "--name .*: not one line of printable characters"),
        ({"name": "\x1b[2Jx"}, "--name .*: not one line of printable"),
        ({"name": " "}, "--name .*: not one line"),
        ({"teacher": "org/\u202ename"}, "--teacher .*: not one line"),
        ({"languages": ("en", "english\n")}, r"--language 'english\\n': no code"),
    ],
)
def test_names_that_are_no_names_are_refused_before_anything_is_written(
    store, tmp_path, given, says
):
    with pytest.raises(UsageError, match=says):
        export(asked(store, **given), tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ['a/b"x', "a/..", "a b/c", "a/b/c"])
def test_what_the_hub_has_no_name_for_is_refused(store, tmp_path, repo):
    with pytest.raises(UsageError, match="name a folder, or a dataset of the Hub"):
        publish(asked(store), f"hf://datasets/{repo}", say=silent)
