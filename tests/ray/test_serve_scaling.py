"""Replicas come and go under load, down to none; a stop answers what is in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray import serve
from served_load import Answer, ask, body, clients, make_config, write_adapter

from mmedpo_ray.serve.endpoint import Endpoint, start_endpoint
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REQUESTS = [body(model, number) for number in range(4) for model in ("base", "aligned")]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Endpoint]:
    """An endpoint that scales between no engine and two, within seconds."""
    run: Path = tmp_path_factory.mktemp("scaling") / "run"
    write_adapter(run, 0)
    config = make_config(
        run,
        min_replicas=0,
        max_replicas=2,
        target_ongoing_requests=2,
        upscale_delay_s=1,
        downscale_delay_s=5,
        drain_timeout_s=30,
    )
    versions = VersionFolder(RunFolder(config.run.folder).versions())
    with start_endpoint(config, run_models(config), versions=versions) as endpoint:
        yield endpoint


def replicas() -> int:
    deployment = serve.status().applications["mmedpo"].deployments["engine:base"]
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


def wait_until(found: Callable[[], bool], timeout_s: float = 180) -> float:
    started = time.monotonic()
    while not found():
        assert time.monotonic() - started < timeout_s
        time.sleep(0.2)
    return time.monotonic() - started


def get(endpoint: Endpoint, path: str) -> httpx.Response:
    return httpx.get(endpoint.base_url.removesuffix("/v1") + path, trust_env=False)


def test_replicas_come_and_go_and_no_request_fails(endpoint: Endpoint) -> None:
    with clients(endpoint.base_url, 12, REQUESTS) as load:
        up = wait_until(lambda: replicas() == 2)
        load.wait_for(100)
    assert not load.failed, load.failed[:3]
    with clients(endpoint.base_url, 1, REQUESTS, pause_s=0.3) as light:
        down = wait_until(lambda: replicas() == 1)
        light.wait_for(10)
    assert not light.failed, light.failed[:3]
    print(f"two replicas after {up:.1f} s under load, one {down:.1f} s after it")


def test_to_zero_and_back(endpoint: Endpoint) -> None:
    to_zero = wait_until(lambda: replicas() == 0)
    wait_until(lambda: get(endpoint, "/ready").status_code == 503, timeout_s=5)
    assert "mmedpo_engines_up 0.0" in get(endpoint, "/metrics").text
    assert get(endpoint, "/health").status_code == 200
    time.sleep(3)
    assert replicas() == 0, "looking at it does not start it"
    answers: list[Answer] = []
    with httpx.Client(trust_env=False, timeout=60) as client:
        started = time.monotonic()
        while not answers or answers[-1].status != 200:
            answers.append(ask(client, endpoint.base_url, REQUESTS[1]))
            assert time.monotonic() - started < 180, answers[-1]
            time.sleep(0.5)
        cold_start = time.monotonic() - started
    *refused, _ = answers
    assert refused and {answer.status for answer in refused} == {503}
    assert all(answer.retry_after and 1 <= int(answer.retry_after) <= 60 for answer in refused)
    assert max(answer.received - answer.sent for answer in refused) < 2, "the refusal comes at once"
    print(
        f"to zero {to_zero:.1f} s, cold start {cold_start:.1f} s, first Retry-After {refused[0].retry_after}"
    )


def test_a_stop_answers_what_is_in_flight(endpoint: Endpoint) -> None:
    """The last test of this endpoint."""
    long = body("base", max_tokens=150, min_tokens=150)
    with httpx.Client(trust_env=False, timeout=60) as client, ThreadPoolExecutor(9) as pool:
        in_flight = [pool.submit(ask, client, endpoint.base_url, long) for _ in range(8)]
        while "mmedpo_requests_in_flight 8.0" not in get(endpoint, "/metrics").text:
            time.sleep(0.01)
        stop = pool.submit(endpoint.stop)
        late: list[Answer] = []
        while not late or late[-1].status == 200:
            late.append(ask(client, endpoint.base_url, REQUESTS[0]))
        assert late[-1].status == 503 and late[-1].retry_after is not None
        assert [each.result().status for each in in_flight] == [200] * 8
        stop.result(timeout=60)
