"""What docs/evidence/protocol.md says to be careful about, from the rows that are committed: how sure the leads over
rivals are after a correction for their number, whether the people by whom rates and filters were not chosen say the
same, and what each draw of photos says alone. Prints; writes nothing.

    python benchmarks/cautions.py
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import evidence
import numpy as np
from scipy.stats import norm, t, ttest_1samp

LOOKED_AT = 10  # people of London, the first, by whom eight times the rates were chosen

Row, Point = evidence.Row, evidence.Point


def of(rows: Sequence[Row], people: Container[str]) -> list[Row]:
    return [row for row in rows if row["identity"] in people]


def people_of(rows: Sequence[Row]) -> set[str]:
    return {row["identity"] for row in rows}


def paired(rows: Sequence[Row], theirs: Point, metric: str, damage: str) -> np.ndarray:
    """Ours minus theirs, a number per person."""
    recogniser = evidence.SCORER if metric == "identity" else None
    wanted = metric, recogniser, damage
    asked = [row for row in rows if (row["metric"], row["recogniser"], row["degradation"]) == wanted]
    ours, other = ({row["identity"]: row["value"] for row in asked
                    if (row["method"], row["shots"], row["steps"]) == point} for point in (evidence.OURS, theirs))
    return np.array([ours[name] - other[name] for name in sorted(ours.keys() & other.keys())])


def student(values: np.ndarray) -> str:
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def main() -> None:
    curve, rates, meta, long, sixteen = map(evidence.read_run, (
        "curve_128", "curve_rates", "curve_meta", "curve_long_hard", "curve_16"))
    leads = {(theirs, damage): ttest_1samp(paired(curve, theirs, "identity", damage), 0).pvalue
             for theirs in evidence.rivals_of(curve) for damage in ("hard", "extreme")}
    worst = max(leads, key=leads.__getitem__)
    print(f"{len(leads)} leads on ruined photos: largest p {leads[worst]:.5f} ({worst[0][0]}, {worst[1]}), times their "
          f"number {len(leads) * leads[worst]:.4f}")
    rest, unseen = people_of(curve) - people_of(rates), people_of(curve) - people_of(meta)
    for theirs in evidence.rivals_of(curve):
        gain = evidence.against(of(curve, rest), evidence.OURS, theirs, "identity")
        print(f"the {len(rest)} by whom no rate was chosen, {theirs[0]}: {evidence.interval(gain)}")
    for damage in ("hard", "moderate"):
        theirs = ("random-filters", 5, 32)
        gain = evidence.against(of(curve, unseen), evidence.OURS, theirs, "identity", damage)
        p = ttest_1samp(paired(curve, theirs, "identity", damage), 0).pvalue
        print(f"filters, {damage}: the {len(unseen)} by whom they were not chosen {evidence.interval(gain)}, "
              f"Student's {student(paired(of(curve, unseen), theirs, 'identity', damage))}; all 25 p {p:.3f}")
    for seed in sorted({row["seed"] for row in sixteen}):
        more = evidence.growth([row for row in sixteen if row["seed"] == seed], "adapt")
        print(f"draw {seed}: {', '.join(map(evidence.interval, more))}")
    london = evidence.read_run("curve_london")
    others = set(sorted(people_of(london))[LOOKED_AT:])
    scaled, lora = (evidence.SCALED, 1, 32), ("lora-16-x16", 1, 32)
    for damage in evidence.DAMAGE:
        gains = [evidence.interval(evidence.against(of(london, others), scaled, lora, metric, damage))
                 for metric in ("identity", "psnr", "lpips")]
        print(f"London, {damage}: ours at eight times its rates minus LoRA, the {len(others)} by whom eight was not "
              f"chosen: identity, PSNR, LPIPS {', '.join(gains)}")
    print("2,000 iterations, identity by Student's t:", student(paired(long, evidence.FINETUNE, "identity", "hard")))
    for n in (12, 25):
        wider = t.ppf(0.975, n - 1) / norm.ppf(0.975) * (n / (n - 1)) ** 0.5
        print(f"Student's interval over the bootstrap's, {n} people: {wider:.2f}")


if __name__ == "__main__":
    main()
