"""The OpenAI-compatible endpoint: Ray Serve in front of vLLM engines.

    endpoint = start_endpoint(config, {"base": "models/base", "aligned": "run/model/adapter"})
    ...  # POST {endpoint.base_url}/chat/completions
    endpoint.stop()

A model is a folder. A folder with an ``adapter_config.json`` is a LoRA adapter: it shares the engine of the base
model instead of starting its own, which saves memory on a GPU and most of the start-up time on a small machine.
Any other folder is a whole model with an engine of its own.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import logging
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve as ray_serve

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_processor, read_model_config, template_with_bos
from mmedpo_ray.models.vllm_engine import EngineSettings, engine_settings
from mmedpo_ray.serve.settings import ServeConfig
from mmedpo_ray.tables.run_folder import ADAPTER, RunFolder

if TYPE_CHECKING:
    from ray.serve.deployment import Application

log = logging.getLogger(__name__)

APP_NAME = "mmedpo"
_ADAPTER_CONFIG = "adapter_config.json"
# Ranks for which vLLM has LoRA kernels (vllm.config.lora.MaxLoRARanks).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# While engines import on few cores, the proxy may need longer than Ray's 5 s to answer; it would be killed.
_CONTROLLER_ENVIRONMENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
_POLL_S = 0.25
_GREETING_TIMEOUT_S = 60.0


@dataclass
class Endpoint:
    """A running endpoint.

    Attributes:
        base_url: for OpenAI clients, ending in ``/v1``.
        models: names that requests may use.
        seconds: from the start until every model had answered.
    """

    base_url: str
    models: tuple[str, ...]
    seconds: float = 0.0
    _app_name: str = field(default=APP_NAME, repr=False)
    _stops_serve: bool = field(default=True, repr=False)

    def stop(self) -> None:
        """Takes the models down; Serve itself too, unless it was running before."""
        if not ray.is_initialized():
            return
        if self._stops_serve:
            ray_serve.shutdown()
        else:
            ray_serve.delete(self._app_name)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


# ---------------------------------------------------------------------- the application


def build_app(config: Config, models: dict[str, str | Path], *, has_gpu: bool) -> Application:
    """The Serve application: one deployment a whole model, its adapters with it, behind one OpenAI ingress.

    Args:
        config: all settings (``model.engine``, ``serve``).
        models: served name → folder (or hub name). The first whole model is the base of every adapter.
        has_gpu: whether the cluster has a GPU.

    Raises:
        UserError: a folder is no model, or adapters come without a base.
    """
    from mmedpo_ray.serve.app import EngineServer, build_ingress

    engines, names_of = {}, {}
    for group in engine_groups(models):
        (name, path), *others = group.items()
        settings = engine_settings(config.model.engine, has_gpu=has_gpu, model=path)
        own = dict(others)
        llm_config = _llm_config(name, path, settings, own)
        options = _deployment_options(config.serve, settings)
        engines[name] = ray_serve.deployment(name=f"engine:{name}", **options)(EngineServer).bind(
            llm_config, own
        )
        names_of[name] = [name, *own]
    return build_ingress(engines, names_of)


def engine_groups(models: dict[str, str | Path]) -> list[dict[str, str]]:
    """The models that share an engine, one group an engine: a whole model, the first one with all adapters.

    Raises:
        UserError: there is no whole model.
    """
    wholes = {name: str(path) for name, path in models.items() if not is_adapter(path)}
    adapters = {name: str(path) for name, path in models.items() if is_adapter(path)}
    if not wholes:
        raise UserError(
            f"cannot serve {', '.join(models) or 'nothing'}: adapters need the base model beside them."
        )
    first, *others = ({name: path} for name, path in wholes.items())
    return [first | adapters, *others]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a whole model."""
    return (Path(path).expanduser() / _ADAPTER_CONFIG).is_file()


def _llm_config(name: str, path: str, settings: EngineSettings, adapters: dict[str, str]) -> dict[str, Any]:
    """Arguments of ``ray.serve.llm.LLMConfig``, plain data so that only the replica imports vLLM."""
    arguments = dict(settings.engine_kwargs)
    if (template := _chat_template(path)) is not None:
        arguments["chat_template"] = template
    if adapters:
        arguments |= {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_lora_rank": _served_rank(adapters),
        }
    result: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": path},
        "engine_kwargs": arguments,
        "placement_group_config": {"bundles": settings.bundles},
        "runtime_env": {"env_vars": settings.env},
        "log_engine_metrics": False,
    }
    if settings.device == "cpu":
        result["accelerator_config"] = {"kind": "cpu"}
    return result


def _chat_template(path: str) -> str | None:
    """What a LLaVA's prompts are written with where its own template leaves out the beginning token."""
    settings = read_model_config(path) or {}
    return template_with_bos(load_processor(path)) if settings.get("model_type") == "llava" else None


def _deployment_options(serve: ServeConfig, settings: EngineSettings) -> dict[str, Any]:
    return {
        "autoscaling_config": {
            "min_replicas": serve.min_replicas,
            "initial_replicas": max(1, serve.min_replicas),
            "max_replicas": serve.max_replicas,
            # Ray's default for models, 1e9, never scales.
            "target_ongoing_requests": serve.target_ongoing_requests,
        },
        "max_ongoing_requests": serve.max_ongoing_requests,
        # The replica's event loop stands still while it imports and loads; a short limit would kill it then.
        "health_check_timeout_s": 120,
        "graceful_shutdown_timeout_s": 5,
        # The engine's bundle has the resources; the replica itself only passes requests on.
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": settings.env}},
        "placement_group_bundles": [dict(bundle) for bundle in settings.bundles],
        "placement_group_strategy": "PACK",
    }


def _served_rank(adapters: dict[str, str]) -> int:
    """The smallest rank that vLLM has kernels for and that fits every adapter."""
    largest = max(_adapter_rank(path) for path in adapters.values())
    fitting = [rank for rank in _LORA_RANKS if rank >= largest]
    if not fitting:
        raise UserError(
            f"the adapter has rank {largest}; vLLM serves ranks up to {_LORA_RANKS[-1]}. Serve model/merged instead."
        )
    return fitting[0]


def _adapter_rank(path: str) -> int:
    file = Path(path) / _ADAPTER_CONFIG
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["r"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no LoRA adapter's configuration ({error!r}). Export the adapter again."
        ) from error


# ---------------------------------------------------------------------- starting and stopping


def start_endpoint(
    config: Config, models: dict[str, str | Path], *, app_name: str = APP_NAME, route_prefix: str = "/"
) -> Endpoint:
    """Deploys the models and waits until each of them answers a question.

    Args:
        config: all settings; ``serve.port: 0`` takes a free port.
        models: served name → folder of a whole model or of an adapter on the first whole one.
        app_name: name of the Serve application; several may run beside each other under different prefixes.
        route_prefix: path before ``/v1``.

    Raises:
        UserError: a folder is no model, the port is in use, the application already runs on this cluster, a model
            fails to start, or ``serve.start_timeout_s`` passed.
    """
    started = time.monotonic()
    for path in models.values():
        _check_model(path)
    cluster.start(config.ray)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    app = build_app(config, models, has_gpu=cluster.has_gpu())
    _warn_of_waiting(config, models)
    host, port, running_before = _open_http(config.serve)
    reachable = "127.0.0.1" if _is_any(host) else host
    endpoint = Endpoint(
        base_url=f"http://{_bracketed(reachable)}:{port}{route_prefix.rstrip('/')}/v1",
        models=tuple(models),
        _app_name=app_name,
        _stops_serve=not running_before,
    )
    if running_before and app_name in ray_serve.status().applications:
        raise UserError(
            f"the application {app_name!r} is already served at {endpoint.base_url} on this cluster. Use that one, or stop "
            "it first (Ctrl-C where it was started, or `serve shutdown`)."
        )
    try:
        ray_serve.run_many(
            [ray_serve.RunTarget(app, name=app_name, route_prefix=route_prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_running(app_name, config.serve.start_timeout_s, started)
        for name in models:
            _greet(endpoint.base_url, name, deadline=started + config.serve.start_timeout_s)
    except BaseException:
        endpoint.stop()
        raise
    endpoint.seconds = round(time.monotonic() - started, 1)
    log.info(
        "endpoint %s answers for %s after %.0f s", endpoint.base_url, ", ".join(models), endpoint.seconds
    )
    return endpoint


def _warn_of_waiting(config: Config, models: dict[str, str | Path]) -> None:
    """Says so where the engines want more than the cluster has; one that scales may still get it."""
    groups = engine_groups(models)
    bundles = engine_settings(config.model.engine, has_gpu=cluster.has_gpu()).bundles
    replicas = max(1, config.serve.min_replicas)
    resources = ray.cluster_resources()
    for kind in bundles[0]:
        wanted = len(groups) * replicas * sum(bundle[kind] for bundle in bundles)
        if wanted > resources.get(kind, 0):
            log.warning(
                "%d engines (%s) want %g %ss, the cluster has %g: they wait until it grows. Whole models do not share an "
                "engine; serve.models serves some of them",
                len(groups) * replicas,
                ", ".join(next(iter(group)) for group in groups),
                wanted,
                kind,
                resources.get(kind, 0),
            )


def _check_model(path: str | Path) -> None:
    folder = Path(path).expanduser()
    if is_adapter(folder):
        _adapter_rank(str(folder))
    else:
        read_model_config(path)


def _open_http(settings: ServeConfig) -> tuple[str, int, bool]:
    """Starts Serve's proxy, or checks the one that runs. Returns host, port and whether Serve ran before."""
    running = _running_http()
    if running is not None:
        host, port = running
        if settings.port not in (0, port):
            raise UserError(
                f"Ray Serve already runs on this cluster at port {port}, not serve.port={settings.port}, and has only "
                f"one. Set serve.port={port}, or stop the running one with `serve shutdown`."
            )
        return host, port, True
    port = settings.port or _free_port(settings.host)
    _check_port(settings.host, port)
    if not _is_loopback(settings.host):
        log.warning(
            "the endpoint listens on %s without authentication: everybody who reaches this machine can use the models. "
            "Put a gateway in front, or set serve.host=127.0.0.1",
            settings.host,
        )
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.host, "port": port, "request_timeout_s": 600},
        logging_config={"enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": _CONTROLLER_ENVIRONMENT}},
    )
    return settings.host, port, False


def _running_http() -> tuple[str, int] | None:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    options = client.http_config
    return options.host or "127.0.0.1", options.port


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} on {host} is in use by another program. Set serve.port to another one (0: any free)."
                ) from error
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}). Set serve.host to an address of this machine and "
                "serve.port above 1023."
            ) from error


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::", "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wait_until_running(app_name: str, timeout_s: float, started: float) -> None:
    """Polls Serve until the application runs; the first failed start of a model ends the waiting."""
    with console.status("starting the endpoint: waiting for the engines") as status:
        while True:
            app = ray_serve.status().applications.get(app_name)
            elapsed = time.monotonic() - started
            if app is not None:
                if app.status == "RUNNING":
                    return
                ready = sum(item.status in ("HEALTHY", "RUNNING") for item in app.deployments.values())
                status.update(
                    f"starting the endpoint: {ready} of {len(app.deployments)} deployments are up, {elapsed:.0f} s"
                )
                problem = _failure(app)
                if problem:
                    raise UserError(
                        f"the endpoint failed to start: {problem}. The full log is in {_log_folder()}; check the model's "
                        "files and model.engine."
                    )
            if elapsed > timeout_s:
                raise UserError(
                    f"the endpoint was not up after serve.start_timeout_s={timeout_s:.0f} s{_waiting_for(app)}. See the "
                    f"logs in {_log_folder()}; a cluster short of CPUs or GPUs never starts (`ray status`), and a large "
                    "model needs a larger limit."
                )
            time.sleep(_POLL_S)


def _failure(app: Any) -> str | None:
    for name, deployment in app.deployments.items():
        if "failed to start" in deployment.message or deployment.status == "DEPLOY_FAILED":
            return f"{name.rpartition(':')[2]}: {_last_error(deployment.message)}"
    if app.status == "DEPLOY_FAILED":
        return _last_error(app.message)
    return None


def _last_error(message: str) -> str:
    """The most telling line of a remote traceback."""
    lines = [line.strip() for line in message.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return (
        lines[-1] if lines else message.strip().splitlines()[-1] if message.strip() else "no reason given"
    )[:500]


def _waiting_for(app: Any) -> str:
    if app is None:
        return ""
    waiting = [
        f"{name.rpartition(':')[2]} ({item.status.value if hasattr(item.status, 'value') else item.status})"
        for name, item in app.deployments.items()
        if item.status not in ("HEALTHY", "RUNNING")
    ]
    return f" (waiting for {', '.join(waiting)})" if waiting else ""


def _log_folder() -> str:
    node = ray._private.worker._global_node
    return str(Path(node.get_logs_dir_path()) / "serve") if node else "/tmp/ray/session_latest/logs/serve"


def _greet(base_url: str, model: str, deadline: float) -> None:
    """Asks a model for one token, which also warms it up."""
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    last = "no answer"
    # The server is on this machine, where the environment's proxies would not find it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        request = urllib.request.Request(
            f"{base_url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with direct.open(request, timeout=_GREETING_TIMEOUT_S) as response:
                json.load(response)["choices"]
            return
        except urllib.error.HTTPError as error:
            last = f"HTTP {error.code}"
            if error.code in (400, 401, 403, 404, 422):
                raise UserError(
                    f"the model {model!r} is up but refuses a plain question (HTTP {error.code}: "
                    f"{error.read(300).decode(errors='replace')}). Check its chat template."
                ) from error
        except (OSError, KeyError, ValueError) as error:
            last = repr(error)
        time.sleep(_POLL_S)
    raise UserError(f"the model {model!r} does not answer ({last}). See the logs in {_log_folder()}.")


# ---------------------------------------------------------------------- the models of a run


def run_models(config: Config) -> dict[str, str | Path]:
    """The models of a run that exist: base, aligned and control, by served name.

    A trained one is an adapter on the base's engine where that is all that was trained, else the merged model with an engine
    of its own.

    Raises:
        UserError: ``model.path`` is no model.
    """
    from mmedpo_ray.models.loading import resolve_model

    run = RunFolder(config.run.folder)
    models: dict[str, str | Path] = {config.model.name: resolve_model(config.model.path)}
    aligned = _exported(run.model("aligned"))
    if aligned is not None:
        models[config.evaluate.aligned_name] = aligned
    control = _exported(run.model("control"))
    if config.control.enabled and control is not None:
        models[config.control.name] = control
    return models


def _exported(folder: Path) -> Path | None:
    if is_adapter(folder / ADAPTER):
        return folder / ADAPTER
    merged = folder / "merged"
    return merged if (merged / "config.json").is_file() else None


def served_models(config: Config) -> dict[str, str | Path]:
    """Those of :func:`run_models` that ``serve.models`` names, with the base model where they are adapters on it.

    Raises:
        UserError: it names one that the run does not have.
    """
    models = run_models(config)
    wanted = config.serve.models
    if wanted is None:
        return models
    if missing := [name for name in wanted if name not in models]:
        raise UserError(
            f"serve.models names {missing[0]!r}; {config.run.folder} has {', '.join(models)}. Name one of these, or run "
            "`mmedpo export` first."
        )
    base = config.model.name
    return {
        name: path
        for name, path in models.items()
        if name in wanted or (name == base and any(is_adapter(models[other]) for other in wanted))
    }


def serve(config: Config) -> None:
    """Serves the models of a run until interrupted (``mmedpo serve``).

    Raises:
        UserError: see :func:`start_endpoint`.
        KeyboardInterrupt: after the endpoint was stopped.
    """
    try:
        models = served_models(config)
        if list(models) == [config.model.name] and config.serve.models is None:
            log.warning("%s holds no exported model: only %s is served", config.run.folder, config.model.name)
        with start_endpoint(config, models) as endpoint:
            console.print(_help(endpoint), markup=False, soft_wrap=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        console.print("the endpoint is stopped")
        raise


def _help(endpoint: Endpoint) -> str:
    model = endpoint.models[min(1, len(endpoint.models) - 1)]  # the aligned one, if there is one
    return (
        f"{endpoint.base_url} answers for {', '.join(endpoint.models)} (OpenAI API). For example:\n"
        f"  curl {endpoint.base_url}/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": [\n'
        '         {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},\n'
        '         {"type": "text", "text": "Is there a pleural effusion?"}]}]}\'\n'
        "Stop it with Ctrl-C."
    )
