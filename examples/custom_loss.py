"""A loss of your own in the inner loop: here an L1 that counts the eyes and the mouth more than the rest.

    python examples/custom_loss.py

`Objective.terms` is what a step minimises, a number per person. A subclass adds to it; the loop below is the one that
`metagpen.adapt` runs, written out with its own parts. Learns ada with and without the term and shows both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import metagpen
from metagpen import degrade, recognise
from metagpen.adaptation import AdaptConfig, Album, album
from metagpen.adaptation.draws import draw
from metagpen.adaptation.loop import mean_identities, start_guess
from metagpen.adaptation.objective import Objective
from metagpen.adaptation.optimise import new_optimiser
from metagpen.adaptation.steps import begin, inner_step, step_rates
from metagpen.album import OWN_ALBUM
from metagpen.evaluate.report import contact_sheet
from metagpen.faces import save_photo, to_pil
from metagpen.person import Parameters

OUTPUT = Path("example_out/custom_loss")
SHOTS = 4
STEPS = 8
WEIGHT = 4.0  # of the new term, beside AdaptConfig's own: l1 = 2, perceptual = 0.5, ...
RADIUS = 0.12  # of the regions, as a share of the crop's side
DRAWS = 4  # degradations of the held-out photo that are measured
EYES_AND_MOUTH = [0, 1, 3, 4]  # of the five landmarks; the nose is 2


def region_weights(landmarks: Tensor, size: int) -> Tensor:
    """Bumps around eyes and mouth corners: landmarks [B, 5, 2] in pixels -> [B, 1, size, size] in [0, 1]."""
    centres = torch.arange(size, device=landmarks.device) + 0.5
    away_x, away_y = ((centres - landmarks[:, EYES_AND_MOUTH, axis, None]).square() for axis in (0, 1))
    squared = away_y[..., :, None] + away_x[..., None, :]  # [B, 4, size, size]
    return torch.exp(-squared / (2 * (RADIUS * size) ** 2)).amax(dim=1, keepdim=True)


def region_l1(restored: Tensor, truth: Tensor, landmarks: Tensor) -> Tensor:
    """Mean absolute difference where the regions are, [B, 3, S, S] twice -> [B]."""
    weights = region_weights(landmarks, truth.shape[-1])
    difference = (restored - truth).abs().mean(dim=1, keepdim=True)
    return (weights * difference).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))


class RegionObjective(Objective):
    """The usual terms, and `region_l1`. Rows are person-major: person 0's photos, then person 1's, ..."""

    def terms(self, parameters: Parameters, restored: Tensor, truth: Tensor, poor: Tensor, landmarks: Tensor) -> Tensor:
        usual = super().terms(parameters, restored, truth, poor, landmarks)  # [P]
        own = region_l1(restored, truth, landmarks).unflatten(0, (len(usual), -1)).mean(dim=1)
        return usual + WEIGHT * own


def adapt_with(objective_type: type[Objective], model: metagpen.MetaGPEN, own: Album,
               config: AdaptConfig) -> metagpen.Person:
    """`metagpen.adapt` with another objective."""
    recogniser = recognise.load(model.card["recogniser"])
    identity = mean_identities([own], recogniser)  # [1, E]
    config = config.for_model(model)
    parameters = begin(model, config, 1, torch.Generator().manual_seed(config.seed),
                       start_guess(model, [own], identity))
    objective = objective_type(model, config, recogniser, parameters["latent.offset"])
    optimiser, generator = new_optimiser(config.optimiser), torch.Generator().manual_seed(config.seed + 1)
    for step in range(config.steps):
        support = draw([own], objective.degradation, config, [generator])
        parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        rates = step_rates(model, config, step, parameters)
        parameters, _ = inner_step(objective, parameters, support, rates, optimiser)
    learned = {name: value.detach() for name, value in parameters.items()}
    metadata = {"shots": len(own), "steps": config.steps, "seed": config.seed, "recogniser": recogniser.name,
                "objective": objective_type.__name__}
    return metagpen.Person(model, config.spec, learned, metadata, identity[0])


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    model = metagpen.load()
    *photos, held_out = sorted((OWN_ALBUM / "ada").glob("*.jpg"))[: SHOTS + 1]
    own, query = album(photos, model.size), album([held_out] * DRAWS, model.size)
    poor = degrade.by_name("heavy")(query.crops, torch.Generator().manual_seed(0))

    columns = {"degraded": poor}
    for objective_type in (Objective, RegionObjective):
        name = objective_type.__name__
        person = adapt_with(objective_type, model, own, AdaptConfig(steps=STEPS))
        file = person.save(OUTPUT / f"ada_{name}.safetensors")
        restored = columns[name] = person.restore_batch(poor)
        everywhere = (restored - query.crops).abs().mean()
        there = region_l1(restored, query.crops, query.landmarks).mean()
        print(f"{name}: L1 {float(everywhere):.4f}, at eyes and mouth {float(there):.4f}; {file.resolve()}")
    columns["truth"] = query.crops
    sheet = OUTPUT / "restored.png"
    save_photo(contact_sheet([[(name, to_pil(images[i])) for name, images in columns.items()]
                              for i in range(DRAWS)]), sheet)
    print(f"side by side: {sheet.resolve()}")


if __name__ == "__main__":
    main()
