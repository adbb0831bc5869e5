"""The command line without any engine: help, errors, exit codes, locking."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from PIL import Image

from mmedpo_ray import cli, pipeline
from mmedpo_ray.commands.options import settings_of
from mmedpo_ray.commands.parser import build_parser
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.stages import preflight
from mmedpo_ray.stages.registry import Stage
from mmedpo_ray.tables.manifest import Manifest, write_manifest
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner

COMMANDS = ["run", "ingest", "curate", "score", "audit", "align", "export", "serve", "evaluate", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "reads" in text
    assert "writes" in text
    assert "example: mmedpo" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_stage_has_a_job(command: str, repository: Path) -> None:
    script = repository / "jobs" / f"{'pipeline' if command == 'run' else command}.py"
    result = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, cwd=repository, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"mmedpo {command}" in result.stdout


def test_settings_and_options_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "phantom.yaml")
    assert cli.main(["config", "show", "align.beta=0.25", "--config", config, "run.seed=7"]) == 0
    shown = capsys.readouterr().out
    assert "beta: 0.25" in shown
    assert "seed: 7" in shown


def test_options_stand_for_settings() -> None:
    arguments = cli._parse(["ingest", "--format", "slake", "--root", "/data/slake"])
    assert (settings_of(arguments).data.format, settings_of(arguments).data.root) == (
        "slake",
        "/data/slake",
    )
    arguments = cli._parse(["audit", "pairs.parquet", "--fail-on", "high", "audit.examples=2"])
    config = settings_of(arguments)
    assert (arguments.table, config.audit.fail_on, config.audit.examples) == ("pairs.parquet", "high", 2)
    arguments = cli._parse(["audit", "audit.examples=2"])
    assert (arguments.table, settings_of(arguments).audit.examples) == (None, 2)


PATHS = [
    "/data/Station #3",
    "/data/a: b",
    "/data/ blank ",
    "/data/Städtisches Klinikum Köln, Röntgen/ß",
    "/data/a=b",
    "2024",
    "2024-01-01",
    "007",
    "1e5",
    "nan",
    "1_000",
    "12:30",
    "no",
    "true",
    "~",
    "~/data",
    "@data",
    "*glob",
    "&anchor",
    "!tag",
    "%20",
    "`x`",
    "- a",
    "[x]",
    "{x: y}",
    "# x",
    '"quoted"',
    "'quoted'",
    "C:\\data\\",
    "/data/\ttab",
]


@pytest.mark.parametrize("path", [*PATHS, "null"])
def test_the_value_of_an_option_is_taken_as_it_is(path: str) -> None:
    arguments = cli._parse(["ingest", "--format", "slake", "--root", path])
    assert settings_of(arguments).data.root == path


@pytest.mark.parametrize("path", PATHS)
def test_a_text_in_a_setting_is_taken_as_it_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["data.format=slake", f"data.root={path}", f"run.folder={path}", f"data.columns.image={path}"]
    config = settings_of(cli._parse(["ingest", *given]))
    assert (config.data.root, config.run.folder, config.data.columns.image) == (path, path, path)
    assert cli.main(["config", "show", *given]) == 0
    assert Config.model_validate(yaml.safe_load(capsys.readouterr().out)).data.root == path


def test_an_option_beats_the_same_setting() -> None:
    arguments = cli._parse(["ingest", "data.root=/a", "--root", "/b", "data.format=slake"])
    assert settings_of(arguments).data.root == "/b"


def test_a_folder_with_any_name_is_ingested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: None
) -> None:
    folder = tmp_path / "Röntgen: Station #3 "
    run = tmp_path / "Läufe #1"
    (folder / "images").mkdir(parents=True)
    Image.new("L", (8, 8), 100).save(folder / "images" / "a.png")
    row = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nIs it?"}]}
    row["conversations"].append({"from": "gpt", "value": "Yes"})
    (folder / "rows.json").write_text(json.dumps([row]))
    settings = [f"run.folder={run}", "data.train_file=rows.json", "data.image_folder=images"]
    assert cli.main(["ingest", "--format", "llava_json", "--root", str(folder), *settings]) == 0
    [sample] = storage.dataset(run / "samples").to_table().to_pylist()
    assert sample["image_uri"] == str(folder / "images" / "a.png")


def test_help_says_how_a_value_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "exactly as given" in text
    assert "YAML" in text


def test_unknown_option_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--confg", "x"])
    assert caught.value.code == 2


def test_user_errors_have_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "validate", "align.btea=1"]) == 2
    message = capsys.readouterr().err
    assert "align.beta" in message
    assert "Traceback" not in message
    with pytest.raises(UserError):
        cli.main(["config", "validate", "align.btea=1", "--debug"])


@pytest.mark.parametrize("name", ["/nowhere/[x]", "/nowhere/:b:", "/nowhere/a\\[/b]", "/nowhere/\\"])
def test_an_error_names_a_path_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "validate", "--config", name]) == 2
    assert f"error: no configuration file {name}. Give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("curate", "Run the stage that writes it first"),
        ("score", "Run the stage that writes it first"),
        ("align", "Run the stage that writes it first"),
        ("export", "Run the stage that writes it first"),
        ("evaluate", "Run the stage that writes it first"),
        ("report", "start one with `mmedpo run`"),
    ],
)
def test_a_stage_without_its_input_says_what_to_run(
    command: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: None
) -> None:
    assert cli.main([command, f"run.folder={tmp_path}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert remedy in message
    assert "Traceback" not in message


def test_settings_of_an_existing_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("align: {beta: 0.7}\n")
    arguments = build_parser().parse_args(["report", f"run.folder={tmp_path}"])
    config = settings_of(arguments)
    assert config.align.beta == 0.7
    assert config.run.folder == str(tmp_path)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Config | None]:
    """Stages that read nothing and do nothing, or fail where they are set to ``None``; no cluster is
    started."""
    reached: dict[str, Config | None] = {}

    def run(stage: Stage, config: Config) -> None:
        if reached.get(stage.name, config) is None:
            raise UserError(f"{stage.name} failed")
        reached[stage.name] = config
        if stage.name in ("ingest", "align"):
            StageRunner(stage.name, stage.folder(RunFolder(config.run.folder)), config).finish()

    monkeypatch.setattr(Stage, "run", run)
    monkeypatch.setattr(pipeline, "_print_end", lambda *_: None)
    monkeypatch.setattr(pipeline.cluster, "start", lambda _: None)
    monkeypatch.setattr(preflight, "_check_input", lambda *_: None)
    return reached


def saved(folder: Path) -> Config:
    return load(folder / "config.yaml")


def test_the_settings_of_a_first_command_are_kept_to_go_on_from(tmp_path: Path, steps: dict) -> None:
    steps["ingest"] = None
    assert cli.main(["run", f"run.folder={tmp_path}", "align.beta=0.7"]) == 2
    assert saved(tmp_path).align.beta == 0.7


@pytest.mark.parametrize("command", ["run", "align", "evaluate"])
def test_settings_of_a_command_that_fails_do_not_replace_those_of_the_run(
    command: str, tmp_path: Path, steps: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", f"run.folder={tmp_path}", "align.beta=0.7"]) == 0
    assert cli.main([command, f"run.folder={tmp_path}", "model.path=/nowhere/model"]) == 2
    assert "there is no model folder /nowhere/model" in " ".join(capsys.readouterr().err.split())
    steps["align" if command == "run" else command] = None
    assert cli.main([command, f"run.folder={tmp_path}", "align.beta=0.9"]) == 2
    assert (saved(tmp_path).align.beta, saved(tmp_path).model.path) == (0.7, "phantom")
    steps.pop("align", None)
    assert cli.main(["align", f"run.folder={tmp_path}", "align.beta=0.9"]) == 0
    assert saved(tmp_path).align.beta == 0.9


def test_settings_that_differ_from_those_of_finished_tables_are_said(
    tmp_path: Path, steps: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", f"run.folder={tmp_path}", "align.beta=0.7"]) == 0
    assert "settings differ" not in capsys.readouterr().err
    assert cli.main(["report", f"run.folder={tmp_path}"]) == 0
    assert "settings differ" not in capsys.readouterr().err
    changed = ["align.beta=0.9", "data.test_share=0.5", "report.gallery=1"]
    assert cli.main(["report", f"run.folder={tmp_path}", *changed]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "finished tables here were made with: data.test_share 0.2 → 0.5, align.beta 0.7 → 0.9" in said
    assert "gallery" not in said


def test_a_wrong_model_fails_before_anything_starts(
    tmp_path: Path, steps: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    visual = "curate.visual={tool: medklip, medklip: {checkpoint: /nowhere/m.pth}}"
    for setting, said in (
        ("model.path=/nowhere/model", "there is no model folder /nowhere/model"),
        (f"model.path={tmp_path / 'empty'}", "config.json"),
        (visual, "curate.visual.medklip.checkpoint: there is no /nowhere/m.pth"),
        ("score.agents=[{kind: vllm, model: ./nowhere}]", "score.agents.0.model: there is no ./nowhere"),
    ):
        assert cli.main(["run", f"run.folder={tmp_path / 'run'}", setting]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not steps and not (tmp_path / "run").exists()
    assert cli.main(["ingest", f"run.folder={tmp_path / 'run'}", "model.path=/nowhere/model"]) == 0


def own_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, but for lines of the cluster that other tests have started: ``(raylet) …``."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("(", "["))]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("serve", "audit")])
def test_a_command_begins_with_model_and_data(
    command: str,
    tmp_path: Path,
    steps: dict,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_manifest(str(tmp_path / "evaluate"), Manifest(stage="evaluate", key="k"))
    assert cli.main([command, f"run.folder={tmp_path}"]) == 0
    first, *_ = own_lines(capsys)
    assert first.startswith(f"mmedpo {command}") and str(tmp_path) in first
    assert "model: the embedded tiny LLaVA" in first and "data: phantom" in first
    (tmp_path / "[x]").mkdir()
    monkeypatch.setattr(preflight, "check_available", lambda _: None)
    data = ["data.format=slake", f"data.root={tmp_path}/[x]"]
    assert cli.main([command, f"run.folder={tmp_path}", *data, "model.path=some/name"]) == 0
    first, *rest = own_lines(capsys)
    assert "model: some/name" in first and f"data: slake {tmp_path}/[x]" in first
    assert "tiny LLaVA" not in " ".join(rest)


@pytest.mark.parametrize(
    ("command", "warned"), [("ingest", False), ("score", False), ("align", True), ("run", True)]
)
def test_the_embedded_model_on_other_data_is_warned_of(
    command: str, warned: bool, tmp_path: Path, steps: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, f"run.folder={tmp_path}", "data.format=slake", f"data.root={tmp_path}"]) == 0
    assert ("its answers and scores mean nothing" in " ".join(capsys.readouterr().err.split())) == warned


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        pipeline._exclusive(tmp_path),
        pytest.raises(UserError, match="another process"),
        pipeline._exclusive(tmp_path),
    ):
        pass
    with pipeline._exclusive(tmp_path):
        pass


def test_a_dead_cluster_is_a_user_error(tmp_path: Path) -> None:
    config = load(None, [f"run.folder={tmp_path}", "ray.address=127.0.0.1:1"])
    assert config != Config()
    code = (
        "import sys; from mmedpo_ray.cli import main;"
        f"sys.exit(main(['ingest', 'run.folder={tmp_path}', 'ray.address=127.0.0.1:1']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "does not answer" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("command", "writer"),
    [
        ("curate", "ingest"),
        ("score", "curate"),
        ("align", "score"),
        ("export", "align"),
        ("evaluate", "ingest"),
        ("report", "run"),
    ],
)
def test_missing_inputs_are_found_before_anything_is_started_or_written(
    command: str,
    writer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "start", lambda _: pytest.fail("Ray was started"))
    folder = tmp_path / "mis typed"
    assert cli.main([command, f"run.folder={folder}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    given = "" if command == "report" else f" run.folder='{folder}'"
    assert f"`mmedpo {writer}{given}`" in message
    assert not folder.exists()


@pytest.mark.parametrize("command", ["curate", "align", "export", "serve", "evaluate", "run"])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/model", "./nowhere"])
def test_a_model_that_cannot_be_had_is_found_before_ray_starts(
    command: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "start", lambda _: pytest.fail("Ray was started"))
    monkeypatch.setattr(preflight, "_check_input", lambda *_: None)
    assert cli.main([command, f"run.folder={tmp_path / 'run'}", f"model.path={name}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    assert name in message and "model.path" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("format_", ["hf_parquet", "slake", "vqa_rad", "r2gen", "llava_json", "mmedpo_json"])
@pytest.mark.parametrize("kind", ["file", "missing"])
def test_a_data_set_that_is_not_there_is_found_before_ray_starts(
    format_: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "start", lambda _: pytest.fail("Ray was started"))
    root = tmp_path / "data.parquet"
    if kind == "file":
        root.write_bytes(b"")
    settings = [
        f"run.folder={tmp_path / 'run'}",
        f"data.format={format_}",
        f"data.root={root}",
        "data.train_file=x",
    ]
    assert cli.main(["ingest", *settings]) == 2
    message = capsys.readouterr().err
    assert f"data.root: there is no folder {root}" in message or f"data.root: {root} is a file" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/nowhere/run", "unwritable"])
def test_a_run_folder_that_cannot_be_is_a_user_error(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start", lambda _: pytest.fail("Ray was started"))
    (tmp_path / "file").touch()
    if folder == "unwritable":
        monkeypatch.setattr(storage.os, "access", lambda *_: False)
    path = tmp_path / folder
    assert cli.main(["ingest", f"run.folder={path}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: run.folder: {path} ") and len(message.splitlines()) == 1


def fails(error: BaseException) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


def chained(cause: BaseException) -> Exception:
    error = ImportError("cannot import")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(13, "Permission denied", "/archive/run"), 2, "error: /archive/run: Permission "
                                                                      "denied. Check"),
        (OSError("Failed to open local file '/a'. Detail: [errno 28] No space left"), 2, "No space left. "
                                                                                         "Check"),
        (KeyError("the text of a patient"), 1, "error: unexpected KeyError in pipeline_commands.py, line"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes"),
        (chained(KeyboardInterrupt()), 130, "interrupted; the same command resumes"),
    ],
)  # fmt: skip
def test_every_error_ends_with_one_line(
    error: BaseException, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "run_stage", fails(error))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["ingest"]) == status
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1
    assert "patient" not in message
    if status == 1:
        [log] = tmp_path.glob("mmedpo-*.log")
        assert str(log) in message and "Traceback" in log.read_text() and log.stat().st_mode & 0o077 == 0
    elif status == 2:
        with pytest.raises(type(error)):
            cli.main(["ingest", "--debug"])


def test_sigterm_ends_as_ctrl_c_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["ingest"]) == 143
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_line_loads_nothing_slow() -> None:
    code = (
        "import sys, mmedpo_ray.cli; slow = ('rich', 'pydantic', 'yaml', 'ray'); "
        "print([name for name in slow if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_ray_that_does_not_start_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", fails(Exception("The node timed out.\nMore")))
    with pytest.raises(UserError, match=r"does not start: The node timed out\. Try again"):
        cluster.start(Config().ray)


def test_a_command_ends_with_what_it_made_and_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    made = Manifest(
        stage="ingest", key="k", rows_in=12, rows_out=9, dropped={"image_missing": 2, "empty_answer": 1}
    )
    rows = [
        {"image_uri": None, "drop_reason": "empty_answer"},
        {"image_uri": "/scans/7.png", "drop_reason": "image_missing"},
    ]

    def work(*_: object) -> None:
        write_manifest(str(run / "samples"), made)
        storage.write_parquet(run / "samples" / "dropped" / "part-0.parquet", pa.Table.from_pylist(rows))

    monkeypatch.setattr(pipeline, "run_stage", work)
    assert cli.main(["ingest", f"run.folder={run}"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"9 samples in {run}/samples; 3 dropped (image_missing 2, empty_answer 1), see "
        f"{run}/samples/dropped; image_missing: /scans/7.png",
        f"next: mmedpo curate run.folder={run}",
    ]
