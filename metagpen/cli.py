"""The `metagpen` command: one thin function per sub-command; the work is done by the library.

Bad input ends in one line on stderr and exit code 1, an interruption in exit code 130, a wrong flag in exit code 2.
Everything heavy is imported inside the commands, so that `metagpen --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .errors import DataError, MetagpenError
from .memory import keep_freed_memory

if TYPE_CHECKING:
    from .demo import DemoResult


class CommandGroup(TyperGroup):
    """Turns errors that a user can mend into one line, for every command alike."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MetagpenError, OSError) as error:
            say_error(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            say_error("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Personal face restoration from a few photos.",
)

Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]
Model = Annotated[str, typer.Option(help="Restoration model: 'embedded', a catalogue name, or a checkpoint file.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; none: the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Sets one key, e.g. -s seed=1; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="Fixes every random draw.")]
ConfiguredSeed = Annotated[int | None, typer.Option(help="Fixes every random draw [0].")]
Steps = Annotated[int | None, typer.Option(min=0, help="Gradient steps [32]; 0: the start alone.")]
Start = Annotated[
    bool | None, typer.Option("--start/--no-start", help="Begin from the identity-conditioned start, or from zero.")
]


def main() -> None:
    """Entry point of the `metagpen` script."""
    keep_freed_memory()
    app(prog_name="metagpen")


def show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"metagpen {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    album: Annotated[str, typer.Option(help="'own', 'lisa' (one real person, CC0), or a folder of photos.")] = "own",
    output_dir: Annotated[Path, typer.Option(help="Where the pictures and figures go.")] = Path("demo_out"),
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps of adapting; 0: the start alone.")] = 32,
    shots: Annotated[int, typer.Option(min=1, help="Photos to learn each person from.")] = 5,
    degradation: Annotated[str, typer.Option(help="How the held-out photos are degraded.")] = "heavy",
    seed: Seed = 0,
) -> None:
    """End to end: learn people from a few photos, restore others of them, show before and after."""
    from .demo import CAVEAT, run_demo

    result = run_demo(album, output_dir, steps, shots, seed, degradation, progress=out.print)
    out.print(demo_table(result))
    out.print(CAVEAT)
    out.print("Pictures (degraded, generic, personal, truth):")
    for person in result.people:
        out.print(f"  {person.sheet.resolve()}")
    out.print(f"Figures:\n  {result.report.resolve()}\n  {result.data.resolve()}")


@app.command()
def pairs(
    input_dir: Annotated[Path, typer.Option(help="Folder of sharp photos.")],
    output_dir: Annotated[Path, typer.Option(help="Gets GT/001.png ... and LR/001.png ...")],
    degradation: Annotated[str, typer.Option(help="bsrgan, gfpgan, heavy or mixed.")] = "bsrgan",
    scale: Annotated[int, typer.Option(min=1, help="How many times smaller the degraded side is.")] = 1,
    size: Annotated[int | None, typer.Option(min=8, help="Side of the sharp pictures; default: as they are.")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0: none.")] = 4,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pairs that are there already.")] = False,
) -> None:
    """Write pairs of degraded and sharp pictures for training."""
    from .degrade.pairs import write_pairs

    summary = write_pairs(
        input_dir,
        output_dir,
        degradation,
        scale=scale,
        size=size,
        num_workers=num_workers,
        seed=seed,
        overwrite=overwrite,
        progress=True,
    )
    out.print(f"{summary}\nPairs are in {output_dir.resolve()}")


@app.command()
def train(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Train a restoration model together with its identity-conditioned start."""
    from .train import TrainConfig
    from .train import train as run

    run(TrainConfig.from_yaml(config, overrides or []))


@app.command()
def meta_train(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Learn over many people where adaptation begins and how far it steps; under torchrun on several processes."""
    from .meta.train import MetaConfig
    from .meta.train import meta_train as run

    run(MetaConfig.from_yaml(config, overrides or []))


@app.command()
def adapt(
    photos: Annotated[list[Path], typer.Argument(help="Photos of one person, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Person file to write (.safetensors).")],
    model: Model = "embedded",
    steps: Steps = None,
    start: Start = None,
    seed: ConfiguredSeed = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Learn one person from a few photos; seconds to minutes."""
    import metagpen

    files = photo_files(photos)
    flags = given_flags(steps=steps, start=start, seed=seed)
    settings = metagpen.AdaptConfig.from_yaml(config, (overrides or []) + flags)
    network = metagpen.load(model, device=pick_device(device))
    person = metagpen.adapt(
        network, files, settings.steps, start=settings.start, seed=settings.seed, config=settings, progress=True
    )
    file = person.save(output)
    out.print(f"Learned from {len(files)} photo(s) in {person.metadata['seconds']} s: {file.resolve()}")


@app.command("adapt-many")
def adapt_many(
    photos: Annotated[Path, typer.Argument(help="Folder with one sub-folder of photos per person.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The store: a folder or a URL that fsspec knows.")],
    model: Model = "embedded",
    steps: Steps = None,
    start: Start = None,
    seed: ConfiguredSeed = None,
    batch: Annotated[int | None, typer.Option(min=1, help="People at a time [as many as memory allows].")] = None,
    engine: Annotated[str, typer.Option(help="'embedded' learns here, 'ray' on the workers of a Ray cluster.")] = (
        "embedded"
    ),
    workers: Annotated[int | None, typer.Option(min=1, help="Ray's workers [one per GPU, or per CPU].")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Learn many people into a store; after an interruption the same command goes on."""
    import metagpen

    people = people_folders(photos)
    flags = given_flags(steps=steps, start=start, seed=seed, people_per_batch=batch)
    settings = metagpen.AdaptConfig.from_yaml(config, (overrides or []) + flags)
    store = metagpen.PersonStore(output, metagpen.load(model, device=pick_device(device)))
    failed: list[str] = []

    def report(name: str, error: Exception) -> None:
        failed.append(name)
        say_error(f"{name}: {' '.join(str(error).split())}")

    metagpen.adapt_many(
        store.model, people, settings.steps, start=settings.start, seed=settings.seed, config=settings, store=store,
        on_error=report, engine=engine, workers=workers, progress=True,
    )
    lost = f" ({len(failed)} could not be learned)" if failed else ""
    out.print(f"{len(store)} people are in {output}{lost}")
    if failed:
        raise typer.Exit(1)


def people_folders(folder: Path) -> dict[str, list[Path]]:
    """{name of a sub-folder: the photos in it}. Raises DataError for a folder without any."""
    from .faces import PHOTO_SUFFIXES

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    people = {
        own.name: sorted(file for file in own.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES)
        for own in sorted(folder.resolve().iterdir())
        if own.is_dir()
    }
    if not people:
        raise DataError(f"{folder}: no sub-folders; one per person is needed, with the photos in it")
    return people


@app.command()
def restore(
    source: Annotated[Path, typer.Option("--input", "-i", help="A photo, or a folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The restored photo, or the folder for them.")],
    person: Annotated[Path | None, typer.Option(help="Person file; without one the generic model restores.")] = None,
    strength: Annotated[
        float,
        typer.Option("--strength", "--lambda-id", min=0.0, max=1.0, help="0: the generic model ... 1: fully personal."),
    ] = 1.0,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The photos are square crops of faces: nothing to find.")
    ] = False,
    model: Model = "embedded",
    device: Device = "auto",
) -> None:
    """Restore the face of a photo, or of every photo of a folder."""
    import metagpen

    targets = restore_targets(source, output)
    network = metagpen.load(model, device=pick_device(device))
    restorer = metagpen.Person.load(person, network) if person else metagpen.Person.generic(network)
    for photo, target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        restorer.restore(photo, strength=strength, aligned=aligned).save(target)
        out.print(f"{photo} -> {target}")


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="Folder with one sub-folder of photos per person.")] = None,
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
    overrides: Overrides = None,
) -> None:
    """Measure what adapting gains on people set aside: identity, PSNR, SSIM, with intervals over people."""
    from .evaluate import EvaluateConfig, run_evaluate
    from .evaluate.report import figures_table

    settings = EvaluateConfig.from_yaml(config, (overrides or []) + given_flags(data=data, output=output))
    found = run_evaluate(settings)
    for degradation in settings.degradations:
        out.print(f"\n{degradation}\n\n{figures_table(found.rows, degradation, list(settings.recognisers))}")
    out.print(f"\nLPIPS: {found.lpips}. Records and previews: {found.folder.resolve()}")


@app.command()
def compare(
    restored: Annotated[Path, typer.Option(help="Folder of restored aligned faces.")],
    truth: Annotated[Path, typer.Option(help="Folder of true faces of the same names.")],
    recogniser: Annotated[str, typer.Option(help="'embedded' or a recogniser's file.")] = "embedded",
    size: Annotated[int, typer.Option(min=32, help="Side in pixels at which they are compared.")] = 128,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Score restored faces, from whatever tool, against the true ones: PSNR, SSIM, LPIPS, identity."""
    from .evaluate import compare_folders
    from .evaluate.report import write_text

    figures = compare_folders(restored, truth, recogniser=recogniser, size=size)
    table = Table("metric", "mean")
    for metric, value in figures.items():
        table.add_row(metric, "not available" if value is None else f"{value:.4f}")
    out.print(table)
    if output:
        write_text(output, json.dumps(figures, indent=1) + "\n")


@app.command()
def curve(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Measure quality against photos, steps and seconds, for us, rivals and controls; goes on where it was killed."""
    from .evaluate.curve import ROWS, CurveConfig, run_curve

    rows, folder = run_curve(CurveConfig.from_yaml(config, overrides or []))
    out.print(f"{len(rows)} rows: {(folder / ROWS).resolve()}")


@app.command("curve-report")
def curve_report(
    rows: Annotated[Path, typer.Argument(help="The rows that `metagpen curve` wrote (.jsonl or .jsonl.gz).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, plots and the page.")],
    previews: Annotated[Path | None, typer.Option(help="Folder of pictures [previews, beside the rows].")] = None,
) -> None:
    """Tables (Markdown, CSV), plots (PNG, SVG) and one self-contained HTML page from the rows of `curve`."""
    from .evaluate.curve_report import write_report

    for path in write_report(rows, output, previews):
        out.print(str(path.resolve()))


@app.command("mine-identities")
def mine_identities(
    photos: Annotated[Path, typer.Argument(help="Folder of aligned faces (FFHQ, say); sub-folders are searched too.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write: file (below the folder), id.")],
    recogniser: Annotated[str, typer.Option(help="'embedded' or a recogniser's file.")] = "embedded",
    threshold: Annotated[
        float | None, typer.Option(help="Mean cosine that makes two groups one [0.55 for up to 1000 photos, embedded].")
    ] = None,
    min_photos: Annotated[int, typer.Option(min=1, help="Leave out people with fewer photos.")] = 2,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 1,
    device: Device = "auto",
) -> None:
    """Group photos of unnamed people by a recogniser, so that FFHQ has people with several photos."""
    from . import identities, recognise

    files = identities.find_photos(photos)
    cosine = identities.validated_threshold(recogniser, len(files)) if threshold is None else threshold
    where = pick_device(device)
    embed = recognise.load(recogniser, device=where).embed
    found = identities.mine_identities(
        map(identities.Photo, files), embed, cosine, workers=num_workers, device=where, progress=True
    ).min_photos(min_photos)
    identities.write_groups(found, photos, output)
    shown = sum(map(len, found.values()))
    out.print(f"{len(found)} people with {min_photos} photos or more ({shown} of {len(files)}): {output.resolve()}")


@app.command()
def weights() -> None:
    """List the models: those in the package and those that can be downloaded."""
    from .weights import available

    table = Table("name", "what", "size", "where")
    for entry in available():
        table.add_row(*entry)
    out.print(table)


# --- helpers ----------------------------------------------------------------------------------------------------

out = Console(soft_wrap=True, highlight=False, markup=False)


def say_error(message: str) -> None:
    """One line on stderr, as it is: file names may hold brackets that rich would read as markup."""
    Console(stderr=True, soft_wrap=True).print(Text(message, style="bold red"))


def given_flags(**flags: Any) -> list[str]:
    """Flags that were given, as KEY=VALUE overrides of a configuration (JSON is YAML)."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in flags.items() if value is not None]


def pick_device(name: str) -> str:
    """'auto' becomes 'cuda' where there is one, else 'cpu'. Raises DataError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError):
        raise DataError(f"device '{name}' is not available here; try --device auto or cpu") from None
    return name


def photo_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders replaced by the photos in them. Raises DataError for what is missing or empty."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            from .faces import PHOTO_SUFFIXES

            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
            if not found:
                raise DataError(f"{path}: no photos in this folder ({', '.join(sorted(PHOTO_SUFFIXES))})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such photo or folder")
    return files


def restore_targets(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """(photo, where its restoration goes). A folder goes to a folder, as PNG; never onto the source."""
    photos = photo_files([source])
    if source.is_dir():
        targets = [(photo, output / f"{photo.stem}.png") for photo in photos]
    else:
        targets = [(source, output / f"{source.stem}.png" if output.is_dir() else output)]
    for photo, target in targets:
        if target.exists() and target.samefile(photo):
            raise DataError(f"{target}: the output would replace the input; give another --output")
    if len({target for _, target in targets}) < len(targets):
        raise DataError(f"{source}: photos that differ only in their suffix would overwrite each other; rename one")
    return targets


def demo_table(result: DemoResult) -> Table:
    """A line per person and method, then the means over people."""
    from .demo import shown

    table = Table("person", "learned / restored", "method", title=f"album '{result.album}'")
    for name in ("identity", "PSNR dB", "SSIM", "s to adapt"):
        table.add_column(name, justify="right")
    for person in result.people:
        photos = f"{person.support} / {person.held_out}"
        for method, values in person.figures.items():
            seconds = f"{person.seconds:.1f}" if method == "personal" else ""
            table.add_row(person.name, photos, method, *shown(values), seconds)
        table.add_section()
    for method, values in result.mean.items():
        table.add_row("mean", "", method, *shown(values))
    return table
