"""What a batch may be, and which loss is made of a model's output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_accel import batch as batches

IMAGES, LABELS, LOGITS = torch.randn(4, 5), torch.tensor([0, 2, 1, 2]), torch.randn(4, 3)


@pytest.mark.parametrize("batch", [(IMAGES, LABELS), [IMAGES, LABELS]], ids=["tuple", "list, as DataLoader has it"])
def test_a_pair_is_inputs_and_targets(batch: Any) -> None:
    assert batches.split(batch) == (IMAGES, LABELS)
    assert batches.forward(lambda x: x, batch) is IMAGES
    assert batches.size(batch) == 4
    assert batches.split(IMAGES) == (IMAGES, None)
    with pytest.raises(ValueError, match=r"must be \(inputs, targets\); got 1 items"):
        batches.split(batch[:1])


@pytest.mark.parametrize(
    "inputs", [(IMAGES, 2.0), [IMAGES, 2.0], {"x": IMAGES, "factor": 2.0}], ids=["tuple", "list", "dict"]
)
def test_several_inputs_are_several_arguments(inputs: Any) -> None:
    assert torch.equal(batches.forward(lambda x, factor: factor * x, (inputs, None)), 2 * IMAGES)


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        (LOGITS, LABELS, F.cross_entropy(LOGITS, LABELS)),
        ({"loss": torch.tensor(3.0), "logits": LOGITS}, LABELS, torch.tensor(3.0)),
        (SimpleNamespace(loss=torch.tensor(2.0)), LABELS, torch.tensor(2.0)),
        ({"loss": None, "logits": LOGITS}, LABELS, LOGITS.square().mean()),
        (LOGITS, torch.randn(4, 3), LOGITS.square().mean()),
        (LOGITS, None, LOGITS.square().mean()),
        ({"a": LOGITS, "b": [3 * LOGITS, LABELS]}, None, 10 * LOGITS.square().mean()),
        (torch.full((4,), 300.0, dtype=torch.float16), None, torch.tensor(90_000.0)),  # more than float16 holds
    ],
)
def test_the_loss_is_the_outputs_own_or_made_of_it(output: Any, targets: Any, expected: Tensor) -> None:
    torch.testing.assert_close(batches.loss(output, (IMAGES, targets)), expected)
    given = batches.loss(output, (IMAGES, targets), lambda *arguments: arguments)
    assert given[0] is output
    assert given[1] is targets


def test_what_has_no_loss_asks_for_one() -> None:
    with pytest.raises(ValueError, match="no loss can be made of an output of type Tensor; pass loss_fn"):
        batches.loss(LABELS, IMAGES)


def test_a_loss_has_one_floating_point_value() -> None:
    model = nn.Linear(5, 3)
    assert batches.training_loss(model, IMAGES, lambda output, _: output.sum().reshape(1)).shape == (1,)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar floating-point tensor; got torch.int64"):
        batches.training_loss(model, IMAGES, lambda output, _: output.argmax())
    with pytest.raises(TypeError, match=r"loss_fn must return a scalar tensor; got 3\.0 of type float"):
        batches.training_loss(model, IMAGES, lambda output, _: 3.0)


def test_the_size_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert batches.size(({"name": "text", "x": IMAGES}, torch.zeros(7))) == 4
    for batch in (torch.tensor(1.0), {"x": 3}):
        with pytest.raises(ValueError, match="no tensor with a batch dimension"):
            batches.size(batch)
