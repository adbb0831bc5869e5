"""kill -9 of every process of the endpoint, under load: what clients see, and when it is whole again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import httpx
import psutil
import pytest
from ray import serve
from served_load import Answer, Load, ask, body, clients, make_config, write_adapter

from mmedpo_ray.serve.endpoint import Endpoint, start_endpoint
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.serve.rollout import rollout
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = 12
REQUESTS = [body(model, number) for number in range(4) for model in ("base", "aligned")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate(("first", "second")):
        write_adapter(root / name, seed)
    return root


@pytest.fixture(scope="module")
def endpoint(root: Path, ray_cluster: None, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """Two engine replicas; the adapter of the second run was rolled out."""
    config = make_config(root / "first", min_replicas=2, max_replicas=2, http=request.param)
    versions = VersionFolder(RunFolder(config.run.folder).versions())
    with start_endpoint(config, run_models(config), versions=versions) as endpoint:
        wait_for_engines(endpoint, 2)
        rollout(make_config(root / "second"), "aligned")
        yield endpoint


def processes(task: str) -> list[psutil.Process]:
    return faults.workers(os.getpid(), task)


def replicas() -> list[psutil.Process]:
    return processes("ServeReplica:mmedpo:engine:base")


def engine_of(replica: psutil.Process) -> psutil.Process:
    """The core of its engine, which a fork server started."""
    (core,) = (core for child in replica.children() for core in child.children() if core.children())
    return core


def wait_for_engines(endpoint: Endpoint, count: int) -> None:
    """Waits for so many replicas that Serve sends requests to."""
    deadline = time.monotonic() + 240
    while engine_states() != {"RUNNING": count}:
        assert time.monotonic() < deadline, engine_states()
        time.sleep(0.2)


def engine_states() -> dict[str, int]:
    """State → number of engine replicas, as Serve's controller sees it."""
    return serve.status().applications["mmedpo"].deployments["engine:base"].replica_states


def under_load(endpoint: Endpoint, fault: Callable[[], None], least: int = 100) -> tuple[Load, float, float]:
    """Lets clients ask before, during and after a fault; returns answers and times of fault and end."""
    wait_for_engines(endpoint, 2)
    with clients(endpoint.base_url, CLIENTS, REQUESTS) as load:
        load.wait_for(30)
        killed = time.monotonic()
        fault()
        time.sleep(1)
        load.wait_for(least, timeout_s=240)
        end = time.monotonic()
    return load, killed, end


def check_refusals(answers: list[Answer]) -> None:
    """Each is a 503 with Retry-After in the form of the API."""
    for answer in answers:
        assert answer.status == 503, answer
        assert answer.retry_after is not None and 1 <= int(answer.retry_after) <= 60
        assert json.loads(answer.text)["error"]["type"] == "server_error"


@pytest.mark.parametrize("endpoint", ["direct"], indirect=True)
@pytest.mark.parametrize("what", ["engine", "replica"])
def test_one_of_two(endpoint: Endpoint, what: str) -> None:
    """The other replica answers instead; the new one has the version that was rolled out."""
    killed = replicas()[0]
    core = engine_of(killed)
    load, start, end = under_load(endpoint, (core if what == "engine" else killed).kill)
    print(
        f"{what}: {len(load.failed)} of {len(load.answers)} failed, gap {load.longest_gap(start, end):.1f} s"
    )
    assert not load.failed, load.failed[:3]
    assert len({answer.model for answer in load.answers}) == 2
    faults.wait_until_gone([killed, core])
    wait_for_engines(endpoint, 2)
    print(f"{what}: two again after {time.monotonic() - start:.1f} s, first start {endpoint.seconds:.1f} s")
    with clients(endpoint.base_url, CLIENTS, REQUESTS) as load:
        load.wait_for(100)
    assert not load.failed
    assert len({answer.model for answer in load.answers}) == 2


@pytest.mark.parametrize("endpoint", ["direct"], indirect=True)
def test_all_engines(endpoint: Endpoint) -> None:
    found = [engine_of(replica) for replica in replicas()]
    assert len(found) == 2

    def kill() -> None:
        for core in found:
            core.kill()

    load, start, end = under_load(endpoint, kill, least=20)
    gap = load.longest_gap(start, end)
    print(f"all engines: {len(load.failed)} of {len(load.answers)} failed, back after {gap:.1f} s")
    check_refusals(load.failed)
    assert load.failed
    assert gap < 1.5 * endpoint.seconds


@pytest.mark.parametrize("endpoint", ["direct"], indirect=True)
def test_a_stream_that_has_begun_ends_with_an_error(endpoint: Endpoint) -> None:
    wait_for_engines(endpoint, 2)
    request = body("base", stream=True, n=8, temperature=1.0, max_tokens=150, min_tokens=150)
    engines = [engine_of(replica) for replica in replicas()]
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", f"{endpoint.base_url}/chat/completions", json=request) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        for core in engines:
            core.kill()
        events = [line for line in lines if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    deadline = time.monotonic() + 60
    while engine_states() == {"RUNNING": 2}:
        assert time.monotonic() < deadline, "Serve does not notice"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("endpoint", "task", "most_failed"),
    [
        ("direct", "OpenAiIngress", None),
        ("direct", "ServeController", 0),
        ("proxy", "OpenAiIngress", CLIENTS),
        ("proxy", "ServeController", 0),
    ],
    indirect=["endpoint"],
)
def test_ingress_and_controller(endpoint: Endpoint, task: str, most_failed: int | None) -> None:
    """Without a proxy before it, connections to the ingress break and are refused until it is back."""
    wait_for_engines(endpoint, 2)
    (process,), engines = processes(task), replicas()
    load, start, end = under_load(endpoint, process.kill)
    gap = load.longest_gap(start, end)
    print(f"{task}: {len(load.failed)} of {len(load.answers)} failed, gap {gap:.1f} s")
    if most_failed is None:
        assert load.failed and not any(answer.status for answer in load.failed)
    else:
        check_refusals(load.failed)
        assert len(load.failed) <= most_failed
    assert gap < endpoint.seconds
    assert len({answer.model for answer in load.answers[-20:] if answer.status == 200}) == 2
    wait_for_engines(endpoint, 2)
    assert replicas() == engines, "no engine was started again"


@pytest.mark.parametrize("endpoint", ["proxy"], indirect=True)
def test_the_proxy(endpoint: Endpoint) -> None:
    """Its connections break; a client that connects again is answered."""
    (process,) = processes("ProxyActor")
    load, start, end = under_load(endpoint, process.kill)
    gap = load.longest_gap(start, end)
    print(f"proxy: {len(load.failed)} of {len(load.answers)} failed, gap {gap:.1f} s")
    check_refusals([answer for answer in load.failed if answer.status])
    assert gap < endpoint.seconds
    with httpx.Client(trust_env=False, timeout=60) as client:
        assert ask(client, endpoint.base_url, REQUESTS[0]).status == 200
