"""Tables that no longer belong together are found, wherever in the chain, and what to run first is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import lineage
from mmedpo_ray.tables.manifest import read_manifest
from mmedpo_ray.tables.stage_runner import StageRunner

# Folder → what it is made of, in the order of the pipeline.
PIPELINE = {
    "samples": (),
    "candidates": ("samples",),
    "pairs": ("samples", "candidates"),
    "scored": ("pairs",),
    "prepared": ("scored",),
    "align": ("prepared",),
    "control/align": ("prepared",),
    "model": ("align",),
    "control/model": ("control/align",),
    "evaluate": ("samples", "model"),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run in which every stage has finished."""
    config = load(None, [f"run.folder={tmp_path}"])
    for name in PIPELINE:
        make(config, name)
    return config


def make(config: Config, name: str, setting: int = 0) -> StageRunner:
    folders = [f"{config.run.folder}/{made_of}" for made_of in PIPELINE[name]]
    stage = StageRunner(name, f"{config.run.folder}/{name}", config, settings=[setting], inputs=folders)
    stage.finish()
    return stage


def use(config: Config, *names: str) -> StageRunner:
    """A stage that reads these tables."""
    folders = [f"{config.run.folder}/{name}" for name in names]
    return StageRunner("next", f"{config.run.folder}/next", config, inputs=folders)


@pytest.mark.parametrize(
    ("replaced", "used", "stale", "command"),
    [
        ("samples", "pairs", "candidates", "curate"),
        ("samples", "scored", "candidates", "curate"),
        ("samples", "model", "candidates", "curate"),
        ("pairs", "prepared", "scored", "score"),
        ("scored", "align", "prepared", "align"),
        ("prepared", "control/model", "control/align", "align"),
        ("align", "model", "model", "export"),
        ("control/align", "control/model", "control/model", "export"),
        ("model", "evaluate", "evaluate", "evaluate"),
    ],
)
def test_a_table_made_from_an_earlier_one_is_refused(
    config: Config, replaced: str, used: str, stale: str, command: str
) -> None:
    make(config, replaced, setting=1)
    said = rf"next: {config.run.folder}/{stale} was .* another {replaced}/.* Run `mmedpo {command}` first"
    with pytest.raises(UserError, match=said):
        use(config, used)
    make(config, replaced)
    assert use(config, used), "made again as it was, everything belongs together again"


def test_made_again_in_order_they_belong_together(config: Config) -> None:
    make(config, "samples", setting=1)
    for name in list(PIPELINE)[1:]:
        with pytest.raises(UserError, match="was made from another"):
            use(config, "evaluate")
        make(config, name)
    assert use(config, "samples", "evaluate")


def test_an_unchanged_table_made_again_changes_nothing(config: Config) -> None:
    before = use(config, "evaluate").key
    for name in PIPELINE:
        make(config, name)
    assert use(config, "evaluate").key == before


def test_rows_tried_again_make_the_tables_after_them_stale(config: Config) -> None:
    manifest = read_manifest(f"{config.run.folder}/pairs")
    assert manifest is not None
    manifest.revision = "more rows"
    Path(config.run.folder, "pairs/manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(UserError, match=r"/scored was made from another pairs/ .* Run `mmedpo score` first"):
        use(config, "align")


def test_a_table_that_is_gone_hides_nothing(config: Config) -> None:
    for name in ("candidates", "prepared", "align"):
        shutil.rmtree(f"{config.run.folder}/{name}")
    assert use(config, "model")
    make(config, "samples", setting=1)
    with pytest.raises(
        UserError, match=r"/pairs was made from another samples/ .* Run `mmedpo curate` first"
    ):
        use(config, "model")


def test_an_unfinished_input_is_named(config: Config) -> None:
    Path(config.run.folder, "align/manifest.json").rename(f"{config.run.folder}/align/key.json")
    said = r"/model was made from align/, .* not finished\. Run `mmedpo align` first"
    with pytest.raises(UserError, match=said):
        use(config, "model")


def test_a_run_may_be_moved_and_its_folder_named_in_any_way(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    monkeypatch.chdir(moved.parent)
    config = load(None, [f"run.folder={moved.name}"])
    StageRunner("export", str(moved / "model"), config, inputs=[str(moved / "align")]).finish()
    manifest = read_manifest(str(moved / "model"))
    assert manifest is not None
    assert list(manifest.inputs) == ["samples", "candidates", "pairs", "scored", "prepared", "align"]
    make(config, "samples", setting=1)
    with pytest.raises(UserError, match=re.escape("was made from another samples/")):
        StageRunner("export", str(moved / "model"), config, inputs=[str(moved / "align")])


def test_tables_elsewhere_are_followed_too(config: Config, tmp_path: Path) -> None:
    other = load(None, [f"run.folder={tmp_path}-other"])
    StageRunner("t", f"{other.run.folder}/t", other, inputs=[f"{config.run.folder}/samples"]).finish()
    assert lineage.find_stale(other.run.folder, f"{other.run.folder}/t") is None
    make(config, "samples", setting=1)
    assert lineage.find_stale(other.run.folder, f"{other.run.folder}/t") is not None


def test_a_manifest_keeps_the_settings(config: Config) -> None:
    manifest = read_manifest(f"{config.run.folder}/align")
    assert manifest is not None
    assert manifest.settings == config.model_dump(mode="json")
