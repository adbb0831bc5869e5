"""Versions of adapters, errors of Serve's proxy, and when to try again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mmedpo_ray.errors import UserError
from mmedpo_ray.serve import proxy_errors
from mmedpo_ray.serve.engine_watch import StartTimes, has_replica
from mmedpo_ray.serve.versions import Alias, VersionFolder


def adapter(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_a_version_is_named_after_its_files_and_does_not_change(tmp_path: Path) -> None:
    versions = VersionFolder(tmp_path / "versions")
    first = versions.add("aligned", adapter(tmp_path / "run", b"1"))
    second = versions.add("aligned", adapter(tmp_path / "run", b"2"))
    assert first != second and first.startswith("aligned@")
    assert (versions.path(first) / "adapter_model.safetensors").read_bytes() == b"1"
    assert versions.add("aligned", adapter(tmp_path / "copy", b"2")) == second
    assert versions.read() == {} and versions.names() == []


def test_a_switch_keeps_the_version_before_it(tmp_path: Path) -> None:
    versions = VersionFolder(tmp_path)
    first, second, third = (
        versions.add("aligned", adapter(tmp_path / "run", weights)) for weights in (b"1", b"2", b"3")
    )
    versions.add("other", adapter(tmp_path / "run", b"1"))
    for version in (first, second, second):
        versions.switch("aligned", version)
    assert versions.read() == {"aligned": Alias(current=second, previous=first)}
    versions.switch("aligned", third)
    versions.prune("aligned")
    assert versions.names() == [third, second]
    assert not versions.path(first).exists() and len(list(tmp_path.glob("other@*"))) == 1
    with pytest.raises(UserError, match=first):
        versions.switch("aligned", first)


def test_a_restart_keeps_what_was_rolled_out_until_the_run_is_exported_again(tmp_path: Path) -> None:
    versions, run = VersionFolder(tmp_path / "versions"), adapter(tmp_path / "run", b"1")
    versions.start("aligned", run)
    own = versions.read()["aligned"].current
    rolled = versions.add("aligned", adapter(tmp_path / "second", b"2"))
    versions.switch("aligned", rolled)
    versions.start("aligned", run)
    assert versions.read() == {"aligned": Alias(current=rolled, previous=own, own=own)}
    versions.start("aligned", adapter(run, b"3"))
    newest = versions.read()["aligned"]
    assert newest.current not in (own, rolled) and newest.previous == rolled


def test_adapters_of_other_sizes_are_refused_and_of_other_ranks_not(tmp_path: Path) -> None:
    versions, names = VersionFolder(tmp_path / "versions"), []
    for rank, inputs in ((4, 16), (8, 16), (4, 8)):
        folder = adapter(tmp_path / f"{rank}-{inputs}", b"")
        matrices = {"q.lora_A.weight": np.zeros((rank, inputs)), "q.lora_B.weight": np.zeros((6, rank))}
        save_file(matrices, folder / "adapter_model.safetensors")
        names.append(versions.add("aligned", folder))
    first, other_rank, other_size = names
    versions.check_shapes(other_rank, first)
    with pytest.raises(UserError, match=r"q\.lora_A\.weight has size 8, and 16"):
        versions.check_shapes(other_size, first)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mmedpo export"):
        VersionFolder(tmp_path / "versions").add("aligned", tmp_path)


def test_replicas_that_a_new_controller_takes_over_answer() -> None:
    assert has_replica({"RUNNING": 1, "STARTING": 1}) and has_replica({"RECOVERING": 2})
    assert not any(map(has_replica, ({}, {"STARTING": 2}, {"STOPPING": 1}, {"RUNNING": 0})))


def test_start_times_say_how_much_is_left() -> None:
    times = StartTimes()
    assert times.seconds_left("base") == 5
    times.begin("base")
    times._began["base"] -= 40
    times.end("base")
    times.begin("base")
    times._began["base"] -= 10
    assert times.seconds_left("base") == pytest.approx(30, abs=1)
    times._began["base"] -= 60
    assert times.seconds_left("base") == 5, "it takes longer than the last time"


def ask(answer: Response, path: str = "/v1/models") -> httpx.Response:
    async def respond(_: Request) -> Response:
        return answer

    async def send() -> httpx.Response:
        app = proxy_errors.ProxyErrors(Starlette(routes=[Route("/{path:path}", respond)]))
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(send())


@pytest.mark.parametrize("status", [500, 503])
def test_the_proxys_own_errors_are_json(status: int) -> None:
    found = ask(PlainTextResponse("Traceback: the actor died", status))
    assert (found.status_code, int(found.headers["Retry-After"])) == (503, 5)
    assert found.json()["error"]["type"] == "server_error" and "Traceback" not in found.text


def test_a_request_that_the_proxy_leaves_without_an_answer() -> None:
    async def send_nothing(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(proxy_errors.ProxyErrors(send_nothing))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models")

    assert asyncio.run(send()).status_code == 503


def test_other_answers_pass_the_proxy_unchanged() -> None:
    error = ask(JSONResponse({"error": {"message": "x"}}, 504))
    assert (error.status_code, error.json()) == (504, {"error": {"message": "x"}})
    assert ask(PlainTextResponse("fine")).text == "fine"
    assert ask(PlainTextResponse("not healthy", 503), "/-/healthz").text == "not healthy"
