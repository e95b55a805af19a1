"""What a command can run: the cells of a claim, of all claims, or of a profile."""

from experiments.claims import CLAIMS
from experiments.pretrained import CPU_SCREEN, objectives, retrofit, retrofit_gpu, retrofit_own
from experiments.star import joints, longer_from_scratch, seeds
from experiments.suite import RANKS, SEEDS, Cell, complete, controls, heads, scratch, trunk

SCALES = ("cpu", "gpu")


def study(claim: str, scale: str = "cpu") -> list[Cell]:
    """The cells of one claim, or of `all`, trunks and references first.

    `all` leaves out C6, which rests on a model of others and has a profile of its own, retrofit.
    """
    chosen = [each for each in CLAIMS if claim == each.id or (claim == "all" and each.id != "C6")]
    assert chosen, claim
    arms = [arm for each in chosen for arm in (each.arms if scale == "cpu" else each.gpu_arms)]
    return complete(cell for arm in arms for cell in arm())


def smoke() -> list[Cell]:
    """Every stage once, in minutes."""
    code = trunk("code", "smoke,trunk")
    return [
        code,
        *(heads(code, rank, "smoke") for rank in (1, 4)),
        heads(code, 4, "smoke", link="first"),
        *(scratch(rank, "smoke") for rank in (1, 4)),
    ]


def cpu() -> list[Cell]:
    """One seed of the main arms, on two cores."""
    code, text = trunk("code", "cpu-trunk,trunk"), trunk("text", "cpu-trunk,trunk")
    return [
        code,
        text,
        *(heads(code, rank, "cpu-heads") for rank in RANKS),
        *(heads(code, rank, "cpu-heads", link="first") for rank in RANKS),
        *controls(code)[:2],
        trunk("code", "trunk"),
        *(scratch(rank) for rank in RANKS),
        *(heads(text, rank, "cpu-heads") for rank in (1, 8)),
        *(heads(code, 4, "cpu-heads", horizon=horizon) for horizon in (2, 8)),
    ]


def paper() -> list[Cell]:
    """From scratch on TinyStories at 56.3M parameters, equal steps per rank; needs a hub and a large GPU."""
    cells = []
    for seed in SEEDS:
        reference = Cell("trunks", {"preset": "paper,trunk", "seed": seed})
        settings = [{"preset": "paper", "rank": rank, "seed": seed} for rank in RANKS]
        cells += [reference, *(Cell("C1", each, reference=reference) for each in settings)]
    return cells


PROFILES = {
    "smoke": smoke,
    "cpu": cpu,
    "cpu-full": lambda: study("all"),
    "retrofit-screen": lambda: objectives(CPU_SCREEN),
    "retrofit": retrofit,
    "retrofit-own": retrofit_own,
    "joints": lambda: complete(joints()),
    "seeds": lambda: complete(seeds()),
    "scratch-long": lambda: complete(longer_from_scratch()),
    "gpu": lambda: study("all", "gpu"),
    "retrofit-gpu": retrofit_gpu,
    "paper": paper,
}
