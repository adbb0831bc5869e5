"""Words of the vocabulary that mean something else where they stand: "was left in the ward", "body mass index", "middle-aged".

Such a word is no mention: no rule edit changes it, and no reading of facts counts it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# How far back the words before a place are looked at.
_NEAR = 40


class _Sense(NamedTuple):
    """What stands right before, or right after, a word in its other sense; None: nothing does."""

    before: re.Pattern[str] | None
    after: re.Pattern[str] | None


_HANDED = r"[ -]?(?:handed\w*|hander|overs?\b)|[ -](?:hand )?dominan\w+"
_RHYTHM = "rhythm|rate|intervals?|follow-?up|use|basis|pulse|heartbeat|menses|periods|meals?|visits?"
# Spellings → words right before | words right after them (patterns in small letters).
_TABLE: dict[str, tuple[str, str]] = {
    "left|right|left-hand|right-hand": ("", _HANDED),
    "middle|mid": (
        "",
        r"[ -](?:aged?|name|class|school|ground|east\w*|management|\d0s|\d{4}|jan\w*|feb\w*|mar\w*|apr\w*|may|june?|july?|aug\w*|sep\w*|oct\w*|nov\w*|dec\w*|(?:twen|thir|for|fif|six|seven|eigh|nine)ties)\b"
        r"| of (?:the )?(?:night|day|week|month|year|exam\w*|study|procedure|therapy|treatment|chemotherapy|surgery|operation|season|"
        r"winter|summer|conversation|meal|\d{4})\b",
    ),
    "center|centre": (
        "medical|health|cancer|trauma|tertiary|care|burn|surgery|our|another|outside|referral|stroke|imaging|transplant",
        "",
    ),
    "upper|lower|superior|inferior": (
        "mildly|slightly|moderately|markedly|much|somewhat|significantly|even|far|relatively|abnormally|"
        "(?:quality|resolution|results?|performance|accuracy) (?:is|are|was|were)",
        " (?:than|class|doses?|density|attenuation|signal|rates?|values?|numbers?|incidence)| the [\\w ]+, the|"
        " (?:(?:image|picture|diagnostic|overall|technical|soft[- ]tissue|spatial|temporal|clinical|treatment) )?"
        "(?:quality|results?|outcomes?|performance|accuracy|resolution|sensitivity|specificity|survival|detail|contrast)|"
        " to (?:ct|mri?|x-?rays?|radiograph\\w*|ultrasound|pet|conventional|standard|placebo|other|that of)",
    ),
    "top": (
        "",
        r"[ -](?:normal|priority|speed|level|\d+)|(?<=\bon top)(?! of (?:the|this) (?:image|picture|scan|lung|heart))",
    ),
    "bottom": ("", "[ -](?:line|up)"),
    "central": ("", " (?:hospital|stage|role|question|issue)"),
    "base": (
        "skull|cranial|tongue|data",
        " (?:excess|deficit|pairs?|rate)|-pairs?| of (?:the )?(?:skull|tongue|thumb|(?:\\w+ )?(?:metatarsal|metacarpal|phalanx|finger|toe))",
    ),
    "apical": ("", r" (?:impulse|beat|pulse|periodontitis)|[ -](?:two|three|four|[2-5])[ -]chamber"),
    "head": (
        "femoral|humeral|radial|fibular|ulnar|metatarsal|metacarpal|pancreatic|caudate|condylar|mandibular|talar|terminal",
        " of (?:the )?(?:pancreas|femur|humerus|radius|fibula|caudate|mandible|talus|department|bed|epididymis|\\w+ met\\w+)",
    ),
    "mass|masses": (
        "(?<!vertebral )(?<!ciliary )(?<!carotid )body|lean|muscle|fat-free|birth|red cell|atomic|en|critical|"
        "(?:low|reduced|peak|decreased|total) bone",
        " (?:index|indices|spectrometr\\w+|screening|casualt\\w+|gatherings?|vaccination|general hospital|of \\d+ kg|of the \\w+ (?:is|was) \\d+ ?k?g)",
    ),
    "small|large|moderate": (
        "by and",
        " (?:body (?:mass|habitus|size|frame|build|weight)|numbers?|part|extent|proportion|majority|cohort|series|stud(?:y|ies)|trial|"
        "child|children|boy|girl|meal|bore)|(?<=\\bat large)(?! \\w)",
    ),
    "marked": ("", " (?:by|with|on|in|as|at|out|for|off)"),
    "trace": ("no|any|without|to|can|not", " (?:elements?|metals?|the|its)"),
    "massive": ("", " transfusions?"),
    "extensive": (
        "",
        " (?:(?:\\w+ )?history|discussion|experience|work-?up|surgery|search|review|counsel\\w+|testing|training|use)",
    ),
    "normal": ("", " (?:saline|volunteers?|controls?|subjects?|deliver\\w+|vaginal|diet)"),
    "clear": (
        "",
        "[ -](?:cut|cells?)| (?:that|whether|why|history|liquids?|fluids?|urine|sputum|margins?|consciousness)",
    ),
    "acute": ("", " (?:angles?|care|ward|hospital|margin\\w*|setting|unit)"),
    "collapse": (
        "vertebral|endplate|cardiovascular|circulatory|ha?emodynamic|tracheal|airway|sudden|episode of|(?:after|following|had) a|"
        "(?:vertebral|[tlc]\\d) body|(?:femoral|humeral) head",
        " of (?:the )?(?:vertebra\\w*|femoral|humeral|talus|[tlc]\\d+|disc|airway|trachea)| at (?:home|work|school)",
    ),
    "stroke": ("heat|sun|brush", " (?:volume|unit|team|work|alert|code|cent(?:er|re)|protocol|clinic|ward)"),
    "cancer": ("", " (?:cent(?:er|re)|clinic|institute|screening|registry|society|antigen)"),
    "tumor|tumour": ("", " (?:board|markers?|lysis|necrosis|registry|suppressor)"),
    "fracture": ("", " (?:clinic|liaison|table)"),
    "subdural|epidural|subarachnoid": (
        "",
        " (?:an?a?esthe\\w+|analgesi\\w+|catheters?|injections?|steroids?|spaces?|fat|abscess\\w*|empyemas?|cysts?|infusion|drain\\w*|"
        "electrodes?|lipomatosis|hygromas?|cisterns?|metast\\w+|mass\\w*|tumou?rs?|veins?|gas|air)",
    ),
    "infiltration": (
        "local|lidocaine|lignocaine|an?a?esthetic",
        " (?:of|with) (?:local|lidocaine|lignocaine|an?a?esthetic)",
    ),
    "white|black|gray|grey|dark": (
        "",
        "[ -](?:males?|females?|m[ae]n|wom[ae]n|patients?|persons?|people|boys?|girls?|blood|cells?|count|box|scale|stools?|urine|coat|room)",
    ),
    "intermediate": ("", "[ -](?:weighted|risk|grade|care)"),
    "solid": ("", "[ -](?:foods?|state|diet|organs?|evidence)"),
    "linear": ("", " (?:array|regression|accelerator|probe|transducer|relationship)"),
    "round": ("all|year|ward", " (?:the clock|trip)"),
    "regular|irregular": ("", f" (?:{_RHYTHM})"),
    "focal": ("", " (?:length|spot|point)"),
    "axial": ("", " (?:skeleton|load\\w*|spondylo\\w+)"),
    "pa|ap": ("", " (?:catheters?|pressures?|diameter)"),
    "pet": ("", " (?:owner|dog|bird|shop)"),
}


def _compiled(before: str, after: str) -> _Sense:
    return _Sense(
        re.compile(rf"(?<!\w)(?:{before})[ -]$") if before else None,
        re.compile(rf"(?:{after})(?!\w)") if after else None,
    )


_SENSES = {spelled: _compiled(*around) for words, around in _TABLE.items() for spelled in words.split("|")}
# "The patient was left in the ward": a verb. "Left of the midline", "on the left with a nodule": a side.
_A_SIDE_BEFORE = re.compile(r"(?<!\w)(?:the|on|to|at|both|upper|lower|and|or) $")
_LEFT_BEHIND = re.compile(
    r" (?:in (?:place|situ|(?:the|a|his|her) (?:ward|room|hospital|unit|bed|clinic|department|hands))|behind|over|alone|out|home|"
    r"un(?:treated|attended|disturbed|repaired|touched)|against medical|without being|ama|him|them|with (?:an?|no|some|the|only)|"
    r"the (?:hospital|ward|room|clinic|department|country|unit|building|icu|institution)|a (?:scar|residual|defect))(?!\w)"
)
_WAS = re.compile(r"(?<!\w)(?:was|were|been|being|be) $")
_WAS_LEFT = re.compile(
    r" (?:in|on|at|with|as|for|by|across|between|under|over|inside|within|after|before|until|to(?! right)|open|intact|unchanged|alone|"
    r"behind|blind|deaf|dead|unconscious|\w*(?:plegic|paretic)|un\w+|"
    r"(?!(?:sided|deviated|shifted|displaced|rotated|located|lateralized|directed|based)\b)\w+ed)(?!\w)| ?(?:$|[.;])"
)
_HAS = re.compile(r"(?<!\w)(?:has|have|had|having) $")
_HAS_LEFT = re.compile(
    r" (?:the|its|only|behind|an?|him|her|them|his|their|for|against|home|to)(?!\w)| ?(?:$|[.;])"
)
_LEAVES = re.compile(r"(?<!\w)(?:he|she|they|who|we|i) $")
_REMAINDER = re.compile(
    r"(?<!\w)(?:what|nothing|little|much|none|all that)(?: (?:is|was|were|remains))? $|"
    r"(?<!\w)(?:no|little|any|much) [\w-]+ $"
)
# "He was right about the fracture", "it is a mass, right?": correct.
_IS_CORRECT = re.compile(
    r"(?<!\w)(?:(?:he|she|they|we|you|who|that|clinicians?|doctors?|physicians?|referrers?|radiologists?|surgeons?|"
    r"diagnosis|impression|suspicion|assumption|guess)(?: (?:is|was|are|were|may be|might be)|['’](?:s|re))|i am|i['’]m|i was|"
    r"am i|(?:is|was) (?:he|she|that)|(?:are|were) (?:they|you|we)|(?:did|does|do|done|get|got) (?:it|this|that)|prove[dn]?) "
    r"(?:(?:quite|absolutely|probably|perfectly|not|all|completely|entirely) )?$"
)
_CORRECT_ENDS = re.compile(
    r" ?(?:$|[.,;!?])| (?:in \w+ing|and (?:the|that|so)|but|because|since|when|as)(?!\w)"
)
_BE = re.compile(r"(?<!\w)(?:is|was|are|were|be|been|am|['’]s|['’]re|['’]m) (?:\w+ly |quite |not )?$")
_CORRECT_THAT = re.compile(r" (?:that|to (?!left|the|a)\w+)(?!\w)")
_ASKS_BACK = re.compile(r"(?<!\w)(?!left)\w+, $")
# "Right after the injection", "the right diagnosis", "at right angles".
_RIGHT_ALONE = re.compile(
    r" (?:away|after|before|now|then|here|through|beside|beneath|behind|underneath|next to|up to|out of|in front of|on top of|"
    r"in the middle|(?:at|above|below|under|over) the|you are|about(?! \d))(?!\w)"
)
_RIGHT_THING = re.compile(
    r" (?:to (?:refuse|life|die|know|treat\w*|privacy)|of way|answer|diagnosis|dose|time|way|direction|moment|choice|decision|patient|drug|medication|treatment|therapy|"
    r"test|question|conclusion|track|idea|thing|place|person|angles?(?! of)|angled)(?!\w)"
)
_ALL_RIGHT = re.compile(r"(?<!\w)(?:all|you are|that is quite) $")
_AT_AN_END = re.compile(r" ?(?:$|[.,;!])")
_TITLE = "Mr"


def is_other_sense(text: str, low: str, start: int, end: int) -> bool:
    """Whether a word of the vocabulary means something else at its place.

    Args:
        text: as it is written.
        low: the same in small letters, each in its place.
        start: where the word begins.
        end: where it ends.
    """
    spelled = low[start:end]
    sense = _SENSES.get(spelled)
    if sense is None:
        # "Mr Smith", not "MR".
        return text[start:end] == _TITLE
    if sense.after is not None and sense.after.match(low, end):
        return True
    before = low[max(0, start - _NEAR) : start]
    if sense.before is not None and sense.before.search(before):
        return True
    if spelled == "left":
        return _is_a_verb(before, low, end)
    return spelled == "right" and _is_no_side(before, low, end)


def _is_a_verb(before: str, low: str, end: int) -> bool:
    """Whether a "left" is that of "to leave"."""
    if _A_SIDE_BEFORE.search(before):
        return False
    for what, follows in ((_WAS, _WAS_LEFT), (_HAS, _HAS_LEFT)):
        if what.search(before) and follows.match(low, end):
            return True
    if _LEAVES.search(before):
        return True
    if _REMAINDER.search(before) and (low.startswith(" of", end) or _AT_AN_END.match(low, end)):
        return True
    return _LEFT_BEHIND.match(low, end) is not None


def _is_no_side(before: str, low: str, end: int) -> bool:
    """Whether a "right" is that of "right after", "the right answer", "he was right" or "all right"."""
    if _RIGHT_THING.match(low, end):
        return True
    if _A_SIDE_BEFORE.search(before):
        return False
    if _IS_CORRECT.search(before) and _CORRECT_ENDS.match(low, end):
        return True
    if _BE.search(before) and _CORRECT_THAT.match(low, end):
        return True
    if low.startswith("?", end) and _ASKS_BACK.search(before):
        return True
    return _RIGHT_ALONE.match(low, end) is not None or bool(
        _ALL_RIGHT.search(before) and _AT_AN_END.match(low, end)
    )
