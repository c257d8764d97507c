"""Everything that is wrong or odd with a data set; exit status 0 only if training could start.

python -m helpers.data FILE [--model NAME] [--max-length N] [--truncate] [--rejected PATH]
"""

from __future__ import annotations

import argparse
import sys

from helpers.data.check import check_examples
from helpers.data.issues import DataError, tell
from helpers.data.tokens import load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """The command line: prints the report; 0 only if training could start."""
    parser = argparse.ArgumentParser(prog="python -m helpers.data", description="Check a data set for fine-tuning.")
    parser.add_argument("source", metavar="FILE", help="JSON, CSV, TSV or Parquet (also .gz), a folder, or a Hub id")
    parser.add_argument("--model", help="also check tokens: a name from the menu, a folder or a Hub id")
    parser.add_argument("--max-length", type=int, help="tokens of the longest example to train (needs --model)")
    parser.add_argument("--truncate", action="store_true", help="keep answers that are cut")
    parser.add_argument("--rejected", metavar="PATH", help="write the rows that were set aside to this file")
    chosen = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(chosen.model) if chosen.model else None
        report = check_examples(chosen.source, tokenizer, chosen.max_length, chosen.truncate)
    except DataError as error:
        tell(error)
        return 1
    tell(report)
    if chosen.rejected and report.rejected:
        tell(f"  - rows set aside: {report.written(chosen.rejected)}")
    return 0 if report.ready else 1


if __name__ == "__main__":
    sys.exit(main())
