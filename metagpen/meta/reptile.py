"""Reptile (Nichol, Achiam & Schulman 2018): move where everybody begins towards where adaptation ends.

θ_0 ← θ_0 + ε (1/P) Σ_p (θ_T^p − θ_0^p), or any outer optimiser (SGD is the paper's, Adam is MetaPortrait's) fed with
θ_0 − θ_T as the gradient. No query is needed for it; the query loss that it reports is only watched. The inner rates
have no gradient and stay as they are.
"""

import torch

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop


@outer_loop("reptile", learns_rates=False)
def reptile(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
    end = engine(problem, leaves, problem.rates, False)[-1]
    with torch.no_grad():
        loss = problem.outer(end, *problem.query).mean()
        moved = {name: (leaves[name] - end[name]) / problem.people for name in problem.rates[0]}
    return MetaGradient(loss, moved, [{} for _ in problem.rates], [None for _ in problem.slow])
