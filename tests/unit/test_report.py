"""The report: says what the figures show and no more, escapes what it shows, needs nothing else, and bears
missing parts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.judge import weights
from mmedpo_ray.metrics import verdict
from mmedpo_ray.report.stage import report
from mmedpo_ray.tables import lineage, schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner

EVIL = '<script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(2)>'


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def config_of(folder: Path, *overrides: str) -> Config:
    return load(None, [f"run.folder={folder}", "data.name=toy & co", *overrides])


def estimate(value: float, spread: float = 0.03, n: int = 80) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


SUMMARY: dict[str, Any] = {
    "models": {
        "base": {
            "closed_accuracy": estimate(0.6),
            "report_rouge_l": estimate(0.4),
            "open_recall_official": estimate(0.5),
        },
        "aligned": {
            "closed_accuracy": estimate(0.7),
            "report_rouge_l": estimate(0.41),
            "open_recall_official": estimate(0.9),
        },
        "sft_control": {
            "closed_accuracy": estimate(0.8),
            "report_rouge_l": estimate(0.42),
            "open_recall_official": estimate(0.5),
        },
    },
    "difference": {
        "closed_accuracy": estimate(0.1),
        "report_rouge_l": estimate(0.01),
        "open_recall_official": estimate(0.4),
    },
    "difference_to_control": {"closed_accuracy": estimate(-0.1), "report_rouge_l": estimate(-0.01)},
    "names": {"base": "base", "aligned": "aligned", "control": "sft_control"},
    "questions": 160,
    "images": 40,
    "confidence": 0.95,
    "command": "mmedpo run --config x.yaml",
}  # fmt: skip


def write_image(path: Path, seed: int, side: int = 64, mode: str = "L") -> str:
    shape = (side, side) if mode == "L" else (side, side, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return str(path)


def scored_rows(folder: Path, count: int, side: int = 64) -> list[dict[str, Any]]:
    original = write_image(folder / "a.png", 1, side)
    heat, noised = (
        write_image(folder / "heat.png", 2, side),
        write_image(folder / "noised.png", 3, side, "RGB"),
    )
    rows = []
    for number in range(count):
        kind = "text" if number % 2 else "visual"
        visual = kind == "visual"
        rows.append(
            {
                "pair_id": f"{number:03d}:{kind}",
                "sample_id": f"{number:03d}",
                "image_id": "i",
                "dataset": "toy",
                "task": "vqa",
                "answer_type": "open",
                "kind": kind,
                "image_uri": original,
                "rejected_image_uri": noised if visual else original,
                "question": f"Question {number} {EVIL}",
                "chosen": f"Chosen {number} {EVIL}",
                "rejected": f"Chosen {number} {EVIL}" if visual else f"Rejected {number} {EVIL}",
                "generator": "dataset_mask" if visual else "rule_edit",
                "tool": "dataset_mask" if visual else None,
                "heat_map_uri": heat if visual else None,
                "noise": json.dumps({"mode": "diffusion", "signal_share": 0.123456}) if visual else None,
                "score": number / count,
                "weight": 0.75 + number / (2 * count),
                "consensus": True,
                "rounds": 0 if visual else 2,
                "history": []
                if visual
                else [{"agent": "findings", "round": 1, "score": 0.5, "rationale": f"because {EVIL}"}],
            }
        )
    return rows


def build_run(config: Config, *, side: int = 64, count: int = 8) -> None:
    run = RunFolder(config.run.folder)
    rows = scored_rows(Path(run.root) / "img", count, side)
    ingest = StageRunner("ingest", run.samples, config)
    ingest.finish(rows_in=12, rows_out=9, dropped={"image_missing": 3})
    stage = StageRunner("score", run.scored, config)
    kinds = [row["kind"] for row in rows]
    scores = np.array([row["score"] for row in rows])
    summary = weights.Summary(config.score.weights)
    summary.add(scores, np.array([row["weight"] for row in rows]), kinds)
    stage.write_rows(
        lambda _: stage.write_part(rows, schemas.SCORED, "pair_id"),
        schema=schemas.SCORED,
        id_column="pair_id",
        extra=lambda table: {
            "weights": {"mode": "match_moments", "per": "kind", "kinds": summary.figures()},
            "debate": {"agents": ["findings"], "judged": 4, "consensus": 3, "rounds": {"1": 1, "2": 3}},
        },
    )
    StageRunner("align", str(run.align()), config).finish(rows_in=count, rows_out=count)
    lines = [
        {"step": step, "loss": 1 / step, "reward_margin": step * 0.1, "reward_accuracy": 0.5 + step / 100}
        for step in range(1, 31)
    ]
    (run.align() / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo'
    )
    run.align("control").mkdir(parents=True, exist_ok=True)
    (run.align("control") / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 2 / step, "reward_margin": None, "reward_accuracy": None})
            + "\n"
            for step in range(1, 31)
        )
    )
    StageRunner("evaluate", run.evaluate, config).finish(rows_in=320, rows_out=320)
    storage.write_bytes(storage.join(run.evaluate, "summary.json"), json.dumps(SUMMARY).encode())


def page_of(config: Config) -> tuple[str, Page]:
    report(config)
    text = storage.read_bytes(RunFolder(config.run.folder).report).decode()
    return text, Page(text)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_whole_run_is_told_and_everything_escaped(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    build_run(config)
    text, page = page_of(config)
    shown = words(page.text)
    # Patient text appears as text, never as markup; the page loads and runs nothing.
    assert EVIL in page.text and "toy & co" in page.text
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    sources = [attributes["src"] or "" for attributes in page.of("img")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\((?!#)", text) and "default-src 'none'" in text
    # Accessible: alt texts, labels, header cells.
    assert all(attributes.get("alt") for attributes in page.of("img"))
    drawings = page.of("svg")
    assert len(drawings) == 5 and all(attributes.get("aria-label") for attributes in drawings)
    assert all(attributes.get("scope") for attributes in page.of("th"))
    assert page.of("html")[0]["lang"] == "en"
    # Verdict, counts, weights, training, galleries, provenance.
    assert (
        "Better than the base model (base) on closed accuracy; on report ROUGE-L no difference is shown"
        in shown
    )
    assert "Worse than the supervised fine-tuning control (sft_control) on closed accuracy" in shown
    assert "closed accuracy +10.0 points (95% interval +7.0 to +13.0)" in shown
    assert "70.0 [67.0, 73.0]" in shown and "−10.0 [−13.0, −7.0]" in shown
    assert "image missing 3" in shown and "does not add up" not in shown
    assert "4 pairs were judged in a debate" in shown and "effective sample size" in shown
    assert "Training loss over 30 steps: aligned (DPO)" in text and "control (SFT)" in text
    assert shown.count("Question ") == 8 and "because" in shown and "signal share 0.123" in shown
    assert "images_per_step: 8" in page.text and "not for diagnosis" in shown
    assert len(text.encode()) < 3_000_000


def test_it_is_written_once_and_again_when_a_figure_changed(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    build_run(config)
    first = report(config)
    assert report(config) == first
    changed = {**SUMMARY, "command": "another command"}
    storage.write_bytes(tmp_path / "evaluate" / "summary.json", json.dumps(changed).encode())
    report(config)
    assert b"another command" in (tmp_path / "report.html").read_bytes()


def test_whether_the_model_looks_and_what_became_of_findings_are_told(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    build_run(config)
    assert 'id="look"' not in page_of(config)[0], "off: nothing of it"
    names = ("accuracy", "accuracy_without", "drop", "changed", "survive")
    figures = {name: estimate(0.38) for name in names}
    undefined = figures | {"survive": {"value": None, "low": None, "high": None, "n": 80}}
    difference = dict(SUMMARY["difference"])
    metric = next(iter(difference))
    mcnemar = {"gained": 23, "lost": 9, "p": 0.02}
    difference[metric] = difference[metric] | {"mcnemar": mcnemar, "detectable": 0.051}
    summary = SUMMARY | {
        "difference": difference,
        "findings": {"aligned": {"Edema": {"contradicted": 2, "unmentioned": 3, "supported": 7}}},
        "look": {
            "models": {
                "base": {"blank": {"all": undefined}},
                "aligned": {"blank": {"all": figures}, "lesion_noised": {"all": figures}},
            },
            "differences": {"aligned": {"blank": estimate(0.1) | {"p": 0.01, "p_holm": 0.02}}},
        },
    }
    storage.write_bytes(tmp_path / "evaluate" / "summary.json", json.dumps(summary).encode())
    text, page = page_of(config)
    assert 'id="look"' in text and 'href="#look"' in text
    told = words(page.text)
    assert "Of aligned’s right answers, 38 % survive without the image" in told
    assert "Of base’s" not in told and "lesion noised" in told and "p = 0.02" in told
    assert "23 answers" in told and "9 are lost" in told and "5.1 points" in told
    assert "Edema750" in told.replace(" ", ""), "supported, hallucinated, missed"


def test_identifiable_data_stays_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, "report.show_text=false")
    build_run(config)
    text, page = page_of(config)
    for secret in ("Question 1", "Chosen 1", "Rejected 1", "because", "alert(1)", "001:text"):
        assert secret not in text
    assert not page.of("img")
    assert "left out of this page" in page.text and "Better than the base model" in page.text


def test_many_large_images_stay_below_the_size_limit(tmp_path: Path) -> None:
    config = config_of(tmp_path, "report.gallery=200")
    build_run(config, side=400, count=120)
    text, page = page_of(config)
    assert len(text.encode()) < 3_000_000
    assert "images were left out to keep this page small" in words(page.text)


def test_missing_parts_are_said_in_a_sentence(tmp_path: Path) -> None:
    config = config_of(tmp_path, "control.enabled=false")
    run = RunFolder(config.run.folder)
    StageRunner("ingest", run.samples, config).finish(rows_in=5, rows_out=4, dropped={})
    _, page = page_of(config)
    shown = words(page.text)
    for sentence in (
        "have not been evaluated",
        "have not been scored",
        "has not been aligned",
        "There is no text pair to show",
        "There is no visual pair to show",
        "Not run yet: curate, score, align, evaluate",
        "does not add up",
    ):
        assert sentence in shown, sentence
    assert not (tmp_path / "align").exists(), "reporting creates no folder of another stage"


def test_no_control_and_an_unreadable_image(tmp_path: Path) -> None:
    config = config_of(tmp_path, "control.enabled=false")
    build_run(config)
    summary = {**SUMMARY, "difference_to_control": {}, "names": {"base": "base", "aligned": "aligned"}}
    storage.write_bytes(tmp_path / "evaluate" / "summary.json", json.dumps(summary).encode())
    (tmp_path / "img" / "a.png").write_bytes(b"no image")
    _, page = page_of(config)
    assert "There is no supervised fine-tuning control in this run" in words(page.text)
    assert "image not available here" in page.text


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing has run"):
        report(config_of(tmp_path))


def test_the_verdict_claims_only_what_intervals_show() -> None:
    def tone(**difference: dict[str, float]) -> str:
        found = verdict.compare(difference, other="b", other_is="the base model", confidence=0.95)
        assert found is not None
        return found.tone

    assert tone(a=estimate(0.1)) == "better"
    assert tone(a=estimate(-0.1)) == "worse"
    assert tone(a=estimate(0.02)) == tone(a=estimate(-0.02)) == tone(a=estimate(0.03, 0.03)) == "open"
    assert tone(a=estimate(0.1), b=estimate(-0.1)) == "mixed"
    assert tone(a=estimate(0.01), a_official=estimate(0.9)) == "open"
    nothing = {"a": {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}}
    assert verdict.compare(nothing, other="b", other_is="the base model", confidence=0.95) is None
    assert verdict.label("report_rouge_l") == "report ROUGE-L"
    assert verdict.label("open_f1") == "open F1"


def build_chain(config: Config) -> None:
    """The manifests of a run whose stages have all finished, and a summary."""
    run = RunFolder(config.run.folder)
    chain = [
        run.samples,
        run.pairs,
        run.scored,
        run.prepared,
        str(run.align()),
        str(run.model()),
        run.evaluate,
    ]
    for before, folder in zip([None, *chain], chain, strict=False):
        settings = config.align.beta if folder == str(run.align()) else 0
        inputs = [before] if before else []
        StageRunner("s", folder, config, settings=[settings], inputs=inputs).finish(rows_in=1, rows_out=1)
    storage.write_bytes(storage.join(run.evaluate, "summary.json"), json.dumps(SUMMARY).encode())


def test_scores_of_an_earlier_model_are_not_shown(tmp_path: Path) -> None:
    config = config_of(tmp_path, "align.beta=0.1")
    build_chain(config)
    _, page = page_of(config)
    assert "Better than the base model" in words(page.text) and "stale" not in page.text.lower()
    run = RunFolder(config.run.folder)
    later = config_of(tmp_path, "align.beta=0.7")
    StageRunner("s", str(run.align()), later, settings=[0.7], inputs=[run.prepared]).finish()
    for verb, stale in (("export", "model"), ("evaluate", "evaluate")):
        _, page = page_of(later)
        shown = words(page.text)
        assert (
            f"The scores are out of date and are not shown: {tmp_path}/{stale} was made from another align/"
            in shown
        )
        assert f"mmedpo {verb}, then the stages after it" in shown and "evaluate (stale)" in shown
        assert "Better than the base model" not in shown and "70.0" not in shown
        if verb == "export":
            StageRunner("s", str(run.model()), later, settings=[0], inputs=[str(run.align())]).finish()


def test_settings_are_those_that_the_tables_were_made_with(tmp_path: Path) -> None:
    build_chain(config_of(tmp_path, "align.beta=0.625", "score.max_rounds=3", "run.seed=7"))
    text, _ = page_of(config_of(tmp_path, "align.beta=0.875", "report.gallery=3", "model.path=/typo"))
    assert "beta: 0.625" in text and "0.875" not in text and "max_rounds: 3" in text
    assert "seed 7" in text and "gallery: 3" in text and "/typo" not in text


def test_findings_about_earlier_pairs_are_not_shown(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    build_chain(config)
    run = RunFolder(config.run.folder)
    audit = {"rows": 4321, "findings": [], "passed": [], "not_checked": []}
    audit["inputs"] = lineage.identities(run.root, [run.samples, run.scored])
    storage.write_bytes(run.audit, json.dumps(audit).encode())
    assert "4,321 scored pairs" in words(page_of(config)[1].text)
    StageRunner("s", run.scored, config, settings=[1], inputs=[run.pairs]).finish()
    shown = words(page_of(config)[1].text)
    assert "4,321" not in shown and "have not been audited since they were last made" in shown
