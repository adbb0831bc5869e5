"""Scores of answers, each as sums that can be added over images.

A metric turns one answer into a few numbers (its *statistics*: hits and trials, n-gram matches, …) and the
sum of these over any set of answers into a value. So the same code gives the value of the whole test set and
of every bootstrap resample of it, also for scores that are no means (BLEU of a corpus, micro-averaged F1).

    metric = METRICS["closed_accuracy"]
    metric.value(metric.of(answers).sum(axis=0))

The ``*_official`` metrics repeat the rules of the paper's scripts, only for comparison with published
figures: a substring rule for closed questions ("no" is in "normal") and a recall that counts repeated words.

A new metric is a file with a :class:`~mmedpo_ray.metrics.base.Metric` and a line here, or an entry point of
another package.
"""

from __future__ import annotations

from typing import Any

from mmedpo_ray.metrics.base import Answer, Metric, UnavailableError
from mmedpo_ray.plugins import Registry

__all__ = ["METRICS", "Answer", "Metric", "UnavailableError", "at_hand"]

METRICS = Registry(
    "metric",
    "mmedpo_ray.metrics",
    {
        "closed_accuracy": "mmedpo_ray.metrics.closed_questions:CLOSED_ACCURACY",
        "open_exact": "mmedpo_ray.metrics.open_questions:EXACT_MATCH",
        "open_f1": "mmedpo_ray.metrics.open_questions:TOKEN_F1",
        "report_finding_f1": "mmedpo_ray.metrics.report:FINDING_F1",
        "report_findings_supported": "mmedpo_ray.metrics.finding_labels:SUPPORTED",
        "report_findings_recalled": "mmedpo_ray.metrics.finding_labels:RECALLED",
        "report_radgraph_f1": "mmedpo_ray.metrics.radeval:RADGRAPH_F1",
        "report_chexbert_f1": "mmedpo_ray.metrics.radeval:CHEXBERT_F1",
        "report_ratescore": "mmedpo_ray.metrics.radeval:RATESCORE",
        "report_rouge_l": "mmedpo_ray.metrics.report:ROUGE_L",
        "report_meteor": "mmedpo_ray.metrics.meteor:METEOR",
        "report_meteor_exact": "mmedpo_ray.metrics.meteor:METEOR_EXACT",
        "report_cider": "mmedpo_ray.metrics.cider:CIDER",
        "report_bleu": "mmedpo_ray.metrics.report:BLEU",
        "report_bleu_sentence": "mmedpo_ray.metrics.sentence_bleu:BLEU_MEAN",
        "report_bleu1": "mmedpo_ray.metrics.sentence_bleu:BLEU_1",
        "report_bleu2": "mmedpo_ray.metrics.sentence_bleu:BLEU_2",
        "report_bleu3": "mmedpo_ray.metrics.sentence_bleu:BLEU_3",
        "report_bleu4": "mmedpo_ray.metrics.sentence_bleu:BLEU_4",
        "closed_accuracy_official": "mmedpo_ray.metrics.official:CLOSED_ACCURACY",
        "open_recall_official": "mmedpo_ray.metrics.official:RECALL",
    },
)


def at_hand() -> dict[str, Any]:
    """What decides which metrics this machine can compute; scores change when it does."""
    from mmedpo_ray.metrics import meteor, radeval

    return {
        "metrics": sorted(METRICS),
        "wordnet": meteor.wordnet_found(),
        "radeval": radeval.installed(),
    }
