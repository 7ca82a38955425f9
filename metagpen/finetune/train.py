"""`metagpen train -opt`: the usual few-shot tutorial's fine-tune of GPEN on the pairs of one person.

Progressive and decoupled. Stage 1: the prior is frozen; the encoder's last blocks, its last linear layer and the latent
adapter learn. Stage 2: the discriminator's last layers are released and both sides move together. What moves is a
Person without the gate, so every checkpoint exists twice: as a Person on the model begun from, whose strength can be
chosen, and folded into a model of its own. Each batch is a function of (seed, iteration) alone: a run that was killed
goes on with the numbers it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from .. import recognise
from ..adaptation.adversarial import CRITIC_BETAS, critic_step, person_step, release_last_layers
from ..adaptation.draws import Album
from ..adaptation.loop import default_recogniser, describe, mean_identities
from ..adaptation.objective import Objective
from ..adaptation.optimise import Adam
from ..adaptation.steps import rate
from ..atomic import write_text
from ..config import same_run, seed_of_step
from ..devices import pick_device
from ..errors import CheckpointError, ConfigError, DataError
from ..evaluate.engine import in_batches
from ..faces import save_photo
from ..gpen.discriminator import Discriminator
from ..model import MetaGPEN
from ..person import Person, folded, new_parameters
from ..recognise import Recogniser
from ..runs import go_on_from, progress_bar, tensorboard, write_state
from ..weights import load
from ..weights.files import read_state
from ..workers import finishing
from .options import Options
from .pairs import Batch, PairSet, draw, hold_back, read_pairs
from .watch import HeldOut, Series, plot_curves

CRITIC_NARROW = 0.125  # width of a discriminator that begins from scratch, as in base training
FREE_TO_CHANGE = {"logger": True, "device": True, "val": {"val_freq"}}  # options that change no number


@dataclass(frozen=True)
class Finished:
    """Where a run's last checkpoint lies, and its held-out figures before and after (None without held-out pairs)."""

    model: Path
    person: Path
    before: dict[str, float | None] | None
    after: dict[str, float | None] | None


def finetune(options: Options, recogniser: Recogniser | None = None, console: Console | None = None,
             device: str | None = None) -> Finished:
    """Fine-tune as the options say, or go on where the same command was stopped.

    recogniser: of losses and the identity column in place of the model's own. device: in place of `options.device`.
    Raises PhotoError or DataError for unusable pairs, ConfigError for options that fit neither the model nor the run
    that lies in the folder, CheckpointError for weights that do not fit.
    """
    run = FineTune(options, recogniser, console or Console(), device)
    run.begin()
    return run.run()


class FineTune:
    """One person's parameters, the discriminator, their optimisers, and the iteration at which they are."""

    def __init__(self, options: Options, recogniser: Recogniser | None, console: Console,
                 device: str | None = None):
        self.options, self.console = options, console
        self.device = torch.device(pick_device(device or options.device))
        self.folder, self.schedule = options.folder, options.train
        self.model = load(options.path.pretrain_network_g or "embedded", self.device)
        gpen = self.model.gpen
        self.config = options.adapt_config(gpen)
        self.spec = replace(self.config.spec, gated=False)  # the whole person is let in
        recogniser = recogniser.to(self.device) if recogniser else None
        self.in_losses = recogniser or default_recogniser(self.model, self.config)
        self.objective = Objective(self.model, self.config, self.in_losses, None)
        self.objective.spec = self.spec
        self.pairs, self.held_out = self._pairs(recogniser)
        self.template = self._template()
        self.iteration, self.seconds, self.board = options.start_iter, 0.0, None
        self.parameters = new_parameters(gpen, self.spec, 1, torch.Generator().manual_seed(options.manual_seed))
        self.optimiser = Adam()
        self.critic = self._critic()
        if self.critic is not None:
            self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), betas=CRITIC_BETAS)

    def _pairs(self, recogniser: Recogniser | None) -> tuple[PairSet, HeldOut | None]:
        """What is trained on and what is watched; nothing is both."""
        data = self.options.datasets
        pairs = read_pairs(data.train, self.model.size)
        if data.val is not None:
            held = read_pairs(data.val, self.model.size)
            if same := shared_photos(pairs.truth, held.truth):
                raise DataError(f"datasets.val: '{held.names[same[0][1]]}' is the training photo "
                                f"'{pairs.names[same[0][0]]}'; what is trained on cannot be held out")
        else:
            pairs, held = hold_back(pairs)
            if held is not None and held.poor is None:
                generator = torch.Generator().manual_seed(self.options.manual_seed)
                held = replace(held, poor=self.objective.degradation(held.truth, generator))
        if held is None:
            return pairs, None
        name = self.options.val.recogniser or self.model.card.get("recogniser", "embedded")
        return pairs, HeldOut(held, recogniser or recognise.load(name))

    def _template(self) -> Tensor | None:
        """Who the sharp photos show, [E], unit length: what a Person's photos are matched by."""
        if self.in_losses is None:
            return None
        sharp = Album(self.pairs.truth.to(self.device), self.pairs.landmarks.to(self.device))
        return mean_identities([sharp], self.in_losses)[0].cpu()

    def _critic(self) -> Discriminator | None:
        """The discriminator given, or one from scratch; None when no stage 2 would ask it."""
        given, size = self.options.path.pretrain_network_d, self.model.size
        if given is not None and not given.is_file():
            raise CheckpointError(f"path.pretrain_network_d: no such file {given}")
        if not self.schedule.losses.adversarial or self.schedule.joint_from >= self.schedule.total_iters:
            return None
        if given is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.manual_seed)
                return Discriminator(size, self.model.gpen.config.channel_multiplier, CRITIC_NARROW).to(self.device)
        try:
            critic = Discriminator.from_state_dict(read_state(given))
        except CheckpointError as error:
            raise CheckpointError(f"path.pretrain_network_d: {given}: {error}") from error
        if critic.size != size:
            raise ConfigError(f"path.pretrain_network_d: {given} judges faces of {critic.size} px, the model makes "
                              f"faces of {size} px")
        return critic.to(self.device)

    # -- one iteration ------------------------------------------------------------------------------------------

    def batch(self, iteration: int) -> Batch:
        """(truth, degraded, landmarks) of an iteration: a function of the seed and its number."""
        generator = torch.Generator().manual_seed(seed_of_step(self.options.manual_seed, iteration))
        drawn = draw(self.pairs, self.options.datasets.train, self.objective.degradation, generator)
        return tuple(part.to(self.device) for part in drawn)

    def step(self) -> dict[str, float]:
        """One iteration; its losses and rates. Raises ConfigError when the numbers stop being finite."""
        joint = self.critic is not None and self.iteration >= self.schedule.joint_from
        factor, batch = self.schedule.factor(self.iteration), self.batch(self.iteration)
        rates = {name: factor * rate(name, self.config) for name in self.parameters}
        logged = {"lr_G": factor * self.schedule.lr_G}
        if self.critic is not None:
            self._release_critic(joint, factor * self.schedule.lr_D)
        self.parameters, restored, losses = person_step(
            self.objective, self.parameters, batch, rates, self.optimiser, self.critic if joint else None
        )
        if self._critic_learns(joint):
            logged["lr_D"] = factor * self.schedule.lr_D
            losses["critic"] = critic_step(self.critic, self.critic_optimiser, batch[0], restored)
        finite = [value.isfinite().all() for value in (restored, *self.parameters.values())]
        if not bool(torch.stack(finite).all()):
            raise ConfigError(f"the fine-tune diverged at iteration {self.iteration} (numbers that are not finite); "
                              "lower train.lr_G")
        self.iteration += 1
        return logged | losses

    def _critic_learns(self, joint: bool) -> bool:
        """A discriminator that was given waits for stage 2; one from scratch must learn to see before."""
        return self.critic is not None and (joint or self.options.path.pretrain_network_d is None)

    def _release_critic(self, joint: bool, lr: float) -> None:
        if joint:
            release_last_layers(self.critic)
        else:
            self.critic.requires_grad_(True)
        for group in self.critic_optimiser.param_groups:
            group["lr"] = lr

    # -- the loop -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare the folder, or take up the run that lies there."""
        resumed = self._resume()
        upto = self.iteration if resumed else -1
        self.log = Series(self.folder / "log.csv", ("loss", "adversarial", "critic", "lr_G", "lr_D"), upto)
        self.validation = Series(self.folder / "validation.csv", HeldOut.columns, upto)
        if resumed:
            self.say(f"resumed at iteration {self.iteration}")
        else:
            for line in [*self.options.notes(self.model.gpen), *self._notes()]:
                self.say(line)
            self.watch()
            self._save_state()

    def _notes(self) -> list[str]:
        """What there is to train on and to watch, and how the stages run."""
        schedule, held = self.schedule, self.held_out
        lines = [f"{len(self.pairs)} pairs to train on: {', '.join(self.pairs.names)}"]
        if held is None:
            lines.append("nothing is held out: that takes three pairs or datasets.val; there will be no quality curve")
        else:
            why = "datasets.val" if self.options.datasets.val else "no datasets.val was given"
            lines.append(f"held out ({why}): {', '.join(held.pairs.names)}")
            in_loss = self.in_losses is not None and held.recogniser.name == self.in_losses.name
            lines.append(f"identity is judged by '{held.recogniser.name}'"
                         + (", which the losses use too; val.recogniser names another" if in_loss else ""))
            if held.lpips is None:
                lines.append("LPIPS: not available, its backbone file is not here")
        end = schedule.total_iters
        if self.critic is None:
            lines.append(f"stage 1 until iteration {end}; no stage 2 (adversarial weight or length of 0)")
        else:
            whose = self.options.path.pretrain_network_d or "from scratch, learning beside stage 1"
            lines.append(f"stage 1 until iteration {schedule.joint_from}, then the last layers of the discriminator "
                         f"({whose}) are released until iteration {end}")
        return lines

    def run(self) -> Finished:
        """Iterate to the end; a checkpoint every `save_checkpoint_freq` iterations and at the end.

        An interruption waits for the iteration that is under way, and saves the state."""
        end, wanted = self.schedule.total_iters, self.options.logger.use_tb_logger
        try:
            with (tensorboard(self.folder / "tb_logger", self.iteration, wanted) as self.board,
                  progress_bar("fine-tune", end, self.iteration, self.console) as show):
                while self.iteration < end:
                    with finishing():  # so that an interruption finds nothing half learned, and no row missing
                        began = time.perf_counter()
                        logged = self.step()
                        self.seconds += time.perf_counter() - began
                        self._after(logged)
                    show(self.iteration, f"loss {logged['loss']:.3f}")
        except KeyboardInterrupt:
            self._save_state()
            self.say(f"interrupted at iteration {self.iteration}; run the same command to go on from there")
            raise
        return self._finished()

    def _after(self, logged: Mapping[str, float]) -> None:
        """Whatever is due after an iteration; the state last, so that it never runs ahead of the rows."""
        at, logger, last = self.iteration, self.options.logger, self.iteration == self.schedule.total_iters
        if at % logger.print_freq == 0 or last:
            self.log.add(at, logged)
            self._to_board("train", logged)
        watched = at % self.options.val.val_freq == 0 or last
        if watched:
            self.watch()
        if at % logger.save_checkpoint_freq == 0 or last:
            self.save()
        if watched or at % logger.save_checkpoint_freq == 0:
            self._save_state()

    def _finished(self) -> Finished:
        rows = [{key: row[key] for key in HeldOut.columns} for row in self.validation.rows]
        if rows:
            first, last = rows[0], rows[-1]
            best = max(self.validation.rows, key=lambda row: row["psnr"])
            self.say(f"held out: PSNR {first['psnr']:.2f} -> {last['psnr']:.2f} dB (best {best['psnr']:.2f}, "
                     f"iteration {best['iter']}), identity {first['identity']:.3f} -> {last['identity']:.3f}")
        model, person = self.files()
        self.say(f"{self.seconds:.0f} s of training; model {model}, Person {person}")
        return Finished(model, person, rows[0] if rows else None, rows[-1] if rows else None)

    def say(self, line: str) -> None:
        """A line for the screen and for train.log."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        with (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    # -- watching -----------------------------------------------------------------------------------------------

    @property
    def person(self) -> Person:
        """What has been learned so far, as its file will hold it."""
        mine = {name: value.detach().half().float() for name, value in self.parameters.items()}
        config = self.config.model_copy(update={"steps": self.iteration})
        facts = describe(self.model, config, self.in_losses, len(self.pairs), self.seconds)
        return Person(self.model, self.spec, mine, {**facts, "fine_tuned": self.options.label}, self.template)

    def watch(self) -> None:
        """A row and a curve of the held-out pairs."""
        if self.held_out is None:
            return
        figures = self.held_out.score(in_batches(self.person.restore_batch, self.held_out.pairs.poor, 8))
        self.validation.add(self.iteration, figures)
        self._to_board("val", figures)
        plot_curves(self.folder / "curves.png", self.validation.rows, self.schedule.joint_from,
                    f"{self.options.label}: {len(self.held_out.pairs)} held-out, {len(self.pairs)} trained on")

    def _to_board(self, part: str, values: Mapping[str, float | None]) -> None:
        for name, value in values.items() if self.board else ():
            if value is not None:
                self.board.add_scalar(f"{part}/{name}", value, self.iteration)

    # -- files --------------------------------------------------------------------------------------------------

    def files(self) -> tuple[Path, Path]:
        """Of this iteration: the folded model and the Person."""
        models = self.folder / "models"
        return models / f"net_g_{self.iteration}.safetensors", models / f"person_{self.iteration}.safetensors"

    def save(self) -> None:
        """The checkpoint twice (see above), and a picture of the held-out pairs."""
        model_file, person_file = self.files()
        person = self.person
        person.save(person_file)
        card = {name: self.model.card[name] for name in ("recogniser", "licence") if name in self.model.card}
        begin = self.options.path.pretrain_network_g or "embedded"
        begin = str(Path(begin).resolve()) if Path(begin).is_file() else begin  # from wherever it is asked for later
        card["fine_tuned"] = {"from": begin, "fingerprint": self.model.fingerprint, "person": person_file.name,
                              **person.metadata}
        MetaGPEN(folded(person), person.model.start, card).save(model_file, torch.float32)
        if self.held_out is not None:
            poor = self.held_out.pairs.poor
            columns = {"before": in_batches(self.model.restore, poor, 8),
                       "half": in_batches(lambda x: person.restore_batch(x, 0.5), poor, 8),
                       "fine-tuned": in_batches(person.restore_batch, poor, 8)}
            picture = self.folder / "visualization" / f"net_g_{self.iteration}.png"
            save_photo(self.held_out.sheet(columns), picture)

    @property
    def state_file(self) -> Path:
        return self.folder / "training_states" / "latest.state"

    def _photos(self) -> str:
        """Which pictures are trained on and which are watched."""
        return "/".join([self.pairs.digest, *([self.held_out.pairs.digest] if self.held_out else [])])

    def _save_state(self) -> None:
        state = {"iteration": self.iteration, "seconds": self.seconds, "options": self.options.model_dump_json(),
                 "photos": self._photos(), "model": self.model.fingerprint, "parameters": self.parameters,
                 "optimiser": {"steps": self.optimiser.steps, "mean": self.optimiser.mean,
                               "square": self.optimiser.square}}
        if self.critic is not None:
            state |= {"critic": self.critic.state_dict(), "critic_optimiser": self.critic_optimiser.state_dict()}
        write_state(self.state_file, state)

    def _resume(self) -> bool:
        """Take up the state in the folder, if there is one; a fresh folder gets its options written down."""
        if go_on_from(self.state_file, self.device, self._take_up, f"move {self.folder} away to begin again"):
            return True
        if any((self.folder / "models").glob("net_g_*")):
            raise DataError(f"{self.folder / 'models'} holds models but no training state lies beside it; give "
                            "another name, or move that folder away")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "train.log").unlink(missing_ok=True)
        write_text(self.folder / "options.yml", yaml.safe_dump(self.options.model_dump(mode="json")))
        return False

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self._same_run(state)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.parameters = state["parameters"]
        for name, value in state["optimiser"].items():
            setattr(self.optimiser, name, value)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimiser.load_state_dict(state["critic_optimiser"])

    def _same_run(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming what differs, when the state belongs to another run."""
        advice = f"give this run another name, or move {self.folder} away"
        same_run(self.folder, Options.as_stored(state["options"], FREE_TO_CHANGE),
                 self.options.model_dump(mode="json", exclude=FREE_TO_CHANGE), advice)
        for key, found, what in (("photos", self._photos(), "other photos"),
                                 ("model", self.model.fingerprint, "another model to begin from")):
            if state[key] != found:
                raise ConfigError(f"{self.folder} holds a run with {what}; {advice}")


def shared_photos(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    """Indices of pictures [N, 3, S, S] and [M, 3, S, S] that are the same."""
    return [(i, k) for i, a in enumerate(first) for k, b in enumerate(second) if torch.equal(a, b)]
