"""`mmedpo serve`: the models of a run behind one endpoint, until interrupted."""

from __future__ import annotations

import logging
import os
import threading

import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.serve.endpoint import Endpoint, start_endpoint
from mmedpo_ray.serve.models import served_models
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder

log = logging.getLogger(__name__)


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
        versions = VersionFolder(RunFolder(config.run.folder).versions())
        with start_endpoint(config, models, versions=versions) as endpoint:
            console.print(_help(endpoint), markup=False, soft_wrap=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        console.print("the endpoint is stopped")
        raise


def _help(endpoint: Endpoint) -> str:
    model = endpoint.models[min(1, len(endpoint.models) - 1)]  # the aligned one, if there is one
    has_keys = endpoint.api_key is not None
    who = (
        "whoever has an API key" if has_keys else "this machine only (serve.api_keys_file opens it to others)"
    )
    address = ray.get_runtime_context().gcs_address
    # A cluster that Ray starts here asks for a token, and other processes send theirs only if told to.
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    key = "-H 'Authorization: Bearer KEY' " if has_keys else ""
    return (
        f"{endpoint.base_url} serves {', '.join(endpoint.models)} to {who} (OpenAI API). For example:\n"
        f"  curl {endpoint.base_url}/chat/completions {key}-H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": [\n'
        '         {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},\n'
        '         {"type": "text", "text": "Is there a pleural effusion?"}]}]}\'\n'
        f"Roll another adapter in: {mode}mmedpo rollout run.folder=… ray.address={address}\n"
        f"Compare the models in a browser: {endpoint.base_url.removesuffix('/v1')}/\n"
        "Stop it with Ctrl-C."
    )
