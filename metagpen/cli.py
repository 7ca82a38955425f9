"""The `metagpen` command: one thin function per sub-command; the work is done by the library.

Whatever a user can mend (bad input, a wrong flag, a full disk) ends in a line on stderr and exit code 2; a batch of
which some photos or people failed in exit code 1; an interruption in exit code 130.
Everything heavy is imported inside the commands, so that `metagpen --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .atomic import check_writable
from .devices import pick_device
from .errors import ConfigError, DataError, MetagpenError, PhotoError
from .memory import keep_freed_memory

if TYPE_CHECKING:
    from .demo import DemoResult
    from .faces import PhotoSource
    from .model import MetaGPEN
    from .person import Person, PersonStore
    from .restore import Gallery


PANELS = ("Personalise", "Measure", "Train", "Maintain")  # of `metagpen --help`, in this order


class CommandGroup(TyperGroup):
    """Lists commands by panel, and turns errors that a user can mend into one line, for every command alike."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: PANELS.index(self.commands[name].rich_help_panel))

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MetagpenError, OSError) as error:
            say_error(f"error: {in_words(error)}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            say_error("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if not out_of_memory(error):
                raise
            say_error("error: not enough memory; try a smaller --batch or model, fewer photos, or --device cpu")
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Personal face restoration from a few photos.",
)

def command(panel: str, example: str, name: str | None = None) -> Callable:
    """A sub-command: its panel (of PANELS) in `metagpen --help`, and an example below its own help."""
    return app.command(name, rich_help_panel=panel, epilog=f"Example: {example}")


Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]
Model = Annotated[str, typer.Option(help="Restoration model: 'embedded', a catalogue name, or a checkpoint file.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; none: the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Sets one key, e.g. -s seed=1; may be repeated."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes every random draw.")]
ConfiguredSeed = Annotated[int | None, typer.Option(help="Fixes every random draw [0].")]
Steps = Annotated[int | None, typer.Option(min=0, help="Gradient steps [32]; 0: the start alone.")]
Start = Annotated[
    bool | None, typer.Option("--start/--no-start", help="Begin from the identity-conditioned start, or from zero.")
]


def main() -> None:
    """Entry point of the `metagpen` script."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # PIL's, of pictures that are refused anyway
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
    import numpy  # noqa: F401, ICN001  (before torch, in whose import of it an interruption would be lost)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name that is no text must not stop who prints it


@command("Personalise", "metagpen demo --album my_photos --output-dir demo_out")
def demo(
    album: Annotated[str, typer.Option(help="'own', 'lisa' (one real person, CC0), or a folder of photos.")] = "own",
    output_dir: Annotated[Path, typer.Option(help="Where the pictures and figures go.")] = Path("demo_out"),
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps of adapting; 0: the start alone.")] = 32,
    shots: Annotated[int, typer.Option(min=1, help="Photos to learn each person from.")] = 5,
    degradation: Annotated[str, typer.Option(help="How the held-out photos are degraded.")] = "heavy",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """End to end: learn people from a few photos, restore others of them, show before and after."""
    from .demo import CAVEAT, run_demo

    result = run_demo(album, output_dir, steps, shots, seed, degradation, device, progress=out.print)
    out.print(demo_table(result))
    out.print(CAVEAT)
    out.print("Pictures (degraded, generic, personal, truth):")
    for person in result.people:
        out.print(f"  {person.sheet.resolve()}")
    out.print(f"Figures:\n  {result.report.resolve()}\n  {result.data.resolve()}")


@command("Train", "metagpen pairs --input-dir my_photos --output-dir my_pairs --degradation bsrgan")
def pairs(
    input_dir: Annotated[Path, typer.Option(help="Folder of sharp photos.")],
    output_dir: Annotated[Path, typer.Option(help="Gets GT/001.png ... and LR/001.png ...")],
    degradation: Annotated[str, typer.Option(help="bsrgan, gfpgan, heavy, mixed or none.")] = "bsrgan",
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
    if summary.failed:
        raise typer.Exit(1)


@command("Train", "metagpen train -opt options.yml")
def train(
    config: ConfigFile = None,
    opt: Annotated[
        Path | None, typer.Option("--opt", "-opt", help="The tutorial's options.yml: fine-tune on one person's pairs.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train a restoration model together with its identity-conditioned start; with -opt, fine-tune it on one person."""
    if opt is not None:
        if config is not None:
            raise typer.BadParameter("-c trains on many people, -opt fine-tunes on one; give one of them")
        from .finetune import Options, finetune

        options = Options.from_yaml(opt, overrides or [])
        finetune(options, console=out, device=pick_device(options.device))
        return
    from .train import TrainConfig
    from .train import train as run

    run(TrainConfig.from_yaml(config, overrides or []))


@command("Train", "metagpen meta-train -c configs/meta_128.yml -s meta_steps=200")
def meta_train(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Learn over many people where adaptation begins and how far it steps; under torchrun on several processes."""
    from .meta.train import MetaConfig
    from .meta.train import meta_train as run

    run(MetaConfig.from_yaml(config, overrides or []))


@command("Personalise", "metagpen adapt photos_of_ada -o ada.safetensors --steps 32")
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
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Learn from every photo, also strangers' and unusable ones.")
    ] = False,
    best: Annotated[int | None, typer.Option(min=1, help="Learn from so many of the photos, the best ones.")] = None,
) -> None:
    """Learn one person from a few photos; seconds to minutes. Photos of strangers and unusable ones are left out."""
    import metagpen

    from .person.person import person_file

    if keep_all and best is not None:
        raise typer.BadParameter("--best chooses among the photos, --keep-all takes every one; give one of them")
    files = one_persons_files(photos)
    flags = given_flags(steps=steps, start=start, seed=seed)
    settings = metagpen.AdaptConfig.from_yaml(config, (overrides or []) + flags)
    if settings.adversarial_steps:
        raise ConfigError("adversarial_steps: stage 2 needs a critic, which is given in the options of "
                          "metagpen train -opt (path.pretrain_network_d), or to metagpen.adapt; leave it out here")
    check_writable(person_file(output), [*files, model, config])
    network = metagpen.load(model, device=pick_device(device))
    chosen = files if keep_all else photos_that_serve(network, files, best)
    with spoken_warnings():
        person = metagpen.adapt(network, chosen, config=settings, progress=True)
    file = person.save(output)
    out.print(f"Learned from {len(chosen)} photo(s) in {person.metadata['seconds']} s: {file.resolve()}")


@command("Personalise", "metagpen album photos_of_ada")
def album(
    photos: Annotated[list[Path], typer.Argument(help="Photos of one person, or folders of them.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw the faces with their verdicts (.png, .jpg).")
    ] = None,
    model: Model = "embedded",
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Look at photos before learning from them: who is on them, which serve, and what is wrong with the others."""
    import metagpen

    from .check.show import album_sheet, album_table, reason_lines
    from .faces import photo_format, save_photo

    files = one_persons_files(photos)
    if output:
        file = output.resolve()
        if folder := next((path for path in photos if path.is_dir() and path.resolve() in file.parents), None):
            raise DataError(f"{output}: lies in {folder}, and would be one of its photos the next time; write the "
                            "sheet to another folder")
        if file in {photo.resolve() for photo in files}:
            raise DataError(f"{output}: is one of the photos; give the sheet another name")
        photo_format(output)
        check_writable(output)
    report = metagpen.check_album(metagpen.load(model, device=pick_device(device)), files)
    if output:
        save_photo(album_sheet(report), output)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        out.print(album_table(report))
        for line in reason_lines(report):
            out.print(line)
        if output:
            out.print(f"Sheet: {output.resolve()}")
    if not report.usable or report.divided:
        raise typer.Exit(1)


@command("Personalise", "metagpen adapt-many folder_of_people -o people", name="adapt-many")
def adapt_many(
    photos: Annotated[Path, typer.Argument(help="Folder with one sub-folder of photos per person.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The store: a folder or a URL that fsspec knows.")],
    model: Model = "embedded",
    steps: Steps = None,
    start: Start = None,
    seed: ConfiguredSeed = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="People at a time (default: as many as memory allows).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Leave out strangers' photos and unusable ones, as adapt does; slower.")
    ] = False,
    engine: Annotated[str, typer.Option(help="'embedded' learns here, 'ray' on the workers of a Ray cluster.")] = (
        "embedded"
    ),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray's workers (default: one per GPU, or per CPU).")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Learn many people into a store; after an interruption the same command goes on."""
    import metagpen

    failed: list[str] = []

    def report(name: str, error: Exception) -> None:
        failed.append(name)
        say_error(f"{name}: {in_words(error)}")

    people = people_folders(photos, output, report)
    flags = given_flags(steps=steps, start=start, seed=seed, people_per_batch=batch)
    settings = metagpen.AdaptConfig.from_yaml(config, (overrides or []) + flags)
    store = metagpen.PersonStore(output, metagpen.load(model, device=pick_device(device)))
    chosen = screened(people, store, report) if check else people
    metagpen.adapt_many(store.model, chosen, config=settings, store=store, on_error=report, engine=engine,
                        workers=workers, progress=True)
    lost = f" ({len(failed)} could not be learned)" if failed else ""
    out.print(f"{len(store)} people are in {output}{lost}")
    if failed:
        raise typer.Exit(1)


def screened(people: Mapping[str, list[Path]], store: PersonStore,
             report: Callable[[str, Exception], None]) -> Iterator[tuple[str, list[PhotoSource]]]:
    """Everybody who is not in the store yet, with the photos that serve; whoever has none is reported."""
    for name, files in people.items():
        if name in store:
            continue
        try:
            yield name, photos_that_serve(store.model, files, None, "without --check all are learned from")
        except (MetagpenError, OSError) as error:
            report(name, error)


def people_folders(folder: Path, apart: str, report: Callable[[str, Exception], None]) -> dict[str, list[Path]]:
    """{name of a sub-folder: the photos in it}, but for the folder `apart`; one that cannot be read is reported. Raises
    DataError for a folder without any."""
    from .faces import photos_in

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    store = Path(apart).resolve()
    if store.parent == folder.resolve() and store.is_dir() and photos_in(store):
        raise DataError(f"{apart}: the store would lie among somebody's photos; give it a folder of its own")
    found = [own for own in sorted(folder.resolve().iterdir())
             if own.is_dir() and not own.name.startswith(".") and own != store]
    if not found:
        raise DataError(f"{folder}: no sub-folders; one per person is needed, with the photos in it")
    people = {}
    for own in found:
        try:
            people[own.name] = photos_in(own)
        except OSError as error:
            report(own.name, error)
    return people


@command("Personalise", "metagpen restore -i old.jpg -o new.png --person ada.safetensors --strength 0.5")
def restore(
    source: Annotated[
        list[Path],
        typer.Option("--input", "-i", help="A photo, a folder, or a quoted pattern ('old/*.jpg'); may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The restored photo, or the folder for them.")],
    person: Annotated[
        list[Path] | None,
        typer.Option(help="Person file; may be repeated. Without any the generic model restores."),
    ] = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of a PersonStore: everybody in it is known.")] = None,
    strength: Annotated[
        float,
        typer.Option("--strength", "--lambda-id", min=0.0, max=1.0, help="0: the generic model ... 1: fully personal."),
    ] = 1.0,
    null_space: Annotated[
        bool, typer.Option("--null-space", help="Let persons change only what the photo leaves open.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Write a labelled sheet of each known face at strengths 0 to 1 instead.")
    ] = False,
    repeats: Annotated[
        bool, typer.Option("--repeats", help="The same person may be in a photo more than once.")
    ] = False,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The photos are square crops of faces: nothing to find.")
    ] = False,
    face: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="Restore the face in this box alone, in pixels of the upright photo: ear to ear, hairline to chin. "
            "May be repeated; nothing is looked for.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "--model-path", help="Restoration model: 'embedded', a catalogue name, or a checkpoint file."
        ),
    ] = "embedded",
    device: Device = "auto",
) -> None:
    """Restore the faces of photos: people who are known as themselves, strangers with the generic model."""
    import metagpen

    if sweep and strength < 1:
        raise typer.BadParameter("--sweep shows all strengths, --strength is one; give one of them")
    boxes = [box_of(text) for text in face or []]
    if boxes and aligned:
        raise typer.BadParameter("--aligned: the photo is one face, --face: where faces are in it; give one of them")
    targets = restore_targets(source, output)
    if boxes and len(targets) > 1:
        raise ConfigError(f"--face says where faces are in one photo; -i names {len(targets)}")
    network = metagpen.load(model, device=pick_device(device))
    with spoken_warnings():
        gallery = known_people(person or [], store, model, network, needed=strength < 1 or sweep or null_space)
    options: dict[str, Any] = {"null_space": null_space, "aligned": aligned, "boxes": boxes, "once": not repeats}
    if sweep:
        write = partial(write_sweep, gallery, options)
    else:
        write = partial(write_restored, gallery, options | {"strength": strength})
    if restore_all(targets, write) < len(targets):
        raise typer.Exit(1)


@command("Measure", "metagpen evaluate --data folder_of_people -o figures.json")
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
    if settings.output:
        check_writable(settings.output, [config])
    with spoken_warnings():
        found = run_evaluate(settings)
    for degradation in settings.degradations:
        out.print(f"\n{degradation}\n\n{figures_table(found.rows, degradation, list(settings.recognisers))}")
    out.print(f"\nLPIPS: {found.lpips}. Records and previews: {found.folder.resolve()}")


@command("Measure", "metagpen compare --restored restored_faces --truth true_faces")
def compare(
    restored: Annotated[Path, typer.Option(help="Folder of restored aligned faces.")],
    truth: Annotated[Path, typer.Option(help="Folder of true faces of the same names.")],
    recogniser: Annotated[str, typer.Option(help="'embedded' or a recogniser's file.")] = "embedded",
    size: Annotated[int, typer.Option(min=32, help="Side in pixels at which they are compared.")] = 128,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Score restored faces, from whatever tool, against the true ones: PSNR, SSIM, LPIPS, identity."""
    from .atomic import write_text
    from .evaluate import compare_folders

    if output:
        check_writable(output, [*restored.glob("*"), *truth.glob("*"), recogniser])
    figures = compare_folders(restored, truth, recogniser=recogniser, size=size, device=device)
    table = Table("metric", "mean")
    for metric, value in figures.items():
        table.add_row(metric, "not available" if value is None else f"{value:.4f}")
    out.print(table)
    if output:
        write_text(output, json.dumps(figures, indent=1, allow_nan=False) + "\n")


@command("Measure", "metagpen curve -c configs/curve_128.yml -s max_people=5")
def curve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    export: Annotated[
        Path | None, typer.Option(help="Measure nothing: write photos and damaged faces to this new folder, for other "
                                       "restorers; then measure theirs with -s exported=FOLDER, methods folder-NAME.")
    ] = None,
) -> None:
    """Measure quality against photos, steps and seconds, for us, rivals and controls; goes on where it was killed."""
    from .evaluate.curve import ROWS, CurveConfig, export_curve, run_curve

    settings = CurveConfig.from_yaml(config, overrides or [])
    if settings.output:
        check_writable(settings.output, [config])
    if export:
        with spoken_warnings():
            pictures = export_curve(settings, export)
        out.print(f"{pictures} damaged faces: {export.resolve()}", soft_wrap=True)
        return
    with spoken_warnings():
        rows, folder = run_curve(settings)
    out.print(f"{len(rows)} rows: {(folder / ROWS).resolve()}")


@command("Measure", "metagpen curve-report rows.jsonl -o report", name="curve-report")
def curve_report(
    rows: Annotated[Path, typer.Argument(help="The rows that `metagpen curve` wrote (.jsonl or .jsonl.gz).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables, plots and the page.")],
    previews: Annotated[
        Path | None, typer.Option(help="Folder of pictures (default: previews, beside the rows).")
    ] = None,
    sheets_of: Annotated[
        int, typer.Option(min=0, help="So many of the people who may be shown are on the page's contact sheets.")
    ] = 8,
) -> None:
    """Tables (Markdown, CSV), plots (PNG, SVG) and one self-contained HTML page from the rows of `curve`."""
    from .evaluate.curve_report import write_report

    for path in write_report(rows, output, previews, sheets_of):
        out.print(str(path.resolve()))


@command("Train", "metagpen mine-identities ffhq -o identities.csv", name="mine-identities")
def mine_identities(
    photos: Annotated[Path, typer.Argument(help="Folder of aligned faces (FFHQ, say); sub-folders are searched too.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write: file (below the folder), id.")],
    recogniser: Annotated[str, typer.Option(help="'embedded' or a recogniser's file.")] = "embedded",
    threshold: Annotated[
        float | None,
        typer.Option(help="Mean cosine that makes two groups one (default: 0.55 for up to 1000 photos, embedded)."),
    ] = None,
    min_photos: Annotated[int, typer.Option(min=1, help="Leave out people with fewer photos.")] = 2,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 1,
    device: Device = "auto",
) -> None:
    """Group photos of unnamed people by a recogniser, so that FFHQ has people with several photos."""
    from . import identities, recognise

    files = identities.find_photos(photos)
    check_writable(output, [*files, recogniser])
    cosine = identities.validated_threshold(recogniser, len(files)) if threshold is None else threshold
    where = pick_device(device)
    embed = recognise.load(recogniser, device=where).embed
    found = identities.mine_identities(
        map(identities.Photo, files), embed, cosine, workers=num_workers, device=where, progress=True
    ).min_photos(min_photos)
    identities.write_groups(found, photos, output)
    shown = sum(map(len, found.values()))
    out.print(f"{len(found)} people with {min_photos} photos or more ({shown} of {len(files)}): {output.resolve()}")


@command("Maintain", "metagpen weights")
def weights() -> None:
    """List the models: those in the package and those that can be downloaded."""
    from .weights import available

    table = Table("name", "what", "size", "where")
    for entry in available():
        table.add_row(*entry)
    out.print(table)


@command("Maintain", "metagpen doctor --json")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False) -> None:
    """Look whether this installation works: versions, device, weights, extras; exit code 1 if something is broken."""
    from .doctor import as_dict, cures, examine, findings_table, usable

    findings = examine()
    if as_json:
        typer.echo(json.dumps(as_dict(findings), indent=1))
    else:
        out.print(findings_table(findings))
        for line in cures(findings):
            out.print(line)
        out.print("Fit for work." if usable(findings) else "Not fit for work: something needed is broken.")
    if not usable(findings):
        raise typer.Exit(1)


# --- helpers ----------------------------------------------------------------------------------------------------

out = Console(soft_wrap=True, highlight=False, markup=False)


def say_error(message: str) -> None:
    """One line on stderr, as it is: file names may hold brackets that rich would read as markup."""
    Console(stderr=True, soft_wrap=True).print(Text(message, style="bold red"))


ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EFBIG: "write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.EEXIST: "something else is where it is needed",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "a link leads back to itself; remove it",
}


def in_words(error: Exception) -> str:
    """An error in one line; one of the operating system with its file in front and what to do behind."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.errno:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        advice = ADVICE.get(error.errno)
        text = f"{where}{error.strerror}" + (f"; {advice}" if advice else "")
    return " ".join(text.split())


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, the machine's or a GPU's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "t allocate memory" in str(error))


def given_flags(**flags: Any) -> list[str]:
    """Flags that were given, as KEY=VALUE overrides of a configuration (JSON is YAML)."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in flags.items() if value is not None]


def photo_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders replaced by the photos in them. Raises DataError for what is missing or empty."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            from .faces import PHOTO_SUFFIXES, photos_in

            found = photos_in(path)
            if not found:
                raise DataError(f"{path}: no photos in this folder ({', '.join(sorted(PHOTO_SUFFIXES))})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such photo or folder")
    return files


def one_persons_files(paths: list[Path]) -> list[Path]:
    """`photo_files`, for commands that learn one person. Raises DataError also for a folder of people."""
    from .check import people_instead

    if people := people_instead(paths):
        raise DataError(people)
    return photo_files(paths)


def photos_that_serve(model: MetaGPEN, files: list[Path], best: int | None,
                      otherwise: str = "--keep-all learns from all of them") -> list[PhotoSource]:
    """What to learn one person from, each photo that is left out and each doubt being told.

    Raises PhotoError when no photo is usable, or the album shows several people and it cannot be told whose it is; the
    error then says what the album's advice would have said, which is not printed as well.
    """
    from .check import check_album
    from .check.show import photo_lines

    if not files:
        raise PhotoError("no photo given: at least one photo of the person is needed")
    report = check_album(model, files)
    if not report.usable and len(files) == 1:  # said once, in the error, which names the file
        raise PhotoError(f"{files[0]}: not usable: {'; '.join(report.photos[0].reasons)}")
    for line in photo_lines(report):
        out.print(line)
    if report.divided:
        raise PhotoError(f"{report.advice[0]}; {otherwise}")
    if not report.usable:
        raise PhotoError(f"none of the {len(files)} photos is usable, {files[0]} the first of them: take new ones, "
                         "sharp, upright and with the whole face")
    for line in report.advice:
        out.print(line)
    chosen = report.usable if best is None else report.best(best)
    if len(chosen) < len(report.usable):
        out.print(f"the best {len(chosen)}: {', '.join(photo.name for photo in chosen)}")
    return [photo.learn_from(model.size) for photo in chosen]


def restore_targets(source: Path | Iterable[Path], output: Path) -> list[tuple[Path, Path]]:
    """(photo, where its restoration goes), before anything is written.

    Folders, patterns and several photos go to a folder, as PNG; so does one photo where `output` is a folder or has
    no suffix. Never onto a photo that is read, and no two onto one.
    """
    from .faces import PHOTO_SUFFIXES, photo_format

    sources = [source] if isinstance(source, Path) else list(source)
    photos = list(dict.fromkeys(photo_files(path for given in sources for path in matching_paths(given))))
    if len(sources) == 1 and photos == sources and output.suffix and not output.is_dir():
        targets = [(photos[0], output)]
    elif not output.is_dir() and (output.exists() or output.suffix.lower() in PHOTO_SUFFIXES):
        raise DataError(f"{output}: not a folder; several photos, a folder or a pattern need a folder, a single photo "
                        "a name that ends in .png, .jpg, ...")
    else:
        targets = [(photo, output / f"{photo.stem}.png") for photo in photos]
    read = {os.path.realpath(photo) for photo in photos}
    taken: dict[Path, Path] = {}
    for photo, target in targets:
        photo_format(target)
        if os.path.realpath(target) in read:
            raise DataError(f"{target}: the output would replace the input; give another --output")
        if target in taken:
            raise DataError(f"{taken[target]} and {photo}: photos that differ only in their suffix or folder would "
                            "overwrite each other; rename one")
        taken[target] = photo
    for target in {target.parent: target for _, target in targets}.values():
        check_writable(target)
    return targets


def matching_paths(path: Path) -> list[Path]:
    """The path itself, or the photos that it means as a pattern. Raises DataError for a pattern of no photo."""
    import glob

    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    from .faces import PHOTO_SUFFIXES, is_photo

    photos = [file for file in sorted(map(Path, glob.glob(str(path), recursive=True))) if is_photo(file)]
    if not photos:
        raise DataError(f"{path}: no photo matches this pattern ({', '.join(sorted(PHOTO_SUFFIXES))})")
    return photos


def known_people(files: list[Path], store: str | None, model: str, network: MetaGPEN, needed: bool) -> Gallery:
    """Everybody in the files or the store; where there is nobody and somebody is needed, whom the model was fine-tuned
    on, on the model that it began from. Raises DataError where it was not."""
    from .restore import Gallery

    people = named_people(files, store, network)
    if people or not needed:
        return Gallery(people, network)
    from .finetune import person_behind

    if (behind := person_behind(model, network)) is None:
        raise DataError("--strength, --sweep and --null-space say how much of a person is let in: give --person or "
                        "--store, or a --model-path that `metagpen train -opt` made")
    return Gallery({behind.metadata["fine_tuned"]: behind}, behind.model)


def named_people(files: list[Path], store: str | None, network: MetaGPEN) -> Mapping[str, Person]:
    """Everybody in the files, by file name, or in the store. Raises DataError for both, or nobody, or a name twice."""
    from .person import Person, PersonStore

    if store is None:
        names = [file.stem for file in files]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"--person: two files are called '{min(twice)}'; rename one, people are told by that name")
        return {name: Person.load(file, network) for name, file in zip(names, files)}
    if files:
        raise DataError("--person and --store: give one of them")
    people = PersonStore(store, network)
    if not people:
        raise DataError(f"{store}: no Person in this store; fill it with metagpen adapt-many")
    return people


def box_of(text: str) -> list[float]:
    """Four numbers from "x0,y0,x1,y1"."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--face {text}: four numbers x0,y0,x1,y1 are wanted") from None
    return [x0, y0, x1, y1]


def restore_all(targets: list[tuple[Path, Path]], write: Callable[[Path, Path], str]) -> int:
    """Each photo to its file by `write`, which returns what to say of it; how many were restored. An error ends one of
    many photos alone, and is told; the only photo's is raised."""
    many, done = len(targets) > 1, 0
    with Progress(console=out, disable=not (many and out.is_terminal), transient=True) as bar:
        for photo, target in bar.track(targets, description="restoring"):
            try:
                with spoken_warnings():
                    said = write(photo, target)
            except (MetagpenError, OSError) as error:
                if not many:
                    raise
                say_error(f"{photo}: not restored: {in_words(error)}")
            else:
                done += 1
                out.print(f"{photo} -> {target}: {said}")
    if many:
        out.print(f"{done} of {len(targets)} photos restored")
    return done


def write_restored(gallery: Gallery, options: dict[str, Any], photo: Path, target: Path) -> str:
    """Restore a photo into a file; returns who was found."""
    from .faces import save_photo
    from .restore import restore_photo

    restored = restore_photo(gallery.model, photo, gallery, **options)
    save_photo(restored.image, target)
    if not gallery.persons:
        done = sum(not face.left_alone for face in restored.faces)
        told = [f for f in restored.faces if f.left_alone or f.unsure]
        return f"{done} face{'s' if done > 1 else ''}" + "".join(f", {f}" for f in told)
    return ", ".join(map(str, restored.faces))


def write_sweep(gallery: Gallery, options: dict[str, Any], photo: Path, target: Path) -> str:
    """Write the sheet of a photo's known faces at several strengths; returns what it shows."""
    from .evaluate.report import contact_sheet
    from .faces import save_photo
    from .restore import sweep

    lines = sweep(gallery.model, photo, gallery, **options)
    save_photo(contact_sheet(lines), target)
    return f"{len(lines)} face{'s' if len(lines) > 1 else ''} at {len(lines[0]) - 1} strengths"


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """What the library warns of becomes a line on stderr, at once."""
    def speak(message: Warning | str, *_: Any, **__: Any) -> None:
        Console(stderr=True, soft_wrap=True).print(Text(f"warning: {message}", style="yellow"))

    with warnings.catch_warnings():
        warnings.showwarning = speak
        yield


def demo_table(result: DemoResult) -> Table:
    """A line per person and method, then the means over people."""
    from .demo import lines

    table = Table("person", "learned / restored", "method", title=f"album '{result.album}'")
    for name in ("identity", "PSNR dB", "SSIM", "s to adapt"):
        table.add_column(name, justify="right")
    for own in lines(result):
        for line in own:
            table.add_row(*line)
        table.add_section()
    return table
