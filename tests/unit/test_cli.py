"""The command line without any engine: help, errors, exit codes, locking."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmedpo_ray import cli, pipeline, storage
from mmedpo_ray.config import Config, load
from mmedpo_ray.errors import UserError

VERBS = ["run", "ingest", "curate", "score", "audit", "align", "export", "serve", "evaluate", "report"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "reads" in text
    assert "writes" in text
    assert "example: mmedpo" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_station_has_a_job(verb: str, repository: Path) -> None:
    script = repository / "jobs" / f"{'pipeline' if verb == 'run' else verb}.py"
    result = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, cwd=repository, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"mmedpo {verb}" in result.stdout


def test_settings_and_options_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "phantom.yaml")
    assert cli.main(["config", "show", "align.beta=0.25", "--config", config, "run.seed=7"]) == 0
    shown = capsys.readouterr().out
    assert "beta: 0.25" in shown
    assert "seed: 7" in shown


def test_options_stand_for_settings() -> None:
    arguments = cli._parse(["ingest", "--format", "slake", "--root", "/data/slake"])
    assert (cli.settings_of(arguments).data.format, cli.settings_of(arguments).data.root) == (
        "slake",
        "/data/slake",
    )
    arguments = cli._parse(["audit", "pairs.parquet", "--fail-on", "high", "audit.examples=2"])
    config = cli.settings_of(arguments)
    assert (arguments.table, config.audit.fail_on, config.audit.examples) == ("pairs.parquet", "high", 2)
    arguments = cli._parse(["audit", "audit.examples=2"])
    assert (arguments.table, cli.settings_of(arguments).audit.examples) == (None, 2)


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
    assert cli.settings_of(arguments).data.root == path


@pytest.mark.parametrize("path", PATHS)
def test_a_text_in_a_setting_is_taken_as_it_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["data.format=slake", f"data.root={path}", f"run.folder={path}", f"data.columns.image={path}"]
    config = cli.settings_of(cli._parse(["ingest", *given]))
    assert (config.data.root, config.run.folder, config.data.columns.image) == (path, path, path)
    assert cli.main(["config", "show", *given]) == 0
    assert Config.model_validate(yaml.safe_load(capsys.readouterr().out)).data.root == path


def test_an_option_beats_the_same_setting() -> None:
    arguments = cli._parse(["ingest", "data.root=/a", "--root", "/b", "data.format=slake"])
    assert cli.settings_of(arguments).data.root == "/b"


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
    assert "taken as it is" in text
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
    ("verb", "remedy"),
    [
        ("curate", "Run the station that writes this table first"),
        ("score", "Run the station that writes it first"),
        ("align", "Run the station that writes it first"),
        ("export", "Run the station that writes it first"),
        ("evaluate", "Run `mmedpo export` first"),
        ("report", "start one with `mmedpo run`"),
    ],
)
def test_a_station_without_its_input_says_what_to_run(
    verb: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: None
) -> None:
    assert cli.main([verb, f"run.folder={tmp_path}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert remedy in message
    assert "Traceback" not in message


def test_settings_of_an_existing_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("align: {beta: 0.7}\n")
    arguments = cli.build_parser().parse_args(["report", f"run.folder={tmp_path}"])
    config = cli.settings_of(arguments)
    assert config.align.beta == 0.7
    assert config.run.folder == str(tmp_path)


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
