"""Waiting until an application runs and every model answers, with the reason if one does not."""

from __future__ import annotations

import re
import time
from typing import Any

import ray
from ray import serve

from mmedpo_ray.compat import cluster
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError

_POLL_S = 0.25
_ANSWER_TIMEOUT_S = 60.0
_UP = ("HEALTHY", "RUNNING")
# Answers after which the same question would not be answered either.
_REFUSALS = (400, 401, 403, 404, 422)


def wait_until_running(app_name: str, timeout_s: float, started: float) -> None:
    """Polls Serve until the application runs; the first failed start of a model ends the waiting.

    Raises:
        UserError: a model failed to start, or ``timeout_s`` passed since ``started``.
    """
    with console.status("starting the endpoint: waiting for the engines") as status:
        while True:
            app = serve.status().applications.get(app_name)
            if app is not None and app.status == "RUNNING":
                return
            deployments: dict[str, Any] = app.deployments if app is not None else {}
            waiting = [
                f"{name.rpartition(':')[2]} ({getattr(item.status, 'value', item.status)})"
                for name, item in deployments.items()
                if item.status not in _UP
            ]
            elapsed = time.monotonic() - started
            status.update(
                f"starting the endpoint: {len(deployments) - len(waiting)} of {len(deployments)} deployments "
                f"are up, {elapsed:.0f} s"
            )
            if problem := app is not None and _failure(app):
                raise UserError(
                    f"the endpoint failed to start: {problem}. The full log is in {_log_folder()}; check the "
                    "model's files and model.engine."
                )
            if elapsed > timeout_s:
                for_whom = f" (waiting for {', '.join(waiting)})" if waiting else ""
                raise UserError(
                    f"the endpoint was not up after serve.start_timeout_s={timeout_s:.0f} s{for_whom}. See "
                    f"the logs in {_log_folder()}; a cluster short of CPUs or GPUs never starts (`ray "
                    "status`), and a large model needs a larger limit."
                )
            time.sleep(_POLL_S)


def wait_for_answer(base_url: str, model: str, deadline: float, api_key: str | None = None) -> None:
    """Asks a model for one token until it answers, which also warms it up.

    Raises:
        UserError: it refuses, or does not answer before ``deadline`` (:func:`time.monotonic`).
    """
    import openai

    # The server is on this machine, where the environment's proxies would not find it.
    direct = openai.DefaultHttpxClient(trust_env=False)
    last = "no answer"
    with openai.OpenAI(
        base_url=base_url,
        api_key=api_key or "none",
        timeout=_ANSWER_TIMEOUT_S,
        max_retries=0,
        http_client=direct,
    ) as client:
        while time.monotonic() < deadline:
            try:
                client.chat.completions.create(
                    model=model, max_tokens=1, messages=[{"role": "user", "content": "Hello"}]
                )
                return
            except openai.APIStatusError as error:
                last = f"HTTP {error.status_code}"
                if error.status_code in _REFUSALS:
                    raise UserError(
                        f"the model {model!r} is up but refuses a plain question (HTTP {error.status_code}: "
                        f"{error.response.text[:300]}). Check its chat template."
                    ) from error
            except openai.OpenAIError as error:
                last = repr(error)
            time.sleep(_POLL_S)
    raise UserError(f"the model {model!r} does not answer ({last}). See the logs in {_log_folder()}.")


def _failure(app: Any) -> str | None:
    for name, deployment in app.deployments.items():
        if "failed to start" in deployment.message or deployment.status == "DEPLOY_FAILED":
            return f"{name.rpartition(':')[2]}: {_last_error(deployment.message)}"
    return _last_error(app.message) if app.status == "DEPLOY_FAILED" else None


def _last_error(message: str) -> str:
    """The last line of a remote traceback that names an error, else its last line."""
    lines = [line.strip() for line in message.strip().splitlines()] or ["no reason given"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines)[-1][:500]


def _log_folder() -> str:
    return f"{cluster.ray_folder()}/{ray.get_runtime_context().get_session_name()}/logs/serve"
