"""Pairs for profiles/dates.yaml: days as people write them, and the same days by ISO 8601. Writes dates.jsonl here.

python profiles/dates.py
"""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path

FORMATS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{weekday}, {day}{th} {short} {year}",
    "the {day}{th} of {month}, {year}",
)
ENDINGS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
WEEKDAYS = [datetime.date(2000, 5, day).strftime("%A") for day in range(1, 8)]  # the first was a Monday


def write(path: Path, count: int, seed: int = 0) -> None:
    """So many days between 1800 and 2199, each in one of the ways."""
    draw = random.Random(seed)
    first, last = datetime.date(1800, 1, 1).toordinal(), datetime.date(2199, 12, 31).toordinal()
    with path.open("w") as file:
        for _ in range(count):
            date = datetime.date.fromordinal(draw.randint(first, last))
            month = MONTHS[date.month - 1]
            source = draw.choice(FORMATS).format(
                day=date.day,
                th=ENDINGS.get(date.day, "th"),
                month=month,
                short=month[:3],
                year=date.year,
                weekday=WEEKDAYS[date.weekday()],
            )
            file.write(json.dumps({"source": source, "target": date.isoformat()}) + "\n")


if __name__ == "__main__":
    write(Path("dates.jsonl"), 20_000)
