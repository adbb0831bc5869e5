"""Judges on a real cluster and a real vLLM engine: scores from words and from log-probabilities, texts that
attack, endpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, Reply, running
from judge_attacks import ATTACKS
from tiny_chat import build_tiny_chat

from mmedpo_ray.clients.chat import TRANSIENT
from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import user_message
from mmedpo_ray.io import storage
from mmedpo_ray.judge.agents import prompt
from mmedpo_ray.judge.agents.base import AGREEMENT, Case, Judgement
from mmedpo_ray.judge.stage import score
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner, read_table

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]

QUESTION = ("Which side is the effusion on?", "left", "right")
PLAIN = {
    "presence": ("Is there a pneumothorax?", "Yes", "No"),
    "side": QUESTION,
    "report": (
        "Describe the image.",
        "Large left pleural effusion.",
        "Small right pleural effusion and a nodule.",
    ),
}


def attacked() -> dict[str, tuple[str, str, str]]:
    """Every attack as the dispreferred answer, and one in each of the other places."""
    texts = {name: text.encode("utf-8", "replace").decode() for name, text in ATTACKS.items()}
    rows = {name: (*QUESTION[:2], text) for name, text in texts.items()}
    rows["in the question"] = (texts["chatml"], *QUESTION[1:])
    rows["in the reference"] = (QUESTION[0], texts["forged answer"], QUESTION[2])
    return rows


def write_pairs(config: Config, rows: dict[str, tuple[str, str, str]]) -> None:
    stage = StageRunner("curate", RunFolder(config.run.folder).pairs, config, settings=[sorted(rows)])
    made = [
        {
            **{
                field.name: "none" for field in schemas.PAIRS if field.type == "string" and not field.nullable
            },
            "pair_id": name,
            "kind": "text",
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
        }
        for name, (question, chosen, rejected) in rows.items()
    ]
    stage.write_rows(
        lambda _: stage.write_part(made, schemas.PAIRS, "pair_id"), schema=schemas.PAIRS, id_column="pair_id"
    )


def config_of(folder: Path, agents: list[dict[str, Any]], rounds: int) -> Config:
    overrides = [
        f"score.agents={json.dumps(agents)}",
        f"score.max_rounds={rounds}",
        "run.max_dropped_share=0.5",
    ]
    return load(None, [f"run.folder={folder}", *overrides])


def scored(config: Config) -> dict[str, dict[str, Any]]:
    table = read_table(RunFolder(config.run.folder).scored, schemas.SCORED, "scored")
    return {row["pair_id"]: row for row in table.to_pylist()}


def expected_view(model: Any, tokenizer: Any, case: Case, rationale: str) -> float:
    """The mean of the grid under the probabilities of the letters, by transformers."""
    import torch

    tokens = tokenizer.apply_chat_template(
        prompt.letter_messages(case, rationale), add_generation_prompt=True, return_dict=False
    )
    letters = tokenizer.convert_tokens_to_ids(list(prompt.LETTERS))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1, letters]
    return float(logits.softmax(-1) @ torch.tensor(prompt.GRID))


def test_no_text_moves_the_form_and_the_expectation_is_that_of_the_model(tmp_path: Path) -> None:
    """Lexicon, a chat model that writes its score, and one whose score is read from its log-probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny_chat(tmp_path / "model", max_positions=4096)
    # A chance of 1 makes seeds matter, and 64 prompts of 1,000 tokens are more than the engine takes in one
    # step.
    model = {"kind": "vllm", "model": str(folder), "temperature": 1.0, "max_tokens": 96}
    agents = [
        {"kind": "rules", "name": "lexicon"},
        {**model, "name": "writes", "engine": {"kv_cache_gib": 0.25}},
        {**model, "name": "expects", "engine": {"kv_cache_gib": 0.25}, "scoring": "expectation"},
    ]
    config = config_of(tmp_path / "run", agents, rounds=1)
    rows = PLAIN | attacked()
    write_pairs(config, rows)
    manifest = score(config)
    assert (manifest.rows_in, manifest.dropped) == (len(rows), {"judge_prompt_too_long": 1})

    found = scored(config)
    assert set(found) == set(rows) - {"long"}
    reference = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    agreed = 0
    for name, row in found.items():
        history = [Judgement(**item) for item in row["history"]]
        assert [(item.agent, item.round) for item in history] == [
            ("lexicon", 1),
            ("writes", 1),
            ("expects", 1),
        ]
        before, written, own = history
        assert written.score in {*prompt.GRID, before.score}
        case = Case(*rows[name], (before, written), 1)
        said = own.rationale
        if agrees := own.score == written.score:
            stated, said = said.removeprefix("agrees, own view ").split("; ", 1)
            view = float(stated)
        else:
            view = own.score
        assert view == pytest.approx(expected_view(reference, tokenizer, case, said), abs=1e-3), name
        assert agrees == (abs(view - written.score) <= AGREEMENT)
        agreed += agrees
    assert 0 < agreed < len(found), "both ways through the debate were taken"
    assert len({row["history"][1]["score"] for row in found.values()}) > 2, "chance uses the grid"


def test_an_endpoint_joins_the_debate_and_tells_what_it_could_not_judge(tmp_path: Path) -> None:
    with running() as server:

        def answer(body: dict[str, Any], before: int) -> Reply:
            (line,) = [line for line in body["messages"][0]["content"].splitlines() if line.startswith("{")]
            record = json.loads(line)
            if record["dispreferred_answer"] == "right":
                return Reply(status=503, headers={"Retry-After": "0.01"})
            return Reply(json.dumps({"rationale": "agreed", "score": "same"}))

        server.answer = answer
        endpoint = {"base_url": server.url, "model": MODEL, "retries": 1}
        agents = [
            {"kind": "rules", "name": "lexicon"},
            {"kind": "openai", "name": "remote", "endpoint": endpoint},
        ]
        config = config_of(tmp_path / "run", agents, rounds=5)
        write_pairs(config, PLAIN)
        manifest = score(config)
        assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (3, 2, {TRANSIENT: 1})
        for row in scored(config).values():
            assert [item["agent"] for item in row["history"]] == ["lexicon", "remote"]
            assert row["consensus"] and row["rounds"] == 1
        (dropped,) = storage.dataset(tmp_path / "run" / "scored" / "dropped").to_table().to_pylist()
        assert dropped["pair_id"] == "side" and dropped["drop_detail"].endswith("HTTP 503 an_error")
        texts = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))
        assert "effusion" not in texts and "pneumothorax" not in texts

        server.key = "right"
        other = config_of(tmp_path / "other", agents, rounds=5)
        write_pairs(other, PLAIN)
        with pytest.raises(Exception, match="refuses the key") as failure:
            score(other)
        assert "OPENAI_API_KEY" in (user_message(failure.value) or "")


def asked_about(body: dict[str, Any]) -> str:
    (line,) = [line for line in body["messages"][0]["content"].splitlines() if line.startswith("{")]
    return json.loads(line)["dispreferred_answer"]


def tables_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def endpoint_agents(url: str) -> list[dict[str, Any]]:
    endpoint = {"base_url": url, "model": MODEL, "retries": 0, "concurrency": 4}
    return [
        {"kind": "openai", "name": "first", "endpoint": endpoint},
        {"kind": "rules", "name": "lexicon"},
        {"kind": "openai", "name": "second", "endpoint": endpoint},
    ]


MANY = {f"{number:02}": ("Where is it?", "left", f"right {number}") for number in range(8)}


@pytest.mark.parametrize("num_failing", [2, 6])
def test_only_pairs_that_failed_in_passing_are_judged_again(tmp_path: Path, num_failing: int) -> None:
    """Some pairs fail with the first agent, some with the second; six are more than the share that may be
    dropped."""
    failing = [rejected for _, _, rejected in MANY.values()][:num_failing]
    with running() as server:
        turns: dict[str, int] = {}
        is_up = True

        def answer(body: dict[str, Any], before: int) -> Reply:
            about = asked_about(body)
            is_second = "previous_score" in body["messages"][0]["content"]
            if not is_up and about in failing and is_second == failing.index(about) % 2:
                return Reply(status=429, headers={"Retry-After": "0.01"})
            turns[about] = turns.get(about, 0) + 1
            return Reply(json.dumps({"rationale": about, "score": "0.8"}))

        server.answer = answer
        agents = endpoint_agents(server.url)
        undisturbed = config_of(tmp_path / "undisturbed", agents, rounds=1)
        write_pairs(undisturbed, MANY)
        assert score(undisturbed).dropped == {}
        quiet_requests, quiet_turns = len(server.requests), dict(turns)

        is_up = False
        config = config_of(tmp_path / "run", agents, rounds=1)
        write_pairs(config, MANY)
        if num_failing > len(MANY) / 2:
            with pytest.raises(Exception, match=r"6 of 8 rows would be dropped \(endpoint_failed 6\)"):
                score(config)
        else:
            first = score(config)
            assert (first.rows_in, first.rows_out, first.dropped) == (8, 6, {TRANSIENT: 2})
            asked = len(server.requests)
            assert score(config).dropped == {TRANSIENT: 2}, "still down"
            assert {asked_about(body) for body in server.requests[asked:]} == set(failing)

        is_up = True
        asked = len(server.requests)
        again = score(config)
        assert (again.rows_in, again.rows_out, again.dropped) == (8, 8, {})
        assert {asked_about(body) for body in server.requests[asked:]} == set(failing)
        assert tables_of(tmp_path / "run" / "scored") == tables_of(tmp_path / "undisturbed" / "scored")
        sent = sum(agent["requests"] for agent in again.extra["debate"]["usage"].values())
        assert sent == len(server.requests) - quiet_requests, "what failed is counted too"
        assert all(turns[about] == 2 * quiet_turns[about] for about in quiet_turns if about not in failing)

        asked = len(server.requests)
        assert score(config).finished_at == again.finished_at
        assert len(server.requests) == asked


def test_an_outage_in_the_first_pass_costs_the_answers_that_failed(tmp_path: Path) -> None:
    """More pairs fail than may be dropped before the debate has ended; what was answered is not asked for
    again."""
    with running() as server:
        is_up = False

        def answer(body: dict[str, Any], before: int) -> Reply:
            if not is_up and asked_about(body) > "right 2":
                return Reply(status=503, headers={"Retry-After": "0.01"})
            return Reply(json.dumps({"rationale": "as said", "score": "0.5"}))

        server.answer = answer
        config = config_of(tmp_path / "run", endpoint_agents(server.url)[:1], rounds=1)
        write_pairs(config, MANY)
        for _ in range(2):
            with pytest.raises(Exception, match=r"5 of 8 rows would be dropped \(endpoint_failed 5\)"):
                score(config)
        assert len(server.requests) == 8 + 5
        is_up = True
        assert score(config).rows_out == 8
        assert len(server.requests) == 8 + 5 + 5
