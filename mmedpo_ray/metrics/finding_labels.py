"""What a chest report says about CheXpert's 14 observations: present, absent, uncertain, or nothing.

A rule labeller after CheXpert (Irvin et al. 2019) and NegEx (Chapman et al. 2001): phrases that mention an
observation, and cues before and after them in the same clause. It reads findings without the lexicon that
makes rejected answers, so an error there is not repeated here. English only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mmedpo_ray.metrics.base import Answer, Array, Metric, per_answer
from mmedpo_ray.radiology.lexicon import final_answer

Status = Literal["positive", "negative", "uncertain"]

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

# Observation → phrases that mention it.
_PHRASES = {
    "Enlarged Cardiomediastinum": (
        r"(?:widen(?:ed|ing)|enlarged|enlargement"
        r"|prominen\w+)(?: of)?(?: the)? (?:superior )?(?:cardio-?)?mediastin\w+"
        r"|(?:cardio-?)?mediastin\w+(?: contours?| silhouette)? (?:(?:is|are|appears?) )?(?:mildly "
        r"|markedly )?"
        r"(?:widen(?:ed|ing)|enlarged|enlargement|prominent)"
    ),
    "Cardiomegaly": (
        r"cardiomegaly|enlarged (?:heart|cardiac \w+|cardiac)|cardiac enlargement"
        r"|enlargement of the (?:heart|cardiac \w+)"
        r"|(?:heart|cardiac silhouette|heart size|cardiac size)(?: size)? (?:(?:is|appears"
        r"|remains) )?(?:\w+ly )?"
        r"(?:enlarged|large|increased)"
    ),
    "Lung Opacity": (
        r"opaci\w+|infiltrat\w+|air-?space disease|interstitial (?:marking|pattern|thickening|prominence)\w*"
        r"|haz(?:e|iness)|scarring"
    ),
    "Lung Lesion": (
        r"(?:lung |pulmonary )?(?:nodul\w+|mass(?:es)?(?! effect)|tumou?rs?|neoplasms?|cavit\w+"
        r"|granulomas?|metastas[ei]s)"
    ),
    "Edema": r"o?edema|(?:pulmonary )?vascular congestion|heart failure|chf|kerley b lines"
    r"|vascular redistribution",
    "Consolidation": r"consolidat\w+",
    "Pneumonia": r"pneumonia|bronchopneumonia|infectious process|infection",
    "Atelectasis": r"atelecta\w+|(?:lobe|lobar|lung|volume) collapse|collapse of the|volume loss",
    "Pneumothorax": r"pneumothora\w+|hydropneumothorax",
    "Pleural Effusion": (
        r"effusions?|pleural fluid|hydrothorax|hydropneumothorax|blunting of the (?:\w+ )?costophrenic"
    ),
    "Pleural Other": (
        r"pleural (?:thickening|plaques?|calcifications?|scarring)|fibrothorax"
        r"|(?:bi-?)?apical (?:pleural )?capping"
    ),
    "Fracture": r"fractur\w+",
    SUPPORT_DEVICES: (
        r"(?:endotracheal|nasogastric|orogastric|ng|et|chest|enteric|feeding|tracheostomy"
        r"|drainage) tubes?|picc\w*|catheters?"
        r"|pacemakers?|pacer|icd|defibrillators?|(?:central|subclavian|jugular) (?:venous )?lines?"
        r"|port-?a-?cath|sternal wires"
        r"|leads?|stents?|prosthe\w+|valve replacement"
    ),
}
OBSERVATIONS = (NO_FINDING, *_PHRASES)
_MENTIONS = {name: re.compile(rf"\b(?:{phrase})\b") for name, phrase in _PHRASES.items()}
# Sentences that deny an observation without a word for it.
_NORMAL = (
    r"(?:\w+ly )?(?:normal|unremarkable|within normal limits|not enlarged|not widened|stable and normal)"
)
_DENIALS = {
    "Cardiomegaly": re.compile(
        rf"\b(?:heart|cardiac (?:silhouette|size|shadow|contours?))(?: size)?(?: and \w+)*(?: (?:is"
        rf"|are|appears?|remains?|of))? {_NORMAL}"
        rf"|\b(?:normal|unremarkable) (?:heart|cardiac|cardiomediastinal)\b"
        rf"|\bcardiomediastinal \w+ (?:is|are) {_NORMAL}"
    ),
    "Enlarged Cardiomediastinum": re.compile(
        rf"\b(?:cardio)?mediastin\w+(?: (?:contours?|silhouette))?(?: and \w+)*(?: (?:is|are|appears?"
        rf"|remains?))? {_NORMAL}"
        r"|\b(?:normal|unremarkable) (?:cardio)?mediastin\w+"
    ),
    "Lung Opacity": re.compile(
        r"\b(?:lungs?|lung fields|lung bases)(?: \w+)?(?: (?:is|are|appears?|remains?))? (?:grossly "
        r"|otherwise )?clear\b|\bclear lungs?\b"
    ),
    "Fracture": re.compile(
        r"\b(?:bones|osseous structures|bony \w+|ribs)(?: \w+)? (?:are|is) (?:intact|unremarkable|normal)"
    ),
}
# Beside a mention these make it another thing.
_NO_MENTION = re.compile(
    r"\b(?:history of|rule out|r/o|evaluate for|assess for|indication:?|evaluation of|query)\b"
)

_UNCERTAIN_BEFORE = re.compile(
    r"\b(?:possib\w+|probabl\w+|may|might|could|suspicio\w+ (?:for|of)|suspected|suspect"
    r"|suggest\w*|likely|concern\w*(?: for)?"
    r"|question\w*|equivocal|cannot (?:exclude|rule out)|can ?not (?:exclude|rule out)"
    r"|can't exclude|not exclude|difficult to exclude"
    r"|versus|vs|or less likely|differential|borderline|presumed|consider|compatible with|if any"
    r"|unclear whether|not certain)(?!\w)"
)
_UNCERTAIN_AFTER = re.compile(
    r"\b(?:(?:cannot|can ?not|can't|could not) be (?:entirely |completely )?(?:excluded"
    r"|ruled out)|(?:is|are|was) not (?:entirely )?excluded|not excluded"
    r"|(?:is|are) (?:possible|suspected|questioned|not certain)|(?:is"
    r"|are) (?:a )?(?:consideration|concern)|may be present|versus|vs"
    r"|(?:should|could) be considered|is likely|are likely|possible\b)|^ ?\?"
)
_NEGATED_BEFORE = re.compile(
    r"\b(?:no|without|free of|negative for|absence of|absent|not (?:see|show|demonstrate|identify"
    r"|have|reveal|contain)|neither|nor|never|none of"
    r"|(?:resolution|clearing|removal) of|resolved|denies|rather than|fails? to (?:show|reveal)"
    r"|(?:do|does|did|is|are|has|have|was|were)(?: not|n't))(?!\w)"
)
_NEGATED_AFTER = re.compile(
    r"\b(?:(?:is|are|was|were|has been|have been) (?:not|no longer) (?:seen|identified|present"
    r"|visualized|evident|detected|noted|appreciated|visible)"
    r"|(?:not|no longer) (?:seen|identified|present|visualized|evident|visible)|(?:is|are) absent"
    r"|(?:has|have)(?: completely| now)? (?:resolved|cleared)"
    r"|(?:is|are|was|were)(?: now)? (?:resolved|excluded|ruled out)|(?:has|have) been (?:excluded"
    r"|ruled out|removed))\b|^: ?(?:no|none|negative|absent)\b"
)
_SENTENCES = re.compile(r"(?<!\d)\.(?!\d)|\.(?=\s|$)|[;\n!]")
_CLAUSES = re.compile(
    r"\b(?:but|however|although|though|except|apart from|aside from|other than|whereas|while"
    r"|which|with (?!no\b)(?=\w+ \w+)|(?<!whether )there (?:is|are)|causing)\b"
    r"|,(?= (?:and )?(?:the |a |an |there |\w+ )?\w+ (?:is|are|has|have|shows?|appears?) )"
    r"|\band (?:a|an|the|there|new|stable|small|mild|unchanged|basal|basilar|bibasilar|bibasal)\b"
)
_SIDES = {
    "left": re.compile(
        r"\b(?:left|left-sided|leftsided|lingula\w*|bilateral\w*|bibasilar|bibasal|biapical|both)\b"
    ),
    "right": re.compile(r"\b(?:right|right-sided|rightsided|bilateral\w*|bibasilar|bibasal|biapical|both)\b"),
}
_ZONES = {
    "upper": re.compile(r"\b(?:upper|apex|apices|apical|biapical|suprahilar)\b"),
    "middle": re.compile(r"\b(?:middle|mid|midlung|perihilar|hilar)\b"),
    "lower": re.compile(
        r"\b(?:lower|base|bases|basal|basilar|bibasilar|bibasal|retrocardiac|infrahilar|costophrenic)\b"
    ),
}


@dataclass(frozen=True)
class Label:
    """What a text says about an observation.

    Attributes:
        status: positive, negative or uncertain; one that is not mentioned has no label.
        sides: left, right or both, where a positive mention names them.
        zones: upper, middle, lower, likewise.
    """

    status: Status
    sides: frozenset[str] = field(default=frozenset())
    zones: frozenset[str] = field(default=frozenset())


def labels(text: str) -> dict[str, Label]:
    """The labels of a report; an observation that it does not mention (blank) is absent.

    Of several mentions a positive one counts before an uncertain one, that before a negative one.
    "No Finding" is positive if the text says something and nothing but support devices is positive or
    uncertain.
    """
    found: dict[str, Label] = {}
    for sentence in _SENTENCES.split(text.lower().replace("’", "'")):
        for name, label in _of_sentence(" ".join(sentence.split())):
            found[name] = _stronger(found.get(name), label)
    if any(letter.isalpha() for letter in text) and all(
        label.status == "negative" or name == SUPPORT_DEVICES for name, label in found.items()
    ):
        found[NO_FINDING] = Label("positive")
    return found


def _of_sentence(sentence: str) -> Iterator[tuple[str, Label]]:
    """Observation and label of every mention in a sentence in lower case."""
    for name, denial in _DENIALS.items():
        if denial.search(sentence):
            yield name, Label("negative")
    cuts = [match.start() for match in _CLAUSES.finditer(sentence)]
    for name, pattern in _MENTIONS.items():
        for match in pattern.finditer(sentence):
            start = max((cut for cut in cuts if cut < match.start()), default=0)
            stop = min((cut for cut in cuts if cut >= match.end()), default=len(sentence))
            before, after = sentence[start : match.start()], sentence[match.end() : stop]
            if _NO_MENTION.search(before):
                continue
            status = _status(before, after)
            where = sentence[start:stop]
            yield (
                name,
                Label(status, _named(_SIDES, where), _named(_ZONES, where))
                if status == "positive"
                else Label(status),
            )


def _status(before: str, after: str) -> Status:
    # "Cannot exclude" and "not excluded" hold a negation, so doubt is looked for first; "no suspicious mass"
    # is a denial all the same.
    doubt = _UNCERTAIN_BEFORE.search(before)
    negated = _NEGATED_BEFORE.search(before)
    if _UNCERTAIN_AFTER.search(after):
        return "uncertain"
    if doubt and not (negated and negated.end() <= doubt.start()):
        return "uncertain"
    if negated and not re.search(r"\bno (?:significant |interval )?change\b|\bnot only\b", before):
        return "negative"
    return "negative" if _NEGATED_AFTER.search(after) else "positive"


def _stronger(known: Label | None, label: Label) -> Label:
    order: tuple[Status, ...] = ("negative", "uncertain", "positive")
    if known is None or order.index(label.status) > order.index(known.status):
        return label
    if known.status == label.status:
        return Label(known.status, known.sides | label.sides, known.zones | label.zones)
    return known


def _named(words: Mapping[str, re.Pattern[str]], text: str) -> frozenset[str]:
    return frozenset(name for name, pattern in words.items() if pattern.search(text))


# How the labels of an answer and of its reference can stand to each other; one a finding and answer.
OUTCOMES = (
    "supported",
    "contradicted",
    "unmentioned",
    "omitted",
    "denied",
    "side_wrong",
    "zone_wrong",
    "uncertain",
)


def outcomes(prediction: str, reference: str) -> dict[str, str]:
    """How an answer's findings stand to those of the reference, by observation.

    Returns:
        supported: both assert it, and no side or zone disagrees; side_wrong, zone_wrong: they name others.
        contradicted: the answer asserts what the reference denies; unmentioned: what it does not speak of.
        omitted: the answer does not speak of what the reference asserts; denied: it denies it. uncertain:
        either side is uncertain, and the other is not silent or denying with it. Observations that neither
        asserts are absent, as is "No Finding".
    """
    said, expected = labels(prediction), labels(reference)
    found = {}
    for name in OBSERVATIONS[1:]:
        outcome = _outcome(said.get(name), expected.get(name))
        if outcome is not None:
            found[name] = outcome
    return found


def finding_figures(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """How often each outcome occurs, by observation; only what occurs. See :func:`outcomes`."""
    counted: dict[str, Counter[str]] = {}
    for answer in answers:
        for name, outcome in outcomes(final_answer(answer.prediction), answer.reference).items():
            counted.setdefault(name, Counter())[outcome] += 1
    return {
        name: {outcome: counted[name][outcome] for outcome in OUTCOMES if counted[name][outcome]}
        for name in OBSERVATIONS
        if name in counted
    }


_HALLUCINATED = ("contradicted", "unmentioned", "side_wrong", "zone_wrong")


def _supported_of_asserted(answer: Answer) -> Array:
    """Findings asserted and right, findings asserted; (2,). Uncertain ones are in neither."""
    found = Counter(outcomes(final_answer(answer.prediction), answer.reference).values())
    return np.array(
        [found["supported"], found["supported"] + sum(found[name] for name in _HALLUCINATED)], np.float64
    )


def _supported_of_expected(answer: Answer) -> Array:
    """Findings of the reference that the answer asserts rightly, and all of them; (2,)."""
    found = Counter(outcomes(final_answer(answer.prediction), answer.reference).values())
    missed = sum(found[name] for name in ("omitted", "denied", "side_wrong", "zone_wrong"))
    return np.array([found["supported"], found["supported"] + missed], np.float64)


SUPPORTED = Metric(
    "report_findings_supported",
    "report findings asserted that the reference supports",
    "report",
    per_answer(_supported_of_asserted),
    role="detail",
)
RECALLED = Metric(
    "report_findings_recalled",
    "report findings of the reference that are asserted",
    "report",
    per_answer(_supported_of_expected),
    role="detail",
)


def _outcome(said: Label | None, expected: Label | None) -> str | None:
    if "uncertain" in (said.status if said else None, expected.status if expected else None):
        return "uncertain"
    if said and said.status == "positive":
        if not expected:
            return "unmentioned"
        if expected.status == "negative":
            return "contradicted"
        if said.sides and expected.sides and not said.sides & expected.sides:
            return "side_wrong"
        disagrees = said.zones and expected.zones and not said.zones & expected.zones
        return "zone_wrong" if disagrees else "supported"
    if expected and expected.status == "positive":
        return "denied" if said else "omitted"
    return None
