"""A new adapter answers on the running endpoint, under load: the real engine and the embedded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served_load import ask, body, clients, make_config, write_adapter

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.serve.endpoint import Endpoint, start_endpoint
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.serve.rollout import rollout
from mmedpo_ray.serve.versions import VersionFolder
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = pytest.mark.engine

CLIENTS = 12
REQUESTS = [body(model, number) for number in range(4) for model in ("base", "aligned")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two runs with an adapter each."""
    root = tmp_path_factory.mktemp("rollout")
    for seed, name in enumerate(("first", "second")):
        write_adapter(root / name, seed)
    return root


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return make_config(root / "first")


@pytest.fixture(scope="module")
def endpoint(config: Config, ray_cluster: None) -> Iterator[Endpoint]:
    versions = VersionFolder(RunFolder(config.run.folder).versions())
    with start_endpoint(config, run_models(config), versions=versions) as endpoint:
        yield endpoint


def tokens_of(endpoint: Endpoint, model: str) -> list[list[tuple[str, float]]]:
    with httpx.Client(trust_env=False, timeout=60) as client:
        asked = [ask(client, endpoint.base_url, body(model, number)) for number in range(4)]
    return [answer.tokens for answer in asked]


def test_a_new_adapter_rolls_in_and_back_under_load(endpoint: Endpoint, root: Path) -> None:
    before, base = tokens_of(endpoint, "aligned"), tokens_of(endpoint, "base")
    assert before != base
    with clients(endpoint.base_url, CLIENTS, REQUESTS) as load:
        load.wait_for(50)
        start = time.monotonic()
        new = rollout(make_config(root / "second"), "aligned")
        switched = time.monotonic()
        load.wait_for(100)
        after = tokens_of(endpoint, "aligned")
        back_from = time.monotonic()
        old = rollout(make_config(root / "second"), "aligned", back=True)
        back = time.monotonic()
        load.wait_for(50)
        end = time.monotonic()
    assert not load.failed, load.failed[:3]
    gap = load.longest_gap(start, end)
    print(f"{len(load.answers)} answers, longest gap {gap:.2f} s, switch {switched - start:.1f} s")
    assert gap < 2
    assert new != old and new.startswith("aligned@")
    assert after != before and tokens_of(endpoint, "aligned") == before, "back is back"
    assert tokens_of(endpoint, "base") == base
    answered = [answer for answer in load.answers if answer.model != "base"]
    assert {answer.model for answer in answered} == {old, new}
    between = [answer for answer in answered if switched < answer.sent and answer.received < back_from]
    assert {answer.model for answer in between} == {new}
    assert {answer.model for answer in answered if answer.sent > back} == {old}


def test_the_models_list_names_the_version(endpoint: Endpoint, config: Config) -> None:
    cards = httpx.get(f"{endpoint.base_url}/models", trust_env=False).json()["data"]
    state = VersionFolder(RunFolder(config.run.folder).versions()).read()["aligned"]
    assert {card["id"]: card["root"] for card in cards} == {"base": "base", "aligned": state.current}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 64}, "rank"),
        ({"base": "/models/another"}, "/models/another"),
        ({"columns": 8}, "does not fit"),
        (None, "export"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(endpoint, root, options, word) -> None:
    before = tokens_of(endpoint, "aligned")
    run = root / word.strip("/").replace("/", "-")
    if options is not None:
        write_adapter(run, 5, **options)
    with clients(endpoint.base_url, 4, REQUESTS) as load:
        load.wait_for(10)
        with pytest.raises(UserError, match=word):
            rollout(make_config(run), "aligned")
        load.wait_for(10)
    assert not load.failed
    assert tokens_of(endpoint, "aligned") == before


def test_only_served_names_can_be_switched(endpoint: Endpoint, root: Path) -> None:
    for name in ("base", "unknown"):
        with pytest.raises(UserError, match=r"no adapter under .*adapters: aligned"):
            rollout(make_config(root / "second"), name)
