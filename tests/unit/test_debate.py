"""The debate: when it ends, what counts, and that passes change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.judge import debate
from mmedpo_ray.judge.agents.base import Case, Judgement, Refusal
from mmedpo_ray.judge.agents.rules import RulesAgent, RulesAgentConfig
from mmedpo_ray.judge.agents.vllm import VllmAgentConfig
from mmedpo_ray.judge.settings import ScoreConfig
from mmedpo_ray.tables import schemas


class Script:
    """A judge that says what it is told to, in turn; ``None`` agrees."""

    def __init__(self, name: str, *scores: float | None) -> None:
        self.name = name
        self.scores = list(scores)
        self.seen: list[Case] = []

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        answers: list[Judgement | Refusal] = []
        for case in cases:
            self.seen.append(case)
            score = self.scores.pop(0) if self.scores else None
            answers.append(
                Judgement(
                    self.name, case.round, case.history[-1].score if score is None else score, "because"
                )
            )
        return answers


class Refuser(Script):
    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        return [Refusal("judgement_unreadable") for _ in cases]


CASE = Case("Which side is the effusion on?", "left", "right", (), 1)


def hold(agents: Sequence[Script], max_rounds: int = 5) -> tuple[tuple[Judgement, ...], debate.Outcome]:
    ((history, refusal),) = debate.hold([CASE], range(len(agents) * max_rounds), agents, max_rounds)
    assert refusal is None
    return history, debate.outcome(history, len(agents))


def test_agreement_in_the_first_round_ends_it() -> None:
    history, outcome = hold([Script("a", 0.8), Script("b"), Script("c")])
    assert [item.agent for item in history] == ["a", "b", "c"]
    assert outcome == debate.Outcome(0.8, consensus=True, rounds=1)


def test_each_agent_sees_the_score_before_and_all_must_stand_by_the_last_one() -> None:
    agents = [Script("a", 0.2), Script("b", 0.6), Script("c")]
    history, outcome = hold(agents)
    # c agrees with b; a must too before it counts, in round 2.
    assert [(item.agent, item.round, item.score) for item in history] == [
        ("a", 1, 0.2),
        ("b", 1, 0.6),
        ("c", 1, 0.6),
        ("a", 2, 0.6),
    ]
    assert outcome == debate.Outcome(0.6, consensus=True, rounds=2)
    assert [item.score for item in agents[2].seen[0].history] == [0.2, 0.6]


def test_without_consensus_the_mean_of_the_history_counts() -> None:
    history, outcome = hold([Script("a", 0.0, 0.0), Script("b", 1.0, 0.5)], max_rounds=2)
    assert len(history) == 4
    assert outcome == debate.Outcome(0.375, consensus=False, rounds=2)


def test_one_agent_alone_agrees_with_itself() -> None:
    assert hold([Script("a", 0.4)])[1] == debate.Outcome(0.4, consensus=True, rounds=1)


def test_a_refusal_ends_only_its_own_debate() -> None:
    held = debate.hold([CASE, CASE], range(10), [Script("a", 0.4, 0.4), Refuser("b")], 5)
    assert [(len(history), refusal) for history, refusal in held] == [
        (1, Refusal("judgement_unreadable"))
    ] * 2


SCORES = st.sampled_from([0.0, 0.2, 0.5, 1.0])


class Fixed:
    """A judge whose scores are a plan: turn → score; ``None`` agrees."""

    def __init__(self, name: str, scores: list[float | None]) -> None:
        self.name = name
        self.scores = scores
        self.shown: list[Case] = []

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        self.shown += cases
        answers: list[Judgement | Refusal] = []
        for case in cases:
            score = self.scores[len(case.history)]
            if score is None:
                score = case.history[-1].score if case.history else 0.5
            answers.append(Judgement(self.name, case.round, score, f"turn {len(case.history)}"))
        return answers


@st.composite
def debates(draw: st.DrawFn) -> tuple[int, int, list[list[float | None]]]:
    """Agents, rounds, and for some debates what would be said in each turn."""
    num_agents, max_rounds = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    turns = num_agents * max_rounds
    plans = st.lists(SCORES | st.none(), min_size=turns, max_size=turns)
    return num_agents, max_rounds, draw(st.lists(plans, min_size=1, max_size=4))


@given(debates())
def test_a_debate_ends_at_the_first_agreement_or_at_the_cap(
    world: tuple[int, int, list[list[float | None]]],
) -> None:
    num_agents, max_rounds, plans = world
    for said in plans:
        agents = [Fixed(str(number), said) for number in range(num_agents)]
        ((history, refusal),) = debate.hold([CASE], range(num_agents * max_rounds), agents, max_rounds)
        assert refusal is None
        # Order: turn t belongs to agent t mod n in round t div n + 1, who sees all that was said before.
        for turn, item in enumerate(history):
            assert (item.agent, item.round) == (str(turn % num_agents), turn // num_agents + 1)
            shown = agents[turn % num_agents].shown[turn // num_agents]
            assert (shown.history, shown.round) == (history[:turn], item.round)
            assert (shown.question, shown.reference, shown.answer) == (
                CASE.question,
                CASE.reference,
                CASE.answer,
            )
        # Number: the first time that the last n scores are one, or every turn.
        scores = [item.score for item in history]
        agreements = [
            end for end in range(num_agents, len(scores) + 1) if len({*scores[end - num_agents : end]}) == 1
        ]
        assert agreements in ([], [len(history)])
        assert agreements or len(history) == num_agents * max_rounds
        # Result: the score agreed on, else the mean of everything said.
        outcome = debate.outcome(history, num_agents)
        assert outcome.consensus == bool(agreements)
        assert outcome.score == (scores[-1] if agreements else pytest.approx(sum(scores) / len(scores)))
        assert outcome.rounds == history[-1].round <= max_rounds
        assert min(scores) - 1e-12 <= outcome.score <= max(scores) + 1e-12


@given(debates())
def test_debates_held_together_are_those_held_alone(
    world: tuple[int, int, list[list[float | None]]],
) -> None:
    """Only unresolved rows travel on, and none of them looks at its neighbours."""
    num_agents, max_rounds, plans = world

    class ByQuestion(Fixed):
        def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
            self.shown += cases
            return [Fixed(self.name, plans[int(case.question)]).judge([case])[0] for case in cases]

    cases = [Case(str(number), "left", "right", (), 1) for number in range(len(plans))]
    agents = [ByQuestion(str(number), []) for number in range(num_agents)]
    together = debate.hold(cases, range(num_agents * max_rounds), agents, max_rounds)
    alone = [debate.hold([case], range(num_agents * max_rounds), agents, max_rounds)[0] for case in cases]
    assert together == alone
    # Each debate was held twice, and nobody was asked about a settled one.
    assert sum(len(agent.shown) for agent in agents) == 2 * sum(len(history) for history, _ in alone)


@given(st.lists(SCORES, min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 5))
def test_a_history_goes_through_its_column_unchanged(
    scores: list[float], num_agents: int, max_rounds: int
) -> None:
    history = tuple(
        Judgement(str(turn % num_agents), turn // num_agents + 1, score, f"“{turn}”")
        for turn, score in enumerate(scores)
    )
    column = debate.to_column([history])
    assert column.type == schemas.HISTORY
    assert debate.from_rows(column.to_pylist()[0]) == history
    assert debate.settled(history, num_agents, max_rounds) == (
        debate.agree(history, num_agents) or len(history) >= num_agents * max_rounds
    )


def test_scores_a_hair_apart_are_the_same_one() -> None:
    first, second = Judgement("a", 1, 0.3, ""), Judgement("b", 1, 0.1 + 0.2, "")
    assert first.score != second.score and debate.agree([first, second], 2)
    assert not debate.agree([first, Judgement("b", 1, 0.3001, "")], 2)


RULES = [RulesAgentConfig(name=name) for name in ("a", "b", "c")]
MODEL = VllmAgentConfig(name="m", model="nowhere")


def test_passes_hold_one_model_and_rules_share_theirs() -> None:
    assert [item.turns for item in debate.plan(RULES, 5)] == [range(0, 15)]
    mixed = debate.plan([RULES[0], RULES[1], MODEL], 2)
    assert [(item.turns, [agent.name for agent in item.agents]) for item in mixed] == [
        (range(0, 2), ["a", "b"]),
        (range(2, 3), ["m"]),
        (range(3, 5), ["a", "b"]),
        (range(5, 6), ["m"]),
    ]
    alone = debate.plan([MODEL, MODEL.model_copy(update={"name": "n"})], 1)
    assert [len(item.turns) for item in alone] == [1, 1]
    assert len({item.name for item in mixed + alone}) == 6
    odd = debate.plan([MODEL.model_copy(update={"name": "../a b"})], 1)[0].name
    assert "/" not in odd and " " not in odd


def test_many_passes_equal_one() -> None:
    """Cutting a debate at any turn and going on from the table gives the same history."""
    config = ScoreConfig()
    rows = [
        ("Is there a pneumothorax?", "Yes", "No"),
        (
            "Describe the image.",
            "Large left pleural effusion.",
            "Small right pleural effusion. Pneumothorax.",
        ),
        ("Which side?", "left", "right"),
        ("What modality?", "CT", "MRI"),
    ]
    speakers = [RulesAgent(agent) for agent in config.agents]
    cases = [Case(*row, (), 1) for row in rows]
    whole = [history for history, _ in debate.hold(cases, range(15), speakers, 5)]
    # At least one of these must be a real debate, or the comparison says nothing.
    assert max(len(history) for history in whole) > 3
    blank = {field.name: None for field in schemas.PAIRS}
    table = pa.table(
        {
            **{
                name: pa.array([value] * len(rows), schemas.PAIRS.field(name).type)
                for name, value in blank.items()
            },
            "question": [row[0] for row in rows],
            "chosen": [row[1] for row in rows],
            "rejected": [row[2] for row in rows],
            "history": pa.array([[]] * len(rows), schemas.HISTORY),
            "settled": pa.array([False] * len(rows)),
        }
    )
    for turn in range(15):
        one = debate.Pass(turn, range(turn, turn + 1), (config.agents[turn % 3],))
        open_rows = table.filter(pa.compute.invert(table["settled"]))
        if not open_rows.num_rows:
            break
        moved = debate.HoldPass(one, config.agents, 5)(open_rows)
        by_answer = {row["rejected"]: row for row in moved.to_pylist()}
        table = pa.Table.from_pylist(
            [by_answer.get(row["rejected"], row) for row in table.to_pylist()], schema=table.schema
        )
    assert [debate.from_rows(row) for row in table["history"].to_pylist()] == whole


@pytest.mark.parametrize("max_rounds", [1, 2, 5])
def test_no_debate_exceeds_its_rounds(max_rounds: int) -> None:
    config = ScoreConfig(max_rounds=max_rounds)
    speakers = [RulesAgent(agent) for agent in config.agents]
    case = Case("Describe.", "Large left pleural effusion.", "Right pneumothorax, no effusion.", (), 1)
    ((history, _),) = debate.hold([case], range(3 * max_rounds), speakers, max_rounds)
    assert len(history) <= 3 * max_rounds
    assert history[-1].round <= max_rounds
