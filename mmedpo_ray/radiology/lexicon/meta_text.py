"""Text that is about the task instead of the image: leaked prompts, role tags, refusals, notes about the making of a pair.

One definition for the filter of text pairs and for the audit; ingest drops reference answers for the surest part of it only,
`is_leaked_prompt`. The patterns are in small letters and keep to what Python's `re` and RE2 (in which Arrow searches a whole
column) have in common, so there is no looking ahead: what is ordinary in a report ("The prior images are not available for
comparison", "I cannot identify a fracture") is kept out by naming what a statement about the task must say. What may begin a line does not reach over line feeds, or a text of
many would take the square of their number. Rules for Chinese are in `meta_chinese`.
"""

from __future__ import annotations

import re

from mmedpo_ray.radiology.lexicon import meta_text_chinese
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, lowered

# ---------------------------------------------------------------------- leaked prompts

# A whole question, as prompts state it. A requisition's is a fragment ("QUESTION: pneumonia?"), or a heading follows it.
_INTERROGATIVE = r"(what|which|where|who|whose|when|why|how|is|are|was|were|does|do|did|has|have|had|can|could|should|will|would)"
# What an answer begins with after a role tag; an operation's report names an assistant ("Assistant: Dr. Smith").
_NAMED_AXES = ("finding", "side", "zone", "size", "state", "anatomy", "modality", "acuity")
_NAMED = "|".join(
    re.escape(form)
    for concept in CONCEPTS.values()
    if concept.axis in _NAMED_AXES
    for form in concept.forms
    if form == "ct" or len(form) > 2
)
_ANSWER_BEGINS = (
    r"((the|there|this|these|that|it|its|an?|i|in|on|at|based|sure|both|to|from|with|without|given|as|here|of) |(yes|no|i['’]\w+|sorry|sure|"
    rf"certainly|unfortunately|however|normal|image|picture)\b|([\w-]+ ){{0,2}}({_NAMED})s?\b"
    r"|[^.:\n]*\b(is|are|shows?|seen|appears?|suggests?|cannot)\b|[一-鿿])"
)
_LEAKS = (
    rf"^[^\w\n]*question\W*:[^?\n]*\b{_INTERROGATIVE}\b[^?\n]*\?(\s*[^\s:][^:\n]*$|\s*\z)",
    r"^[^\w\n]*question\W*:[^:]*\W((correct|final|original|your) )?answer\W*:",
    r"^[^\w\n]*(original answer|candidate ?answer ?\d*)\W*:",
    # Roles: an operation's report names an assistant, a laboratory's the enzyme GPT.
    r"^[^\w\n]*(user|human)\s*:|\b(user|human)\s*:[^:]*\b(assistant|gpt)\s*:",
    rf"\A[^\w]*assistant\s*:[\s\"'*]*{_ANSWER_BEGINS}",
    r"^###+ ?(assistant|system|instruction|input|response)\s*:",
    # Marks of chat templates.
    r"<\s*image\s*>|\[/?inst\]|</?s>|<\|[a-z_]+\|>",
)
# Lines of the prompt that made the pair, or of a chat template, repeated in an answer.
LEAKED_PROMPT = "|".join(_LEAKS)

# ---------------------------------------------------------------------- commentary

_I_CANNOT = (
    r"\b(i (cannot|can ?not|can['’]?t|could not|couldn['’]?t|(do not|don['’]?t) have the (ability|capability|capacity) to)"
    r"|i(['’]?m| am) (currently )?(unable|not able|not allowed|not permitted) to)"
)
_CANNOT = r"\b(cannot|can ?not|can['’]?t|unable to|not able to)"
_LOOK_AT = r"(\w+ly )?(see|view|open|access|load|display|process|examine|read|interpret|analy[sz]e)"
_ONE_PICTURE = r"(image|picture|photo|photograph|file|attachment)"
_PICTURE = rf"{_ONE_PICTURE}s?"
_ANY_PICTURE = r"(image|picture|photo|photograph|file|attachment|scan|x-?ray|radiograph)s?"
_THE = r"(the|this|that|these|those|your|any|an?)"
# The image of the question: a prior, lateral or outside one, or one of another modality, is the radiologist's to miss.
_GIVEN = r"((provided|attached|uploaded|given|shared|sent|linked|embedded|referenced|actual|accompanying|input|medical) ){0,2}"
_OF_THE_TASK = rf"{_GIVEN}((x-?ray|ct|mri?|ultrasound) )?"
# What may follow where nothing more is said of the image: not "for comparison", "due to motion", "from the outside hospital".
_END = (
    r"([^\w\n]*$|\s*[.,;:!?)]|[\s-]+(itself|themselves|directly|here|again|yet|provided|attached|shared|uploaded|you|that you|to me|"
    r"and|or|but|so|because|as|since|now|in (this|the|our|your) (chat|conversation|message|prompt|question|request|context))\b)"
)
_WAS = r"(is|was|were|are|has been|have been)"
_IS_NOT = r"(is|was|are|were|has|have|can|could|does|did)( not|n['’]?t)( been| be)?|cannot be"
_HANDED_OVER = r"(visible|provided|attached|shown|displayed|uploaded|supplied|given)"
_THERE = r"(available|accessible|included|loaded|load|seen|viewed|opened)"
_ADVICE = (
    rf"(medical \w+|(diagnos[ie]s|answer|advice|interpretation|assessment|opinion|analys[ie]s|information|response|that|this)"
    rf"({_END}|[^.!?\n]*\b{_THE} (\w+ )?({_ANY_PICTURE}|question|request)\b))"
)
_EDITED = r"(changed|replaced|modified|altered|swapped|rewrote|rewritten|edited|substituted|flipped|inverted|negated|reversed)"
# What an edit of an answer changes; an intervention changes tubes.
_EDITABLE = (
    r"(sides?|laterality|polarity|negation|answers?|responses?|statements?|sentences?|text|words?|wording|phrase|meaning|modality|"
    r"question)"
)
_VALUE = r"(left|right|yes|no|upper|lower|normal|abnormal|present|absent)"
_QUOTE = r"[\"“”„‘'`]"
_VERDICT = (
    r"(wrong|incorrect|correct|inaccurate|accurate|invalid|implausible|not correct|not accurate|false|untrue)"
)
# An edit of an answer, in either voice.
_EDIT = (
    rf"(\b{_EDITED} ((the|an?|this|its|one|my|your|both) )?((original|given|stated|named|correct|final|last|key) )?{_EDITABLE}\b"
    rf"|\b{_EDITED} {_QUOTE}|{_QUOTE} ((is|was|has been) )?{_EDITED}\b"
    rf"|\b{_EDITED} {_VALUE} (to|with|into|by|for|and) {_VALUE}\b"
    rf"|\b{_VALUE} ((is|was|has been) )?{_EDITED} (to|with|into|by) {_VALUE}\b"
    rf"|\b(the|this) {_EDITABLE} ((is|are|was|were|has been|have been) )?{_EDITED}\b)"
)
_BETWEEN = r"[\s'\"“”’*_-]*"
# The text that a wrong answer was made from. "Initial" and "original" are also said of studies, diseases and earlier reports.
_SOURCE = r"(original|given|provided|reference|ground[- ]truth)"
# The same behind other words: "given the findings", "the history provided", "with reference to" are none.
_NAMED_SOURCE = r"(original|ground[- ]truth|(the|this|these|your|its|any|all) (given|provided|reference))"
_TOLD = (
    r"(statement|sentence|description|depiction|conclusion|caption|text|answer|response|observation|claim|assertion|annotation|"
    r"finding|label)s?"
)
# A text: findings that "suggest tuberculosis" are none.
_TEXT = r"(statement|sentence|description|conclusion|caption|text|answer|response|claim|assertion|annotation|label)s?"
_REPORTED = (
    r"(report|impression|interpretation|assessment|evaluation|reading|information|result|indication)s?"
)
_DIAGNOSED = r"(diagnos[ie]s)"
_FEW_WORDS = r"([\w'’\"“”/-]+ ){0,3}"
# "This contradicts", "directly contradicting": an edit is told. A biopsy may well contradict an initial diagnosis.
_COUNTERS = r"((this|that|which|it|answer|statement|response|\w+ly) contradict(s|ed)|contradicting)"
_CONTRADICTS = r"(contradict(s|ed|ing|ory to|ion of|ion to)?|in contradiction (to|with))"
# Findings may well contradict an original report; a statement that contradicts it was made to.
_WAS_MADE_TO_CONTRADICT = r"((to|will|would|must|should|directly) contradict|contradict(s|ed|ing|ory to|ion of|ion to)|in contradiction (to|with))"
_DISAGREES = (
    r"((is |are |in )?(direct |clear )?(conflict(s|ed|ing)? with|opposites? (of|to)|opposition to|contrary to|at odds with)"
    r"|(disagree(s|ing)?|incompatible|inconsistent|not (in line|consistent|compatible)) with|(not|n['’]t) (match|(align|agree|correspond) "
    r"(with|to))|oppos(es|ing)|contrast(s|ing) with|negat(es|ing)|misrepresent(s|ing)|misinterpret(s|ing)|revers(es|ing)|refut(es|ing)|den(ies|ying))"
)
_DIFFERS = r"((differ(s|ing)?|different|deviat(es|ing)) from|unlike|despite|rather than|instead of|in contrast to|as opposed to)"
_IS_TOLD = r"(supported|observed|identified|documented|evident|mentioned|stated|described|noted|specified|indicated|listed|included|present|found|given|reported|said|written|seen)"
_FIRST_SENTENCE = r"\A[^.!?\n]*"
# The source with nothing after it: "in the original, …". The original of a report has a noun: "in the original study".
_BARE_SOURCE = r"the (original|reference|ground[- ]truth)"
_STOP = r"([^\w\n]*$|\s*[.,;:!?)\]])"
_SAYS = r"(states?|stated|says?|said|mentions?|mentioned|indicates?|describes?|claims?|claimed|specifies|specified|names|reads|asserts?)"
_THE_EDIT = r"(this|that|which|it|answer|statement|response|version|sentence)"
_CHANGES = r"(changes|alters|reverses|flips|inverts|swaps|negates|modifies|rewrites|contradicts)"
# Labels of an edit, and what is labelled.
_LABEL = r"(changed?|changes|edits?|edited|modified|modifications?|swap|swapped|flip|flipped|altered|rewritten|replaced|reversed)"
_LABELLED = r"(answer|response|statement|sentence|caption|version)"
_ARROW = r"(-+>|→|=>)"
_OF_A_SIDE = r"( (lung|lobe|side|sided|kidney|hemisphere|breast|upper|middle|lower)){0,2}"

_I = ("i ", "i'", "i’", "im ")
_PICTURES = ("image", "picture", "photo", "file", "attachment")
_ANY_PICTURES = (*_PICTURES, "scan", "x-ray", "xray", "radiograph")
_MODEL = r"(language model|llm|chatbot|ai (model|system)|(ai|virtual|digital) assistant)"
# Refusals, and talk about answers and their making. A report that "cannot exclude" something is none of these.
# Each: pieces of which one must be there, since to look for those is quick, and the pattern.
_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("sorry", "apolog"),
        r"(^[^\w\n]*((i(['’]?m| am) )?((so|very|really|truly) )?sorry|((my|our|sincere) )*apologies)"
        r"|\b(i(['’]?m| am) ((so|very|really|truly) )?sorry|i ((do|must|sincerely) )?apologi[sz]e))"
        r"([^\w\n]*$|\s*[,.;:!]|\s*[—–-]|,? (but|i|that i|if|as i|for (the|any|my) (\w+ )?(confusion|misunderstanding|error|mistake|"
        r"inconvenience))\b)",
    ),
    # AI is also aortic insufficiency.
    (
        ("as a",),
        rf"\bas (an (ai|artificial intelligence)|an? ([\w-]+ ){{0,3}}{_MODEL}|a helpful assistant)\b",
    ),
    (
        _I,
        rf"\bi(['’]?m| am) (just |only |merely )?(an ai|an? ([\w-]+ ){{0,3}}{_MODEL}|an? (\w+ ){{0,2}}assistant)\b",
    ),
    # The image cannot be looked at.
    (_ANY_PICTURES, rf"{_I_CANNOT} {_LOOK_AT} ({_THE} )?{_OF_THE_TASK}{_ANY_PICTURE}{_END}"),
    (_PICTURES, rf"{_CANNOT} {_LOOK_AT} {_THE} {_OF_THE_TASK}{_PICTURE}{_END}"),
    (
        _ANY_PICTURES,
        rf"\bi (do not|don['’]?t) (\w+ly )?(have (any )?access to|see) ({_THE} )?{_OF_THE_TASK}{_ANY_PICTURE}{_END}",
    ),
    (
        _ANY_PICTURES,
        rf"\bwithout ((access to|seeing|viewing|being able to (see|view)) ({_THE} )?|{_THE} ){_OF_THE_TASK}{_PICTURE}{_END}",
    ),
    (_I, r"\bi (do not|don['’]?t) have the (ability|capability|capacity) to\b"),
    # Of the answer itself, and first of all; a finding that an eye cannot decide is an answer.
    (
        _I,
        rf"{_FIRST_SENTENCE}{_I_CANNOT} (\w+ly )?((answer|assist|comply|respond|help (you|with))\b"
        rf"|(provide|give|offer|do) (you )?(with )?({_THE} )?([\w-]+ ){{0,2}}{_ADVICE}"
        rf"|(see|tell|determine|identify|say|name) (an?|the|any) (side{_END}|answer\b)"
        r"|(diagnose|interpret|analy[sz]e|process) (medical|patients?|people|diseases|conditions)\b)",
    ),
    (
        _I,
        rf"{_FIRST_SENTENCE}\bi (do not|don['’]?t) (\w+ly )?have (enough|sufficient) (information|context|data|details)"
        rf"({_END}| to (answer|respond|provide|determine the answer|give|help|assist))",
    ),
    # At the start of a clause, so that a lesion in the image may well be not visible.
    (
        _PICTURES,
        rf"(^|[.,;:!?]\s*|\b(but|as|since|because|that|and) )(the|this|that|your) "
        rf"(({_OF_THE_TASK}{_ONE_PICTURE}|{_GIVEN}{_PICTURE}) ((itself|you \w+|above) )?({_IS_NOT}) {_HANDED_OVER}{_END}"
        rf"|{_GIVEN}{_ONE_PICTURE} ((itself|you \w+|above) )?({_IS_NOT}) {_THERE}{_END})",
    ),
    (
        _PICTURES,
        rf"\bno {_GIVEN}({_PICTURE} ({_WAS} )?{_HANDED_OVER}|{_ONE_PICTURE} ({_WAS} )?{_THERE}){_END}",
    ),
    (
        ("please",),
        rf"\bplease (re-?)?(provide|upload|attach|share|send|submit)( me)?( with)? (({_THE} )?{_OF_THE_TASK}({_ANY_PICTURE}|question){_END}"
        r"|[^.\n]{0,200}\b(so (that )?i (can|could|may)|for me to|and i (will|can)|and i['’]ll) (\w+ ){{0,2}}(help|assist|answer|analy[sz]e|interpret|"
        r"provide|give|look|examine|see|respond|try)\b)",
    ),
    # The answers, the question, the task.
    (
        ("answer",),
        r"\b(original|provided|given|correct|incorrect|wrong|chosen|rejected|(dis)?preferred|reference|previous|candidate|"
        rf"ground[- ]truth|expected|modified|rewritten|altered|edited|plausible|hallucinated){_BETWEEN}answers?\b",
    ),
    (("answer",), r"\bcandidate ?answer ?\d*\b"),
    (("answer",), rf"\b(the|this|that|my|your) answer (is|was|seems|appears|would be) (\w+ly )?{_VERDICT}\b"),
    (
        ("question",),
        r"\b(the|this|your) question (asks|pertains|mentions|(does not|doesn['’]?t) (ask|specify|mention|provide))\b",
    ),
    (
        ("task", "prompt"),
        r"\b((the|this|my|your) task (asks|is to (find|select|choose|pick|write|rewrite|create|provide|produce|contradict|modify|make|"
        r"answer))|(the|this|your) prompt (asks|says|states|requires|instructs))\b",
    ),
    (_I, rf"\bi(['’]?ve| have)? ((just|only|also|simply|then) )?({_EDIT}|{_EDITED} the diagnosis\b)"),
    (
        ("note", "nb", "n.b.", "explanation", "rationale", "change", "edit", "modification"),
        r"^[^\w\n]*(note|nb|n\.b\.|explanation|rationale|changes?|edit|modification)s?\s*:(.*"
        rf"(\b(the|this|that|an?|my|your|both) (\w+ )?(answers?|question (pertains|asks|refers|concerns|mentions|was about))\b|{_EDIT}))",
    ),
    (
        ("here",),
        r"\bhere(['’]?s| is) (the|an?|my|your|one) (\w+ )?(answer|response|rewrite|edit|version|sentence|rewritten|edited|modified)\b",
    ),
)
# Talk about the text that the answer was made from, and that it was made to contradict.
_SOURCE_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("contradict",),
        rf"\b{_WAS_MADE_TO_CONTRADICT} [^.;!?\n]*\b{_NAMED_SOURCE} {_FEW_WORDS}{_REPORTED}\b"
        rf"|\b{_CONTRADICTS} [^.;!?\n]*\b({_NAMED_SOURCE} {_FEW_WORDS}{_TOLD}\b"
        rf"|initial {_FEW_WORDS}{_TOLD}\b|(original|the reference|ground[- ]truth){_END}"
        r"|originally (stated|described|reported|mentioned|noted|given|provided)\b)",
    ),
    (
        ("contradict",),
        rf"\b{_COUNTERS} ({_THE} )?(initial {_FEW_WORDS}{_REPORTED}|(initial|{_SOURCE}) {_FEW_WORDS}{_DIAGNOSED}|(statement|description|caption|sentence|assertion|claim)s?|"
        r"([\w-]+ )?findings? (of|that)"
        r"|(normal|clear|negative|unremarkable|stated|described|actual|true|correct) ([\w-]+ ){0,2}"
        r"(findings?|interpretation|impression|report|diagnosis|conclusion))\b",
    ),
    (
        ("contradict",),
        r"\bcontradict(s|ing|ory|ion)? ([\w-]+ ){0,2}(answer|statement|response|sentence|caption|version|rewrite)s?\b"
        r"|\b(answer|statement|response|sentence|description|version) (\w+ ){0,2}contradicts\b",
    ),
    (
        ("original", "given", "provided", "reference", "ground"),
        rf"\b{_DISAGREES} {_FEW_WORDS}{_NAMED_SOURCE} {_FEW_WORDS}({_TOLD}|{_REPORTED})\b"
        rf"|\b(opposites? (of|to)|opposition to|oppos(es|ing)|((this|that|which) (conflict|contrast)s|(conflict|contrast)ing) with) ({_THE} )?{_SOURCE} {_FEW_WORDS}{_DIAGNOSED}\b"
        rf"|\b{_DIFFERS} ({_THE} )?{_SOURCE} {_FEW_WORDS}{_TOLD}\b"
        rf"|\b({_IS_TOLD} (\w+ )?|mention [^.;!?\n]* )(in|by|from) {_THE} {_SOURCE} {_FEW_WORDS}{_TOLD}\b"
        rf"|\bthe {_SOURCE} {_FEW_WORDS}{_TOLD} (\w+ )?(states?|says?|mentions?|claims?|reads?)\b"
        rf"|\bthe {_SOURCE} {_FEW_WORDS}{_TEXT} (\w+ )?(indicates?|suggests?|describes?|concludes?)\b"
        rf"|\b(the|this) {_SOURCE} (statement|sentence|caption|text)s?\b"
        r"|\bthe given (description|report|conclusion|interpretation)\b"
        rf"|\bground[- ]truth ({_TOLD}|{_REPORTED}|{_DIAGNOSED})\b|\breference (report|description|findings)\b",
    ),
    (
        ("depiction", "interpretation"),
        r"\bclear depiction of ((an?|the) )?normal\b|\binterpretation of ((an?|the|these|those) )?normal (\w+ )?findings\b",
    ),
    (
        ("dispreferred", "hallucinated", "rewritten"),
        r"\b(dispreferred|hallucinated|rewritten) ([\w-]+ )?(report|response|caption|description|statement|text|finding|diagnosis|version)s?\b",
    ),
)
# An edit that is told without an "I": labels, changes in brackets, and "the original" as a text.
_EDIT_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("original", "reference", "ground"),
        rf"\bin {_BARE_SOURCE}{_STOP}"
        rf"|\b({_IS_TOLD} (in|by)|according to|based on|as per|per|unlike|contrary to|opposed to|opposition to|(opposite|reverse) (of|to)) "
        rf"{_BARE_SOURCE}{_STOP}"
        rf"|\b{_BARE_SOURCE} ((\w+ly|only|also|actually) )?{_SAYS}\b"
        rf"|\b{_THE_EDIT} (\w+ly )?((is |was )?(differs?|differed|different|deviates?|departs?) from"
        rf"|(does not|doesn['’]?t) (match|agree with|align with|correspond (to|with)|reflect)) {_BARE_SOURCE}{_STOP}"
        rf"|\b{_CHANGES} {_BARE_SOURCE}{_STOP}"
        r"|(^[^\w\n]*|[.!?] )ground[- ]truth\s*:|\boriginal\s*:[^:\n]*\b(modified|edited|rewritten|changed|altered|swapped)\s*:",
    ),
    (
        ("originally",),
        r"\b(as|than|what was) originally (stated|said|written|claimed|mentioned)\b"
        rf"|\b(not|instead of|rather than) ((on|in|at) )?(the )?{_VALUE}{_OF_A_SIDE},? as originally \w+ed\b",
    ),
    (
        ("meaning", "wording", "polarity", "laterality", "answer", "statement", "sentence"),
        r"\b(meaning|wording|polarity) of the (original|reference|ground[- ]truth|answer|statement|sentence|caption|text)\b"
        rf"|\b(this|that|which|it) {_CHANGES} the (meaning|wording|polarity|laterality|answer|statement|sentence)\b",
    ),
    (
        (
            "side",
            "laterality",
            "answer",
            "statement",
            "sentence",
            "wording",
            "polarity",
            "negation",
            "meaning",
        ),
        rf"\bthe (answer|statement|sentence|wording|polarity|negation|meaning) (is|was|has been) (now |\w+ly )?({_EDITED}|switched)\b"
        rf"|\bthe (sides?|laterality) (was|were|is now|are now|has been|have been) (\w+ly )?({_EDITED}|switched)({_STOP}"
        rf"| (to|from) {_VALUE}\b| in (this|the) {_LABELLED}\b)"
        rf"|\b(answer|statement|sentence|side|laterality) ({_EDITED}|switched) from {_VALUE} to {_VALUE}\b",
    ),
    (
        ("(", "["),
        rf"[(\[]\W{{0,2}}({_EDITED}|switched)( from)? {_QUOTE}?{_VALUE}{_QUOTE}?{_OF_A_SIDE} (to|with|into|by|for) "
        rf"{_QUOTE}?{_VALUE}{_QUOTE}?{_OF_A_SIDE}\W{{0,2}}[)\]]"
        rf"|[(\[]\W{{0,2}}{_LABEL}\s*:[^:)\]\n]*({_ARROW}|\b{_VALUE}{_QUOTE}? (to|with|into|instead)\b)"
        rf"|^[^\w\n]*{_LABELLED} ?[(\[]({_EDITED}|revised|corrected|incorrect|wrong|hallucinated|(dis)?preferred|rejected|chosen|original|new)"
        r"[)\]]|^[^\w\n]*(report|description) ?[(\[](modified|altered|rewritten|swapped|hallucinated|dispreferred)[)\]]",
    ),
    (
        ("->", "→", "=>"),
        rf"\b{_LABEL}\W{{1,3}}(from )?{_QUOTE}?{_VALUE}{_QUOTE}? ?{_ARROW} ?{_QUOTE}?{_VALUE}{_QUOTE}?{_OF_A_SIDE}{_STOP}",
    ),
    (
        ("deliberate", "intentional", "purpose"),
        r"\b(deliberately|intentionally|purposely|purposefully) (wrong|incorrect|false|inaccurate|misleading|erroneous|contradict\w*"
        r"|(made|introduced|added|inserted|included) (an?|the|some) (\w+ )?(error|mistake|inaccuracy|contradiction)s?)\b",
    ),
    (
        ("answer", "response", "statement", "sentence", "caption", "version"),
        r"\bthis (statement|sentence|response|caption) is (\w+ly )?(wrong|incorrect|false|inaccurate|untrue)\b"
        rf"|(^[^\w\n]*|[.!?] )(edited|modified|revised|altered|rewritten|corrected|corrupted|new|incorrect|wrong) {_LABELLED}[^\w\n]*:",
    ),
    (
        ("edited", "rewritten", "flipped", "swapped", "dispreferred"),
        r"[(\[](edited|rewritten|flipped|swapped|dispreferred)[)\]]",
    ),
    # Who edited a report, and when, is told in its foot: "Edited: Dr. Smith", "Modified: 3 May 2020".
    (
        ("rewrit", "rephrased", "reworded", "edited", "modified", "revised"),
        r"(^[^\w\n]*|[.!?] )(rewritten|rewrite|rephrased|reworded)[^\w\n]*:"
        r"|(^[^\w\n]*|[.!?] )(edited|modified|revised)[^\w\n]*:[^\w\n]*((no|in|it|ct|an?|on|at|the|there|this|yes|left|right) |[a-z-]{3,}( [^\d\n:]*)?\W?$)",
    ),
)
# In one pattern RE2 runs out of memory for its states and takes fifty times as long.
_ALL_RULES = (_RULES, _SOURCE_RULES, _EDIT_RULES, meta_text_chinese.RULES)
COMMENTARY_PARTS = tuple("|".join(pattern for _, pattern in rules) for rules in _ALL_RULES)
COMMENTARY = "|".join(COMMENTARY_PARTS)


def _compiled(pattern: str) -> re.Pattern[str]:
    """The end of the text is written as in RE2."""
    return re.compile(pattern.replace(r"\z", r"\Z"), re.MULTILINE)


_LEAK = _compiled(LEAKED_PROMPT)
_COMMENTS = tuple((pieces, _compiled(pattern)) for rules in _ALL_RULES for pieces, pattern in rules)


def is_leaked_prompt(text: str) -> bool:
    """Whether the text repeats lines of the prompt that made it, or marks of a chat template."""
    return _LEAK.search(lowered(text)) is not None


def is_meta_text(text: str) -> bool:
    """Whether the text talks about the task instead of the image: leaked prompts, role tags, refusals, notes on an edit."""
    low = lowered(text)
    if _LEAK.search(low):
        return True
    return any(
        any(piece in low for piece in pieces) and pattern.search(low) is not None
        for pieces, pattern in _COMMENTS
    )
