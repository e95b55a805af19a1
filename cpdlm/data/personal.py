"""Personal data in chats: found by patterns and by how people introduce themselves, and masked."""

import re
from collections import Counter
from collections.abc import Iterable

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"(?i)\b(?:https?://|www\.(?=\w))\S+")
_HANDLE = re.compile(r"(?<![\w@.])@(?=[\w.]*[A-Za-z])(?!(?:the|byu|dc)\b)[\w.]*\w", re.IGNORECASE)
# Ten digits, grouped or not, with or without a country; seven as 555-1234; anything after a plus sign.
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d[\d ().-]{7,}\d|(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}|"
    r"1?[2-9]\d{9}|\d{3}-\d{4})(?!\w)"
)
_CAPITALS = r"[A-Z][\w'-]*[a-z](?:\s+(?:[A-Z][a-z]+|[vV]an|[dD]e)\b){0,3}"
_OWN_NAME = re.compile(
    r"(?i:\bname(?:'s|s| is)\s+(?:actually\s+|also\s+|just\s+)?)([A-Za-z][\w'-]+)((?:\s+[A-Z][a-z]+\b){0,2})"
)
_CALLED = re.compile(
    rf"(?i:\b(?:(?:you can|just|please|friends|people|they|most|everyone) call me|i go by)\s+)({_CAPITALS})"
)
_I_AM = re.compile(r"(?i:\b(?:i'?m|i am|this is)\s+)([A-Z][a-z]{1,14})\b(?!\s+[a-z]+(?:ing|an|ese)\b)")
_GREETED = re.compile(
    r"(?i:(?:^|[.!?,]\s*)(?:oh |well |ok |okay )?(?:hi|hey|hello|hiya|howdy|sup|thanks|thank you|bye|goodbye|"
    r"(?:nice|good|great|fun|pleasure) (?:to )?(?:meet(?:ing)?|talk(?:ing)?|chat(?:ting)?)(?: (?:to|with))? you)"
    r"(?: there| too)?[ ,]{1,2})([A-Z][a-z]{1,14})\b"
)
_WORD = re.compile(r"[A-Za-z][\w'-]*")
_LOWER = re.compile(r"\b[a-z]+\b")
# Capitalised after "I'm" and not names; more are found by how often the corpus writes them in lower case.
_ORDINARY = """
a an the are is was not only too also and but so just kinda actually spelled something showing hidden korean
american greek french mexican norwegian chinese vietnamese filipino english german spanish italian japanese
indian canadian international mechanical computer mormon christian monday tuesday wednesday thursday friday
saturday sunday january february april june july august september october november december christmas
thanksgiving byu god jesus im ill ive hows wasnt its
"""
_NOT_NAMES = frozenset(_ORDINARY.split())
ORDINARY_SHARE = 0.02  # a word that this share of conversations writes in lower case is not taken for a name


def mask_personal(conversations: Iterable[list[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Messages with <email>, <url>, <phone>, <handle> and <name> in place of personal data; and counts of each.

    Names are collected per conversation where somebody gives one ("my name is ...", "call me ...", "I'm ...", "his name
    is ...") or is greeted by one, then masked throughout that conversation, surnames given with them too. A name that
    nobody introduces, and a first name that is an everyday word in lower case, can stay.
    """
    given = [list(messages) for messages in conversations]
    in_conversations: Counter[str] = Counter()
    for messages in given:
        in_conversations.update({word for message in messages for word in _LOWER.findall(message)})
    least = max(3.0, ORDINARY_SHARE * len(given))
    ordinary = {word for word, count in in_conversations.items() if count >= least} | _NOT_NAMES
    found: Counter[str] = Counter()
    return [_mask_conversation(messages, ordinary, found) for messages in given], found


def _mask_conversation(messages: list[str], ordinary: set[str] | frozenset[str], found: Counter[str]) -> list[str]:
    names: set[str] = set()
    masked = []
    for message in messages:
        for kind, pattern in (("email", _EMAIL), ("url", _URL), ("phone", _PHONE)):
            message, count = pattern.subn(f"<{kind}>", message)
            found[kind] += count
        for handle in _HANDLE.findall(message):
            names.update(part for part in [handle[1:], *re.split(r"[\W\d_]+", handle[1:])] if len(part) > 2)
        message, count = _HANDLE.subn("<handle>", message)
        found["handle"] += count
        names |= _introduced(message, ordinary)
        masked.append(message)
    if not names:
        return masked
    found["conversations_with_names"] += 1
    found["names"] += len(names)
    # Everyday words are masked only where they are capitalised.
    for name in sorted(names, key=lambda name: (-len(name), name)):
        everyday = name.lower() in ordinary
        written = re.escape(name.capitalize() if everyday else name)
        expression = re.compile(rf"(?<![\w<]){written}(?=(?:s|'s)?(?!\w))(?!>)", 0 if everyday else re.IGNORECASE)
        for index, message in enumerate(masked):
            masked[index], count = expression.subn("<name>", message)
            found["name_mentions"] += count
    return masked


def _introduced(message: str, ordinary: set[str] | frozenset[str]) -> set[str]:
    """The names that a message gives."""
    names: set[str] = set()
    for first, rest in _OWN_NAME.findall(message):
        # After "name is" a capital is enough, unless the word can never be a name.
        if first.lower() not in (_NOT_NAMES if first[0].isupper() else ordinary):
            names |= {first, *rest.split()}
    for called in _CALLED.findall(message):
        names |= set(_WORD.findall(called))
    for pattern in (_I_AM, _GREETED):
        names |= {name for name in pattern.findall(message) if name.lower() not in ordinary}
    return {name.removesuffix("'s") for name in names if len(name) > 1 and name.lower() not in _NOT_NAMES}
