"""Scores of answers, each as sums that can be added over images.

A metric turns one answer into a few numbers (its *statistics*: hits and trials, n-gram matches, …) and the sum of these
over any set of answers into a value. So the same code gives the value of the whole test set and of every bootstrap
resample of it, also for scores that are no means (BLEU of a corpus, micro-averaged F1).

    metric = METRICS["closed_accuracy"]
    metric.value(sum(metric.statistics(answer) for answer in answers))

The ``*_official`` metrics repeat the rules of the paper's scripts for comparison with published figures only: a substring
rule for closed questions ("no" is in "normal") and a recall that counts repeated words.
"""

from __future__ import annotations

from mmedpo_ray.evaluate.metrics.base import Answer, Metric, mean_of, mean_value
from mmedpo_ray.evaluate.metrics.closed import closed_correct
from mmedpo_ray.evaluate.metrics.official import closed_correct_official, recall_official
from mmedpo_ray.evaluate.metrics.open import exact_match, token_f1
from mmedpo_ray.evaluate.metrics.report import (
    bleu_statistics,
    bleu_value,
    finding_f1_value,
    finding_statistics,
    rouge_l,
)

__all__ = ["METRICS", "Answer", "Metric"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("closed_accuracy", "closed accuracy", "closed", mean_of(closed_correct), mean_value),
        Metric("open_exact", "open exact match", "open", mean_of(exact_match), mean_value),
        Metric("open_f1", "open token F1", "open", mean_of(token_f1), mean_value),
        Metric("report_finding_f1", "report finding F1", "report", finding_statistics, finding_f1_value),
        Metric("report_rouge_l", "report ROUGE-L", "report", mean_of(rouge_l), mean_value),
        Metric("report_bleu", "report BLEU (mean of 1–4)", "report", bleu_statistics, bleu_value),
        Metric(
            "closed_accuracy_official",
            "closed accuracy (official rule)",
            "closed",
            mean_of(closed_correct_official),
            mean_value,
            official=True,
        ),
        Metric(
            "open_recall_official",
            "open recall (official rule)",
            "open",
            mean_of(recall_official),
            mean_value,
            official=True,
        ),
    )
}
