"""A table of other settings: messages say what changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from align_world import align_settings, write_scored
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.data import prepare_stage
from mmedpo_ray.align.data.prepare_stage import made_with
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables.manifest import Manifest, write_manifest
from mmedpo_ray.tables.provenance import MADE_WITH, changes, check_prepared


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_scored(tmp_path, 1)
    config = Config(align=align_settings(max_length=1024))
    config.run.folder = str(tmp_path)
    config.model.path = str(build_tiny_llava(tmp_path / "llava"))
    return config


def write_table(config: Config, key: str, **extra: object) -> str:
    folder = f"{config.run.folder}/prepared"
    write_manifest(folder, Manifest(stage="prepare", key=key, extra=extra))
    return folder


def test_messages_name_what_changed(config: Config) -> None:
    before = made_with(config)
    folder = write_table(config, "old", **{MADE_WITH: before})
    assert check_prepared(folder, "old", before).key == check_prepared(folder, None, None).key
    model = Path(config.model.path)
    (model / "chat_template.jinja").write_text("other")
    (model / "preprocessor_config.json").write_text('{"size": 1}')
    changed = {"max_length": 512, "precision": "bf16", "reversed_visual_coefficient": 0.5}
    config.align = config.align.model_copy(update=changed)
    write_manifest(f"{config.run.folder}/scored", Manifest(stage="score", key="new"))
    expected = (
        "the model's chat_template.jinja, preprocessor_config.json, align.precision fp32 → bf16, "
        "align.max_length 1024 → 512, reversed pairs no → yes, the table `scored`"
    )
    assert changes(before, made_with(config)) == expected
    with pytest.raises(UserError, match="prepared was made under other settings") as raised:
        check_prepared(folder, "new", made_with(config))
    assert expected in str(raised.value)
    with pytest.raises(UserError, match="missing or unfinished on this node"):
        check_prepared(f"{config.run.folder}/elsewhere", None, None)


def test_a_table_without_record_of_its_settings_is_refused_too(config: Config) -> None:
    folder = write_table(config, "old")
    with pytest.raises(UserError, match="settings that were not recorded"):
        check_prepared(folder, "new", made_with(config))


def test_the_stage_says_why_it_works_again(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    monkeypatch.setattr(prepare_stage, "check_cluster", lambda *_, **__: None)
    monkeypatch.setattr(prepare_stage, "announce_ahead", stop)
    write_table(config, "old", **{MADE_WITH: made_with(config)})
    config.align = config.align.model_copy(update={"max_length": 512})
    with pytest.raises(StoppedError):
        prepare_stage.prepare(config)
    line = " ".join(capsys.readouterr().err.split())
    assert line.startswith("prepare: ") and line.endswith("Changed: align.max_length 1024 → 512")
