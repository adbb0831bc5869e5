"""A table that a model behind an endpoint writes: one request a row, asked by one Ray Data actor.

The actor only waits for the network, so one is enough; how many requests are in flight is the client's matter. It runs on
the node of the driver where that has room: a local server is there, and often the only way out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmedpo_ray.clients.chat import (
    TRANSIENT,
    ChatClient,
    ChatRequest,
    Completion,
    Failure,
    read_key,
)
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.usage_log import UsageLog
from mmedpo_ray.config.tree import Config
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, read_manifest

# Requests handed to the client together, as a multiple of those in flight: the slowest of them is waited for once.
_ROUNDS = 8
_CPUS = 0.25


class Task(Protocol):
    """What is asked about a row, and what the answer makes of it. Picklable."""

    schema: pa.Schema

    def request(self, row: dict[str, Any]) -> ChatRequest:
        """The request about a row."""
        ...

    def row(self, row: dict[str, Any], answer: Completion | Failure) -> dict[str, Any]:
        """The row of the table; with ``drop_reason`` where the answer is of no use."""
        ...


@dataclass(frozen=True)
class Asking:
    """A stage that asks.

    Attributes:
        name: of the stage.
        folder: of its table.
        endpoint: whom it asks.
        task: what it asks.
        settings: what its answers depend on besides the model and its sampling. The address is not among it: a local
            server changes its port without becoming another model.
        inputs: folders it reads.
    """

    name: str
    folder: str
    endpoint: EndpointConfig
    task: Task
    settings: list[Any]
    inputs: list[str]

    def run(self, config: Config, build: Callable[[IdSet], ray.data.Dataset | None]) -> Manifest:
        """Asks about every row of the dataset that ``build`` makes, given the ids that are there.

        Raises:
            UserError: no key, a wrong key, address or model name, or an endpoint that does not answer.
        """
        key = read_key(self.endpoint)
        sampling = self.endpoint.model_dump(include={"model", "temperature", "max_tokens"})
        stage = StageRunner(
            self.name, self.folder, config, settings=[sampling, *self.settings], inputs=self.inputs
        )
        if (manifest := stage.finished()) is not None:
            return manifest
        log = UsageLog(storage.join(self.folder, ".usage", stage.key))
        before = read_manifest(self.folder)
        if before is not None and before.key == stage.key:
            # Only the rows that failed are asked again; the others stay paid for.
            log.carry_over(before.extra.get("endpoint", {}))

        # A block is asked about and written as one: it is what a crash can cost, and the step of the progress bar.
        rows = min(config.ray.rows_per_part, _ROUNDS * self.endpoint.concurrency)

        def asked(done: IdSet) -> ray.data.Dataset | None:
            found = build(done)
            if found is None:
                return None
            return found.repartition(target_num_rows_per_block=rows, strict=True).map_batches(
                AskEndpoint,
                fn_constructor_args=(self.endpoint, key, self.task, log),
                batch_format="pyarrow",
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=_CPUS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=True
                ),
            )

        manifest = stage.write_rows(
            asked,
            schema=self.task.schema,
            id_column="sample_id",
            extra=lambda _: {"endpoint": log.total().figures(self.endpoint)},
            extra_columns=[],
            allow_empty=True,
            retry_reasons=(TRANSIENT,),
        )
        storage.remove(storage.join(self.folder, ".usage"))
        return manifest


class AskEndpoint:
    """Ray Data actor: rows → rows of the task's table, dropped rows among them.

    Args:
        endpoint: address, model, limits.
        key: the key, read where the run was started.
        task: what to ask.
        log: where the counters go.
    """

    def __init__(self, endpoint: EndpointConfig, key: str | None, task: Task, log: UsageLog) -> None:
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


def provenance(model: str, prompt: str, answer: Completion | Failure) -> dict[str, Any]:
    """The columns that every table behind an endpoint has, of an answer or a failure."""
    return {
        "model": model,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
    }


def dropped(row: dict[str, Any], reason: str, detail: str = "", **columns: Any) -> dict[str, Any]:
    """A row without a usable answer."""
    said = f"{row['sample_id']}: {detail}" if detail else row["sample_id"]
    return {"sample_id": row["sample_id"], DROP_REASON: reason, DROP_DETAIL: said, **columns}
