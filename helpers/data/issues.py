"""Everything that can be wrong with a row, in one table: what it is called, whether the row is set aside, and the fix.

    FAULTS["echo"].fix

A row that cannot be used is set aside (`rejects`); the others are kept, and the report points at them.

What is suspicious inside one text: garbled or invisible characters, private data, the language it is in.

    suspicions("Write to jo@example.org")       # {"private": "e-mail address jo@..."}
    language("Wie geht es dir und wo bist du?")  # "German"

Patterns and word lists, no model: they point at lines to look at, and are wrong now and then.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple


class DataError(ValueError):
    """The data cannot be used. The message names the file, the place and the fix."""


class Fault(NamedTuple):
    """One kind of mistake."""

    name: str
    fix: str
    rejects: bool = True


class Problem(NamedTuple):
    """One mistake in one row: the code of its `Fault`, and a sentence that says what is wrong here."""

    code: str
    reason: str


FAULTS: dict[str, Fault] = {
    # --- set aside: what the parser could not read
    "broken line": Fault("broken lines", "Mend the line, or delete it: each row must be complete on its own."),
    "unreadable rest": Fault(
        "unreadable rest of a file", "Mend the file at this place, then check it again: nothing after it was read."
    ),
    "not an object": Fault(
        "rows that are not objects", 'Write each row as one JSON object, {"instruction": ..., "output": ...}.'
    ),
    "broken characters": Fault(
        "text that no encoding can hold", "Save the file as UTF-8 and delete the characters that do not show."
    ),
    # --- set aside: what a row lacks
    "missing column": Fault(
        "rows without a question or an answer column", "Name the question 'instruction' and the answer 'output'."
    ),
    "empty": Fault("empty fields", "Fill the field in, or delete the row."),
    "wrong type": Fault("fields of a wrong type", 'Write the field as text: "42" in quotes, not 42, not a list.'),
    "echo": Fault("answers that only repeat the question", "Write a real answer, or delete the row."),
    "duplicate": Fault("exact duplicates", "Delete them: a row that occurs twice is learned twice."),
    # --- set aside: conversations
    "unknown role": Fault("unknown roles", "Use the roles system, user and assistant."),
    "role order": Fault(
        "roles in the wrong order", "At most one system message first; then user and assistant take turns, user first."
    ),
    "ends with user": Fault("conversations that end with the user", "Add the answer, or delete the last question."),
    "no answer": Fault(
        "conversations in which nothing is trained",
        "Add an assistant message (of weight 1, where messages have weights).",
    ),
    "other form": Fault(
        "plain text among questions and answers, or the reverse",
        "Move them to a file of their own and train them apart.",
    ),
    # --- set aside: only a tokenizer can see these
    "too long": Fault(
        "answers longer than the sequence length",
        "Raise max_length, or shorten them; truncate=True keeps them cut, without an end.",
    ),
    "nothing left": Fault(
        "questions that fill the sequence length alone",
        "Raise max_length, or shorten the question: no token of the answer is left.",
    ),
    "template": Fault(
        "conversations that the model's chat template refuses", "Change them (often: no system message), or the model."
    ),
    # --- kept, worth a look
    "cut": Fault(
        "answers that will be cut",
        "Raise max_length: a cut answer has no end token, so the model learns not to stop.",
        False,
    ),
    "near duplicate": Fault(
        "near duplicates", "Keep the better one of each group; the split keeps them together.", False
    ),
    "leak": Fault(
        "validation examples that also stand in training",
        "Delete them from one part: a score on known questions says nothing.",
        False,
    ),
    "repeated answer": Fault(
        "one answer repeated over many questions",
        "Fine for labels; otherwise vary it, or the model learns to say only this.",
        False,
    ),
    "mojibake": Fault(
        "garbled characters (mojibake)", "Read the original in its true encoding and save it as UTF-8.", False
    ),
    "control characters": Fault(
        "invisible control characters", "Delete them: the model would learn to write them.", False
    ),
    "private": Fault(
        "what looks private (addresses, phone numbers, keys)",
        "Replace it: a model can recite what it was trained on.",
        False,
    ),
    "language": Fault(
        "another language than most answers", "Keep it if you mean it; otherwise move it to a file of its own.", False
    ),
}


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
