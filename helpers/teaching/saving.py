"""What lesson 06 needs to look at folders and at 16-bit models.

folder_table({"adapter": run.adapter})                  # file by file, with bytes
with plain_model(merged, plan) as model: ...            # 16-bit weights on this machine's device, gone afterwards
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from helpers.models import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from helpers.planner import Plan

MB = 1e6  # as file managers and hubs count


def size_of(place: str | Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = Path(place)
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def folder_table(place: str | Path) -> pd.DataFrame:
    """The files of a folder with their sizes in MB, largest first."""
    files = sorted((file for file in Path(place).rglob("*") if file.is_file()), key=size_of, reverse=True)
    rows = [{"file": file.relative_to(place).as_posix(), "MB": round(size_of(file) / MB, 3)} for file in files]
    return pd.DataFrame(rows, columns=["file", "MB"]).set_index("file")


def size_table(places: Mapping[str, str | Path]) -> pd.DataFrame:
    """label -> file or folder, as a table of MB and of how many times the first one each is."""
    sizes = {label: size_of(place) for label, place in places.items()}
    first = next(iter(sizes.values()))
    rows = [
        {"what": label, "MB": round(size / MB, 1), "times the first": round(size / first, 1)}
        for label, size in sizes.items()
    ]
    return pd.DataFrame(rows).set_index("what")


@contextmanager
def plain_model(folder: str | Path, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model in `folder` without quantisation, for evaluation; its memory comes back when the block ends.

    Its numbers are those that the plan calculates in: fp32 on a CPU, 16 bit on a card.
    """
    from transformers import AutoModelForCausalLM

    device = 0 if plan.gpu.kind == "cuda" else plan.gpu.kind
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map={"": device}
    ).eval()
    try:
        yield model
    finally:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # even if a variable still names it
        free_memory()
