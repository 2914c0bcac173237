"""Backbones behind one interface, and features that depend neither on the batch nor on the mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdood_plugin.artifacts import write_tensors
from sdood_plugin.backbones import fitting_weights, make_body, set_pooling
from sdood_plugin.data.images import to_unit
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone, check_backbone, evaluating, extract, load_backbone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone("small_cnn")


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_features_do_not_depend_on_the_batch_size(backbone, pictures, batch_size):
    found = extract(backbone, pictures.images, device=CPU, batch_size=batch_size)
    assert found.shape == (12, 128) and found.dtype == torch.float32
    one = torch.cat([extract(backbone, image[None], device=CPU) for image in pictures.images])
    torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)


def test_extracting_leaves_weights_modes_and_statistics(backbone, pictures):
    backbone.train()
    backbone.body.layers[1].eval()  # a layer with a mode of its own
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, pictures.images, device=CPU)
    assert backbone.training and not backbone.body.layers[1].training and backbone.body.layers[4].training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_modes_are_restored_after_a_failure(backbone):
    backbone.train()
    with pytest.raises(ZeroDivisionError), evaluating(backbone):
        assert not backbone.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert backbone.training and torch.is_grad_enabled()


@pytest.mark.parametrize("prefix", ["", "body."])
def test_weights_are_taken_with_or_without_prefix(tmp_path, backbone, pictures, prefix):
    write_tensors(tmp_path / "w.safetensors", {prefix + name: value for name, value in backbone.body.state_dict().items()})
    loaded = load_backbone("small_cnn", tmp_path / "w.safetensors")
    assert torch.equal(extract(loaded, pictures.images, device=CPU), extract(backbone, pictures.images, device=CPU))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.0.weight"), "no layers.0.weight"),
        (lambda state: state.update({"layers.0.weight": torch.zeros(2, 2)}), r"layers.0.weight of shape \(2, 2\), not \(32, 3,"),
        (lambda state: state.update({"encoder.weight": torch.zeros(2)}), "encoder.weight, which it has not .1 such of"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, backbone, change, message):
    state = dict(backbone.body.state_dict())
    change(state)
    write_tensors(tmp_path / "w.safetensors", state)
    with pytest.raises(UsageError, match=message):
        load_backbone("small_cnn", tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["", "body."])
def test_names_that_begin_with_the_prefix_are_kept(prefix):
    with torch.device("meta"):
        body = make_body("tresnet_m")[0]
    state = body.state_dict()
    assert "body.conv1.conv.weight" in state
    fitting = fitting_weights({prefix + name: value for name, value in state.items()}, body, "tresnet_m", "w.safetensors")
    assert fitting.keys() == state.keys()


def siglip(**settings):
    """A SigLIP of two narrow blocks under the name of a real one: its feature is an attention pooling's."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"global_pool": "map", "class_token": False, "num_classes": 0, **settings}
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, **settings)


@pytest.mark.parametrize("name", ["efficientvim_m1_dist", "legacy_seresnet18", "levit_128s", "test_vit"])
def test_the_state_dict_of_a_whole_timm_model_is_taken_without_its_classifiers(tmp_path, name):
    import timm

    state = timm.create_model(name).state_dict()
    write_tensors(tmp_path / "whole.safetensors", state)
    body = load_backbone(name, tmp_path / "whole.safetensors").body
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items()) and len(state) > len(body.state_dict())
    write_tensors(tmp_path / "other.safetensors", {**state, "heads.of.another": torch.zeros(2), "neck.bias": torch.zeros(2)})
    with pytest.raises(UsageError, match="heads.of.another, which it has not .2 such of"):
        check_backbone(name, tmp_path / "other.safetensors")


def test_the_weights_of_a_pooling_that_was_replaced_are_left_out(tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda name, **settings: siglip())
    name = "vit_base_patch16_siglip_224"
    state = siglip().state_dict()
    write_tensors(tmp_path / "w.safetensors", {**state, "head.weight": torch.zeros(10, 48)})
    body = load_backbone(name, tmp_path / "w.safetensors", pooling="mean").body
    assert body.attn_pool is None and torch.equal(body.state_dict()["norm.weight"], state["norm.weight"])
    write_tensors(tmp_path / "other.safetensors", {**state, "attn_pool.scale": torch.zeros(2)})
    with pytest.raises(UsageError, match="attn_pool.scale, which it has not .1 such of"):
        load_backbone(name, tmp_path / "other.safetensors", pooling="mean")
    del state["attn_pool.latent"]
    write_tensors(tmp_path / "less.safetensors", state)
    with pytest.raises(UsageError, match="no attn_pool.latent"):
        load_backbone(name, tmp_path / "less.safetensors")


def test_an_unknown_backbone_is_refused_with_near_names():
    with pytest.raises(UsageError, match="resnet_18_cifr.*resnet"):
        Backbone("resnet_18_cifr")
    with pytest.raises(UsageError, match=r"got test_vit\.mine; .*'test_vit\.r160_in1k'"):
        Backbone("test_vit.mine")


def test_timm_models_get_their_own_size_mean_and_deviation(pictures):
    with torch.random.fork_rng():
        model = Backbone("test_resnet.r160_in1k").eval()
    mean, std = (torch.tensor(model.body.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    images = pictures.images[:2]
    resized = F.interpolate(to_unit(images), size=(model.input_size,) * 2, mode="bicubic", align_corners=False, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(model(to_unit(images)), model.body((resized / 2 + 0.5 - mean) / std), atol=1e-4, rtol=1e-3)
    assert model.feature_size == model.body.num_features and model.input_size == 160


def test_the_cifar_resnet_keeps_the_resolution():
    with torch.random.fork_rng():
        model = Backbone("resnet18_cifar").eval()
    assert isinstance(model.body.maxpool, nn.Identity) and model.body.conv1.stride == (1, 1)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 512)


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone("test_vit", input_size=32).eval()


@pytest.mark.parametrize("pooling", ["own", "cls", "mean"])
def test_the_feature_is_the_token_asked_for(pictures, vit, pooling):
    model = Backbone("test_vit", input_size=32, pooling=pooling).eval()
    model.load_state_dict(vit.state_dict())
    with torch.no_grad():
        tokens = model.body.forward_features(model.frozen_part(to_unit(pictures.images)))
        expected = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]
        torch.testing.assert_close(model(to_unit(pictures.images)), expected)


@pytest.mark.parametrize("kind", ["Beit", "Eva"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_relatives_of_the_plain_transformer_give_the_token_too(generator, kind, pooling):
    import timm

    settings = {"img_size": 32, "patch_size": 16, "num_classes": 0, "embed_dim": 64, "depth": 1, "num_heads": 2}
    with torch.random.fork_rng():
        body = getattr(timm.models, kind.lower()).__dict__[kind](**settings).eval()
    set_pooling(kind, body, pooling)
    tokens = torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            body.forward_head(tokens), body.fc_norm(tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0])
        )


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("small_cnn", "mean"),
        ("test_resnet", "cls"),
        ("test_efficientnet", "cls"),
        ("test_efficientnet", "mean"),  # which has blocks, but no tokens
        ("deit_tiny_distilled_patch16_224", "cls"),  # whose head averages the class token with the distillation token
        ("deit_tiny_distilled_patch16_224", "mean"),
    ],
)
def test_a_pooling_the_model_does_not_have_is_refused(name, pooling):
    with pytest.raises(UsageError, match=f"detector.pooling: got {pooling}"):
        check_backbone(name, pooling=pooling)


@pytest.mark.parametrize(
    ("name", "side", "reason"),
    [
        ("test_vit", 37, "divisible by patch size"),
        ("test_vit", 8, "greater than 0"),
        ("test_convnext", 16, "[Kk]ernel size"),
        ("small_cnn", 2, "too small"),
    ],
)
def test_an_input_size_the_model_cannot_take_is_refused(name, side, reason):
    with pytest.raises(UsageError, match=f"detector.input_size: got {side}; expected a size {name} can take: .*{reason}"):
        check_backbone(name, input_size=side)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18_cifar", "vit_gigantic_patch14_224"])
def test_a_network_that_timm_has_no_weights_for_is_refused_before_a_run(name):
    for attempt in (check_backbone, load_backbone):
        if attempt is check_backbone or name == "small_cnn":  # nothing so large is built, nor anything downloaded
            with pytest.raises(UsageError, match=f"weights: got hub; expected a safetensors file for {name}"):
                attempt(name, "hub")
    check_backbone("test_vit", "hub")


def test_weights_of_the_own_size_are_taken_to_another_one(tmp_path, pictures):
    with torch.random.fork_rng():
        model = Backbone("test_vit")
    write_tensors(tmp_path / "w.safetensors", {**model.body.state_dict(), "head.weight": torch.zeros(5, 64)})
    check_backbone("test_vit", tmp_path / "w.safetensors", input_size=64)
    loaded = load_backbone("test_vit", tmp_path / "w.safetensors", input_size=64).eval()
    assert loaded.input_size == 64 and loaded.body.pos_embed.shape == (1, 1 + 16, 64)
    assert torch.equal(loaded.body.pos_embed[:, 0], model.body.pos_embed[:, 0])  # the class token has no place
    same = load_backbone("test_vit", tmp_path / "w.safetensors", input_size=160)
    assert torch.equal(same.body.pos_embed, model.body.pos_embed)
    with torch.no_grad():
        assert loaded(to_unit(pictures.images[:1])).shape == (1, 64)


@pytest.mark.parametrize("blocks", [0, 1, 4, 5, "all"])
def test_the_two_halves_are_the_whole(pictures, vit, blocks):
    model = Backbone("test_vit", input_size=32)
    model.load_state_dict(vit.state_dict())
    model.freeze(blocks)
    model.train()
    assert model.has_frozen_part == (blocks != 0) and model.body.training == (blocks != "all")
    with torch.no_grad():
        half = model.frozen_part(to_unit(pictures.images))
        found = model.trained_part(half)
        torch.testing.assert_close(found, vit(to_unit(pictures.images)), atol=1e-5, rtol=1e-4)
    assert half.shape == {0: (12, 3, 32, 32), "all": (12, 64)}.get(blocks, (12, 5, 64))
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and name.startswith("body.blocks")}
    assert trained == {str(block) for block in range(0 if blocks == "all" else blocks, 0 if blocks == "all" else 6)}


@pytest.mark.parametrize(("name", "most"), [("small_cnn", 1), ("test_vit", 5), ("resnet18_cifar", 7)])
def test_no_more_blocks_than_there_are(name, most):
    check_backbone(name, frozen_blocks=most)
    check_backbone(name, frozen_blocks="all")
    with pytest.raises(UsageError, match=f"detector.frozen_blocks: got {most + 1}; expected below {most + 1} for {name}, or all"):
        check_backbone(name, frozen_blocks=most + 1)


def test_frozen_norms_keep_their_statistics(pictures):
    with torch.random.fork_rng():
        model = Backbone("resnet18_cifar")
    model.freeze(2)
    model.train()
    before = {name: value.clone() for name, value in model.body.state_dict().items()}
    model(to_unit(pictures.images[:4]))
    changed = {name for name, value in model.body.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("layer2", "layer3", "layer4")) for name in changed)
    assert not model.has_frozen_part  # timm's ResNets are not split


def test_checking_a_backbone_reads_no_more_than_the_file(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"conv1.weight": torch.zeros(2, 2)})
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match="weights .*w.safetensors: got no bn1.bias .*expected every tensor of resnet18_cifar"):
        check_backbone("resnet18_cifar", tmp_path / "w.safetensors")
    check_backbone("vit_base_patch16_224", frozen_blocks=6)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_by_layer_of_a_network_whose_layers_timm_does_not_tell_are_refused_before_a_run():
    check_backbone("poolformer_s12")
    with pytest.raises(UsageError, match="backbone: got poolformer_s12; .*; set frozen_blocks 0 and layer_decay 1"):
        check_backbone("poolformer_s12", layer_decay=0.9)


def test_weights_of_the_hub(monkeypatch):
    import timm

    made = timm.create_model("test_resnet.r160_in1k", num_classes=0)
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: asked.append((name, settings)) or made)
    assert load_backbone("test_resnet.r160_in1k", "hub").body is made
    assert asked == [("test_resnet.r160_in1k", {"pretrained": True, "num_classes": 0})]
    with pytest.raises(UsageError, match="weights: got hub; expected a safetensors file for small_cnn"):
        load_backbone("small_cnn", "hub")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    import timm

    def offline(name, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RunError, match="weights of test_resnet from the hub: got ConnectionError: no route"):
        load_backbone("test_resnet", "hub")
