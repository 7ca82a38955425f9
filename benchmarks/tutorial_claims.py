"""The claims of the usual few-shot tutorial on GPEN beside what they come to on photos that nothing was trained on.

For each of a few held-out people (val of celeba_wild_256): 3 to 8 photos become pairs by `metagpen pairs` with BSRGAN
at scale 1, `metagpen train -opt` learns from them, and the person's other photos, degraded in the same way, are
restored. Variants differ in one thing each: LoRA from the tutorial itself; step decay, rotation and damage made
afresh for every draw from a shorter run of it (`compared` iterations). Writes benchmarks/results/tutorial_claims.json
and the tables in docs/tutorial.md and docs/tutorial.zh-CN.md. Photos come from `$METAGPEN_SHARED`, or the folder
`shared` beside this repository. Finished people and variants are kept in runs/, so an interrupted run goes on; those
in the JSON file already, of the same model and configuration, are not measured again, so more people can be added.

    python benchmarks/tutorial_claims.py                              # 2 people: 3 hours on two cores with AVX2
    python benchmarks/tutorial_claims.py --workers 2 --threads 1      # one person on each core
    python benchmarks/tutorial_claims.py --people 1 --iterations 20 --compared 10 --dry    # changes no file
    python benchmarks/tutorial_claims.py --tables                     # only the tables, from the JSON file
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console

import metagpen
from metagpen import recognise
from metagpen.adaptation.draws import Album
from metagpen.adaptation.optimise import new_optimiser
from metagpen.adaptation.steps import inner_step
from metagpen.config import Config
from metagpen.degrade import write_pairs
from metagpen.evaluate import report
from metagpen.evaluate.engine import in_batches, named_degradations
from metagpen.evaluate.methods import METHODS, Lesson, Rivals
from metagpen.evaluate.tasks import Task, damage, load_task
from metagpen.faces import to_pil
from metagpen.finetune import Options
from metagpen.finetune.train import FineTune
from metagpen.finetune.watch import read_series
from metagpen.identities import People, load_people, split
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN
from metagpen.workers import spread

RESULTS = measure.RESULTS / "tutorial_claims.json"
PAGES = {"en": measure.ROOT / "docs" / "tutorial.md", "zh": measure.ROOT / "docs" / "tutorial.zh-CN.md"}
MARKERS = measure.markers("tutorial_claims")
LEVEL = "moderate"  # BSRGAN at scale 1, as the tutorial degrades
LATER = ("rotation", "fresh", "lora")  # variants without which the table still says something
STOPS = 4  # held-out figures at so many places on the way

Values = dict[str, float | None]
Record = dict[str, Any]


class Claims(Config):
    """What is measured. `people`: the first of the split, by name; `compared`: iterations of the shorter runs;
    `queries`: at most so many photos of each person."""

    people: int = 2
    iterations: int = 2000
    compared: int = 500
    shots: int = 5
    queries: int = 8
    adapt_steps: int = 32
    lora: str = "lora-16"
    model: str = "embedded"
    scorer: str = "mobilefacenet_casia_xiaoccer_068.ckpt"
    seed: int = 0


# --- measuring ---------------------------------------------------------------------------------------------------


def measured(config: Claims, left_out: Sequence[str], workers: int, threads: int | None) -> list[Record]:
    """One record per person and variant: figures on the held-out photos, seconds of learning, figures on the way."""
    data, scorer = measure.SHARED / "photos" / "celeba_wild_256", measure.SHARED / "weights" / config.scorer
    measure.need(data, scorer)
    held_out = split(load_people(data), data.parent / "splits.csv")["val"]
    persons = sorted(held_out)[: config.people]
    known = earlier(identical(config, metagpen.load(config.model)))
    one = partial(person_records, config, held_out, scorer, known, left_out, threads)
    if workers == 1:
        found = map(one, persons)
    else:
        done = dict(spread(one, persons, workers, keep_freed_memory))
        found = [done[person] for person in persons]
    return [record for records in found for record in records]


def identical(config: Claims, model: MetaGPEN) -> dict[str, Any]:
    """What two measurements must have in common to stand in one table."""
    return {**config.model_dump(exclude={"people"}), "fingerprint": model.fingerprint}


def earlier(same: Mapping[str, Any]) -> dict[tuple[str, str], Record]:
    """By (person, variant): records of the results file, if they are of the same model and configuration."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"same": None}
    if found["same"] != same:
        return {}
    return {(record["person"], record["variant"]): record for record in found["records"]}


def person_records(config: Claims, people: People, scorer: Path, known: Mapping[tuple[str, str], Record],
                   left_out: Sequence[str], threads: int | None, person: str) -> list[Record]:
    """Every variant on one person; each is written down as soon as it is done."""
    if threads:
        torch.set_num_threads(threads)
    model = metagpen.load(config.model)
    digest = hashlib.sha256(json.dumps(identical(config, model)).encode()).hexdigest()[:12]
    folder = measure.ROOT / "runs" / "tutorial_claims" / digest / person
    task = load_task(people, person, config.shots, model.size, config.seed, config.queries)
    write_photos(folder, task, config)
    variants: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda name=name, changes=changes: fine_tuned(options(config, folder, name, scorer, **changes))
        for name, changes in variations(config).items()
    }
    variants["lora"] = lambda: low_rank(config, options(config, folder, "lora", scorer))
    variants["adapt"] = lambda: adapted(config, task, options(config, folder, "adapt", scorer))
    found = []
    for name, run in variants.items():
        file = folder / f"{name}.json"
        if name in left_out:
            continue
        if (person, name) in known:
            found.append(known[person, name])
            continue
        if not file.exists():
            print(f"{person}: {name}", flush=True)
            about = {"person": person, "variant": name, "commit": report.commit(),
                     "machine": report.machine_line(report.machine())}  # fmt: skip
            report.write_text(file, json.dumps({**about, **run()}) + "\n")
        found.append(json.loads(file.read_text()))
    return found


def write_photos(folder: Path, task: Task, config: Claims) -> None:
    """photos/ and pairs/ of the support, as the tutorial makes them; val/ of the queries, each with its own seed."""
    if (folder / "val" / "done").exists():
        return
    sides = {"photos": task.support, "val/GT": task.queries,
             "val/LR": damage(task, LEVEL, named_degradations([LEVEL])[LEVEL], config.seed)}  # fmt: skip
    for name, images in sides.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images, start=1):
            to_pil(image).save(folder / name / f"{i:03}.png")
    write_pairs(folder / "photos", folder / "pairs", "BSRGAN", 1, num_workers=1, seed=config.seed, overwrite=True,
                progress=False)  # fmt: skip
    (folder / "val" / "done").touch()


def variations(config: Claims) -> dict[str, dict[str, Any]]:
    """What each variant of the fine-tune changes."""
    length = config.compared
    steps = {"type": "MultiStepLR", "milestones": [length // 2, 3 * length // 4], "gamma": 0.5}
    return {
        "tutorial": {},
        "short": {"iterations": length},
        "step-decay": {"iterations": length, "scheduler": steps},
        "rotation": {"iterations": length, "use_rot": True},
        "fresh": {"iterations": length, "fresh": True},
    }


def options(config: Claims, folder: Path, name: str, scorer: Path, iterations: int | None = None,
            scheduler: Mapping | None = None, use_rot: bool = False, fresh: bool = False) -> Options:
    """The tutorial's options file with these changes. fresh: every draw degraded anew, in place of fixed pairs."""
    iterations = iterations or config.iterations
    train = {"dataroot_gt": folder / "pairs" / "GT", "dataroot_lq": folder / "pairs" / "LR", "aligned": True,
             "resize_crop": [0.9, 1.1], "color_jitter": {"brightness": 0.1, "contrast": 0.1}, "use_rot": use_rot}
    if fresh:
        del train["dataroot_lq"]
        train["degradation"] = {"bsrgan": 1.0}
    val = {"dataroot_gt": folder / "val" / "GT", "dataroot_lq": folder / "val" / "LR", "aligned": True}
    return Options.from_dict({
        "name": name, "datasets": {"train": train, "val": val}, "manual_seed": config.seed, "device": "cpu",
        "path": {"pretrain_network_g": config.model, "experiments_root": folder / "experiments"},
        "train": {"total_iters": iterations, "warmup_iter": min(100, iterations // 20),
                  "scheduler": scheduler or {"type": "CosineAnnealingLR", "eta_min": 1e-6}},
        "val": {"val_freq": max(1, iterations // STOPS), "recogniser": str(scorer)},
        "logger": {"save_checkpoint_freq": iterations, "use_tb_logger": False},
    })  # fmt: skip


def fine_tuned(given: Options) -> dict[str, Any]:
    """`metagpen train -opt` with these options; scored here, by the metrics that there are now."""
    run = FineTune(given, None, Console(quiet=True), "cpu")
    run.begin()
    run.run()
    before, after = held_out(run, run.model.restore), held_out(run, run.person.restore_batch)
    series = read_series(given.folder / "validation.csv")
    return {"before": before, "after": after, "seconds": run.seconds, "series": series}


def low_rank(config: Claims, given: Options) -> dict[str, Any]:
    """LoRA on the decoder, for the same iterations on the same batches, by the same losses and schedule."""
    run = FineTune(given, None, Console(quiet=True), "cpu")
    schedule, album = given.train, Album(run.pairs.truth, run.pairs.landmarks)
    settings = run.config.model_copy(update={"eta_min": schedule.scheduler.eta_min / schedule.lr_G})
    learner = METHODS[config.lora].build(Lesson(run.model, album, settings, Rivals(), run.in_losses))
    parameters, optimiser = learner.begin, new_optimiser(learner.optimiser)
    began = time.perf_counter()
    for iteration in range(config.iterations):
        rates = learner.rates(iteration)
        parameters = {name: value.detach().requires_grad_(name in rates) for name, value in parameters.items()}
        parameters, _ = inner_step(learner.loss, parameters, run.batch(iteration), rates, optimiser)
    seconds = time.perf_counter() - began
    return {"after": held_out(run, lambda images: learner.restore(parameters, images)), "seconds": seconds}


def adapted(config: Claims, task: Task, given: Options) -> dict[str, Any]:
    """`metagpen adapt` on the same photos."""
    run = FineTune(given, None, Console(quiet=True), "cpu")
    began = time.perf_counter()
    person = metagpen.adapt(run.model, list(task.support), config.adapt_steps, seed=config.seed)
    return {"seconds": time.perf_counter() - began, "after": held_out(run, person.restore_batch)}


def held_out(run: FineTune, restore: Callable) -> Values:
    return run.held_out.score(in_batches(restore, run.held_out.pairs.poor, 8))


# --- summing up --------------------------------------------------------------------------------------------------


def summary(config: Claims, records: list[Record]) -> dict[str, Any]:
    """Means over people, and the lowest and the highest of them, who are too few for an interval; differences are
    paired by person."""
    by = {(record["variant"], record["person"]): record for record in records}
    names = sorted({record["person"] for record in records})

    def values(variant: str, metric: str, when: str = "after") -> dict[str, float]:
        return {name: by[variant, name][when][metric] for name in names}

    def mean(values: Mapping[str, float]) -> dict[str, float]:
        return {"mean": sum(values.values()) / len(values), "lo": min(values.values()), "hi": max(values.values())}

    def gain(variant: str, metric: str, against: dict[str, float]) -> dict[str, float]:
        return mean({name: value - against[name] for name, value in values(variant, metric).items()})

    def known(variant: str) -> list[str]:
        """Metrics that everybody has."""
        return [metric for metric in by[variant, names[0]]["after"] if None not in values(variant, metric).values()]

    variants = {}
    for variant in dict.fromkeys(record["variant"] for record in records):
        against = compared_with(variant)
        metrics = [metric for metric in known(variant) if metric in known(against)]
        variants[variant] = {
            "seconds": mean({name: by[variant, name]["seconds"] for name in names}),
            **{metric: mean(values(variant, metric)) for metric in metrics},
            **{f"{metric}_gain": gain(variant, metric, values("tutorial", metric, "before")) for metric in metrics},
            "against": against,
            **{f"{metric}_against": gain(variant, metric, values(against, metric)) for metric in metrics},
        }
    before = {metric: mean(values("tutorial", metric, "before")) for metric in known("tutorial")}
    stops = [row["iter"] for row in by["tutorial", names[0]]["series"]]
    way = [{"iter": at, "psnr_gain": mean({name: by["tutorial", name]["series"][k]["psnr"]
                                           - by["tutorial", name]["series"][0]["psnr"] for name in names})}
           for k, at in enumerate(stops)]  # fmt: skip
    return {"config": config.model_dump(), "people": len(names), "lpips": "lpips" in before, "before": before,
            "variants": variants, "way": way, "commits": sorted({record["commit"] for record in records}),
            "machine": "; ".join(sorted({record["machine"] for record in records}))}  # fmt: skip


def compared_with(variant: str) -> str:
    """The run that a variant differs from in one thing."""
    return "short" if variant in ("step-decay", "rotation", "fresh") else "tutorial"


TEXT = {
    "en": {
        "heads": ("claim", "tutorial", "measured"), "missing": "not measured yet",
        "absent": "not available: the backbone file of LPIPS is not there",
        "iterations": "iterations needed", "minutes": "time", "minute": "{0} min", "psnr": "PSNR, held-out photos",
        "lpips": "LPIPS, held-out photos", "cosine": "cosine annealing instead of step decay",
        "rotation": "rotating the photos", "harmful": "harmful", "lora": "LoRA instead", "worse": "worse",
        "fresh": "damage made afresh for every draw, instead of pairs",
        "generic": "{0} (model before: {1})", "identity": "identity (cosine), held-out photos",
        "ours": "`metagpen adapt`, {0} steps, instead", "nothing": "–", "after": "after {0}: {1} dB",
        "and": "{0} of PSNR, {1} of identity",
        "foot": "{people} people whom no training saw, {shots} photos of each to learn from, at most {queries} others "
                "restored, BSRGAN at scale 1, {iterations} iterations; in brackets the lowest and the highest of the "
                "people. "
                "Differences are to the model before; those of LoRA and `adapt` to the fine-tune; annealing, "
                "rotation and fresh damage are compared in runs of {compared} iterations. {machine}.",
    },
    "zh": {
        "heads": ("说法", "教程", "实测"), "missing": "尚未测量", "absent": "不可用：缺少 LPIPS 的骨干网络文件",
        "iterations": "所需迭代数", "minutes": "耗时", "minute": "{0} 分钟", "psnr": "PSNR，留出照片",
        "lpips": "LPIPS，留出照片", "cosine": "余弦退火代替阶梯衰减", "rotation": "旋转照片", "harmful": "有害",
        "lora": "改用 LoRA", "worse": "更差",
        "fresh": "每次抽取都重新退化，而不用固定的图像对", "generic": "{0}（训练前的模型：{1}）",
        "identity": "身份相似度（余弦），留出照片", "ours": "改用 `metagpen adapt`，{0} 步", "nothing": "–",
        "after": "{0} 次后：{1} dB", "and": "PSNR {0}，身份 {1}",
        "foot": "{people} 位训练中从未出现的人，每人用 {shots} 张照片学习，至多复原另外 {queries} 张；退化为 BSRGAN"
                "（scale 1），{iterations} 次迭代。方括号内是各人中的最低值与最高值。"
                "差值相对于训练前的模型；"
                "LoRA 与 `adapt` 相对于微调；退火、旋转与重新退化用 {compared} 次迭代的训练比较。{machine}。",
    },
}  # fmt: skip


def table(found: Mapping[str, Any] | None, language: str) -> str:
    """The claims beside the measured figures, or beside "not measured yet"."""
    text = TEXT[language]
    claimed = [(text["iterations"], "2000"), (text["minutes"], text["minute"].format(12)), (text["psnr"], "28.5+ dB"),
               (text["lpips"], "≤ 0.18"), (text["cosine"], "+0.3 dB"), (text["rotation"], text["harmful"]),
               (text["lora"], text["worse"]), (text["identity"], text["nothing"])]  # fmt: skip
    steps = found["config"]["adapt_steps"] if found else Claims().adapt_steps
    claimed += [(text["fresh"], text["nothing"]), (text["ours"].format(steps), text["nothing"])]
    cells = figures(found, text) if found else [text["missing"]] * len(claimed)
    lines = report.table(text["heads"], [(*claim, cell) for claim, cell in zip(claimed, cells, strict=True)])
    if not found:
        return lines
    return lines + "\n\n" + text["foot"].format(**found["config"] | {"people": found["people"]},
                                                machine=found["machine"])  # fmt: skip


def figures(found: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """The measured column."""
    variants, own = found["variants"], found["variants"]["tutorial"]

    def signed(value: Mapping[str, float], digits: int = 2, unit: str = "") -> str:
        return report.interval_text(value["mean"], value["lo"], value["hi"], digits, unit)

    def against(variant: str) -> str:
        if variant not in variants:
            return text["missing"]
        changes = variants[variant]
        return text["and"].format(signed(changes["psnr_against"], 2, " dB"),
                                  signed(changes["identity_against"], 3))  # fmt: skip

    def absolute(metric: str, digits: int, unit: str = "") -> str:
        value = f"{own[metric]['mean']:.{digits}f}{unit}, {signed(own[metric + '_gain'], digits)}"
        return text["generic"].format(value, f"{found['before'][metric]['mean']:.{digits}f}{unit}")

    way = "; ".join(text["after"].format(stop["iter"], signed(stop["psnr_gain"])) for stop in found["way"][1:])
    scheduled = {key: -value for key, value in variants["step-decay"]["psnr_against"].items()}
    scheduled["lo"], scheduled["hi"] = scheduled["hi"], scheduled["lo"]
    return [way, text["minute"].format(f"{own['seconds']['mean'] / 60:.1f}"), absolute("psnr", 2, " dB"),
            absolute("lpips", 3) if found["lpips"] else text["absent"], signed(scheduled, 2, " dB"),
            against("rotation"), against("lora"), absolute("identity", 3), against("fresh"),
            f"{against('adapt')}; {variants['adapt']['seconds']['mean']:.0f} s"]  # fmt: skip


def write_tables(found: Mapping[str, Any] | None) -> None:
    for language, page in PAGES.items():
        text = report.replace_between(page.read_text(encoding="utf-8"), *MARKERS, table(found, language))
        report.write_text(page, text)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, field in Claims.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=field.annotation, default=field.default)
    parser.add_argument("--leave-out", nargs="*", default=[], choices=LATER, help="variants for another time")
    parser.add_argument("--workers", type=int, default=1, help="people at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, help="threads of torch in each; default: as many as it takes")
    parser.add_argument("--dry", action="store_true", help="print the tables; write nothing outside runs/")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the tables anew")
    given = vars(parser.parse_args())
    left_out, workers, threads = given.pop("leave_out"), given.pop("workers"), given.pop("threads")
    dry, only_tables = given.pop("dry"), given.pop("tables")
    if only_tables:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
        write_tables(known and known | summary(Claims(**known["config"]), known["records"]))
        return
    config = Claims(**given)
    recognise.load(measure.SHARED / "weights" / config.scorer)  # better now than after an hour
    records = measured(config, left_out, workers, threads)
    found = summary(config, records)
    print("\n\n".join(table(found, language) for language in TEXT))
    if not dry:
        found |= {"same": identical(config, metagpen.load(config.model)), "records": records}
        report.write_text(RESULTS, json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_tables(found)


if __name__ == "__main__":
    measure.run(main)
