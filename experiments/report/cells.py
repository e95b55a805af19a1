"""Tables of the cells: every one, against rank 1, beside others, what training cost, heads on a pretrained model."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from cpdlm.config import LossConfig
from experiments.claims.c6_heads import positions
from experiments.families import Cells, Family
from experiments.records import MODES, Record
from experiments.report.table import Column, Columns, Table, average, described, shown, tabulated, with_spread
from experiments.stats import difference, over_rank_one, over_seeds, shared_seeds

NOTES = (
    "Means over seeds with 95% intervals over test rows or prompts and seeds (one seed: rows or prompts only). Joint "
    "NLL: over all n tokens, positions with all n. Tokens per forward: of the target, the prompt's forward counts; "
    "autoregressive decoding has 1.00. Speed-up: over autoregressive decoding with the same weights and loop."
)


@dataclass(frozen=True)
class Place:
    """What a row is about: a variant and rank of a family."""

    family: Family
    variant: str
    rank: int

    @property
    def cells(self) -> Cells:
        return self.family.cells[self.variant, self.rank]

    @property
    def one(self) -> Cells:
        """Of rank 1, where an HMM is the CP."""
        return self.family.cells.get((self.variant.replace(", hmm", ""), 1), {})

    @property
    def alone(self) -> Cells:
        """Next-token models of equal training."""
        return {record.seed: record for record in self.family.reference}

    @property
    def record(self) -> Record:
        return next(iter(self.cells.values()))


def places(families: list[Family]) -> Iterator[Place]:
    for family in families:
        for variant in family.variants():
            for rank in family.ranks(variant):
                yield Place(family, variant, rank)


PLACE: Columns = {
    "setting": lambda at: at.family.label,
    "variant": lambda at: at.variant,
    "rank": lambda at: str(at.rank),
    "seeds": lambda at: str(len(at.cells)),
}


def measured(quantity: str, mode: str = "sampling", digits: int = 3, bare: bool = False) -> Column:
    return lambda at: shown(over_seeds(at.cells, quantity, mode), digits, bare)


def by_mode(what: str, quantity: str, digits: int = 3) -> Columns:
    return {f"{what}, {mode}": measured(quantity, mode, digits) for mode in MODES}


# --- every cell ------------------------------------------------------------------------------------------------------


def cells_table(families: list[Family]) -> Table:
    """Every cell: likelihood, draft length and speed."""
    columns = PLACE | {
        "trained parameters": lambda at: f"{at.record['parameters']['trained']:,}",
        "parameters over untied": _added,
        "joint NLL (nats)": measured("joint_nll"),
        "first-token NLL (nats)": measured("first_token_nll"),
        "bits per byte": measured("bits_per_byte", bare=True),
        **by_mode("tokens per forward", "tokens_per_pass"),
        **by_mode("speed-up", "speedup", 2),
        "speed over rank 1, sampling": measured("speedup_over_rank1", digits=2),
        "speed-up per token per forward": lambda at: _mean(at.cells, "conversion"),
        "its limit": lambda at: _mean(at.cells, "conversion_limit"),
        "MFLOPs per draft": lambda at: "-" if (flops := at.record.draft_flops()) is None else f"{flops / 1e6:.2f}",
    }
    caption = (
        "Variant: untied is the paper's; tied, the first token is the target's own; token-conditioned, tied, and the "
        "others also see the pending token; blind, that map fed h in place of its embedding; mlp, perceptron maps with "
        "the parameters of the highest rank. Other kinds of draft on a pretrained model have a table of their own. "
        "Limit: t(1)/t(n), the target's time for one token over that for n."
    )
    records = [record for family in families for record in family.records()]
    ours = (at for at in places(families) if not at.family.is_pretrained or at.variant == "untied")
    return tabulated("cells", f"{caption} {NOTES} {described(records)}", columns, ours)


def _added(at: Place) -> str:
    untied = at.family.cells.get(("untied", at.rank))
    if at.variant == "untied" or not untied:
        return "-"
    return f"{at.record['parameters']['total'] - next(iter(untied.values()))['parameters']['total']:+,}"


def _mean(cells: Cells, key: str) -> str:
    values = [mode[key] for record in cells.values() if (mode := record.mode("sampling"))]
    return f"{sum(values) / len(values):.2f}" if values else "-"


# --- against rank 1 --------------------------------------------------------------------------------------------------


def paired_table(families: list[Family]) -> Table:
    """Every rank against rank 1 of its variant, paired: mean, interval and spread."""
    columns = PLACE | {
        "seeds": lambda at: str(len(shared_seeds(at.cells, at.one))),
        "joint NLL (nats), minus rank 1": _over_one("joint_nll"),
        "first-token NLL (nats), minus rank 1": _over_one("first_token_nll"),
        **{f"tokens per forward, {mode}, minus rank 1": _over_one("tokens_per_pass", mode) for mode in MODES},
        **{f"speed over rank 1, {mode}": _speed_over_one(mode) for mode in MODES},
    }
    families = [family for family in families if not family.is_timing]
    ours = [at for at in places(families) if shared_seeds(at.cells, at.one)]
    compared = [record for at in ours for record in at.cells.values()]
    caption = (
        "Every rank against rank 1 of the same variant, target and seed, on the same test rows or prompts: mean over "
        "seeds, 95% interval over rows or prompts and seeds, ± "
        "standard deviation over seeds where there are several. Speed: medians of interleaved repeats in one "
        f"process, with their own intervals, over all seeds. {described(compared)}"
    )
    return tabulated("paired", caption, columns, (at for at in ours if at.rank > 1))


def _over_one(quantity: str, mode: str = "sampling") -> Column:
    return lambda at: with_spread(
        over_rank_one(at.family.by_rank(at.variant) | {1: at.one}, quantity, mode).get(at.rank), 3, sign=True
    )


def _speed_over_one(mode: str) -> Column:
    return lambda at: with_spread(over_seeds(at.cells, "speedup_over_rank1", mode), 2)


# --- beside others ---------------------------------------------------------------------------------------------------


def references_table(families: list[Family]) -> Table:
    """From-scratch cells beside a next-token model of the same trunk, steps, rows and seed: speed at equal quality."""
    columns = PLACE | {
        "seeds": lambda at: str(len(set(at.cells) & set(at.alone))),
        "first-token NLL (nats)": measured("first_token_nll"),
        "next-token model's NLL (nats)": lambda at: shown(over_seeds(at.alone, "first_token_nll")),
        "difference": lambda at: shown(difference(at.cells, at.alone, "first_token_nll"), sign=True),
        "bits per byte": measured("bits_per_byte", bare=True),
        "next-token model's bits per byte": lambda at: shown(over_seeds(at.alone, "bits_per_byte"), bare=True),
        **by_mode("speed-up over it", "speedup_over_trunk", 2),
        **by_mode("speed-up", "speedup", 2),
    }
    columns = {"pairs of seeds" if name == "seeds" else name: cell for name, cell in columns.items()}
    caption = (
        "From-scratch cells beside a next-token model of equal training: the same trunk, steps, rows, data order and "
        "seed. First-token NLL: of the cells over positions with all n successors, of the next-token model over "
        "those with one. Speed-up over it: the cell's speculative decoding over the next-token model's "
        "autoregressive decoding, which has no heads to evaluate, so that quality and speed can be weighed together. "
        "Speed-up: over the cell's own autoregressive decoding. On a frozen target the trunk is the next-token "
        "model: quality is equal by construction."
    )
    return tabulated("references", caption, columns, (at for at in places(families) if _stands_beside(at)))


def _stands_beside(at: Place) -> bool:
    return at.family.target == "own" and bool(at.alone) and at.rank in at.family.ranks()


# --- what training cost ----------------------------------------------------------------------------------------------


def cost_table(families: list[Family]) -> Table:
    """What training each cell cost, against what the machine can do."""
    columns = PLACE | {
        "step (ms)": _over_seeds("step_ms_median", digits=1),
        "tokens/s": _over_seeds("tokens_per_second"),
        "peak memory (GiB)": _over_seeds("peak_memory_bytes", scale=2**-30, digits=2),
        "MFLOPs per token": _counted("flops_per_token", scale=1e-6),
        "GFLOP/s done": _counted("flops_per_token", "tokens_per_second", scale=1e-9),
        "GFLOP/s of a matrix product": _counted("matmul_flops_per_second", scale=1e-9),
        "achieved (%)": _counted("matmul_fraction", scale=100),
    }
    records = [record for family in families for record in family.records()]
    caption = (
        "Training cost, means over seeds (± their standard deviation). Step: median; memory: of the process (of the "
        "GPU, where there is one). FLOPs: matrix products and attention, forward and backward, counted on the first "
        "step, 2 per multiply-add; achieved: those done per second over the rate of a large square matrix product on "
        f"the same device, threads and precision. -: not counted. {described(records, decoded=False)}"
    )
    return tabulated("cost", caption, columns, places(families))


def _over_seeds(key: str, scale: float = 1, digits: int = 0) -> Column:
    return lambda at: average([record["training"][key] * scale for record in at.cells.values()], digits)


def _counted(key: str, by: str = "", scale: float = 1) -> Column:
    """Of the records that counted their FLOPs."""

    def cell(at: Place) -> str:
        training = [record["training"] for record in at.cells.values()]
        counted = [each for each in training if each["flops_per_token"] and each["matmul_flops_per_second"]]
        return average([each[key] * (each[by] if by else 1) * scale for each in counted], 1)

    return cell


# --- heads on a pretrained model -------------------------------------------------------------------------------------


def pretrained_table(families: list[Family]) -> Table:
    """Heads on a pretrained model, by objective, variant and rank: what training takes, and what it buys."""
    columns: Columns = {
        "setting": lambda at: f"{at.family.settings['corpus']}, {at.family.size}, n={at.family.horizon}",
        "objective": lambda at: _objective(at.family),
        "variant": lambda at: at.variant,
        "precision": lambda at: str(at.record.config["model"]["dtype"]),
        "rank": lambda at: str(at.rank),
        "seeds": lambda at: str(len(at.cells)),
        "steps": lambda at: f"{at.record['training']['steps']:,}",
        "positions": lambda at: f"{positions(at.record):,}",
        "trained parameters": lambda at: f"{at.record['parameters']['trained']:,}",
        "heads (MiB)": lambda at: f"{at.record.trained_bytes() / 2**20:.1f}",
        "training (min)": lambda at: f"{fmean(r['seconds']['train'] for r in at.cells.values()) / 60:.1f}",
        "memory (GiB)": lambda at: f"{at.record['training']['peak_memory_bytes'] / 2**30:.1f}",
        "components in use": lambda at: _component_use(at, "effective", ".2f"),
        "dead components": lambda at: _component_use(at, "dead", "g"),
        **by_mode("tokens per forward", "tokens_per_pass", 2),
        **by_mode("speed-up", "speedup", 2),
        **by_mode("speed over rank 1", "speedup_over_rank1", 2),
    }
    caption = (
        "Heads on a pretrained, frozen model, which is the target. Positions: those that trained the window, of all "
        "steps. Heads: bytes of all that is trained, as stored. Components in use: effective number on test text "
        "(exp of the entropy of the mean weights); dead: below a tenth of an equal share."
    )
    families = [family for family in families if family.is_pretrained]
    records = [record for family in families for record in family.records()]
    return tabulated("pretrained", f"{caption} {NOTES} {described(records)}", columns, places(families))


def _objective(family: Family) -> str:
    """With its constants and the text where those are not the preset's."""
    settings = family.settings
    words = [str(settings["loss.objective"])]
    if words[0].startswith("eq14") and settings["loss.alpha"] != LossConfig.alpha:
        words.append(f"alpha {settings['loss.alpha']:g}")
    if settings["loss.gamma"] != LossConfig.gamma:
        words.append(f"gamma {settings['loss.gamma']:g}")
    if settings["data.text"] != "corpus":
        words.append(f"the model's own text ({settings['data.text']})")
    return ", ".join(words)


def _component_use(at: Place, key: str, form: str) -> str:
    weights = [record["likelihood"]["weights"] for record in at.cells.values()]
    return f"{fmean(each[key] for each in weights):{form}}" if len(weights[0]["mean"]) > 1 else "-"
