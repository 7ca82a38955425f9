"""The shots curve: how quality grows with photos and steps, as a table and plots.

    python examples/shots_curve.py

Measures the generic model, the identity-conditioned start and adaptation on the three people of the demo album, and
writes tables, plots and a page. The settings are tiny, and the album was sampled from the model itself, so the figures
only show the way. With `folder=` a killed run goes on where it was; `metagpen curve -c configs/curve_128.yml` is the
same for a real collection, with rivals and controls (docs/curve.md).
"""

from __future__ import annotations

from pathlib import Path

import metagpen
from metagpen.album import OWN_ALBUM
from metagpen.evaluate.curve import write_rows
from metagpen.evaluate.curve_report import write_report

OUTPUT = Path("example_out/shots_curve")
SHOTS = [1, 4]
STEPS = [0, 4]
QUERIES = 2  # photos of everybody that are restored and measured
METHODS = ["generic", "start", "adapt"]  # the other names: the table in docs/curve.md


def main() -> None:
    rows = metagpen.shots_curve(
        metagpen.load(),
        OWN_ALBUM,  # or any folder with a sub-folder of photos per person
        methods=METHODS,
        shots=SHOTS,
        steps=STEPS,
        degradations=["hard"],
        adapt={"batch_size": 2},
        max_queries=QUERIES,
        progress=True,
    )
    table = OUTPUT / "rows.jsonl"
    write_rows(table, rows)  # one measured number per line, with everything that is known about it
    print(f"{len(rows)} rows: {table.resolve()}")
    for file in write_report(table, OUTPUT / "report"):
        print(file.resolve())


if __name__ == "__main__":
    main()
