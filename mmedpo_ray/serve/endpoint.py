"""The OpenAI-compatible endpoint: Ray Serve in front of vLLM engines.

endpoint = start_endpoint(config, {"base": "models/base", "aligned": "run/model/adapter"})
...  # POST {endpoint.base_url}/chat/completions
endpoint.stop()
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from mmedpo_ray.clients.http import is_loopback
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.vllm_engine import engine_settings
from mmedpo_ray.serve import proxy_errors
from mmedpo_ray.serve.access import KEYS_VARIABLE, hash_key, read_key_hashes
from mmedpo_ray.serve.application import Models, build_app, check_model, engine_groups
from mmedpo_ray.serve.readiness import wait_for_answer, wait_until_running
from mmedpo_ray.serve.settings import ServeConfig
from mmedpo_ray.serve.versions import VersionFolder

log = logging.getLogger(__name__)

_DRAIN_MARGIN_S = 5.0
_ALL_ADDRESSES = ("0.0.0.0", "::", "")
# Of the controller, and of the proxies that it starts. While engines import on few cores, a proxy may need
# longer than Ray's 5 s to answer; it would be killed.
_SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_errors.IMPORT_PATH,
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # One that died is started again after three checks.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


@dataclass
class Endpoint:
    """A running endpoint; a context manager that stops it.

    Attributes:
        base_url: for OpenAI clients, ending in ``/v1``.
        models: names that requests may use.
        api_key: a key for this process alone; None if the endpoint asks for none.
        seconds: from the start until every model had answered.
    """

    base_url: str
    models: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    seconds: float = 0.0
    _app_name: str = field(default="", repr=False)
    _drain_timeout_s: float = field(default=0.0, repr=False)
    _stops_serve: bool = field(default=True, repr=False)

    def stop(self) -> None:
        """Answers what is in flight and refuses the rest, then takes the endpoint down."""
        if not ray.is_initialized():
            return
        try:
            drain(self._app_name, self._drain_timeout_s)
        finally:
            self.take_down()

    def take_down(self) -> None:
        """Takes the models down at once; Serve itself too, unless it was running before."""
        if self._stops_serve:
            serve.shutdown()
        else:
            serve.delete(self._app_name)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_endpoint(
    config: Config,
    models: Models,
    *,
    versions: VersionFolder | None = None,
) -> Endpoint:
    """Deploys the models and waits until each of them answers a question.

    Args:
        config: all settings; ``serve.port: 0`` takes a free port. Endpoints with different
            ``serve.route_prefix`` run beside each other.
        models: what to serve: whole models, or adapters on the first whole one.
        versions: where new adapters come from while the endpoint runs; None: it keeps those of ``models``.

    Raises:
        UserError: a folder is no model, the port is in use, the application already runs on this cluster, a
            model fails to start, or ``serve.start_timeout_s`` passed.
    """
    started = time.monotonic()
    app_name, route_prefix = config.serve.app_name, config.serve.route_prefix
    for path in models.values():
        check_model(path)
    cluster.start(config.ray)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    key_hashes = read_key_hashes(config.serve)
    own_key = secrets.token_urlsafe() if key_hashes else None
    if own_key is not None:
        key_hashes |= {hash_key(own_key)}
    ran_before = _runs_already()
    if ran_before and app_name in serve.status().applications:
        raise UserError(
            f"the application {app_name!r} is already served on this cluster. Use that one, or stop it first "
            "(Ctrl-C where it was started, or `serve shutdown`)."
        )
    host, port = config.serve.host, _port(config.serve, ran_before)
    is_direct = config.serve.http == "direct"
    app = build_app(
        config,
        models,
        has_gpu=cluster.has_gpu(),
        key_hashes=key_hashes,
        versions=versions,
        listen=(host, port) if is_direct else None,
    )
    _warn_if_too_small(config, models)
    if not ran_before:
        _start_serve(config.serve, port)
    reachable = "127.0.0.1" if host in _ALL_ADDRESSES else _in_url(host)
    # The ingress's own server has no other applications beside it.
    prefix = "" if is_direct else route_prefix.rstrip("/")
    endpoint = Endpoint(
        base_url=f"http://{reachable}:{port}{prefix}/v1",
        models=tuple(models),
        api_key=own_key,
        _app_name=app_name,
        _drain_timeout_s=config.serve.drain_timeout_s,
        _stops_serve=not ran_before,
    )
    try:
        serve.run_many(
            [serve.RunTarget(app, name=app_name, route_prefix=None if is_direct else route_prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        wait_until_running(app_name, config.serve.start_timeout_s, started)
        for name in models:
            deadline = started + config.serve.start_timeout_s
            wait_for_answer(endpoint.base_url, name, deadline, own_key)
    except BaseException:
        endpoint.take_down()
        raise
    endpoint.seconds = round(time.monotonic() - started, 1)
    log.info(
        "endpoint %s answers for %s after %.0f s", endpoint.base_url, ", ".join(models), endpoint.seconds
    )
    return endpoint


def drain(app_name: str, timeout_s: float) -> None:
    """Has every ingress refuse new requests, and waits until none is in flight."""
    try:
        ingress = serve.get_app_handle(app_name)
        left = sum(ingress.broadcast("drain").results(timeout_s=timeout_s + _DRAIN_MARGIN_S))
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("the endpoint was not drained (%s)", type(error).__name__)
        return
    if left:
        log.warning("%d requests were not answered within serve.drain_timeout_s=%g", left, timeout_s)


def _warn_if_too_small(config: Config, models: Models) -> None:
    """Warns if the engines need more than the cluster has; a cluster that scales may still get it."""
    groups = engine_groups(models)
    engine = engine_settings(config.model.engine, has_gpu=cluster.has_gpu())
    count = len(groups) * max(1, config.serve.min_replicas)
    resources = ray.cluster_resources()
    for kind, needed in (("CPU", count * engine.num_cpus), ("GPU", count * engine.num_gpus)):
        if needed > resources.get(kind, 0):
            log.warning(
                "%d engines (%s) need %g %ss, the cluster has %g: they wait until it grows. Whole models do "
                "not share an engine; serve.models serves some of them",
                count,
                ", ".join(next(iter(group)) for group in groups),
                needed,
                kind,
                resources.get(kind, 0),
            )


def _port(settings: ServeConfig, ran_before: bool) -> int:
    """The endpoint's port.

    Raises:
        UserError: it is taken, the proxies that run have another one, or other machines could ask without a
            key.
    """
    if settings.http == "proxy" and ran_before:
        return _port_of_proxies(settings)
    port = _free_port(settings.host, settings.port)
    is_open = settings.host in _ALL_ADDRESSES or not is_loopback(f"//{_in_url(settings.host)}")
    if is_open and not read_key_hashes(settings):
        raise UserError(
            f"serve.host={settings.host} lets other machines use the models, but there are no API keys. Put "
            f"keys into a file and name it in serve.api_keys_file (or set {KEYS_VARIABLE}), or set "
            "serve.host=127.0.0.1."
        )
    return port


def _start_serve(settings: ServeConfig, port: int) -> None:
    options: dict[str, Any] = {"proxy_location": "Disabled"}
    if settings.http == "proxy":
        options = {
            "proxy_location": "HeadOnly",
            "http_options": {
                "host": settings.host,
                "port": port,
                # The application answers before, with an error that says why.
                "request_timeout_s": settings.request_timeout_s + settings.body_timeout_s + 30,
            },
            "controller_options": {"runtime_env": {"env_vars": _SERVE_ENVIRONMENT}},
        }
    serve.start(logging_config={"enable_access_log": False}, **options)


def _runs_already() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _port_of_proxies(settings: ServeConfig) -> int:
    """Port of the proxies that run on this cluster."""
    if not serve.status().proxies:
        raise UserError("Ray Serve runs on this cluster without proxies. Set serve.http=direct.")
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    port: int = client.http_config.port
    if settings.port not in (0, port):
        raise UserError(
            f"the proxies of Ray Serve already listen on port {port} of this cluster, not on "
            f"serve.port={settings.port}. Set serve.port={port}, or serve.http=direct for a port of its own."
        )
    return port


def _free_port(host: str, port: int) -> int:
    """The port, after a test that it is free; any free one for 0.

    Raises:
        UserError: another program uses it, or it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} on {host} is in use by another program. Set serve.port to another one (0: "
                    "any free)."
                ) from error
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}). Set serve.host to an address of this "
                "machine and serve.port above 1023."
            ) from error
        return int(probe.getsockname()[1])


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
