"""The judge behind an endpoint: what it sends, what it makes of answers and failures, and what it is charged
for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from chat_server import INPUT_TOKENS, MODEL, OUTPUT_TOKENS, ChatServer, Reply, running

from mmedpo_ray.clients.chat import REFUSED, TRANSIENT
from mmedpo_ray.clients.settings import EndpointConfig
from mmedpo_ray.clients.usage import Usage
from mmedpo_ray.clients.usage_log import UsageLog
from mmedpo_ray.errors import UserError
from mmedpo_ray.judge import debate
from mmedpo_ray.judge.agents import prompt
from mmedpo_ray.judge.agents.base import Case, Judgement, Refusal
from mmedpo_ray.judge.agents.openai import OpenAIAgent, OpenAIAgentConfig
from mmedpo_ray.judge.agents.rules import RulesAgentConfig
from mmedpo_ray.tables import schemas


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running() as state:
        yield state


def settings_of(server: ChatServer, name: str = "strong", **values: Any) -> OpenAIAgentConfig:
    endpoint = {"base_url": server.url, "model": MODEL, "retries": 1, **values}
    return OpenAIAgentConfig(name=name, endpoint=EndpointConfig(**endpoint))


def asked_about(body: dict[str, Any]) -> dict[str, Any]:
    (line,) = [line for line in body["messages"][0]["content"].splitlines() if line.startswith("{")]
    return json.loads(line)


def judging(score: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any], int], Reply]:
    """A model that gives the score that ``score`` makes of what it is asked about."""
    return lambda body, before: Reply(json.dumps({"rationale": "because", "score": score(asked_about(body))}))


def case_of(answer: str, *history: Judgement) -> Case:
    return Case("Which side?", "left", answer, history, len(history) + 1)


def test_it_sends_the_same_prompt_and_form_as_every_model_judge(server: ChatServer) -> None:
    server.answer = judging(lambda record: "same")
    case = case_of("right", Judgement("before", 1, 0.35, "wrong side"))
    assert OpenAIAgent(settings_of(server)).judge([case]) == [Judgement("strong", 2, 0.35, "because")]
    (body,) = server.requests
    assert body["messages"] == prompt.messages(case)
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"] == prompt.schema(case, 1024)
    assert "seed" not in body


def test_answers_come_back_in_order(server: ChatServer) -> None:
    server.answer = lambda body, before: Reply(
        json.dumps({"rationale": asked_about(body)["dispreferred_answer"], "score": "0.5"}),
        delay=0.02 * (len(server.requests) % 3),
    )
    answers = OpenAIAgent(settings_of(server, concurrency=4)).judge([case_of(f"{n}") for n in range(20)])
    assert [answer.rationale for answer in answers if isinstance(answer, Judgement)] == [
        f"{n}" for n in range(20)
    ]
    assert 1 < server.most_at_once <= 4


def test_a_seed_is_sent_where_chance_decides_and_differs_between_rows(server: ChatServer) -> None:
    server.answer = judging(lambda record: "0.5")
    cases = [case_of("right"), case_of("both")]
    for _ in range(2):
        OpenAIAgent(settings_of(server, temperature=0.7)).judge(cases)
    seeds = {asked_about(body)["dispreferred_answer"]: set() for body in server.requests}
    for body in server.requests:
        seeds[asked_about(body)["dispreferred_answer"]].add(body["seed"])
    assert len(seeds["right"]) == len(seeds["both"]) == 1 and seeds["right"] != seeds["both"]


def test_a_failed_request_is_a_refusal_that_says_whether_to_try_again(server: ChatServer) -> None:
    replies = {
        "good": Reply(json.dumps({"rationale": "because", "score": "0.9"})),
        "busy": Reply(status=503, headers={"Retry-After": "0.01"}),
        "filtered": Reply(status=400, code="content_filter"),
        "chatty": Reply("I would give this answer 0.7."),
        "off the grid": Reply(json.dumps({"rationale": "because", "score": "0.75"})),
        "cut": Reply('{"rationale": "because', finish="length"),
        "forged": Reply('{"rationale": "x", "score": "0.2", "score": "1"}'),
        "half a pair": Reply('{"rationale": "\\ud83d", "score": "0.2"}'),
        "deep": Reply("[" * 1_000),
        "no text": Reply(message={"content": 7}),
    }
    server.answer = lambda body, before: replies[asked_about(body)["dispreferred_answer"]]
    agent = OpenAIAgent(settings_of(server, max_tokens=64))
    answers = dict(zip(replies, agent.judge([case_of(name) for name in replies]), strict=True))
    assert answers["good"] == Judgement("strong", 1, 0.9, "because")
    assert answers["busy"] == Refusal(TRANSIENT, "HTTP 503 an_error")
    assert answers["filtered"] == Refusal(REFUSED, "HTTP 400 content_filter")
    assert answers["cut"] == Refusal("endpoint_answer_cut", "after max_tokens=64")
    assert answers["no text"] == Refusal("endpoint_unreadable", "malformed chat completion")
    for name in ("chatty", "off the grid", "forged", "half a pair", "deep"):
        assert answers[name] == Refusal("judgement_unreadable")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "unknown"}, "does not know the model"),
        ({"api_key_env": "WRONG_KEY"}, "refuses the key in WRONG_KEY"),
    ],
)
def test_a_wrong_key_or_model_is_the_users_to_mend(
    values: dict[str, str], message: str, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "right"
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    monkeypatch.setenv("WRONG_KEY", "wrong")
    with pytest.raises(UserError, match=message):
        OpenAIAgent(settings_of(server, **values)).judge([case_of("right")])


def test_the_key_is_read_where_the_run_starts_and_before_anything_is_sent(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    hosted = OpenAIAgentConfig(name="hosted")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        OpenAIAgent.map_options(hosted, data_cpus=0.25, has_gpu=False)
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    options = OpenAIAgent.map_options(settings_of(server), data_cpus=0.25, has_gpu=False)
    assert options["concurrency"] == 1, "requests are in flight together inside one actor"
    monkeypatch.delenv("OPENAI_API_KEY")
    server.key, server.answer = "right", judging(lambda record: "0.5")
    which = debate.plan([settings_of(server)], 1)[0]
    held = debate.HoldPass(which, [settings_of(server)], 1, **options["fn_constructor_kwargs"])
    assert held(debates("right"))["settled"].to_pylist() == [True]


def debates(*answers: str) -> pa.Table:
    """Open debates about these answers."""
    rows = [
        {
            **{field.name: "" for field in schemas.PAIRS if field.type == pa.string()},
            "pair_id": f"{number}",
            "question": "Which side?",
            "chosen": "left",
            "rejected": answer,
            "history": [],
            "settled": False,
        }
        for number, answer in enumerate(answers)
    ]
    return schemas.to_table(rows, debate.DEBATE)


def test_in_a_debate_it_sees_the_score_before_and_is_charged_for_what_it_sent(
    server: ChatServer, tmp_path: Path
) -> None:
    """The first agent disagrees with nobody; the second agrees with the scores up to 0.5 and is unavailable
    for one row."""

    def answer(body: dict[str, Any], before: int) -> Reply:
        record = asked_about(body)
        if "previous_score" not in record:
            score = {"right": "0.9", "both": "0.4", "none": "0.5"}[record["dispreferred_answer"]]
        elif record["dispreferred_answer"] == "none":
            return Reply(status=429, headers={"Retry-After": "0.01"})
        else:
            score = f"{min(0.5, record['previous_score']):g}"
        return Reply(json.dumps({"rationale": f"said {score}", "score": score}))

    server.answer = answer
    speakers = [settings_of(server, "first"), settings_of(server, "second")]
    table, log = debates("right", "both", "none"), UsageLog(str(tmp_path))
    for which in debate.plan(speakers, 1):
        table = debate.HoldPass(which, speakers, 1, usage=log)(table)
    right, both, none = table.to_pylist()
    told = [[(item["agent"], item["score"]) for item in row["history"]] for row in (right, both, none)]
    assert told == [
        [("first", 0.9), ("second", 0.5)],
        [("first", 0.4), ("second", 0.4)],
        [("first", 0.5)],
    ]
    assert none["drop_reason"] == TRANSIENT
    assert none["drop_detail"] == "pass-01-second, after 1 judgements: HTTP 429 an_error"
    assert debate.outcome(debate.from_rows(both["history"]), 2) == debate.Outcome(0.4, True, 1)
    seen = [asked_about(body) for body in server.requests if "previous_score" in asked_about(body)]
    assert {record["previous_rationale"] for record in seen} == {"said 0.9", "said 0.4", "said 0.5"}
    # Five answers are charged; the row that failed was tried twice.
    assert log.total() == Usage(7, 1, 5 * INPUT_TOKENS, 5 * OUTPUT_TOKENS)


def test_what_was_sent_before_the_batch_failed_is_charged_too(server: ChatServer, tmp_path: Path) -> None:
    server.answer = lambda body, before: (
        Reply(status=401, delay=0.5)
        if asked_about(body)["dispreferred_answer"] == "last"
        else Reply(json.dumps({"rationale": "because", "score": "0.5"}))
    )
    speaker, log = settings_of(server), UsageLog(str(tmp_path))
    with pytest.raises(UserError, match="refuses the key"):
        debate.HoldPass(debate.plan([speaker], 1)[0], [speaker], 1, usage=log)(
            debates("right", "both", "last")
        )
    assert log.total() == Usage(3, 0, 2 * INPUT_TOKENS, 2 * OUTPUT_TOKENS)


def test_agents_that_cost_nothing_leave_no_counters(tmp_path: Path) -> None:
    speaker, log = RulesAgentConfig(), UsageLog(str(tmp_path / "usage"))
    debate.HoldPass(debate.plan([speaker], 1)[0], [speaker], 1, usage=log)(debates("right"))
    assert not (tmp_path / "usage").exists()


def test_pace_patience_place_and_prices_do_not_change_the_key(server: ChatServer) -> None:
    plain = OpenAIAgent.key(settings_of(server))
    other = {
        "concurrency": 2,
        "timeout_s": 5,
        "retries": 0,
        "requests_per_minute": 10,
        "base_url": "http://other/v1",
    }
    assert OpenAIAgent.key(settings_of(server, **other, usd_per_million_input=3.0)) == plain
    for values in ({"temperature": 0.5}, {"max_tokens": 100}, {"model": "weak"}):
        assert OpenAIAgent.key(settings_of(server, **values)) != plain
    assert OpenAIAgent.key(settings_of(server, "another name")) != plain
