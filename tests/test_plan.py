"""Plans: the presets of the paper's sizes build without numbers, and what is planned is what a step does."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cpdlm.config import parse, resolve
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import flops
from cpdlm.training.flop_count import FlopCount, matmul_rate
from cpdlm.training.plan import Plan, make_plan
from experiments import plan as entry

SMALL = {"size": "micro", "data.context": 16, "decode.prompt_tokens": 8, "decode.new_tokens": 8, "data.batch_rows": 4}
VOCAB = 96


@pytest.mark.parametrize(
    "words,trunk,heads",
    [
        (["preset=paper"], 56.3e6, 16 * 8192 * 576),
        (["preset=pycodegpt"], 110e6, 16 * 768**2),
        (["preset=llama8b", "devices=8"], 8.03e9 - 128256 * 4096, 32 * 4096**2),
        (["preset=fineweb1b", "devices=8"], 1.04e9, 32 * 2048**2),
    ],
)
def test_the_sizes_of_the_paper_build_without_numbers(words: list[str], trunk: float, heads: int) -> None:
    config = parse(words)
    plan = make_plan(config)
    assert plan.parameters["trunk"] == pytest.approx(trunk, rel=0.005)
    assert plan.parameters["heads"] == heads
    assert plan.peak_bytes < 80e9, "on GPUs of today"
    page = entry.text(plan, config, 4e14)
    assert all(words in page for words in ("parameters", "memory of each process", "FLOPs per token", "days on"))


def step(model: LanguageModel, config: Any) -> float:
    """FLOPs of a step, forward and backward, as they are counted in training."""
    rows, context, horizon = config.data.batch_rows, config.data.context, config.horizon
    tokens_BT = torch.randint(VOCAB, (rows, context))
    future_BTN = torch.randint(VOCAB, (rows, context, horizon))
    weight_BT = torch.full((rows, context), 1 / (rows * context))
    share = torch.zeros(rows * context)
    share[: round(config.loss.joint_fraction * rows * context)] = 1 / (rows * context)
    alone = model.frozen_target and model.first_is_tied
    whole = not model.first_is_tied and config.loss.joint_fraction == 1
    first_BT = torch.zeros_like(weight_BT) if alone or whole else weight_BT

    with FlopCount() as counter:
        terms = model(
            tokens_BT, None, future_BTN, torch.full((rows, context), horizon), first_BT, share.view(rows, context)
        )
        terms.loss.backward()
    return counter.total / (rows * context)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1, "horizon": 1},
        {"rank": 3},
        {"rank": 3, "loss.joint_fraction": 0.25},
        {"rank": 3, "loss.joint_fraction": 0.25, "model.tie_first": True},
        {"rank": 3, "model.map_rank": 8},
        {"rank": 2, "model.head": "separate"},
        {"rank": 3, "model.trunk": "a run", "loss.joint_fraction": 0.25},
        {"rank": 3, "model.trunk": "a run", "model.tie_first": True},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_planned_flops_are_those_of_a_step(settings: dict[str, Any]) -> None:
    """Within 3 %: the gate is not counted."""
    config = resolve(SMALL | settings)
    trunk = build_language_model(resolve(SMALL | {"rank": 1, "horizon": 1}), VOCAB) if config.model.trunk else None
    model = build_language_model(config, VOCAB, trunk)
    assert make_plan(config, VOCAB).flops_per_token == pytest.approx(step(model, config), rel=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3, "link": "first"},
        {"rank": 2, "model.family": "gpt2", "model.tie_first": True, "model.map_hidden": 8},
        {"rank": 2, "model.head": "separate", "size": "1b"},
        {"rank": 3, "model.trunk": "a run", "data.states": 32, "model.map_rank": 4},
    ],
)
def test_the_formulas_of_a_shape_are_what_is_planned_for_the_model(settings: dict[str, Any]) -> None:
    """Trunk, loss and weights from the settings equal those of the model that is built, but for biases."""
    config = resolve(SMALL | settings)
    plan, shape = make_plan(config, VOCAB), flops.Shape.of(config, VOCAB)
    planned = {"trunk": flops.trunk_forwards(config) * flops.trunk_flops(config), **flops.loss_flops(shape, config)}
    assert plan.flops == pytest.approx(planned)
    heads = sum(plan.parameters[part] for part in ("heads", "gate", "anchor"))
    assert shape.head_weights == pytest.approx(heads, rel=0.02)
    assert flops.trunk_matrices(config) + VOCAB * shape.width == pytest.approx(plan.parameters["trunk"], rel=0.03)


def test_planned_weights_gradients_and_moments_are_those_of_a_step() -> None:
    config = resolve(SMALL | {"rank": 3})
    plan, model = make_plan(config, VOCAB), build_language_model(config, VOCAB)
    step(model, config)
    optimiser = torch.optim.AdamW(model.parameters())
    optimiser.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [tensor for state in optimiser.state.values() for name, tensor in state.items() if name != "step"]
    assert plan.memory["weights"] == size(model.parameters())
    assert plan.memory["gradients"] == size(parameter.grad for parameter in model.parameters())
    assert plan.memory["optimiser"] == size(moments)


def test_sharding_checkpointing_and_precision() -> None:
    def planned(**changes: Any) -> Plan:
        return make_plan(resolve(SMALL | {"rank": 3} | changes), VOCAB)

    one, four = planned(), planned(devices=4, parallel="fsdp")
    assert four.memory["optimiser"] == one.memory["optimiser"] // 4 and four.memory["gathered"] > 0
    assert four.memory["activations"] * 4 == pytest.approx(one.memory["activations"], rel=0.05)
    assert four.tokens_per_second(1e9) == 4 * one.tokens_per_second(1e9)
    assert one.activations_checkpointed < one.memory["activations"]
    assert planned(**{"train.precision": "64-true"}).memory["weights"] == 2 * one.memory["weights"]
    assert planned(devices=2, nodes=2, parallel="fsdp").memory == four.memory, "processes on another machine count"


def test_forward_and_backward_are_counted() -> None:
    left, right = torch.rand(5, 7, requires_grad=True), torch.rand(7, 3, requires_grad=True)
    with FlopCount() as count:
        (left @ right).sum().backward()
    assert count.total == 3 * 2 * 5 * 7 * 3  # the product, and one for each operand's gradient


def test_attention_is_counted_on_the_cpu() -> None:
    query, key, value = (torch.rand(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    products = 2 * 2 * 4 * 16 * 16 * 8  # one of them
    with FlopCount() as count:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert count.total >= 6 * products


def test_a_product_summed_in_another_type_is_counted() -> None:
    """As the joint loss does on a GPU; shapes alone suffice."""
    left, right = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((5, 7), (7, 3)))
    total = torch.empty(5, 3, device="meta")
    with FlopCount() as count:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    assert count.total == 2 * 5 * 7 * 3


def test_the_rate_is_that_of_a_matrix_product_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rate = matmul_rate(torch.device("cpu"), "32-true", seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < rate < 1e15
