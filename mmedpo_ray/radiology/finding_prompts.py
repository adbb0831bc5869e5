"""What a visual tool looks for: the finding that a question and its answer are about.

    prompt_for("Is there a pleural effusion?", "Yes", settings)      -> "pleural effusion"
    prompt_for("What is wrong with this image?", "Pneumothorax", …)  -> "pneumothorax"
    prompt_for("Is this a CT?", "No", settings)                      -> settings.generic_prompt

Reads the text with the radiology lexicon; no model, the same text always gives the same prompt.
"""

from __future__ import annotations

import re

from mmedpo_ray.curate.settings import VisualCurationConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.radiology.lexicon import facts
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS

# What MedKLIP was trained to answer, in the order of its official list.
_OBSERVATION_NAMES = """
normal clear sharp sharply unremarkable intact stable free effusion opacity pneumothorax edema atelectasis tube consolidation process
abnormality enlarge tip low pneumonia line congestion catheter cardiomegaly fracture air tortuous lead disease calcification prominence
device engorgement picc clip elevation expand nodule wire fluid degenerative pacemaker thicken marking scar hyperinflate blunt loss widen
collapse density emphysema aerate mass crowd infiltrate obscure deformity hernia drainage distention shift stent pressure lesion finding
borderline hardware dilation chf redistribution aspiration tail_abnorm_obs excluded_obs
"""
OBSERVATIONS: tuple[str, ...] = tuple(_OBSERVATION_NAMES.split())
GENERIC_OBSERVATION = "disease"

# A yes or no that stands alone before the statement: no negation of what follows.
_POLARITY = re.compile(r"^\W*(?:yes|no)\s*[,.;:]", re.IGNORECASE)
# Findings of the lexicon under another name than MedKLIP's. What is in neither list is asked for as "disease".
_OBSERVATION_OF_FINDING = {
    "pleural effusion": "effusion",
    "pulmonary edema": "edema",
    "pneumoperitoneum": "air",
    "rib fracture": "fracture",
    "mediastinal widening": "widen",
    "cancer": "mass",
    "endotracheal tube": "tube",
    "nasogastric tube": "tube",
    "chest tube": "tube",
    "central line": "line",
    "sternal wires": "wire",
}
# Words for observations that the lexicon has no finding for, tried in this order.
_OBSERVATION_OF_WORD: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"\b(?:{pattern})", re.IGNORECASE), observation)
    for pattern, observation in (
        (r"pulmonary vascular congestion|congest(?:ion|ed)\b", "congestion"),
        (r"(?:congestive )?heart failure\b|chf\b", "chf"),
        (r"aspirat(?:ion|ed)\b", "aspiration"),
        (r"hyper-?(?:inflat|expan)(?:ed|ion)", "hyperinflate"),
        (r"blunt(?:ed|ing)?\b", "blunt"),
        (r"thicken(?:ed|ing)?\b", "thicken"),
        (r"scar(?:s|red|ring)?\b", "scar"),
        (r"widen(?:ed|ing)\b", "widen"),
        (r"mediastinal shift|shift(?:ed)? of the mediastinum", "shift"),
        (r"elevat(?:ed|ion)\b", "elevation"),
        (r"tortuous|tortuosity", "tortuous"),
        (r"degenerative|spondylosis", "degenerative"),
        (r"deformity|scoliosis|kyphosis", "deformity"),
        (r"engorge(?:d|ment)\b", "engorgement"),
        (r"disten(?:ded|tion|sion)\b", "distention"),
        (r"dilat(?:ed|ion|ation)\b", "dilation"),
        (r"enlarge(?:d|ment)\b", "enlarge"),
        (r"fibrosis|fibrotic", "tail_abnorm_obs"),
        (r"picc\b", "picc"),
        (r"catheters?\b", "catheter"),
        (r"stents?\b", "stent"),
        (r"(?:surgical )?clips?\b", "clip"),
        (r"hardware|prosthes[ie]s|implants?\b", "hardware"),
        (r"devices?\b", "device"),
        (r"tubes?\b", "tube"),
        (r"infiltrat(?:e|es|ion|ive)\b", "infiltrate"),
        (r"densit(?:y|ies)\b", "density"),
        (r"lesions?\b", "lesion"),
    )
)

# What asks for any finding, names of conditions by their ending, and what may be wrong with an organ.
_LIKE_A_FINDING = re.compile(
    r"\b(?:(?:ab)?normal|(?:un)?healthy|disease|patholog|anomal|wrong with|finding|diagnos|"
    r"\w{3,}(?:itis|osis|oma|omas|emia|emias|ectasis|pathy|rrhage)\b|"
    r"ischemi|infarct|injur|trauma|swell|swollen|(?:o?edema)|deviat|midline\b|stranding|intubat|foreign bod|silhouett|lucen|plaque|"
    r"obstruct|perforat|ruptur|dissect|aneurysm|stenos|herniat|thromb|clot|compress|flatten|collaps|attenuat|enhanc(?:ing|ement)|"
    r"air.fluid|free (?:air|fluid)|hypo-?dens|hyper-?dens)|"
    + "|".join(pattern.pattern for pattern, _ in _OBSERVATION_OF_WORD),
    re.IGNORECASE,
)


def names_finding(question: str, answer: str) -> bool:
    """Whether question or answer name a finding, or ask for any ("Is this image normal?"): what noise on a lesion can hide.

    Wider than :func:`finding_asked`: also what has the form of a finding's name, without being one of the lexicon's.
    """
    texts = (question, answer)
    return any(facts(text) for text in texts) or any(_LIKE_A_FINDING.search(text) for text in texts)


def finding_asked(question: str, answer: str) -> str | None:
    """The finding that question and answer are about, by its name in the lexicon; None where they name none.

    A finding that the answer affirms comes first ("No. There is an effusion."), then one that the question names (the answer
    is yes, no or a place). Of several the clinically most relevant, then the first.
    """
    affirmed = [fact.finding for fact in facts(_POLARITY.sub("", answer)) if fact.present]
    for names in (affirmed, [fact.finding for fact in facts(question)]):
        # "Abnormality" and the like, which the lexicon counts as facts, name no finding.
        named = [name for name in names if name in CONCEPTS]
        if named:
            return max(named, key=lambda name: CONCEPTS[name].relevance)
    return None


def prompt_for(question: str, answer: str, settings: VisualCurationConfig) -> str:
    """The prompt for a tool that takes free text; never empty.

    Raises:
        UserError: ``curate.visual.generic_prompt`` is empty.
    """
    generic = _generic(settings)
    if settings.prompt == "generic":
        return generic
    return finding_asked(question, answer) or generic


def observation_for(question: str, answer: str, settings: VisualCurationConfig) -> str:
    """The one of MedKLIP's 75 observations to ask for; "disease" where none fits.

    Raises:
        UserError: ``curate.visual.generic_prompt`` is empty.
    """
    generic = _generic(settings).lower()
    fallback = _known(generic) or GENERIC_OBSERVATION
    if settings.prompt == "generic":
        return fallback
    finding = finding_asked(question, answer)
    if finding is not None and (observation := _known(finding)):
        return observation
    for text in (answer, question):
        for pattern, observation in _OBSERVATION_OF_WORD:
            if pattern.search(text):
                return observation
    return fallback


def _known(name: str) -> str | None:
    name = _OBSERVATION_OF_FINDING.get(name, name)
    return name if name in OBSERVATIONS else None


def _generic(settings: VisualCurationConfig) -> str:
    generic = settings.generic_prompt.strip()
    if not generic:
        raise UserError(
            "curate.visual.generic_prompt is empty; set it to the word that a tool looks for where no finding is named, "
            "such as disease."
        )
    return generic
