"""Scores of answers, each as sums that can be added over images.

A metric turns one answer into a few numbers (its *statistics*: hits and trials, n-gram matches, …) and the sum of these
over any set of answers into a value. So the same code gives the value of the whole test set and of every bootstrap
resample of it, also for scores that are no means (BLEU of a corpus, micro-averaged F1).

    metric = METRICS["closed_accuracy"]
    metric.value(metric.of(answers).sum(axis=0))

The ``*_official`` metrics repeat the rules of the paper's scripts for comparison with published figures only: a substring
rule for closed questions ("no" is in "normal") and a recall that counts repeated words.
"""

from __future__ import annotations

from typing import Any

from mmedpo_ray.metrics import radeval
from mmedpo_ray.metrics.base import Answer, Metric, UnavailableError, mean_of, mean_value
from mmedpo_ray.metrics.cider import cider
from mmedpo_ray.metrics.closed_questions import closed_correct
from mmedpo_ray.metrics.meteor import meteor, meteor_exact, wordnet_found
from mmedpo_ray.metrics.official import closed_correct_official, recall_official
from mmedpo_ray.metrics.open_questions import exact_match, token_f1
from mmedpo_ray.metrics.report import (
    bleu_statistics,
    bleu_value,
    finding_f1_value,
    finding_statistics,
    rouge_l,
)
from mmedpo_ray.metrics.sentence_bleu import ORDERS, mean_sentence_bleu, sentence_bleu

__all__ = ["METRICS", "Answer", "Metric", "UnavailableError", "at_hand"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("closed_accuracy", "closed accuracy", "closed", mean_of(closed_correct), mean_value),
        Metric("open_exact", "open exact match", "open", mean_of(exact_match), mean_value),
        Metric("open_f1", "open token F1", "open", mean_of(token_f1), mean_value),
        Metric("report_finding_f1", "report finding F1", "report", finding_statistics, finding_f1_value),
        Metric(
            "report_radgraph_f1", "report RadGraph F1", "report", None, mean_value, batch=radeval.radgraph
        ),
        Metric(
            "report_chexbert_f1",
            "report CheXbert F1",
            "report",
            None,
            radeval.chexbert_value,
            batch=radeval.chexbert,
        ),
        Metric("report_ratescore", "report RaTEScore", "report", None, mean_value, batch=radeval.ratescore),
        Metric("report_rouge_l", "report ROUGE-L", "report", mean_of(rouge_l), mean_value),
        Metric("report_meteor", "report METEOR", "report", None, mean_value, batch=meteor),
        Metric(
            "report_meteor_exact",
            "report meteor-exact (no synonyms)",
            "report",
            None,
            mean_value,
            batch=meteor_exact,
        ),
        Metric("report_cider", "report CIDEr (0–10)", "report", None, mean_value, batch=cider),
        Metric("report_bleu", "report BLEU (mean of 1–4)", "report", bleu_statistics, bleu_value),
        Metric(
            "report_bleu_sentence",
            "report BLEU by answer (mean of 1–4)",
            "report",
            mean_of(mean_sentence_bleu),
            mean_value,
            role="detail",
        ),
        *(
            Metric(
                f"report_bleu{order}",
                f"report BLEU-{order} by answer",
                "report",
                mean_of(sentence_bleu(order)),
                mean_value,
                role="detail",
            )
            for order in ORDERS
        ),
        Metric(
            "closed_accuracy_official",
            "closed accuracy (official rule)",
            "closed",
            mean_of(closed_correct_official),
            mean_value,
            role="official",
        ),
        Metric(
            "open_recall_official",
            "open recall (official rule)",
            "open",
            mean_of(recall_official),
            mean_value,
            role="official",
        ),
    )
}


def at_hand() -> dict[str, Any]:
    """What this machine has of the things that decide which metrics can be computed; scores change when it does."""
    return {"metrics": sorted(METRICS), "wordnet": wordnet_found(), "radeval": radeval.installed()}
