"""The tables of times and memory: in every lesson, as recorded, and as the planner still plans."""

import json

import pytest

from helpers.hardware import KNOWN_GPUS
from tools import course, lesson_tables
from tools.lesson_tables import CARDS, RECORD, config_on, cpu_row, planned, table

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
LESSONS = {path.stem: path for path in course.lessons()}


def test_every_lesson_has_the_table_that_the_record_gives(capsys):
    assert lesson_tables.main(["--check"]) == 0, capsys.readouterr().out
    for lesson in LESSONS.values():
        [found] = course.TABLE.findall(course.read(lesson).cells[0].source)
        assert len(found.splitlines()) == 2 + 1 + len(CARDS)


def test_what_is_not_measured_says_so():
    for stem in LESSONS:
        rows = table(stem, RECORDED).splitlines()
        assert all("by the planner, not yet measured" in row for row in rows[3:])
        assert stem.startswith("00") or RECORDED[stem]["CPU"]["seconds"] > 0


def test_times_are_rounded_up_and_memory_to_half_gigabytes():
    measured = {"02_x": (119.0, 2.01), "05_x": (61.0, 1.3)}
    recorded = {stem: {"CPU": {"seconds": seconds, "peak_gib": gib}} for stem, (seconds, gib) in measured.items()}
    assert "about 2 minutes on one core | 2.5 GB of RAM" in cpu_row("02_x", recorded)
    assert "about 2 minutes on one core, if notebook 04 has left its run | 1.5 GB of RAM" in cpu_row("05_x", recorded)


def test_the_settings_are_those_of_the_lesson_on_that_card():
    assert config_on(LESSONS["04_train"], KNOWN_GPUS["T4"]).max_steps == -1  # a CPU takes fewer steps
    assert config_on(LESSONS["03_prepare_data"], KNOWN_GPUS["T4"]).max_steps == 125


@pytest.mark.slow
def test_the_planner_still_says_what_was_recorded():
    assert planned(LESSONS["00_quickstart"], KNOWN_GPUS["T4"]) == RECORDED["00_quickstart"]["T4"]
