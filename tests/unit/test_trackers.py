"""The real TensorBoard, MLflow and W&B clients, offline: every step is read back once, from one run."""

from __future__ import annotations

import importlib.util
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmedpo_ray.align import trackers
from mmedpo_ray.align.metrics import MetricsWriter, read_metrics
from mmedpo_ray.errors import UserError


@pytest.fixture
def calls_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Requests of any client, wandb's own Go process too: a proxy that records them and answers none."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.lower(), proxy)
        for name in trackers.TRACKER_ENVIRONMENT:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_MODE", "offline")
        yield asked


def rows(*steps: int) -> list[dict[str, float | None]]:
    return [{"step": step, "loss": 1 / step, "ess": 0.5, "gpu_memory_gib": None} for step in steps]


def interrupted_and_resumed(folder: Path, name: str) -> None:
    """Five steps, of which a crash costs two, then all eight."""
    first = MetricsWriter(folder, 0, [name])
    for row in rows(1, 2, 3, 4, 5):
        first.write(row)
    first.close()
    for resumed, last in ((3, 4), (3, 8)):
        time.sleep(1)  # offline runs of W&B are named by the second
        writer = MetricsWriter(folder, resumed, [name])
        for row in rows(*range(resumed + 1, last + 1)):
            writer.write(row)
        writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "slake-run" / "align"
    folder.mkdir(parents=True)
    return folder


def test_mlflow_has_one_run_with_every_step_once(folder: Path, calls_home: list[bytes]) -> None:
    interrupted_and_resumed(folder, "mlflow")
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("slake-run", "FINISHED")]
        logged = database.execute("select key, step, value from metrics order by key, step").fetchall()
    assert [row for row in logged if row[0] == "align/loss"] == [
        ("align/loss", step, pytest.approx(1 / step)) for step in range(1, 9)
    ]
    assert {key for key, _, _ in logged} == {"align/loss", "align/ess"}
    assert not (Path.cwd() / "mlruns").exists(), "everything lies under the run's folder"
    assert calls_home == []


def test_wandb_has_one_run_with_every_step_once(folder: Path, calls_home: list[bytes]) -> None:
    interrupted_and_resumed(folder, "wandb")
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "every launch goes on with the same run id"
    deadline = time.monotonic() + 20  # wandb's own process writes on after finish()
    while len(steps := [pair for file in files for pair in wandb_history(file)]) < 8:
        assert time.monotonic() < deadline, steps
        time.sleep(0.1)
    assert sorted(steps) == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert calls_home == []


def test_tensorboard_shows_every_step_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_and_resumed(folder, "tensorboard")
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("align/loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 9)]


def test_wandb_without_an_account_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # what it read of the environment
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        MetricsWriter(folder, 0, ["wandb"])


def test_mlflow_with_a_wrong_address_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
    with pytest.raises(UserError, match="Check MLFLOW_TRACKING_URI"):
        MetricsWriter(folder, 0, ["mlflow"])


def test_training_goes_on_without_a_tracker_that_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        def log(self, figures: dict[str, float], step: int) -> None:
            if step == 2:
                raise ConnectionError("no route to host")

        def close(self) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda *_: Gone())
    writer = MetricsWriter(folder, 0, ["mlflow"])
    for row in rows(1, 2, 3):
        writer.write(row)
    writer.close()
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    assert caplog.text.count("mlflow failed (no route to host)") == 1


def test_a_tracker_that_is_not_installed_is_refused_with_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.check_trackers(["tensorboard", "mlflow", "wandb"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sqlalchemy" else find(name, *rest)
    )
    with pytest.raises(
        UserError, match=r"names mlflow, but sqlalchemy .* pip install mlflow-skinny sqlalchemy"
    ):
        trackers.check_trackers(["tensorboard", "mlflow"])
    trackers.check_trackers(["wandb"])


def wandb_history(file: Path) -> list[tuple[int, float]]:
    """``(step, loss)`` of an offline run's file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, history = file.read_bytes(), 7, []
    pending = b""
    while position + 7 <= len(content):
        if 0 < (left := -position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record.FromString(pending)
            pending = b""
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "align/loss" in values:
                history.append((int(values["_step"]), float(values["align/loss"])))
    return history


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="MLflow is an extra")
def test_deepspeed_does_not_bring_mlflow_into_every_rank() -> None:
    script = (
        "import sys; from mmedpo_ray.align.engines import deepspeed as engine; "
        "engine._import_deepspeed(use_gpu=False); assert 'mlflow' not in sys.modules; import mlflow; assert "
        "mlflow.set_tracking_uri"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
