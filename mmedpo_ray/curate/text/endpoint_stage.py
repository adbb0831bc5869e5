"""A table that a model behind an endpoint writes, with one request per row of `samples`.

One Ray Data actor is enough, since it only waits for the network; the client has many requests in flight.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import ray

from mmedpo_ray.clients.actor import ROUNDS, actor_resources
from mmedpo_ray.clients.chat import TRANSIENT, ChatClient, ChatRequest, Completion, Failure, read_key
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.usage_log import UsageLog
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, digest, read_manifest


class Drop(NamedTuple):
    """Why an answer is of no use.

    Attributes:
        reason: drop reason.
        detail: what happened, without any question or answer.
    """

    reason: str
    detail: str = ""


class EndpointTask(ABC):
    """What is asked about a row, and how the answer becomes a row of the table. Picklable.

    Attributes:
        schema: of the table.
        wording: the fixed part of the prompt.

    Args:
        model: name of the model, for the table.
        seed: the seed of a request is drawn from it and the sample's id, as servers draw equal numbers for
            equal seeds.
    """

    schema: ClassVar[pa.Schema]
    wording: ClassVar[Sequence[Any]]

    def __init__(self, model: str, seed: int) -> None:
        self._model = model
        self._seed = seed

    @abstractmethod
    def prompt(self, row: dict[str, Any]) -> str:
        """The request about a row, as one user turn: some chat templates know no system role."""

    @abstractmethod
    def answer_schema(self, row: dict[str, Any]) -> dict[str, Any]:
        """JSON schema of the answer."""

    @abstractmethod
    def read(self, text: str, row: dict[str, Any]) -> dict[str, Any] | Drop:
        """The task's own columns, or why the answer is of no use."""

    def key(self) -> list[Any]:
        """What the answers depend on besides the model, its sampling and the rows."""
        return [digest(*self.wording), self._seed]

    def request(self, row: dict[str, Any]) -> ChatRequest:
        """The request about a row."""
        messages = [{"role": "user", "content": self.prompt(row)}]
        return ChatRequest(messages, self.answer_schema(row), stable_seed(self._seed, row["sample_id"]))

    def row(self, row: dict[str, Any], answer: Completion | Failure) -> dict[str, Any]:
        """The row of the table, with ``drop_reason`` if the answer is of no use."""
        sample_id = row["sample_id"]
        columns = {
            "sample_id": sample_id,
            "model": self._model,
            "prompt_sha256": hashlib.sha256(self.prompt(row).encode()).hexdigest(),
            "input_tokens": answer.input_tokens,
            "output_tokens": answer.output_tokens,
        }
        if isinstance(answer, Failure):
            found: dict[str, Any] | Drop = Drop(answer.reason, answer.detail)
        else:
            found = self.read(answer.text, row)
        if not isinstance(found, Drop):
            return columns | found
        detail = f"{sample_id}: {found.detail}" if found.detail else sample_id
        return columns | {DROP_REASON: found.reason, DROP_DETAIL: detail}


def ask_endpoint(
    name: str,
    folder: str,
    task: EndpointTask,
    rows: Callable[..., ray.data.Dataset | None],
    *,
    config: Config,
    settings: Sequence[Any],
    inputs: Sequence[str],
) -> Manifest:
    """Runs a stage that asks the endpoint of ``curate.text`` about each row.

    Args:
        name: of the stage.
        folder: of its table.
        task: what it asks.
        rows: gives the rows to ask about; gets the ids that are done as ``done``.
        config: all settings.
        settings: what decides which rows there are. The address is not part of the key: a local server
            changes its port without becoming another model.
        inputs: folders it reads.

    Raises:
        UserError: no key, a wrong key, address or model name, or an endpoint that does not answer.
    """
    endpoint = config.curate.text.endpoint
    key = read_key(endpoint)
    sampling = endpoint.model_dump(include={"model", "temperature", "max_tokens"})
    stage = StageRunner(name, folder, config, settings=[sampling, *task.key(), *settings], inputs=inputs)
    if (manifest := stage.finished()) is not None:
        return manifest
    log = UsageLog(storage.join(folder, ".usage", stage.key))
    before = read_manifest(folder)
    if before is not None and before.key == stage.key:
        # Only the rows that failed are asked again; the others stay paid for.
        log.carry_over(before.extra.get("endpoint", {}))

    # A block is asked about and written as one: it is what a crash can cost, and the step of the progress
    # bar.
    block_rows = min(config.ray.rows_per_part, ROUNDS * endpoint.concurrency)

    def asked(done: IdSet) -> ray.data.Dataset | None:
        found = rows(done=done)
        if found is None:
            return None
        return found.repartition(target_num_rows_per_block=block_rows, strict=True).map_batches(
            AskEndpoint,
            fn_constructor_args=(endpoint, key, task, log),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=1),
            **actor_resources(),
        )

    manifest = stage.write_rows(
        asked,
        schema=task.schema,
        id_column="sample_id",
        extra=lambda _: {"endpoint": log.total().figures(endpoint)},
        extra_columns=[],
        allow_empty=True,
        retry_reasons=(TRANSIENT,),
    )
    storage.remove(storage.join(folder, ".usage"))
    return manifest


class AskEndpoint:
    """Ray Data actor: rows → rows of the task's table, dropped rows among them.

    Args:
        endpoint: address, model, limits.
        key: the endpoint's key, read where the run was started.
        task: what to ask.
        log: where the counters go.
    """

    def __init__(self, endpoint: EndpointConfig, key: str | None, task: EndpointTask, log: UsageLog) -> None:
        self._client = ChatClient(endpoint, key)
        self._task = task
        self._log = log

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        try:
            answers = self._client.complete([self._task.request(row) for row in rows])
        finally:
            self._log.add(self._client.take_usage())
        made = (self._task.row(row, answer) for row, answer in zip(rows, answers, strict=True))
        return schemas.to_table(made, schemas.with_drop_columns(self._task.schema))
