"""The settings tree: files, overrides, errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.config.load import _apply_override, dump, known_keys, load, resolve_run_folder
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_yaml_in_the_repository_loads(path: Path) -> None:
    config = load(path)
    assert config.run.folder.startswith("runs/")


def test_paper_settings() -> None:
    align = load(Path(__file__).parents[2] / "configs" / "slake_llava_med.yaml").align
    lora = align.lora
    assert (align.beta, align.learning_rate, align.epochs, lora.rank, lora.alpha, align.strategy) == (
        0.1, 1e-7, 3, 128, 256, "zero3",
    )  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_rank_of_a_shipped_configuration_has_a_whole_image(path: Path) -> None:
    align = load(path).align
    assert align.images_per_step >= align.max_workers
    # A SLAKE image has 11 questions, each with a text and a visual pair.
    assert align.pairs_per_forward >= 22


def test_overrides_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("align: {beta: 0.3, epochs: 7}\n")
    config = load(path, ["align.beta=0.2", "align.learning_rate=1e-6", "align.lora.rank=4"])
    assert (config.align.beta, config.align.epochs, config.align.learning_rate) == (0.2, 7, 1e-6)
    assert config.align.lora.rank == 4
    assert config.align.lora.alpha == Config().align.lora.alpha


def annotation_of(key: str) -> Any:
    section: Any = Config()
    *parents, name = key.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return type(section).model_fields[name].annotation


@pytest.mark.parametrize("key", known_keys())
def test_texts_are_taken_as_they_are_and_other_values_are_yaml(key: str) -> None:
    tree: dict[str, Any] = {}
    _apply_override(tree, f"{key}=2024 # x")
    for name in key.split("."):
        tree = tree[name]
    kind = annotation_of(key)
    is_text = kind in (str, str | None) or get_origin(kind) is Literal
    assert tree == ("2024 # x" if is_text else 2024)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("data.root=null", "data.root", None),
        ("data.root=", "data.root", None),
        ("data={format: slake, root: '~'}", "data.root", "~"),
        ("curate.visual.generic_prompt=null", "curate.visual.generic_prompt", "null"),
        ("serve.models=[aligned, base]", "serve.models", ("aligned", "base")),
        ("serve.models=null", "serve.models", None),
        ("align.lora.target_modules=[q_proj]", "align.lora.target_modules", ["q_proj"]),
        ("model.engine.extra={seed: 1, revision: a}", "model.engine.extra", {"seed": 1, "revision": "a"}),
        ("model.engine.extra.seed=1", "model.engine.extra", {"seed": 1}),
        ("align.num_workers=[1, 4]", "align.num_workers", (1, 4)),
        ("align.use_gpu=null", "align.use_gpu", None),
        ("align.use_gpu=no", "align.use_gpu", False),
        ("align.learning_rate=1e-6", "align.learning_rate", 1e-6),
        ("data.columns={image: '2024'}", "data.columns.image", "2024"),
    ],
)  # fmt: skip
def test_values_of_every_kind(override: str, key: str, expected: object) -> None:
    value: Any = load(None, [override])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("override", ["run.folder=", "run.folder=null"])
def test_a_folder_without_a_name(override: str) -> None:
    if override.endswith("null"):
        assert load(None, [override]).run.folder == "null"
    else:
        with pytest.raises(UserError, match=r"run\.folder"):
            load(None, [override])


def test_show_is_a_fixed_point(tmp_path: Path) -> None:
    config = load(CONFIGS[0])
    path = tmp_path / "shown.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_a_temperature_or_one_for_each_candidate() -> None:
    one = load(None, ["curate.text.temperature=0.7"]).curate.text
    assert [one.temperature_of(number) for number in range(3)] == [0.7, 0.7, 0.7]
    more = load(None, ["curate.text.temperature=[0.7, 1]", "curate.text.num_candidates=3"]).curate.text
    assert [more.temperature_of(number) for number in range(3)] == [0.7, 1.0, 0.7]


@pytest.mark.parametrize(
    "given", ["0", "-1", "[]", "[0.7, 0]", "[0.7, hot]", "true", "[[1.0]]", ".inf", "{a: 1}", "null"]
)
def test_a_wrong_temperature_is_told_in_one_line(given: str) -> None:
    with pytest.raises(
        UserError, match=r"curate\.text\.temperature: .*a number above 0, or a list"
    ) as caught:
        load(None, [f"curate.text.temperature={given}"])
    assert str(caught.value).count("temperature") == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("align.btea=1", "did you mean align.beta?"),
        ("allign.beta=1", "did you mean align?"),
        ("learning_rate=1", "did you mean align.learning_rate?"),
        ("zzz=1", "mmedpo config show"),
        ("align.beta=-1", "align.beta"),
        ("align.beta", "section.key=value"),
        ("align.beta.x=1", "valid"),
        ("data.format=dicom", "data.format"),
        ("data.format=llava_json", "data.root is required"),
        (
            "data.root=/data/mine",
            "set data.format (--format) to that of your data (mmedpo_json, llava_json, slake,",
        ),
        ("align={beta: 1, beta: 2}", "the key 'beta' occurs twice in one section, in line 1 and in line 1"),
        ("score.agents=[{kind: vllm}]", "score.agents.0.model"),
        ("score.agents=[{kind: rules, name: a}, {kind: rules, name: a}]", "different names"),
        ("model.name=aligned", "must differ"),
        ("score.weights.clip=[1.2, 0.8]", "clip"),
        ("serve.port=70000", "serve.port"),
        ("align.keep=best", "set align.validation_share above 0"),
        ("align.validation_share=1", "align.validation_share"),
        ("align.beta=2024-13-01", "cannot read the value of 'align.beta=2024-13-01'"),
        ("align.epochs=[", "cannot read the value of 'align.epochs=['"),
        ("align={train: full, reference: online}", "use precomputed"),
        ("align={train: full, kl_coefficient: 0.1}", "use align.train=lora"),
    ],
)
def test_errors_name_the_key(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [override])
    assert expected in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("align: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load(broken)
    broken.write_text("data: {root: 2024-13-01}")
    with pytest.raises(UserError, match="not valid YAML"):
        load(broken)
    broken.write_bytes("data: {root: Röntgen}".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML"):
        load(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must hold sections"):
        load(broken)
    broken.write_text("")
    assert load(broken) == Config()


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("align:\n  beta: 0.1\ndata: {}\nalign:\n  epochs: 2\n", "align", (1, 4)),
        ("align:\n  beta: 0.1\n  epochs: 2\n  beta: 0.2\n", "beta", (2, 4)),
        ("align:\n  lora:\n    rank: 4\n    'rank': 8\n", "rank", (3, 4)),
        ("score:\n  agents:\n    - kind: rules\n      name: a\n      name: b\n", "name", (4, 5)),
    ],
)
def test_a_key_that_occurs_twice_is_named_with_its_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = rf"run\.yaml .*'{key}' .*{lines[0]} .*{lines[1]}"
    with pytest.raises(UserError, match=said):
        load(path)


def test_anchors_merges_and_equal_keys_of_different_sections_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "align:\n  lora: &lora {rank: 4}\n  beta: 0.2\ndata: {name: a}\nmodel: {name: b}\ncontrol: {name: "
        "c}\n"
        "score:\n  agents:\n    - &first {kind: rules, name: a}\n    - {<<: *first, name: b}\n    - {<<: "
        "*first, name: c}\n"
    )
    config = load(path)
    assert [agent.name for agent in config.score.agents] == ["a", "b", "c"]
    assert (config.align.beta, config.align.lora.rank) == (0.2, 4)


@given(st.sampled_from(known_keys()), st.integers(0, 30), st.characters(categories=["Ll"]))
def test_a_typo_never_passes_and_never_crashes(key: str, position: int, letter: str) -> None:
    typo = key[:position] + letter + key[position:]
    if typo in known_keys():
        return
    with pytest.raises(UserError):
        load(None, [f"{typo}=1"])


def test_relative_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_run_folder(Config()).run.folder == str(tmp_path / "runs/default")
    monkeypatch.setenv("MMEDPO_HOME", "/elsewhere")
    assert resolve_run_folder(Config()).run.folder == "/elsewhere/runs/default"
    monkeypatch.delenv("MMEDPO_HOME")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert resolve_run_folder(Config()).run.folder == str(Path.home() / "mmedpo_ray/runs/default")
    assert resolve_run_folder(load(None, ["run.folder=/a/b"])).run.folder == "/a/b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("align:\n  btea: 2\n", "unknown key align.btea; did you mean align.beta? (line 2)"),
        ("curate:\n\n  text: rewrite\n", "curate.text: is a section: set its keys, not itself (got "
                                         "'rewrite') (line 3)"),
        ("score:\n  agents:\n  - {kind: rules, foccus: x}\n", "did you mean score.agents.0.focus? (line 3)"),
        ("score:\n  agents:\n  - {focus: x}\n", "score.agents.0: needs a key `kind` (got {'focus': 'x'}) "
                                                "(line 3)"),
        ("score:\n  agents:\n  - {kind: rulez}\n", "there is no kind of judge 'rulez'. Known: rules, vllm, "
                                                   "openai"),
        ("align:\n  num_workers: two\n", "(got 'two'), or must be a valid tuple (got 'two') (line 2)"),
        ("align:\n  beta: x\n", "align.beta: must be a valid number, unable to parse string as a number "
                                "(got 'x') (line 2)"),
    ],
)  # fmt: skip
def test_a_fault_of_a_file_names_key_and_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml")
    assert said in str(caught.value)
    assert "Input should" not in str(caught.value) and "not permitted" not in str(caught.value)


def test_a_fault_of_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("align:\n  beta: 0.1\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml", ["align.beta=abc"])
    assert "line" not in str(caught.value).splitlines()[1]
