"""A matplotlib `Figure` as something that every notebook shows.

picture(loss_chart(run.history), "The loss falls")      # last line of a cell
place = Place()
place.show(figure, "Two runs")                          # again and again: the newest picture stands where the first one stood
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure


def picture(figure: Figure, words: str = "") -> Image:
    """`figure` as a PNG. The kit's figures are made without pyplot, so a notebook does not show them by itself.

    Args:
        words: what is to be seen, for readers who cannot see it.
    """
    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image(
        buffer.getvalue(), format="png", embed=True, metadata={"alt": words}
    )  # alt= is unknown to Colab's IPython 7


class Place:
    """One place below a cell, whose picture is replaced without flicker: a display handle."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, figure: Figure, words: str = "") -> None:
        """`words`: what is to be seen, for readers who cannot see it."""
        from IPython.display import display

        image = picture(figure, words)
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
