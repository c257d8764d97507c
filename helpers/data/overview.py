"""What only the whole data set shows: near duplicates, leaks between its parts, one answer everywhere, a mix of languages.

overview = Overview()
overview.add(examples_of_one_row, place, held_out=False)
for finding in overview.findings(): ...
"""

from __future__ import annotations

from helpers.data.content import language
from helpers.data.duplicates import Signatures, plain
from helpers.data.formats import Example, texts_of
from helpers.data.report import Finding, Place

REPEATED, REPEATED_SHARE = 5, 0.01  # an answer counts as repeated from 5 times and 1 % of the rows on
LARGEST_LANGUAGE = 10  # rows whose language is clear, needed to call another one odd


class Overview:
    """Fed row by row; keeps a signature and a few numbers of each."""

    def __init__(self) -> None:
        self.signatures = Signatures()
        self.places: list[Place] = []
        self.held_out: list[bool] = []
        self.questions: list[int] = []
        self.answers: dict[int, Finding] = {}
        self.languages: dict[str, Finding] = {}

    def add(self, examples: list[Example], place: Place, held_out: bool, counts: bool = True) -> None:
        """One row. `counts`: it belongs to the data itself, not to a validation source that is only compared with."""
        said = texts_of(examples[-1])
        self.signatures.add("\n".join(said))
        self.places.append(place)
        self.held_out.append(held_out)
        first = examples[0]
        self.questions.append(hash(plain(first["prompt"][-1]["content"] if "prompt" in first else first["text"])))
        if not counts:
            return
        if "completion" in first:
            for example in examples:
                answer = example["completion"][0]["content"]
                known = self.answers.setdefault(hash(plain(answer)), Finding("repeated answer"))
                known.add(place, f"{answer[:60]!r}" if not known.count else "")
        spoken = language(said[-1])
        if spoken:
            self.languages.setdefault(spoken, Finding("language")).add(place)

    def findings(self) -> list[Finding]:
        """One finding of each kind that occurs."""
        found = [self._near_duplicates_and_leaks(), self._repeated_answers(), self._languages()]
        return [finding for findings in found for finding in findings if finding.count]

    def _near_duplicates_and_leaks(self) -> list[Finding]:
        """Groups of rows that say nearly the same; a group in both parts is a leak, and so is a question in both."""
        near, leaks = Finding("near duplicate"), Finding("leak")
        groups = self.signatures.groups()
        for group in groups.lists():
            if len(group) > 1:
                near.add(self.places[group[1]], f"{_and(self.places, group[:4])} belong together")
        if any(self.held_out):
            first_with: dict[int, int] = {}
            for index, question in enumerate(self.questions):
                groups.join(index, first_with.setdefault(question, index))
            for group in groups.lists():
                trained = [index for index in group if not self.held_out[index]]
                for index in group if trained else []:
                    if self.held_out[index]:
                        leaks.add(self.places[index], f"it stands in training at {_and(self.places, trained[:1])}")
        return [near, leaks]

    def _repeated_answers(self) -> list[Finding]:
        often = [
            finding
            for finding in self.answers.values()
            if finding.count >= max(REPEATED, REPEATED_SHARE * len(self.places))
        ]
        often.sort(key=lambda finding: -finding.count)
        if not often:
            return []
        first = often[0]
        others = f"; {len(often) - 1} more such answers" if len(often) > 1 else ""
        total = sum(finding.count for finding in often)
        return [
            Finding(
                "repeated answer", total, first.places, f"{first.detail} answers {first.count:,} rows{others}", False
            )
        ]

    def _languages(self) -> list[Finding]:
        """Rows in another language than the most common one."""
        ranked = sorted(self.languages.items(), key=lambda entry: -entry[1].count)
        if len(ranked) < 2 or ranked[0][1].count < LARGEST_LANGUAGE:
            return []
        main, others = ranked[0], ranked[1:]
        places = [place for _, finding in others for place in finding.places][:5]
        named = ", ".join(f"{finding.count:,} {name}" for name, finding in others[:4])
        return [
            Finding(
                "language",
                sum(finding.count for _, finding in others),
                places,
                f"{main[1].count:,} {main[0]}, {named}",
                False,
            )
        ]


def _and(places: list[Place], group: list[int]) -> str:
    """Some places in words, with their files where these differ."""
    only_file = len({place[0] for place in places}) == 1
    return " and ".join(("line " if only_file else "") + places[index].show(only_file) for index in group)
