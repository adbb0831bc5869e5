"""Settings of `score`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mmedpo_ray.config.base import Section
from mmedpo_ray.judge.agents import JUDGES
from mmedpo_ray.judge.agents.base import AgentConfig


def _read_agent(value: Any) -> AgentConfig:
    """An agent's settings, read by the class of its kind."""
    if isinstance(value, AgentConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise PydanticCustomError("union_tag_not_found", "needs a key `kind`")
    return JUDGES[JUDGES.check(value["kind"])].settings_class.model_validate(value)


def _default_agents() -> list[Any]:
    return [
        {"kind": "rules", "name": focus, "focus": focus} for focus in ("findings", "laterality", "polarity")
    ]


class _AnyKind:
    """Gives the JSON schema the settings of all kinds of judges."""

    def __get_pydantic_json_schema__(self, _: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(kind.settings_class.__pydantic_core_schema__) for kind in JUDGES.values()]}


class WeightConfig(Section):
    """Scores → weights."""

    mode: Literal["match_moments", "literal", "raw", "none"] = Field(
        "match_moments",
        description="match_moments: mean 1, variance as given, clipped; literal: the paper's formula; "
        "raw: the score; none: 1",
    )
    variance: float = Field(0.1, ge=0)
    clip: tuple[float, float] = Field((0.75, 1.25), description="[low, high]; mode match_moments and literal")
    per: Literal["kind", "dataset", "global"] = Field(
        "kind", description="rows that are normalised together (kind: text and visual scores differ in scale)"
    )

    @field_validator("clip")
    @classmethod
    def _check_clip(cls, clip: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= clip[0] < clip[1]:
            raise ValueError("must be 0 <= low < high")
        return clip


class ScoreConfig(Section):
    """pairs → scored pairs."""

    agents: list[Annotated[SerializeAsAny[AgentConfig], BeforeValidator(_read_agent), _AnyKind()]] = Field(
        default_factory=_default_agents, min_length=1
    )
    max_rounds: int = Field(5, ge=1, description="debate rounds; then the mean of the history counts")
    keep_source_scores: bool = Field(
        True, description="a score that came with the data is kept, not judged again"
    )
    weights: WeightConfig = WeightConfig()

    @model_validator(mode="after")
    def _check_names(self) -> ScoreConfig:
        names = [agent.name for agent in self.agents]
        if len(set(names)) != len(names):
            raise ValueError(f"score.agents must have different names, not {names}")
        return self
