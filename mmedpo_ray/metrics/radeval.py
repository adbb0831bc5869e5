"""Clinical scores of reports by trained models, from RadEval (``pip install mmedpo-ray[radeval]``).

- RadGraph F1 (Delbrouck et al., 2022, arXiv 2210.12186): entities and whether they stand in a relation,
  RadGraph-XL, level "partial".
- CheXbert F1 (Smit et al., 2020, arXiv 2004.09167): micro-averaged over the 14 CheXpert labels, uncertain
  counted as present.
- RaTEScore (Zhao et al., 2024, arXiv 2406.16845): similarity of entities by their embeddings.

Each needs weights from the Hugging Face hub: in its cache, or downloaded on first use unless HF_HUB_OFFLINE
is set. A metric whose weights or package are missing is left out, with a message. The models read English
chest reports; they have no meaning for other answers.

RadEval's own adapters are not used, for three reasons found in 2.2.1: they ask for CUDA on machines without,
they give the CheXbert score of a whole set only, and in RaTEScore an empty or very short answer shifts the
pairs of all later ones. Empty answers score 0 here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from mmedpo_ray.metrics.base import Answer, Array, Metric, UnavailableError, as_means, is_empty, micro_f1


def installed() -> str | None:
    """The version of RadEval, if it is installed."""
    if importlib.util.find_spec("radeval") is None:
        return None
    try:
        return importlib.metadata.version("radeval")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def radgraph(answers: Sequence[Answer], _references: Sequence[str]) -> Array:
    """Statistics of RadGraph F1, (N, 2).

    Raises:
        UnavailableError: RadEval or the weights are missing.
    """
    scorer = _load(
        "RadGraph F1", "radgraph", "StanfordAIMI/RRG_scorers (radgraph-xl.tar.gz) and its BERT", _radgraph
    )

    def score(kept: list[Answer]) -> Sequence[float]:
        # Entities are compared with their case, so that what begins a sentence would be another finding.
        expected, said = [a.reference.lower() for a in kept], [a.prediction.lower() for a in kept]
        _, (_, partial, _), *_ = scorer(refs=expected, hyps=said)
        return partial

    return _scored(answers, score)


def chexbert(answers: Sequence[Answer], _references: Sequence[str]) -> Array:
    """Statistics of CheXbert F1: labels of both sides, the answer alone, the reference alone, and 1; (N, 4).

    Raises:
        UnavailableError: RadEval or the weights are missing.
    """
    scorer = _load(
        "CheXbert F1",
        "f1chexbert.f1chexbert",
        "StanfordAIMI/RRG_scorers (chexbert.pth) and bert-base-uncased",
        _chexbert,
    )
    with _quiet():
        expected = np.array(scorer.get_labels([answer.reference for answer in answers]), dtype=bool)
        said = np.array(scorer.get_labels([answer.prediction or "." for answer in answers]), dtype=bool)
    said[[is_empty(answer.prediction) for answer in answers]] = False
    labels = [said & expected, said & ~expected, expected & ~said]
    return np.stack([*(label.sum(axis=1) for label in labels), np.ones(len(answers))], axis=1)


def chexbert_value(sums: Array) -> Array:
    """Micro-averaged F1; 0 if neither side has a label, as scikit-learn gives it."""
    return micro_f1(sums, empty=0.0)


def ratescore(answers: Sequence[Answer], _references: Sequence[str]) -> Array:
    """Statistics of RaTEScore, (N, 2).

    Raises:
        UnavailableError: RadEval or the weights are missing.
    """
    scorer = _load(
        "RaTEScore",
        "RaTEScore.scorer",
        "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C",
        _ratescore,
    )

    def score(answer: Answer) -> float:
        # One pair a call: RadEval 2.2.1 leaves out texts without a sentence of three characters, and all
        # later pairs shift.
        try:
            found = scorer.compute_score([answer.prediction], [answer.reference])[0]
        except IndexError:
            found = []
        return float(found[0]) if len(found) == 1 else 0.0

    return _scored(answers, lambda kept: [score(answer) for answer in kept])


def _scored(answers: Sequence[Answer], score: Callable[[list[Answer]], Sequence[float]]) -> Array:
    """Scores of the answers that say something, 0 for the others."""
    kept = [index for index, answer in enumerate(answers) if not is_empty(answer.prediction)]
    scores = np.zeros(len(answers))
    if kept:
        with _quiet():
            scores[kept] = [float(value) for value in score([answers[index] for index in kept])]
    return as_means(scores.tolist())


# ---------------------------------------------------------------------- loading


def _radgraph(module: Any) -> Any:
    return module.F1RadGraph(reward_level="all", model_type="radgraph-xl")


def _chexbert(module: Any) -> Any:
    return module.F1CheXbert(device="cuda" if module.torch.cuda.is_available() else "cpu")


def _ratescore(module: Any) -> Any:
    return module.RaTEScore()


@cache
def _load(label: str, module: str, weights: str, build: Callable[[Any], Any]) -> Any:
    """A scorer of RadEval; kept, since its model takes long to load."""
    if installed() is None:
        # An extra that is not installed needs no message.
        raise UnavailableError("")
    with _quiet():
        try:
            # RadEval 2.2.1 imports parts of its RadGraph by the name RadEval, which only a file system that
            # ignores case knows.
            sys.modules.setdefault("RadEval", importlib.import_module("radeval"))
            found = importlib.import_module(f"radeval.metrics.{module}")
        except Exception as error:
            # Compiled parts of another numpy raise a ValueError.
            lacking = (
                f"has no module {error.name}"
                if isinstance(error, ModuleNotFoundError)
                else type(error).__name__
            )
            raise UnavailableError(
                f"{label} is left out: RadEval's {module} cannot be imported here ({lacking}); see "
                "docs/how-to/evaluate.md"
            ) from error
        try:
            return build(found)
        except Exception as error:
            # RadEval raises a bare Exception if a file is missing.
            why = (
                "the cache lacks them and HF_HUB_OFFLINE is set" if _offline() else "they could not be loaded"
            )
            raise UnavailableError(
                f"{label} is left out: it needs the weights {weights} from the Hugging Face hub, and {why} "
                f"({type(error).__name__})"
            ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps RadEval's prints out of stdout, where --json may write, and prevents downloads if offline."""
    import nltk

    download = nltk.download
    if _offline():
        nltk.download = lambda *_, **__: False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        nltk.download = download


RADGRAPH_F1 = Metric("report_radgraph_f1", "report RadGraph F1", "report", radgraph)
CHEXBERT_F1 = Metric("report_chexbert_f1", "report CheXbert F1", "report", chexbert, chexbert_value)
RATESCORE = Metric("report_ratescore", "report RaTEScore", "report", ratescore)
