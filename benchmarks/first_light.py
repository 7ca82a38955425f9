"""First light: does adapting to a few photos help on real people whom no training saw?

Measures the embedded model (or `--model`) on the 25 val people of celeba_wild_256, writes the rows to
benchmarks/results/first_light.json and the tables to docs/results/first_light.md, README.md and, translated,
README.zh-CN.md, and the contact sheet of one CC0 person to docs/images/first_light.jpg. Photos come from
`$METAGPEN_SHARED`, or the folder `shared` beside this repository; the contact sheets of the val people stay in runs/,
which git ignores.

    python benchmarks/first_light.py                   # all people, all queries; goes on where it was interrupted
    python benchmarks/first_light.py --max-people 2 --max-queries 3 --dry   # a quick look that changes no file
    python benchmarks/first_light.py --picture         # the picture alone; a minute
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import measure
import torch
from PIL import Image

import metagpen
from metagpen import faces
from metagpen.evaluate import EvaluateConfig, report, run_evaluate
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.protocol import Evaluation, load_people, preview_path
from metagpen.evaluate.tasks import Task, damage, load_task
from metagpen.identities import People
from metagpen.memory import keep_freed_memory

RESULTS = measure.RESULTS / "first_light.json"
PAGE = measure.ROOT / "docs" / "results" / "first_light.md"
PICTURE = measure.ROOT / "docs" / "images" / "first_light.jpg"
README, CHINESE_README = measure.ROOT / "README.md", measure.ROOT / "README.zh-CN.md"
MARKERS = measure.markers("first_light")
LONDONERS = 3  # people of the picture beside the first
SCORER, IN_LOSSES = measure.SCORER, "embedded (in losses)"
IN_README = {("generic", 0), ("start", 5), ("start", 1), ("adapt", 5), ("wrong-adapt", 5), (report.CEILING, 0)}

Tile = tuple[str, Image.Image]


class Target(NamedTuple):
    """What was to be reached, what was measured, and whether that is enough."""

    wish: str
    measured: str
    verdict: str


def configuration(arguments: argparse.Namespace) -> EvaluateConfig:
    people = measure.held_out("val", measure.PEOPLE)
    measure.need(Path(people["data"]), measure.SCORING)
    return EvaluateConfig(
        **{**people, "recognisers": {**people["recognisers"], IN_LOSSES: "embedded"}},
        model=arguments.model,
        trained_parts=["train", "kept"],
        degradations=["heavy", "moderate"],
        shots=[5, 1],
        steps=32,
        seed=0,
        max_people=arguments.max_people,
        max_queries=arguments.max_queries,
        work_dir=str(measure.ROOT / "runs" / "first_light"),
    )


def targets(rows: list[report.Row]) -> list[Target]:
    """The figures that were asked for before anything was measured."""

    def row(degradation: str, method: str, shots: int, metric: str = "identity") -> report.Row:
        recogniser = SCORER if metric == "identity" else None
        keys = dict(degradation=degradation, method=method, shots=shots, metric=metric, recogniser=recogniser)
        return report.find(rows, **keys)

    def judged(wish: str, found: report.Row, verdict: str) -> Target:
        return Target(wish, report.gain_text(found, 2 if found["metric"] == "psnr" else 3), verdict)

    def at_least(wish: str, found: report.Row, least: float, least_low: float = -math.inf) -> Target:
        return judged(wish, found, measure.verdict(found["gain"] >= least and found["gain_lo"] > least_low))

    def not_below(wish: str, found: report.Row) -> Target:
        return judged(f"{wish} not below generic", found, measure.not_below(found["gain_lo"], found["gain_hi"]))

    start5, start1, adapt5 = row("heavy", "start", 5), row("heavy", "start", 1), row("heavy", "adapt", 5)
    result = [
        at_least("heavy, 0 steps, 5 photos: identity gain at least +0.20", start5, 0.20),
        at_least("heavy, 0 steps, 1 photo: identity gain at least +0.14", start1, 0.14),
        at_least("heavy, 32 steps, 5 photos: identity gain at least +0.22, lower end above +0.17", adapt5, 0.22, 0.17),
        not_below("heavy, 32 steps, 5 photos: PSNR", row("heavy", "adapt", 5, "psnr")),
    ]
    for method, steps in (("start", 0), ("adapt", 32)):
        for metric, name in (("identity", "identity"), ("psnr", "PSNR")):
            result.append(not_below(f"moderate, {steps} steps, 5 photos: {name}", row("moderate", method, 5, metric)))
    for method, steps in (("wrong-start", 0), ("wrong-adapt", 32)):
        found = row("heavy", method, 5)
        wish = f"heavy, {steps} steps, a wrong person's 5 photos: no identity gain, upper end at most +0.02"
        result.append(judged(wish, found, measure.verdict(found["gain_hi"] <= 0.02)))
    seconds = adapt5["seconds_per_identity"]
    return [*result, Target("adapt, 5 photos, 32 steps: under 20 s", f"{seconds:.1f} s",
                            measure.verdict(seconds < 20))]


def page(found: Evaluation) -> str:
    """docs/results/first_light.md."""
    rows, first = found.rows, found.rows[0]
    tables = "\n\n".join(
        f"## {name.capitalize()} degradation\n\n{report.figures_table(rows, name, [SCORER, IN_LOSSES])}"
        for name in found.settings["degradations"]
    )
    return f"""# First light

Written by `benchmarks/first_light.py`; the rows are in `benchmarks/results/first_light.json`.

{first["identities"]} held-out people of celeba_wild_256 (CelebA; in no training), {first["queries"]} queries. They are
not untouched: while the models before this one were made, settings were chosen by how they did on them. The damage is
synthetic, from the generators that training uses too. For each person
5 photos are set aside (of these the first, where one is used); the query photos are all the others whose native
face was at least as wide as the model works on. Heavy: faces reduced to 8-16 px, noise, JPEG. Moderate: BSRGAN
at scale 1. Every photo's damage, the 5 photos, the wrong person's identity and the bootstrap come from seed
{first["seed"]}.

Values are means over people of each person's mean over their queries; in brackets the gain over the generic model,
paired by person, with its 95 % bootstrap interval over people (percentiles of 10,000 draws). *Identity* is the cosine
between the embeddings of the restored and the true face, both aligned by the truth's landmarks. {SCORER} is
`{found.settings["recognisers"][SCORER]}`, which no loss ever saw; the embedded recogniser is in the losses, so its
figures flatter. *Of ceiling*: mean cosine divided by that of other true photos of the same person (all pairs of
queries); it flatters, for a restored photo has pose and light in common with its own truth. *Likeness* is like for
like: the cosine to the person's *other* true photos over that of a true photo to them. *Worse*: people whose identity
cosine ({SCORER}) fell below generic. *Sharpness*: amplitude of the high band relative to the truth's. LPIPS:
{found.lpips}. *Not below* is reached where the whole interval lies above zero, and undecided where it holds zero.

Model {found.settings["model"]}, commit {first["commit"]}, on {first["machine"]}; load average at the end
{found.machine["load_average"]}. Seconds are those of `adapt` alone.

## What was to be reached

{report.table(["figure", "measured", "verdict"], targets(rows))}

{tables}
"""


def summary(found: Evaluation) -> str:
    """The table in README.md: what matters most of the page's."""
    first, metrics = found.rows[0], ["psnr", "lpips"] if found.settings["lpips"] else ["psnr"]
    kept = [row for row in found.rows if (row["method"], row["shots"]) in IN_README]
    moderate = [report.gain_text(report.find(found.rows, degradation="moderate", method="adapt", shots=5, metric=metric,
                                             recogniser=recogniser), digits)
                for metric, recogniser, digits in (("identity", SCORER, 3), ("psnr", None, 2))]
    return f"""{first["identities"]} real people whom no training of ours saw, {first["queries"]} restored photos;
identity is the cosine to the true photo under a recogniser that no loss saw; in brackets the gain over the generic
model with its 95 % interval over people. *Likeness*: the cosine to the person's other photos, as a share of what a
true photo reaches with them; *of ceiling*: identity over that of another true photo, which flatters, for restored
photos have pose and light in common with their own truth. *Worse*: how many people end below the generic model's
identity, and the largest drop. LPIPS: {found.lpips}.
[All figures and how they were measured](docs/results/first_light.md).

{report.figures_table(kept, "heavy", [SCORER], metrics)}

Under moderate degradation adapt gains {moderate[0]} of identity and {moderate[1]} dB."""


CHINESE = {  # the words of README.md's figures; where one phrase holds another, the longer one first
    "real people whom no training of ours saw, ": "位我们的训练中从未出现的真人，",
    " restored photos;\nidentity is the cosine to the true photo under a recogniser that no loss saw; in brackets the "
    "gain over the generic\nmodel with its 95 % interval over people. *Likeness*: the cosine to the person's other "
    "photos, as a share of what a\ntrue photo reaches with them; *of ceiling*: identity over that of another true "
    "photo, which flatters, for restored\nphotos have pose and light in common with their own truth. *Worse*: how many "
    "people end below the generic model's\nidentity, and the largest drop. LPIPS: ":
        " 张复原的照片；身份是与真实照片之间的余弦，所用识别器没有进入任何损失；\n"
        "圆括号内是相对于通用模型的增益及其对人的 95 % 区间。“相像度”：与此人其他照片的余弦，"
        "相对于一张真实照片与它们所达到的值；\n“占上限”：身份相对于此人另一张真实照片所达到的值，"
        "它偏高，因为复原的照片与自己的真实照片姿态和光线相同；“变差”：身份低于通用模型的人数与最大降幅。LPIPS：",
    ".\n[All figures and how they were measured](docs/results/first_light.md).":
        "。[全部数字与测量方法](docs/results/first_light.md)。",
    "Under moderate degradation adapt gains ": "中度退化下，适配的增益：身份 ",
    " of identity and ": "，PSNR ", " dB.": " dB。",
    "not available": "不可用", "alexnet, real backbone": "AlexNet，真实骨干网络",
    "| method |": "| 方法 |", "identity, ": "身份，", "of ceiling": "占上限", "likeness": "相像度",
    "| worse |": "| 变差 |",
    "s per person": "每人秒数", "generic model": "通用模型",
    "wrong person's photos, adapt, ": "别人的照片，适配，",
    "another true photo (ceiling in kind)": "另一张真实照片（同类上限）",
    "| start, ": "| 起点，", "| adapt, ": "| 适配，", " of 25, by ": " / 25，最多 ", " of 25 |": " / 25 |",
    " photos, ": " 张照片，", " photo, ": " 张照片，", " steps": " 步",
}  # fmt: skip


def in_chinese(figures: str) -> str:
    """`summary` for README.zh-CN.md: the same numbers, the words replaced."""
    for english, chinese in CHINESE.items():
        figures = figures.replace(english, chinese)
    return figures


def write_readmes(figures: str) -> None:
    """The figures into README.md and, translated, into README.zh-CN.md."""
    for path, text in ((README, figures), (CHINESE_README, in_chinese(figures))):
        report.write_text(path, report.replace_between(path.read_text(encoding="utf-8"), *MARKERS, text))


def write_sheets(found: Evaluation, config: EvaluateConfig, model: metagpen.MetaGPEN) -> Path:
    """Contact sheets of the val people, for looking at in runs/ only: a line per query, a column per method."""
    columns = [("generic", 0), ("start", 1), ("start", 5), ("adapt", 5), ("zero", 5), ("wrong-adapt", 5)]
    people, folder, size = load_people(config, model.size), found.folder / "sheets", model.size
    folder.mkdir(exist_ok=True)
    for person in people:
        task = load_task(people, person, max(config.shots), size, config.seed, config.max_queries)
        for name in config.degradations:
            strips = {c: preview_path(found.folder, person, name, *c) for c in [("input", 0), *columns]}
            lines = [[(f"photo {i + 1}", faces.to_pil(photo)) for i, photo in enumerate(task.support)]]
            for i, truth in enumerate(task.queries[: config.preview]):
                tiles = [(f"{m} {k or ''}", _tile(path, i, size)) for (m, k), path in strips.items()]
                lines.append([*tiles, ("truth", faces.to_pil(truth))])
            report.contact_sheet(lines, tile=size).save(folder / f"{name}_{person}.png")
    return folder


def _tile(strip: Path, index: int, size: int):
    return faces.load_photo(strip).crop((index * size, 0, (index + 1) * size, size))


def write_picture(model: metagpen.MetaGPEN, seed: int) -> None:
    """docs/images/first_light.jpg: a person from five photos (CC0), and the first people of the London set from one
    each (CC BY 4.0), unchosen."""
    people = People.from_folder(measure.SHARED / "photos" / "london_512")
    lisa = load_task(people, "lisa", 5, model.size, seed)
    lines = [[(f"given: photo {i + 1}", faces.to_pil(photo)) for i, photo in enumerate(lisa.support)]]
    lines += restored_lines(model, lisa, measure.DAMAGE, seed)
    for name in [name for name in people if name != "lisa"][:LONDONERS]:
        task = load_task(people, name, 1, model.size, seed, min_queries=1)
        given = ("given: the only photo", faces.to_pil(task.support[0]))
        lines += [[given, *line] for line in restored_lines(model, task, {"hard": measure.DAMAGE["hard"]}, seed)]
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    report.contact_sheet(lines, tile=160).save(PICTURE, quality=92)


def restored_lines(model: metagpen.MetaGPEN, task: Task, damages: dict[str, str], seed: int) -> list[list[Tile]]:
    """The task's first query under each of the damages: input, generic, start, adapt, truth."""
    start, person = (metagpen.adapt(model, list(task.support), steps=steps, seed=seed) for steps in (0, 32))
    lines = []
    for name, title in damages.items():
        poor = damage(task, name, named_degradations([name])[name], seed)[:1]
        images = {f"input, {title}": poor, "generic model": model.restore(poor), "start": start.restore_batch(poor),
                  "adapt": person.restore_batch(poor), "truth": task.queries[:1]}
        lines.append([(label, faces.to_pil(image[0])) for label, image in images.items()])
    return lines


def as_published() -> Evaluation:
    """What benchmarks/results/first_light.json holds."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return Evaluation(found["rows"], found["settings"], found["machine"], found["lpips"], RESULTS.parent)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint or name; default: the embedded model")
    parser.add_argument("--max-people", type=int, help="only the first people")
    parser.add_argument("--max-queries", type=int, help="at most so many queries per person; default: all")
    parser.add_argument("--threads", type=int, help="threads of torch; default: as many as it takes")
    parser.add_argument("--dry", action="store_true", help="print the figures; write nothing outside runs/")
    parser.add_argument("--pages", action="store_true", help="write the pages anew from the published rows")
    parser.add_argument("--picture", action="store_true", help="draw the picture anew; measure nothing")
    arguments = parser.parse_args()
    if arguments.pages:
        report.write_text(PAGE, page(as_published()))
        write_readmes(summary(as_published()))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.picture:
        write_picture(metagpen.load(arguments.model or "embedded"), seed=0)
        return
    config = configuration(arguments)
    if not arguments.dry:
        for readme in (README, CHINESE_README):
            report.replace_between(readme.read_text(encoding="utf-8"), *MARKERS, "")  # better now than after an hour
    found = run_evaluate(config)
    model = metagpen.load(config.model or "embedded")
    print(page(found))
    print(f"contact sheets: {write_sheets(found, config, model)}")
    if arguments.dry:
        report.write_json(found.folder / "rows.json", found.rows, settings=found.settings, machine=found.machine)
        report.write_text(found.folder / "page.md", page(found))
        return
    report.write_json(RESULTS, found.rows, settings=found.settings, machine=found.machine, lpips=found.lpips)
    report.write_text(PAGE, page(found))
    write_picture(model, config.seed)
    write_readmes(summary(found))
    written = (path.relative_to(measure.ROOT) for path in (RESULTS, PAGE, PICTURE, README, CHINESE_README))
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    measure.run(main)
