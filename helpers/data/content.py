"""What is suspicious inside one text: garbled or invisible characters, private data, the language it is in.

    suspicions("Write to jo@example.org")       # {"private": "e-mail address jo@..."}
    language("Wie geht es dir und wo bist du?")  # "German"

Patterns and word lists, no model: they point at lines to look at, and are wrong now and then.
"""

from __future__ import annotations

import re
import unicodedata

# UTF-8 that was read as Latin-1 or Windows-1252 (é as Ã©, a quote as â€™, a mark as ï»¿), and the sign for "could not be decoded".
MOJIBAKE = re.compile(
    "[ÃÂÐÑØÙ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â[€\u0080-\u009f][\u0080-\u00bf€œ™˜“”¦¢]?|ð[\u009fŸ]|ï»¿|\ufffd"
)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or a byte that did not fit the encoding
# Every repetition is bounded, so that no text, however long or odd, takes more than linear time.
E_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w")
PHONE = re.compile(
    r"(?<![\w.,-])(?:\+\d{1,3}[ ./-]?(?:\(?\d{1,4}\)?[ ./-]?){2,5}\d{2}"  # +44 20 7946 0018
    r"|\(\d{2,5}\) ?\d{3,4}[ .-]?\d{3,4}"  # (555) 010-4477
    r"|\d{3}[.-]\d{3}[.-]\d{4}"  # 555-010-4477
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w-])"  # 0171 5550 1234
)
KEY = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|eyJ[\w-]{10,2000}\.[\w-]{10,2000}\.[\w-]+)|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?i:\b(?:api[_ -]?key|password|secret)\b\s*[:=]\s*['\"]?[\w!#$%&*-]{8,})"
)
COMMON_WORDS = {
    "English": "the and of to is that you it for with this are was not have your will can from they be",
    "German": "der die das und ist nicht ich sie ein eine mit zu den auf für wir sich auch dem von es wie",
    "French": "le la les et est des une que vous pas pour dans qui nous je sur avec ce il elle sont au",
    "Spanish": "el los las y es que una por con para no se del su como más está pero lo muy un hay",
    "Italian": "il che di è e non per una sono con del della le gli ma si come questo ho più un anche",
    "Portuguese": "o os as e é que não uma para com do da em se por mais como você são um seu foi",
    "Dutch": "de het een en van is niet dat ik je op te met voor zijn er maar ook wij hebben aan die",
}
LANGUAGES_OF = {
    word: frozenset(name for name, words in COMMON_WORDS.items() if word in words.split())
    for words in COMMON_WORDS.values()
    for word in words.split()
    if len(word) > 1  # in code, single letters are names
}
SCRIPTS = {
    "CYRILLIC": "Cyrillic script",
    "GREEK": "Greek",
    "ARABIC": "Arabic script",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari script",
    "THAI": "Thai",
    "HANGUL": "Korean",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "CJK": "Chinese characters",
}
LANGUAGE_SAMPLE = 600  # characters of a text that decide its language
FEWEST_WORDS, CLEAR_LEAD = (
    4,
    2,
)  # different common words needed to name a language, and how far ahead of the second it must be


def suspicions(text: str) -> dict[str, str]:
    """Code of a fault -> what was seen, for everything suspicious in a text. Empty for nearly all of them."""
    found = {}
    if not text.isascii() and (garbled := MOJIBAKE.search(text)):
        found["mojibake"] = f"garbled characters {_around(text, garbled)}"
    if control := CONTROL.search(text):
        found["control characters"] = f"an invisible character, U+{ord(control[0]):04X}"
    for kind, pattern, needed in (
        ("an e-mail address", E_MAIL, "@"),
        ("a phone number", PHONE, ""),
        ("a key or password", KEY, ""),
    ):
        if needed in text and (private := pattern.search(text)):
            found["private"] = f"{kind} ({private[0][:3]}...)"  # never the whole of it: reports get shared
    return found


def is_broken(text: str) -> bool:
    """Does a text hold half characters, which no file and no tokenizer can take?"""
    return not text.isascii() and SURROGATE.search(text) is not None


def language(text: str) -> str | None:
    """The language of a text by its most common words, or its script; None if that is not clear."""
    text = text[:LANGUAGE_SAMPLE].lower()
    if not text.isascii():
        letters = [letter for letter in text if not letter.isascii() and letter.isalpha()]
        names = [re.split("[ -]", unicodedata.name(letter, ""), maxsplit=1)[0] for letter in letters[:80]]
        foreign = [SCRIPTS[name] for name in names if name in SCRIPTS]
        if len(foreign) >= 4 and len(foreign) >= 0.3 * sum(map(str.isalpha, text)):
            return "Japanese" if "Japanese" in foreign else max(set(foreign), key=foreign.count)
    votes: dict[str, int] = {}
    for word in set(re.findall(r"[^\W\d_]+", text)):
        for name in LANGUAGES_OF.get(word, ()):
            votes[name] = votes.get(name, 0) + 1
    if not votes:
        return None
    ranked = sorted(votes.items(), key=lambda vote: -vote[1])
    second = ranked[1][1] if len(ranked) > 1 else 0
    return ranked[0][0] if ranked[0][1] >= FEWEST_WORDS and ranked[0][1] >= CLEAR_LEAD * second else None


def _around(text: str, match: re.Match[str]) -> str:
    return repr(text[max(0, match.start() - 8) : match.end() + 8])
