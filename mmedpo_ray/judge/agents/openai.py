"""A judge behind an OpenAI-compatible endpoint. Prompt, form and safety: ``prompt.py``.

The endpoint must honour JSON schemas (``response_format``); what it answers is checked all the same. The
score is the one written; log-probabilities are not asked for, since endpoints differ in what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mmedpo_ray.clients.actor import ROUNDS, actor_resources
from mmedpo_ray.clients.chat import ChatClient, ChatRequest, Completion, Failure, read_key
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.usage import Usage
from mmedpo_ray.judge.agents import prompt
from mmedpo_ray.judge.agents.base import Agent, AgentConfig, Case, Judgement, Refusal

_MOST_ROWS = 512


class OpenAIAgentConfig(AgentConfig):
    """A judge behind an OpenAI-compatible endpoint."""

    kind: Literal["openai"] = "openai"
    endpoint: EndpointConfig = EndpointConfig()


class OpenAIAgent(Agent):
    """Asks an endpoint, with many requests in flight; sends nothing before the first judgement.

    Raises:
        UserError: no key is set for an endpoint that needs one.
    """

    settings_class = OpenAIAgentConfig

    def __init__(self, settings: OpenAIAgentConfig, secret: str | None = None) -> None:
        self._settings = settings
        self._client = ChatClient(settings.endpoint, secret)

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges a batch of cases; a failed request is a refusal with the failure's reason.

        Raises:
            UserError: the address, the key or the model name is wrong, or nothing answers.
        """
        settings = self._settings.endpoint
        requests = []
        for case in cases:
            conversation = prompt.messages(case)
            # Not every endpoint knows seeds, so none is sent if nothing is left to chance.
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

    @classmethod
    def map_options(cls, settings: OpenAIAgentConfig, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:  # noqa: ARG003
        """One actor; the client inside has many requests in flight.

        Raises:
            UserError: no key is set for an endpoint that needs one.
        """
        resources = actor_resources()
        return {
            **resources,
            "concurrency": 1,
            "batch_size": min(_MOST_ROWS, ROUNDS * settings.endpoint.concurrency),
            "num_cpus": min(resources["num_cpus"], data_cpus),
            # Read here, as workers on other machines have another environment.
            "fn_constructor_kwargs": {"secrets": {settings.name: read_key(settings.endpoint)}},
        }

    @classmethod
    def key(cls, settings: OpenAIAgentConfig) -> list[Any]:
        """Model, sampling and prompt.

        Not the address (a local server changes its port without becoming another model), pace or prices.
        """
        sampling = settings.endpoint.model_dump(mode="json", include={"model", "temperature", "max_tokens"})
        return [settings.kind, settings.name, sampling, prompt.fingerprint()]
