"""What Ray Serve runs of ours: the ingress that knows adapters, and a start without downloads.

Ray's OpenAI ingress knows one name a deployment, and adapters only from cloud storage. Ours also routes the names of
the adapters that an engine was started with, and does without Ray's CORS rule, which would let any web page that a
user visits talk to an endpoint on their machine.
"""

from __future__ import annotations

from typing import Any

from fastapi.middleware.cors import CORSMiddleware
from ray import serve

# Private, which the narrow pin of Ray allows: the public builder offers neither an application without the CORS rule
# nor the base class of callbacks.
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve.deployment import Application
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress


class LocalFiles(CallbackBase):
    """Skips Ray's look for model downloads on every node, which starts one more process that imports everything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ctx.run_init_node = False


class AdapterIngress(OpenAiIngress):
    """An ingress that sends an adapter's name to the engine of its base model.

    Args:
        llm_deployments: handle by the name of its base model.
        names_of: for each deployment, every name it answers for: base and adapters.
    """

    def __init__(self, llm_deployments: dict[str, Any], *, names_of: dict[str, list[str]]) -> None:
        handles = {name: llm_deployments[base] for base, names in names_of.items() for name in names}
        cards = {
            name: ModelCard(id=name, object="model", owned_by="mmedpo-ray", permission=[], metadata={"base": base})
            for base, names in names_of.items()
            for name in names
        }
        super().__init__(llm_deployments=handles, model_cards=cards)


def build_ingress(deployments: dict[str, Application], names_of: dict[str, list[str]]) -> Application:
    """Puts one OpenAI-compatible ingress before the deployments; see :class:`AdapterIngress`."""
    application = init()
    application.user_middleware = [
        item for item in application.user_middleware if item.cls is not CORSMiddleware
    ]
    ingress = make_fastapi_ingress(AdapterIngress, app=application)
    return serve.deployment(
        ingress, max_ongoing_requests=1000, num_replicas=1, ray_actor_options={"num_cpus": 0}
    ).bind(llm_deployments=deployments, names_of=names_of)
