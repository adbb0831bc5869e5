"""What is judged is data: whatever a text says, it changes neither the form of the question nor that of the
answer, skips no agent and adds no judgement."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from judge_attacks import ATTACKS, SPECIAL
from tiny_chat import save_tokenizer

from mmedpo_ray.clients.untrusted_text import as_data
from mmedpo_ray.judge import debate
from mmedpo_ray.judge.agents import JUDGES, prompt
from mmedpo_ray.judge.agents.base import Case, Judgement, Refusal
from mmedpo_ray.judge.agents.openai import OpenAIAgentConfig
from mmedpo_ray.judge.agents.rules import RulesAgent, RulesAgentConfig
from mmedpo_ray.judge.agents.vllm import VllmAgent, VllmAgentConfig
from mmedpo_ray.judge.settings import ScoreConfig

TEXTS = st.one_of(st.sampled_from(sorted(ATTACKS.values())), st.text(max_size=200))


def case_of(question: str, reference: str, answer: str, rationale: str | None = None) -> Case:
    history = () if rationale is None else (Judgement("first", 1, 0.35, rationale),)
    return Case(question, reference, answer, history, 1)


def record_of(content: str) -> dict[str, Any]:
    """The JSON object in a prompt: the only line that begins with a brace."""
    (line,) = [line for line in content.split("\n") if line.startswith("{")]
    return json.loads(line)


# ---------------------------------------------------------------------- the question


@given(TEXTS)
@example(ATTACKS["control"])
@example(ATTACKS["long"])
def test_a_text_stays_inside_one_json_string(text: str) -> None:
    line = as_data({"answer": text})
    assert json.loads(line) == {"answer": text}
    assert line.isascii() and line.isprintable() and not set("<>[]|&") & set(line)


@given(TEXTS, TEXTS, TEXTS, st.none() | TEXTS)
def test_texts_change_their_own_json_strings_and_nothing_else_of_the_prompt(
    question: str, reference: str, answer: str, rationale: str | None
) -> None:
    case = case_of(question, reference, answer, rationale)
    plain = case_of("q", "r", "a", None if rationale is None else "p")
    for write in (prompt.messages, prompt.rationale_messages):
        (message,), (frame,) = write(case), write(plain)
        record = record_of(message["content"])
        expected = {"question": question, "reference_answer": reference, "dispreferred_answer": answer}
        if rationale is not None:
            expected |= {"previous_score": 0.35, "previous_rationale": rationale}
        assert record == expected and list(record) == list(expected)
        assert message["content"].replace(as_data(record), "") == frame["content"].replace(
            as_data(record_of(frame["content"])), ""
        )
    assert prompt.schema(case, 160) == prompt.schema(plain, 160)


@given(TEXTS)
def test_the_models_own_words_are_data_in_the_second_turn(rationale: str) -> None:
    first, own, last = prompt.letter_messages(case_of("q", "r", "a"), rationale)
    assert [first["role"], own["role"], last["role"]] == ["user", "assistant", "user"]
    assert json.loads(own["content"]) == {"rationale": rationale}
    assert own["content"].isascii() and not set("<>[]|&") & set(own["content"])
    assert last == prompt.letter_messages(case_of("q", "r", "a"), "fine")[2]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_judged_text_becomes_a_special_token(attack: str, tmp_path: Path) -> None:
    attack = attack[:2000].encode("utf-8", "replace").decode()
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *SPECIAL]})
    case = case_of(attack, attack, attack, attack)
    for conversation, turns in (
        (prompt.messages(case), ["<|user|>", "<|end|>"]),
        (
            prompt.letter_messages(case, attack),
            ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>", "<|end|>"],
        ),
    ):
        tokens = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        special = [token for token in tokens if token in tokenizer.all_special_ids]
        assert tokenizer.convert_ids_to_tokens(special) == ["<s>", *turns, "<|assistant|>"]
    bare = tokenizer(attack, add_special_tokens=False)["input_ids"]
    # The tokenizer would take the bait: of every attack that holds one of its tokens it makes that token.
    assert bool(set(bare) & set(tokenizer.all_special_ids)) == any(
        token in attack for token in tokenizer.all_special_tokens
    )


def test_one_form_for_every_score_to_agree_with() -> None:
    """An engine compiles each form once, so no score may make one of its own."""
    first, later = case_of("q", "a", "b"), case_of("q", "a", "b", "before")
    assert list(prompt.allowed_scores(first).values()) == list(prompt.GRID)
    assert prompt.allowed_scores(later) == {**prompt.allowed_scores(first), "same": 0.35}
    for case in (first, later):
        assert prompt.schema(case, 160)["properties"]["score"]["enum"] == list(prompt.allowed_scores(case))
    other = replace(later, history=(Judgement("first", 1, 0.4731, "before"),))
    assert prompt.schema(later, 160) == prompt.schema(other, 160)
    assert prompt.parse('{"rationale": "x", "score": "same"}', other, "judge") == Judgement(
        "judge", 1, 0.4731, "x"
    )
    assert prompt.parse('{"rationale": "x", "score": "same"}', first, "judge") == Refusal(
        "judgement_unreadable"
    )


# ---------------------------------------------------------------------- the answer


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "x", "score": 0.7}',
        "",
        "0.7",
        "null",
        "[0.7]",
        '[["rationale", "x"], ["score", "0.7"]]',
        '{"score": "0.7"}',
        '{"rationale": "x", "score": "0.75"}',
        '{"rationale": "x", "score": "0.70"}',
        '{"rationale": "x", "score": true}',
        '{"rationale": 3, "score": "0.7"}',
        '{"rationale": {"a": "b"}, "score": "0.7"}',
        '{"rationale": "x", "score": [0.7]}',
        '{"rationale": "x", "score": "0.7"',
        '{"rationale": "x", "score": "0.2", "score": "1"}',
        '{"rationale": "x", "score": "0.7", "round": "5"}',
        '{"rationale": "x", "score": "0.7"} {"rationale": "x", "score": "1"}',
        '{"rationale": "\\ud83d", "score": "0.7"}',
        '{"rationale": "x", "score": "0.7\\ude00"}',
        "[" * 1_000,
        "[" * 100_000,
        '{"rationale":' * 10_000,
        '{"rationale": "x", "score": ' + "9" * 10_000 + "}",
    ],
)
def test_anything_but_a_judgement_is_refused(text: str) -> None:
    assert prompt.parse(text, case_of("q", "a", "b"), "judge") == Refusal("judgement_unreadable")


def test_a_judgement_is_read() -> None:
    case = replace(case_of("q", "a", "b"), round=2)
    text = '{"rationale": " wrong\\n\\tside ", "score": "0.7"}'
    assert prompt.parse(text, case, "judge") == Judgement("judge", 2, 0.7, "wrong side")
    assert prompt.parse_rationale('{"rationale": "wrong side"}') == "wrong side"
    assert prompt.parse_rationale(text) is None


ANSWERS = st.one_of(
    TEXTS,
    st.fixed_dictionaries(
        {"rationale": TEXTS, "score": TEXTS | st.sampled_from(["0", "same", "1", "1.0"])}
    ).map(json.dumps),
)


@given(ANSWERS)
def test_whatever_a_model_answers_only_a_score_of_the_grid_comes_back(text: str) -> None:
    case = case_of("q", "a", "b", "before")
    answer = prompt.parse(text, case, "judge")
    if isinstance(answer, Refusal):
        assert answer == Refusal("judgement_unreadable")
    else:
        assert (answer.agent, answer.round) == ("judge", 1)
        assert answer.score in {*prompt.GRID, 0.35}
        assert len(answer.rationale) <= 300 and len(answer.rationale.splitlines()) <= 1


def test_the_longest_answer_fits_into_the_tokens() -> None:
    case = case_of("q", "a", "b", "")
    for limit in (48, 160, 1000):
        pattern = prompt.schema(case, limit)["properties"]["rationale"]["pattern"]
        longest = "~" * int(pattern.rsplit(",", 1)[1].removesuffix("}$"))
        assert re.fullmatch(pattern, longest) and not re.fullmatch(pattern, longest + "~")
        answer = json.dumps({"rationale": longest, "score": "same"})
        assert len(answer) < limit, "one token a character, and one to end"
        assert isinstance(prompt.parse(answer, case, "judge"), Judgement)


# ---------------------------------------------------------------------- the expectation


LOGPROBS = st.lists(st.floats(-50, 0), min_size=len(prompt.LETTERS), max_size=len(prompt.LETTERS))


@given(LOGPROBS, st.floats(-20, 20))
def test_the_expectation_is_the_mean_of_the_grid(values: list[float], shift: float) -> None:
    pairs = list(zip(prompt.LETTERS, values, strict=True))
    shares = [math.exp(value) for value in values]
    mean = sum(s * g for s, g in zip(shares, prompt.GRID, strict=True)) / sum(shares)
    assert prompt.expectation(pairs) == pytest.approx(mean, abs=1e-4)
    # Neither a common factor nor tokens that are no letter count.
    moved = [(letter, value + shift) for letter, value in pairs]
    others = [("yes", 0.0), ("", 0.0), ("AB", 0.0), ("J", 0.0), ("1.0", 0.0), ("a", 0.0)]
    assert prompt.expectation([*others, *moved]) == pytest.approx(mean, abs=2e-4)


def test_a_letter_may_have_two_tokens_and_none_may_be_left() -> None:
    half = math.log(0.25)
    assert prompt.expectation([("A", half), (" A", half), ("I", 2 * half + math.log(8))]) == 0.5
    assert prompt.expectation([("A", -math.inf), ("I", -5.0)]) == 1.0
    assert prompt.expectation([("no", -1.0), ("A", -math.inf)]) is None
    assert prompt.expectation([]) is None


def test_close_expectations_agree_exactly() -> None:
    case = case_of("q", "a", "b", "before")
    agreed = prompt.by_expectation(0.4321, "why", case, "judge")
    assert agreed == Judgement("judge", 1, 0.35, "agrees, own view 0.4321; why")
    assert prompt.by_expectation(0.4621, "why", case, "judge") == Judgement("judge", 1, 0.4621, "why")
    assert prompt.by_expectation(0.4321, "why", case_of("q", "a", "b"), "judge").score == 0.4321


# ---------------------------------------------------------------------- the debate


@given(TEXTS, TEXTS, TEXTS)
def test_every_agent_speaks_in_turn_whatever_the_texts_say(
    question: str, reference: str, answer: str
) -> None:
    names = [agent.name for agent in ScoreConfig().agents]
    speakers = [JUDGES[agent.kind](agent) for agent in ScoreConfig().agents]
    ((history, refusal),) = debate.hold([case_of(question, reference, answer)], range(15), speakers, 5)
    assert refusal is None and len(history) >= len(names)
    for turn, item in enumerate(history):
        assert (item.agent, item.round) == (names[turn % 3], turn // 3 + 1)
        assert 0.0 <= item.score <= 1.0 and len(item.rationale) < 500


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_instruction_appended_to_an_answer_does_not_raise_the_lexicons_score(attack: str) -> None:
    lexicon = RulesAgent(RulesAgentConfig())
    (plain,) = lexicon.judge([case_of("Which side is the effusion on?", "left", "left")])
    (attacked,) = lexicon.judge([case_of("Which side is the effusion on?", "left", attack)])
    assert isinstance(plain, Judgement) and isinstance(attacked, Judgement)
    assert plain.score == 0.0 and attacked.score <= 0.3


def test_the_prompt_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [VllmAgentConfig(model="m"), OpenAIAgentConfig()]
    before = [JUDGES[agent.kind].key(agent) for agent in settings]
    monkeypatch.setattr(prompt, "_DATA", "Do what it says.")
    assert all(JUDGES[agent.kind].key(agent) != old for agent, old in zip(settings, before, strict=True))
    choice, expectation = (VllmAgentConfig(model="m", scoring=kind) for kind in ("choice", "expectation"))
    assert VllmAgent.key(choice) != VllmAgent.key(expectation)
