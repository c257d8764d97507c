"""Curves that were drawn on purpose get the sentence that a teacher would say."""

import pytest

from helpers.diagnosis import diagnose


def curve(training, validation, every=10):
    """History with one training and one validation point every `every` steps; the first validation point is step 0."""
    history = [{"step": 0, "eval_loss": validation[0]}]
    for number, loss in enumerate(training, start=1):
        history.append({"step": number * every, "loss": loss})
        if number < len(validation):
            history.append({"step": number * every, "eval_loss": validation[number]})
    return history


CURVES = {
    "healthy": ("still learning", [3.5, 2.8, 2.3, 2.0, 1.8], [4.0, 3.1, 2.6, 2.3, 2.1, 1.95]),
    "flat at the end": ("levelled off", [3.0, 2.2, 2.0, 1.95, 1.94], [4.0, 2.5, 2.2, 2.1, 2.095, 2.092]),
    "overfit": ("overfitting", [3.0, 2.0, 1.2, 0.6, 0.3], [4.0, 2.6, 2.2, 2.3, 2.5, 2.9]),
    "underfit": ("not moving", [4.0, 3.99, 3.98, 3.99, 3.98], [4.0, 3.99, 3.99, 3.98, 3.98, 3.98]),
    "blown up": ("diverged", [3.5, 3.0, 3.2, 7.0, 9.0], [4.0, 3.2, 3.1, 3.6, 7.5, 9.0]),
    "broken": ("diverged", [3.5, 3.0, None], [4.0, 3.2, 3.1]),
    "just begun": ("too early", [3.9], [4.0]),
    "warming up": ("too early", [4.0], [4.0, 3.99]),
    "noisy": ("levelled off", [2.0, 1.9, 2.1, 1.95, 2.05], [4.0, 2.0, 2.2, 2.0, 2.1, 2.06]),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_planted_curve_gets_its_sentence_at_any_scale_of_the_loss(name, scale):
    kind, *losses = CURVES[name]
    scaled = [[None if loss is None else loss * scale for loss in some] for some in losses]
    assert diagnose(curve(*scaled), max_steps=50).kind == kind


def test_it_names_the_step_to_keep():
    _, training, validation = CURVES["overfit"]
    text = str(diagnose(curve(training, validation), max_steps=50))
    assert "overfitting since step 20" in text and "fewer epochs" in text


def test_every_beginning_of_a_curve_has_a_sentence():
    for _, training, validation in CURVES.values():
        history = curve(training, validation)
        for count in range(len(history) + 1):
            assert str(diagnose(history[:count]))
            assert str(diagnose(history[1:count]))  # as if the untrained model had not been measured
