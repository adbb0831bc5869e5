"""A judge behind an OpenAI-compatible endpoint: a hosted model, or a local server. Prompt, form and safety: ``prompt.py``.

The endpoint must honour JSON schemas (``response_format``); what it answers is checked all the same. The score is the one
written; log-probabilities are not asked for, since endpoints differ in what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmedpo_ray.clients.chat import ChatRequest, Completion, EndpointClient, Failure, Usage, read_key
from mmedpo_ray.judge.agents import Case, Judgement, Refusal, prompt
from mmedpo_ray.judge.settings import OpenAIAgentConfig

CHEAP = False

# Rows of a batch, as a multiple of the requests in flight: the slowest of them is waited for once a batch.
_ROUNDS = 8
_MOST_ROWS = 512
_CPUS = 0.25


class OpenAIAgent:
    """Asks an endpoint; many requests are in flight, answers come back in order.

    Args:
        settings: name and endpoint.
        secret: the endpoint's key; None: from the environment of this process.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """

    def __init__(self, settings: OpenAIAgentConfig, secret: str | None = None) -> None:
        self._settings = settings
        self._client = EndpointClient(settings.endpoint, secret)

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges a batch of cases; a failed request is a refusal with the failure's reason.

        Raises:
            UserError: the address, the key or the model name is wrong, or nothing answers.
        """
        settings = self._settings.endpoint
        requests = []
        for case in cases:
            conversation = prompt.messages(case)
            # Not every endpoint knows seeds, so none is sent where nothing is left to chance.
            seed = prompt.seed(conversation) if settings.temperature else None
            requests.append(ChatRequest(conversation, prompt.schema(case, settings.max_tokens), seed))
        answers = self._client.complete(requests)
        return [self._read(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def take_usage(self) -> Usage:
        """What was sent and charged since the last call."""
        return self._client.take_usage()

    def _read(self, case: Case, answer: Completion | Failure) -> Judgement | Refusal:
        if isinstance(answer, Failure):
            return Refusal(answer.reason, answer.detail)
        return prompt.parse(answer.text, case, self._settings.name)


def build(settings: OpenAIAgentConfig, secret: str | None = None) -> OpenAIAgent:
    """Makes the agent; nothing is sent before the first judgement."""
    return OpenAIAgent(settings, secret)


def map_options(settings: OpenAIAgentConfig, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:  # noqa: ARG001
    """One actor, which only waits for the network; on the driver's node where that has room, as a local server is there.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "concurrency": 1,
        "batch_size": min(_MOST_ROWS, _ROUNDS * settings.endpoint.concurrency),
        "num_cpus": min(_CPUS, data_cpus),
        # Read here, as workers on other machines have another environment.
        "fn_constructor_kwargs": {"secrets": {settings.name: read_key(settings.endpoint)}},
    }
    if ray.is_initialized():
        node = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    return options


def key(settings: OpenAIAgentConfig) -> list[Any]:
    """Model, sampling and prompt; not the address (a local server changes its port without becoming another model), the
    pace or the prices."""
    sampling = settings.endpoint.model_dump(mode="json", include={"model", "temperature", "max_tokens"})
    return [settings.kind, settings.name, sampling, prompt.fingerprint()]
