"""A matplotlib `Figure` as something that every notebook shows.

picture(loss_chart(run.history), "The loss falls")      # last line of a cell
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

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
    return Image(buffer.getvalue(), format="png", embed=True, metadata={"alt": words})
