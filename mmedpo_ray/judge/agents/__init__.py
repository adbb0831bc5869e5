"""The kinds of judges.

A new kind is a file with an :class:`~mmedpo_ray.judge.agents.base.Agent` and its settings, and a line here,
or an entry point of another package. The settings are read when the configuration is loaded, so such a file
imports heavy libraries (torch, vLLM, Ray, the lexicon) inside functions.
"""

from mmedpo_ray.plugins import Registry

JUDGES = Registry(
    "kind of judge",
    "mmedpo_ray.judges",
    {
        "rules": "mmedpo_ray.judge.agents.rules:RulesAgent",
        "vllm": "mmedpo_ray.judge.agents.vllm:VllmAgent",
        "openai": "mmedpo_ray.judge.agents.openai:OpenAIAgent",
    },
)
