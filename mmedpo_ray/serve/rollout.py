"""`mmedpo rollout`: another adapter answers under a name of the running endpoint, without a gap.

The adapter is copied under a version of its own (:mod:`.versions`), loaded into every replica beside the one
that answers, and asked a question there. Then the name is switched; requests in flight end with the old one.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.serve.engine_watch import deployment_name
from mmedpo_ray.serve.ingress import Served
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import ADAPTER, RunFolder

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 10.0
_SWITCH_TIMEOUT_S = 30.0
_POLL_S = 0.2


def rollout_command(config: Config, *, name: str | None = None, back: bool = False) -> None:
    """Joins the cluster of the endpoint, rolls out, and prints what answers.

    Args:
        config: ``run.folder`` is the run whose adapter is to answer, ``ray.address`` the endpoint's cluster.
        name: under which it is to answer; None: ``evaluate.aligned_name``.
        back: let the version answer that did before.

    Raises:
        UserError: see :func:`rollout`.
    """
    ray_settings = config.ray.model_copy(update={"address": cluster.address_of(config.ray) or "auto"})
    cluster.start(ray_settings)
    version = rollout(config, name or config.evaluate.aligned_name, back=back)
    console.print(
        f"{version} answers. `mmedpo rollout --back` lets the one before answer again.", soft_wrap=True
    )


def rollout(config: Config, name: str, *, back: bool = False) -> str:
    """Rolls out the adapter of a run, or the previous version.

    Args:
        config: ``run.folder`` is the run whose adapter is to answer, ``serve.route_prefix`` that of the
            endpoint.
        name: under which it is to answer; one that the endpoint serves.
        back: let the version answer that did before.

    Returns:
        The version that answers.

    Raises:
        UserError: there is no endpoint, no adapter, no such name or no previous version; or a replica refuses
            the adapter, and the old version goes on answering.
    """
    app_name = config.serve.app_name
    ingress = _ingress(app_name)
    served = _call(ingress.served.remote())
    folder, engine = _engine_of(served, name)
    version = (
        _previous(folder, name) if back else folder.add(name, RunFolder(config.run.folder).model() / ADAPTER)
    )
    handle = serve.get_deployment_handle(deployment_name(engine), app_name)
    try:
        folder.check_shapes(version, folder.read()[name].current)
        with console.status(f"{version}: waiting for its first answer"):
            _prepare(handle, version, config.serve.start_timeout_s)
        folder.switch(name, version)
    finally:
        folder.prune(name)
    with console.status(f"{version}: waiting for the switch"):
        _wait_for_switch(ingress, name, version)
    return version


def _ingress(app_name: str) -> DeploymentHandle:
    try:
        return serve.get_app_handle(app_name)
    except RayServeException as error:
        raise UserError(
            f"no endpoint ({app_name!r}) runs on this cluster. Set ray.address to the one that `mmedpo "
            "serve` prints, or start it."
        ) from error


def _engine_of(served: Served, name: str) -> tuple[VersionFolder, str]:
    adapters = [each for each, engine in served.engine_of.items() if engine != each]
    if served.versions is None or name not in adapters:
        raise UserError(
            f"the endpoint serves no adapter under {name!r} (adapters: {', '.join(adapters) or 'none'}). "
            "Name one with --name; whole models are replaced by another endpoint beside this one."
        )
    return served.versions, served.engine_of[name]


def _previous(folder: VersionFolder, name: str) -> str:
    previous = folder.read()[name].previous
    if previous is None:
        raise UserError(f"no other version has answered under {name!r} yet.")
    return previous


def _prepare(handle: DeploymentHandle, version: str, timeout_s: float) -> None:
    """Has a version answer on every replica; an engine without one is started."""
    # Waits for a replica, and for the handle to know all.
    problem = _call(handle.prepare.remote(version), timeout_s)
    if problem is None:
        try:
            answers = handle.broadcast("prepare", version).results(timeout_s=timeout_s)
        except (RayError, RayServeException, TimeoutError) as error:
            raise UserError(
                f"a replica went away while {version} was loaded ({type(error).__name__}). Nothing was "
                "switched; try again."
            ) from error
        problem = next((answer for answer in answers if answer is not None), None)
    if problem is not None:
        raise UserError(f"the engine refuses the adapter: {problem} Nothing was switched.")


def _wait_for_switch(ingress: DeploymentHandle, name: str, version: str) -> None:
    deadline = time.monotonic() + _SWITCH_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            found = ingress.broadcast("served").results(timeout_s=_ANSWER_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError):
            found = []
        if found and all(served.version_of[name] == version for served in found):
            return
        time.sleep(_POLL_S)
    log.warning("an ingress replica has not switched to %s yet; does its node see the same files?", version)


def _call(response: Any, timeout_s: float = _ANSWER_TIMEOUT_S) -> Any:
    try:
        return response.result(timeout_s=timeout_s)
    except (RayError, RayServeException, TimeoutError) as error:
        raise UserError(
            f"the endpoint does not answer ({type(error).__name__}). `serve status` says why; nothing was "
            "switched."
        ) from error
