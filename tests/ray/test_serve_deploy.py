"""The endpoint as operators start it: `serve deploy` on a cluster of `ray start`, and `mmedpo serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import httpx
import pytest
import yaml
from head_node import BIN, free_port, head_node
from served_load import ask, body, clients, write_adapter

from mmedpo_ray.serve import proxy_errors

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MMEDPO = [sys.executable, "-m", "mmedpo_ray.cli"]
START_S = 240
REQUESTS = [body(model, number) for number in range(4) for model in ("base", "aligned")]


def wait_until_ready(address: str, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None
        try:
            if httpx.get(f"{address}/ready", trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail("the endpoint is not ready")


def test_the_deployment_file_on_a_plain_cluster(tmp_path: Path, repository: Path) -> None:
    """Deployed, updated by a rollout and shut down, with token authentication, from another folder."""
    for seed, name in enumerate(("first", "second")):
        write_adapter(tmp_path / name, seed)
    port = free_port()
    settings = yaml.safe_load((repository / "serve" / "deployment.yaml").read_text())
    settings["http_options"]["port"] = port
    arguments = settings["applications"][0]["args"]
    arguments |= {"run.folder": str(tmp_path / "first"), "serve.max_replicas": 1}
    arguments |= {"model.engine.kv_cache_gib": 0.25, "model.engine.max_model_len": 256}
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(settings))
    address = f"http://127.0.0.1:{port}"
    serve = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_errors.IMPORT_PATH,
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    }
    with head_node(**serve, PYTHONPATH=str(repository)) as client:

        def run(*command: str | Path) -> str:
            result = subprocess.run(
                command, env=client, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
            )
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
            return result.stdout + result.stderr

        dashboard = ("--address", client["RAY_API_SERVER_ADDRESS"])
        run(BIN / "serve", "deploy", *dashboard, file)
        wait_until_ready(address)
        with httpx.Client(trust_env=False, timeout=60) as http:
            before = ask(http, f"{address}/v1", body("aligned"))
            assert before.status == 200, before
            printed = run(*MMEDPO, "rollout", "run.folder=second")
            after = ask(http, f"{address}/v1", body("aligned"))
            assert after.model != before.model and after.model in printed
            assert run(*MMEDPO, "rollout", "--back", "run.folder=second").count(before.model) == 1
            assert ask(http, f"{address}/v1", body("aligned")).tokens == before.tokens
        for task in ("ServeReplica:mmedpo:OpenAiIngress", "ProxyActor"):
            kill_under_load(f"{address}/v1", task)
        run(BIN / "serve", "shutdown", "-y", *dashboard)


def kill_under_load(base_url: str, task: str) -> None:
    """Each request in flight gets a 503 in the form of the API, or a broken connection from the proxy."""
    (process,) = faults.workers(os.getpid(), task)
    with clients(base_url, 12, REQUESTS) as load:
        load.wait_for(30)
        start = time.monotonic()
        process.kill()
        time.sleep(1)
        load.wait_for(50)
        end = time.monotonic()
    gap = load.longest_gap(start, end)
    print(f"{task}: {len(load.failed)} of {len(load.answers)} failed, gap {gap:.1f} s")
    refused = [answer for answer in load.failed if answer.status]
    assert all(answer.status == 503 and answer.retry_after for answer in refused), refused[:3]
    assert all(json.loads(answer.text)["error"]["type"] == "server_error" for answer in refused)
    assert len(refused) == len(load.failed) or task == "ProxyActor"
    assert gap < 20


def start_serve(folder: Path, *settings: str, **variables: str) -> tuple[subprocess.Popen[str], Path]:
    """`mmedpo serve` of the embedded model; returns the process and its output."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
    engine = ("model.engine.kv_cache_gib=0.25", "model.engine.max_model_len=256")
    log = folder / f"serve-{len(list(folder.glob('serve-*')))}.log"
    process = subprocess.Popen(
        [*MMEDPO, "serve", *engine, *settings], env=environment, cwd=folder,
        stdout=log.open("w"), stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process, log


def test_a_new_base_starts_beside_the_old_one_and_sigterm_drains(tmp_path: Path) -> None:
    write_adapter(tmp_path / "old", 0)
    port = free_port()
    process, log = start_serve(tmp_path, "run.folder=old", f"serve.port={port}")
    beside = None
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process)
        printed = r"RAY_AUTH_MODE=token mmedpo rollout .*ray\.address=(\S+)"
        while (found := re.search(printed, log.read_text())) is None:
            time.sleep(0.2)
        other = free_port()
        new = ("run.folder=new", "model.name=new-base", "serve.route_prefix=/new", f"serve.port={other}")
        beside, _ = start_serve(tmp_path, *new, f"ray.address={found[1]}", RAY_AUTH_MODE="token")
        wait_until_ready(f"http://127.0.0.1:{other}", beside)
        with httpx.Client(trust_env=False, timeout=60) as http:
            assert ask(http, f"http://127.0.0.1:{other}/v1", body("new-base")).model == "new-base"
            beside.send_signal(signal.SIGTERM)
            assert beside.wait(timeout=60) == 143
            assert ask(http, f"http://127.0.0.1:{port}/v1", body("base")).model == "base"
        long = body("aligned", max_tokens=150, min_tokens=150)
        with httpx.Client(trust_env=False, timeout=60) as http, ThreadPoolExecutor(8) as pool:
            in_flight = [pool.submit(ask, http, f"http://127.0.0.1:{port}/v1", long) for _ in range(8)]
            metrics = f"http://127.0.0.1:{port}/metrics"
            while "mmedpo_requests_in_flight 8.0" not in httpx.get(metrics, trust_env=False).text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert [each.result().status for each in in_flight] == [200] * 8
        assert process.wait(timeout=60) == 143
    finally:
        for each in (process, beside):
            if each is not None:
                each.kill()
