"""`mmedpo submit`: a command as a job of a Ray cluster, followed until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmedpo_ray.commands.options import settings_of
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.stages.registry import stages

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_CONFIG = "config.yaml"
_STAGE = "mmedpo_stage"
_INTERRUPTED = 130
_POLL_S = 1.0
# Training saves a checkpoint before it ends; Ray alone would wait three seconds.
_STOP_WAIT_S = "600"


def submit(arguments: Namespace) -> int:
    """Submits ``mmedpo STAGE`` with the given settings and shows its output; the exit status is the job's.

    A job of the same run that is still there is followed instead of submitting a second one. Ctrl-C stops the
    job, and a second Ctrl-C stops only the following.

    Args:
        arguments: ``stage``, ``address``, ``runtime_env``, ``no_follow``, and the settings.

    Raises:
        UserError: the stage or a setting is wrong, or no job server answers.
    """
    from ray.job_submission import JobSubmissionClient

    if "=" in arguments.stage:
        arguments.overrides.insert(0, arguments.stage)
        arguments.stage = "run"
    if arguments.stage not in (known := ["run", *stages()]):
        raise UserError(f"there is no stage {arguments.stage!r}; there are {', '.join(known)}")
    folder = settings_of(arguments).run.folder
    if arguments.address is not None:
        # They would win over an address that is given.
        for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(variable, None)
    try:
        client = JobSubmissionClient(arguments.address)
        job, is_new = _find_or_submit(client, arguments, folder)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the job server does not take the job: {first_line(error)[:300]} Set --address (or "
            "RAY_API_SERVER_ADDRESS) to the dashboard, such as http://HEAD:8265; with token authentication "
            "also RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        ) from error
    console.print(f"{job}: {'submitted' if is_new else 'is there already; following it'}", soft_wrap=True)
    return 0 if arguments.no_follow else _Follower(client, job).run()


def job_name(folder: str) -> str:
    """What the jobs of a run are called, before their attempt."""
    return "mmedpo-" + (re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-").lower()[-80:] or "run")


def _find_or_submit(client: JobSubmissionClient, arguments: Namespace, folder: str) -> tuple[str, bool]:
    name = job_name(folder)
    attempts = {}
    for job in client.list_jobs():
        if found := re.fullmatch(rf"{name}-(\d+)", job.submission_id or ""):
            attempts[int(found[1])] = job
    last = max(attempts, default=0)
    if last and not attempts[last].status.is_terminal():
        running = (attempts[last].metadata or {}).get(_STAGE)
        if running != arguments.stage:
            raise UserError(
                f"{name}-{last} ({running}) works on this run. Wait for it, follow it with `mmedpo submit "
                f"{running}`, or stop it with `ray job stop {name}-{last}`."
            )
        return f"{name}-{last}", False
    command = [*["python", "-m", "mmedpo_ray.cli"], arguments.stage]
    with tempfile.TemporaryDirectory() as upload:
        environment = _runtime_env(arguments.runtime_env)
        if arguments.config is not None:
            shutil.copy(arguments.config, Path(upload, _CONFIG))
            environment.setdefault("working_dir", upload)
            command += ["--config", _CONFIG]
        job_id = client.submit_job(
            entrypoint=shlex.join([*command, *arguments.overrides]),
            submission_id=f"{name}-{last + 1}",
            runtime_env=environment,
            metadata={_STAGE: arguments.stage},
        )
    return job_id, True


def _runtime_env(file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as a runtime environment: {first_line(error)}") from error
        # Only the settings' file is uploaded, not a folder from which something would be left out.
        found.pop("excludes", None)
    found["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_WAIT_S} | found.get("env_vars", {})
    return found


class _Follower:
    """Shows a job's output until the job ends."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client = client
        self._job = job
        self._shown = 0

    def run(self) -> int:
        """Returns the exit status."""
        try:
            asyncio.run(self._follow())
        except KeyboardInterrupt:
            console.print(f"{self._job}: is told to stop; it saves first (Ctrl-C again: leave it alone)")
            self._client.stop_job(self._job)
            asyncio.run(self._follow())
        job = self._client.get_job_info(self._job)
        status = job.status.value
        console.print(f"{self._job}: {status.lower()}", soft_wrap=True)
        if status == "SUCCEEDED":
            return 0
        console.print("The same command again goes on where it stopped.")
        return _INTERRUPTED if status == "STOPPED" else 1

    async def _follow(self) -> None:
        while True:
            # A connection that breaks is made again; the log then comes from its beginning.
            with contextlib.suppress(RuntimeError):
                await self._show()
            if self._client.get_job_status(self._job).is_terminal():
                return
            await asyncio.sleep(_POLL_S)

    async def _show(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._job):
            new = text[max(0, self._shown - seen) :]
            seen += len(text)
            self._shown = max(self._shown, seen)
            sys.stdout.write(new)
            sys.stdout.flush()
