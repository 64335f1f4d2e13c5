"""Models: shapes, the paper's architecture, causality, one training step each, clear errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sdgp_accel import models

OWN = ["resnet9", "digits", "conv_lm", "gpt"]


def _small_batch(name: str) -> models.Batch:
    if name in ("gpt", "conv_lm"):
        return models.example_batch(name, 2, seq_len=16)
    return models.example_batch(name, 4)


@pytest.mark.parametrize("name", OWN)
def test_one_step_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model, batch = models.build(name), _small_batch(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        loss = models.loss(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_resnet9_is_the_papers() -> None:
    model = models.build("resnet9")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    shape = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0], c.bias) for c in convs]
    assert shape == [
        (3, 128, 3, 1, 1, None),
        (128, 256, 5, 2, 2, None),
        (256, 256, 3, 1, 1, None),
        (256, 256, 3, 1, 1, None),
        (256, 512, 3, 1, 1, None),
        (512, 512, 3, 1, 1, None),
        (512, 512, 3, 1, 1, None),
        (512, 256, 3, 1, 0, None),
    ]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias) for m in linear] == [(256, 10, None)]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 8
    images = torch.randn(2, 3, 32, 32)
    features = model.eval().features(images)
    assert features.shape == (2, 256)
    torch.testing.assert_close(model(images), 0.2 * features @ linear[0].weight.t())
    pools = [module for module in model.modules() if "Pool" in type(module).__name__]
    assert [type(pool) for pool in pools] == [nn.MaxPool2d, nn.AdaptiveMaxPool2d]
    residual = model.features[2]
    torch.testing.assert_close(residual(x := torch.randn(2, 256, 4, 4)), x + residual.body(x))


@pytest.mark.parametrize("name", ["gpt", "conv_lm"])
def test_language_models_are_causal(name: str) -> None:
    torch.manual_seed(1)
    model = models.build(name).eval()
    tokens = torch.randint(256, (2, 24))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12], after[:, 12])


@pytest.mark.parametrize(
    ("name", "parameters"),
    # torchvision's and timm's documented counts; GPT-2's from the paper's family (medium 345-355 M), vocabulary padded.
    [("resnet50", 25_557_032), ("vit_base_patch16_224", 86_567_656), ("gpt2-medium", 354_871_296)],
)
def test_meta_models_have_the_known_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.build(name)
        batch = models.example_batch(name, 2, device="meta")
        output = model(batch.inputs)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert output.is_meta
    assert output.shape[0] == 2


def test_options_reach_the_constructor() -> None:
    assert len(models.build("gpt", layers=3, width=32, heads=2).blocks) == 3
    assert models.build("gpt", num_classes=99, seq_len=7).config.context == 7
    assert models.build("digits", num_classes=3)(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert models.build("resnet9", num_classes=3).head.out_features == 3
    assert models.build("conv_lm", num_classes=99, width=16)(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 99)
    assert models.build("resnet18", num_classes=5).fc.out_features == 5
    with torch.device("meta"):
        assert models.build("vit_small_patch16_224", image_size=96).pos_embed.shape[1] == 37
        assert models.build("torchvision/vit_b_16", image_size=96).image_size == 96
        assert models.build("timm/resnet18", image_size=96).fc.out_features == 1000
        assert models.build("timm/resnet18", in_chans=1).conv1.in_channels == 1
        assert models.build("googlenet", aux_logits=True).aux1 is not None


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name).train()
        inputs = models.example_batch(name, 2, device="meta").inputs
        assert isinstance(model(inputs), torch.Tensor)


def test_batches_are_reproducible() -> None:
    first = models.example_batch("digits", 3, generator=torch.Generator().manual_seed(5))
    second = models.example_batch("digits", 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.targets, second.targets)
    text = models.example_batch("gpt", 2, seq_len=9)
    assert torch.equal(text.inputs[:, 1:], text.targets[:, :-1])


def test_the_loss_may_be_smoothed() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    everywhere = -logits.log_softmax(-1).mean()
    right = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(models.loss(logits, targets), right)
    torch.testing.assert_close(models.loss(logits, targets, label_smoothing=0.25), 0.75 * right + 0.25 * everywhere)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"'resnet_50' is neither .* did you mean 'resnet50'"):
        models.build("resnet_50")
    with pytest.raises(ValueError, match="image_size must be None: gpt is a language model; got 32"):
        models.example_batch("gpt", 2, image_size=32)
    with pytest.raises(TypeError, match=r"no option depth; accepted: .*layers"):
        models.build("gpt", depth=3)
    with pytest.raises(ValueError, match="batch must be an int >= 1; got 0"):
        models.example_batch("digits", 0)
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        models.build("gpt", width=30, heads=4)
    with pytest.raises(ValueError, match="context is 128"):
        models.build("gpt")(torch.zeros(1, 129, dtype=torch.long))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"torchvision and timm are not installed.*sdgp_accel\[vision\]"):
        models.build("resnet50")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"'vit_tiny_patch16_224' is not .* and timm is not installed"):
        models.build("vit_tiny_patch16_224")
    with torch.device("meta"):
        assert models.build("resnet18", num_classes=5).fc.out_features == 5  # torchvision's


def test_gpt_starts_with_smaller_weights_where_a_block_writes() -> None:
    """GPT-2's scheme: two layers of each block write to the residual stream."""
    for name, parameter in models.build("gpt", layers=8).named_parameters():
        if parameter.dim() > 1:
            std = 0.02 / 4 if name.endswith(("attention_out.weight", "mlp_out.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05)


def test_conv_lm_sees_as_far_back_as_its_dilations_add_up_to() -> None:
    torch.manual_seed(0)
    model = models.build("conv_lm", layers=3, stacks=2, kernel=4, width=16).double().eval()
    tokens = torch.randint(255, (64,))
    changed = model(tokens + torch.eye(64, dtype=torch.int64))[:, -1]  # row i: with another token at position i
    seen = ((changed - model(tokens[None])[0, -1]).abs() > 1e-12).any(1)
    assert seen.tolist() == [position >= 63 - 2 * (4 - 1) * (1 + 2 + 4) for position in range(64)]


def test_gpt_computes_what_gpt2_does() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 16}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    ours = models.build("gpt2", num_classes=64, layers=2, heads=4, width=32, seq_len=16).double().eval()
    names = {
        "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "norm1": "ln_1", "qkv": "attn.c_attn",
        "attention_out": "attn.c_proj", "norm2": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj", "norm": "ln_f",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms, too
            other = theirs.transformer.get_parameter(".".join(names.get(part, part) for part in name.split(".")))
            other.copy_(
                parameter.t() if "c_" in "".join(names.get(part, "") for part in name.split(".")) else parameter
            )
        tokens = torch.randint(64, (2, 16))
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits)


def test_gpt_drops_out_only_while_it_trains() -> None:
    model, tokens = models.build("gpt", dropout=0.5), torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    torch.nn.init.zeros_(model.blocks[0].attention_out.weight)
    torch.nn.init.zeros_(model.blocks[1].attention_out.weight)
    assert not torch.equal(model(tokens), model(tokens))  # after the MLP, too
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_images_have_the_size_that_their_model_was_designed_for() -> None:
    sizes = {"inception_v3": 299, "timm/tf_efficientnet_b3": 300, "resnet18": 224}
    for name, size in sizes.items():
        assert models.example_batch(name, 2, device="meta").inputs.shape == (2, 3, size, size)
    assert models.example_batch("resnet18", 2, image_size=64, device="meta").inputs.shape == (2, 3, 64, 64)
    assert int(models.example_batch("digits", 500, num_classes=3).targets.max()) == 2
    text = models.example_batch("gpt", 20, num_classes=5, seq_len=30).inputs
    assert (text.shape, int(text.max())) == ((20, 30), 4)
