"""Settings of `score`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.config.base import Section
from mmedpo_ray.models.settings import EngineConfig


class RulesAgentConfig(Section):
    """A judge made of a radiology lexicon."""

    kind: Literal["rules"] = "rules"
    name: str = "rules"
    focus: Literal["findings", "laterality", "polarity", "all"] = "all"


class VllmAgentConfig(Section):
    """A judge that is any chat model, run by vLLM with structured output."""

    kind: Literal["vllm"] = "vllm"
    name: str = "judge"
    model: str = Field(description="local folder or hub name of a chat model")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(160, ge=16)
    scoring: Literal["choice", "expectation"] = Field(
        "choice",
        description="choice: the score the model writes; expectation: mean of the scores under its log-probabilities",
    )
    engine: EngineConfig = EngineConfig()


class OpenAIAgentConfig(Section):
    """A judge behind an OpenAI-compatible endpoint."""

    kind: Literal["openai"] = "openai"
    name: str = "judge"
    endpoint: EndpointConfig = EndpointConfig()


AgentConfig = Annotated[RulesAgentConfig | VllmAgentConfig | OpenAIAgentConfig, Field(discriminator="kind")]


def _default_agents() -> list[AgentConfig]:
    return [
        RulesAgentConfig(name="findings", focus="findings"),
        RulesAgentConfig(name="laterality", focus="laterality"),
        RulesAgentConfig(name="polarity", focus="polarity"),
    ]


class WeightConfig(Section):
    """Scores → weights."""

    mode: Literal["match_moments", "literal", "raw", "none"] = Field(
        "match_moments",
        description="match_moments: mean 1, variance as given, clipped; literal: the paper's formula; raw: the score; none: 1",
    )
    variance: float = Field(0.1, ge=0)
    clip: tuple[float, float] = Field((0.75, 1.25), description="[low, high]; mode match_moments and literal")
    per: Literal["kind", "dataset", "global"] = Field(
        "kind", description="rows that are normalised together (kind: text and visual scores differ in scale)"
    )


class ScoreConfig(Section):
    """pairs → scored pairs."""

    agents: list[AgentConfig] = Field(default_factory=_default_agents, min_length=1)
    max_rounds: int = Field(5, ge=1, description="debate rounds; then the mean of the history counts")
    keep_source_scores: bool = Field(
        True, description="a score that came with the data is kept, not judged again"
    )
    weights: WeightConfig = WeightConfig()
