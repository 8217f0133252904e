"""The models: outputs, independence of the batch, training, loading, compilation, half precision."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

import dart_hf
from dart_hf import DartConfig, DartForImageClassification, DartModel


def make_config(**settings) -> DartConfig:
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
        "image_size": 32,
        "num_patches": 9,
        "scorer": "conv",
        "num_labels": 5,
    }
    return DartConfig(**{**defaults, **settings})


def make_model(**settings) -> DartForImageClassification:
    torch.manual_seed(0)
    model = DartForImageClassification(make_config(**settings))
    # Weights of order one, so that the tokens matter for the logits.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model.eval()


def pixels(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 32, 40, generator=torch.Generator().manual_seed(3)).to(dtype)


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs():
    model = make_model()
    out = model(pixels(), labels=torch.tensor([0, 1, 4]), output_hidden_states=True)
    assert out.logits.shape == (3, 5)
    assert out.loss.ndim == 0
    assert out.regions is None
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 10, 32)] * 3
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 4])))

    out = model(pixels(), num_patches=20, output_regions=True)
    assert out.regions.scores.shape == (3, 14, 14)
    assert out.regions.row_edges.shape == (3, 5)
    assert out.regions.strip_edges.shape == (3, 21)
    assert out.regions.row_edges[0, -1] == 32 and out.regions.strip_edges[0, -1] == 4 * 40

    model.set_attn_implementation("eager")
    out = model(pixels(), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(3, 2, 10, 10)] * 2


def test_the_pooled_output_is_the_normalised_class_token():
    model = make_model().dart
    out = model(pixels())
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
    torch.testing.assert_close(out.pooler_output.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)


def test_live_settings_are_read_at_every_call():
    model = make_model()
    flow = model(pixels(), output_regions=True)
    model.config.partition = "uniform"
    uniform = model(pixels(), output_regions=True)
    assert (uniform.regions.scores == 1).all()
    assert not torch.allclose(flow.logits, uniform.logits)
    model.config.num_patches = 4
    assert model(pixels(), output_regions=True).regions.strip_edges.shape == (3, 5)


def test_labels_must_belong_to_the_images():
    with pytest.raises(ValueError, match=r"one entry per image, got shape \(2,\) for 3 images"):
        make_model()(pixels(), labels=torch.tensor([0, 1]))


def test_attention_implementations_agree():
    model = make_model()
    reference = model(pixels()).logits
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(pixels()).logits, reference, rtol=1e-4, atol=1e-4)


# --- an image's prediction does not depend on its neighbours ---------------------------------------------------------


def test_the_published_rule_does_depend_on_the_neighbours():
    model = make_model(score_normalization="batch").double()
    images = pixels(2, torch.float64)
    assert (model(images).logits[0] - model(images[:1]).logits[0]).abs().max() > 1e-3


def test_a_nan_image_changes_neither_its_neighbours_nor_the_statistics():
    model = make_model(scorer_frozen=True).train()
    model.dart.dropout.p = 0.0
    clean = pixels(3)
    spoiled = torch.cat([clean, torch.full_like(clean[:1], math.nan)])
    other = copy.deepcopy(model)
    expected, found = model(clean).logits, other(spoiled).logits
    torch.testing.assert_close(found[:3], expected, rtol=1e-5, atol=1e-5)
    for name, value in model.scorer.statistics.state_dict().items():
        torch.testing.assert_close(other.scorer.statistics.state_dict()[name], value)


# --- training --------------------------------------------------------------------------------------------------------


def bright_corner(count: int, seed: int) -> dict[str, torch.Tensor]:
    """A task for a few steps: which corner of a noisy image is bright."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = 24 * (label // 2), 24 * (label % 2)
        image[:, y : y + 8, x : x + 8] += 3
    return {"pixel_values": images, "labels": labels}


def test_training_lowers_the_loss_and_moves_the_scorer():
    torch.manual_seed(0)
    model = DartForImageClassification(make_config(num_labels=4)).train()
    scorer = {name: parameter.detach().clone() for name, parameter in model.scorer.named_parameters()}
    batch = bright_corner(32, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.scorer.named_parameters():
        assert not torch.equal(parameter, scorer[name]), name


class Corners(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.batch = bright_corner(16, seed=0)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


def train(folder, model, steps: int, resume: bool = False) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Corners())
    trainer.train(resume_from_checkpoint=resume)


def frozen_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.scorer.trunk.state_dict().items()}


def assert_frozen(model, state) -> None:
    assert not any(parameter.requires_grad for parameter in model.scorer.trunk.parameters())
    assert not any(module.training for module in model.scorer.trunk.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.scorer.trunk.state_dict().items())


def test_a_frozen_trunk_stays_frozen_through_loading_training_and_resuming(tmp_path):
    settings = {"scorer": "mobilenet_v3_small", "scorer_frozen": True, "num_labels": 4}
    model = make_model(**settings)
    model.scorer.trunk_loaded.fill_(True)
    state = frozen_state(model)
    model.train()
    assert_frozen(model, state)

    model.save_pretrained(tmp_path / "saved")
    for load in (DartForImageClassification, DartModel):
        loaded = load.from_pretrained(tmp_path / "saved")
        assert_frozen(loaded.train(), state)
    loaded, info = DartForImageClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_frozen(loaded.train(), state)

    before = loaded.classifier.weight.clone()
    train(tmp_path / "run", loaded, steps=2)
    assert_frozen(loaded, state)
    assert not torch.equal(loaded.classifier.weight, before)
    resumed = DartForImageClassification.from_pretrained(tmp_path / "saved")
    train(tmp_path / "run", resumed, steps=4, resume=True)
    assert_frozen(resumed, state)


def test_freeze_scorer_switches_a_live_model():
    model = make_model().train()
    assert model.scorer.trunk.training
    model.freeze_scorer()
    assert_frozen(model, frozen_state(model))
    assert model.config.scorer_frozen
    model.freeze_scorer(False)
    assert model.scorer.trunk.training and all(p.requires_grad for p in model.scorer.trunk.parameters())


def test_a_dead_scorer_is_refused_where_it_matters(tmp_path):
    model = make_model(scorer="mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"The scorer is dead: its trunk 'mobilenet_v3_small' is frozen"):
        model.require_scorer_weights()
    # A checkpoint remembers that its trunk never got weights.
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The scorer is dead"):
        DartForImageClassification.from_pretrained(tmp_path).require_scorer_weights()
    torch.save(model.scorer.trunk.state_dict(), tmp_path / "trunk.pth")
    model.load_pretrained_scorer(tmp_path / "trunk.pth")
    model.require_scorer_weights()
    model.save_pretrained(tmp_path)
    DartForImageClassification.from_pretrained(tmp_path).require_scorer_weights()
    dead = make_model(scorer="mobilenet_v3_small", partition="uniform")
    dead.require_scorer_weights()


# --- initialisation and loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["mobilenet_v3_small", "conv", "timm/resnet10t"])
def test_initialisation_leaves_the_trunk_as_its_library_makes_it(scorer):
    from dart_hf.modeling.scorer_trunk import build_trunk

    torch.manual_seed(5)
    expected, _ = build_trunk(make_config(scorer=scorer))
    torch.manual_seed(5)
    model = DartModel(make_config(scorer=scorer))
    for name, value in expected.state_dict().items():
        assert torch.equal(model.scorer.trunk.state_dict()[name], value), name


def test_a_checkpoint_without_its_trunk_gets_the_library_initialisation(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(scorer="mobilenet_v3_small")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = "dart.tokenizer.scorer.trunk.1.block.0.0.weight"
    save_file(
        {name: value for name, value in tensors.items() if name != dropped},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded = DartForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) == (name != dropped)
    # Kaiming initialisation over 9·16 outgoing connections, not transformers' 0.02.
    assert loaded.state_dict()[dropped].std() > 0.05


def test_another_number_of_labels(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes"):
        DartForImageClassification.from_pretrained(tmp_path, num_labels=7)
    loaded = DartForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded(pixels()).logits.shape == (3, 7)


def test_a_model_built_in_half_precision_cuts_in_float32():
    """Beyond 2,048 a half-precision number cannot tell one column of the strip from the next."""
    config = make_config(scorer="mobilenet_v3_small", image_size=224, num_patches=196)
    model = DartForImageClassification._from_config(config, dtype=torch.bfloat16).eval()
    outputs = model(torch.randn(1, 3, 224, 224), output_regions=True)
    assert model.classifier.weight.dtype == outputs.logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.scorer.parameters()} == {torch.float32}
    assert {value.dtype for value in outputs.regions.values()} == {torch.float32}
    # As FSDP's mixed precision does, behind the module's back.
    for parameter in model.scorer.parameters():
        parameter.data = parameter.data.bfloat16()
    outputs = model(torch.randn(1, 3, 224, 224), output_regions=True)
    assert {value.dtype for value in outputs.regions.values()} == {torch.float32}
    assert (outputs.regions.strip_edges.diff(dim=1) >= 0).all()


# --- the last layer --------------------------------------------------------------------------------------------------


def test_the_classifier_computes_the_last_layer_for_the_class_token_alone():
    """Same logits, same gradients, and no token but the first leaves the last layer."""
    model = make_model(num_labels=4).double()
    batch = {name: value.double() if name == "pixel_values" else value for name, value in bright_corner(4, 0).items()}
    shapes, results = [], []
    model.dart.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    for asked in ({}, {"output_hidden_states": True}):
        model.zero_grad()
        outputs = model(**batch, **asked)
        outputs.loss.backward()
        results.append([outputs.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert shapes == [1, 10]
    for alone, all_tokens in zip(*results, strict=True):
        torch.testing.assert_close(alone, all_tokens)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_whoever_asks_for_more_gets_every_token(asked, by):
    model = make_model(attn_implementation="eager")
    if by == "configuration":
        setattr(model.config, asked, True)
        outputs = model(pixels())
    else:
        outputs = model(pixels(), **{asked: True})
    if asked == "output_hidden_states":
        assert [state.shape for state in outputs.hidden_states] == [(3, 10, 32)] * 3
    else:
        assert [attention.shape for attention in outputs.attentions] == [(3, 2, 10, 10)] * 2


@pytest.mark.parametrize("num_hidden_layers", [1, 2])
def test_class_token_only(num_hidden_layers):
    model = make_model(num_hidden_layers=num_hidden_layers).dart
    everything, alone = model(pixels()), model(pixels(), class_token_only=True)
    torch.testing.assert_close(alone.pooler_output, everything.pooler_output)
    torch.testing.assert_close(alone.last_hidden_state, everything.last_hidden_state[:, :1])


# --- compilation and export ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "normalization"), [("grid", "image"), ("flow", "batch"), ("uniform", "running")])
def test_every_rule_compiles_as_one_graph(partition, normalization):
    torch.compiler.reset()
    model = make_model(partition=partition, score_normalization=normalization).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = compiled(pixels()).logits, model(pixels()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.sum().backward()
    assert compiled.dart.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize("scorer", ["conv", "mobilenet_v3_small"])
@pytest.mark.parametrize("normalization", ["running", "image", "batch"])
@pytest.mark.parametrize("partition", ["flow", "grid", "uniform"])
def test_nothing_waits_for_the_device(partition, normalization, scorer):
    """Tensors without memory: whatever would read a value on the host, or take a shape from one, fails."""
    with torch.device("meta"):
        config = make_config(partition=partition, score_normalization=normalization, scorer=scorer, image_size=64)
        model = DartForImageClassification(config)
        images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    for training in (True, False):
        outputs = model.train(training)(images, labels=labels, output_regions=True)
        outputs.loss.backward()
        assert outputs.regions.strip_edges.is_meta and model.dart.cls_token.grad.is_meta


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_whole_graph_is_on_the_device(training):
    """CUDA graphs cannot hold an operation on the host. `meta` stands for the device."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = DartForImageClassification(make_config(scorer="mobilenet_v3_small")).train(training)
        images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    devices = set()

    def look(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    devices.add(tensor.device.type)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=look)(images, labels=labels)
    assert devices == {"meta"}


def test_stochastic_depth_drops_in_training_only():
    model = make_model(drop_path_rate=0.5)
    rates = [layer.drop_path.drop_prob for layer in model.dart.layers]
    assert rates == [0.0, 0.5]
    images = pixels(8)
    assert torch.equal(model(images).logits, model(images).logits)
    model.freeze_scorer()
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)


def test_public_names():
    for name in dart_hf.__all__:
        assert hasattr(dart_hf, name)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_drops_in_training_only(rate):
    model = make_model(**{rate: 0.5, "scorer_frozen": True, "score_normalization": "image"})
    images = pixels()
    assert torch.equal(model(images).logits, model(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)


def test_regions_stay_out_of_the_trainers_predictions(tmp_path):
    class AsksForRegionsForImageClassification(DartForImageClassification):
        def forward(self, pixel_values, labels=None):
            return super().forward(pixel_values, labels, output_regions=True)

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    prediction = Trainer(AsksForRegionsForImageClassification(make_config(num_labels=4)), arguments).predict(Corners())
    assert prediction.predictions.shape == (16, 4)


@pytest.mark.slow
def test_attention_by_flex_attention():
    model = make_model()
    expected = model(pixels()).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_trunk_with_missing_weights_is_not_taken_for_loaded(tmp_path):
    model = make_model(scorer="mobilenet_v3_small")
    model.scorer.trunk_loaded.fill_(1)
    model.save_pretrained(tmp_path)
    DartForImageClassification.from_pretrained(tmp_path).require_scorer_weights()
    other = DartForImageClassification.from_pretrained(
        tmp_path, scorer="mobilenet_v3_large", ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="The scorer is dead"):
        other.require_scorer_weights()


def test_trunks_with_computed_buffers_survive_loading(tmp_path):
    model = make_model(scorer="timm/swin_tiny_patch4_window7_224", image_size=56)
    model.save_pretrained(tmp_path)
    loaded = DartForImageClassification.from_pretrained(tmp_path)
    expected, found = dict(model.scorer.trunk.named_buffers()), dict(loaded.scorer.trunk.named_buffers())
    assert any("relative_position_index" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# --- distillation token and head -------------------------------------------------------------------------------------


DISTILLED = {"distillation_token": True, "distillation_head": True}


def test_the_logits_of_a_distilled_model_are_the_mean_of_its_two_heads():
    model = make_model(**DISTILLED).train()
    labels = torch.tensor([0, 1, 4])
    for training in (True, False):
        out = model.train(training)(pixels(), labels=labels)
        assert not torch.allclose(out.cls_logits, out.distillation_logits, atol=1e-2)
        torch.testing.assert_close(out.logits, (out.cls_logits + out.distillation_logits) / 2)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    plain = make_model()(pixels())
    assert plain.cls_logits is None and plain.distillation_logits is None


def test_each_head_reads_its_own_token():
    model = make_model(**DISTILLED)
    hidden = model.dart(pixels()).last_hidden_state
    out = model(pixels())
    assert hidden.shape == (3, 1 + 1 + 9, 32)
    torch.testing.assert_close(out.cls_logits, model.classifier(hidden[:, 0]))
    torch.testing.assert_close(out.distillation_logits, model.distillation_classifier(hidden[:, 1]))
    prefix = model.dart(pixels(), class_token_only=True).last_hidden_state
    torch.testing.assert_close(prefix, hidden[:, :2], rtol=1e-4, atol=1e-5)


def test_the_distillation_token_is_one_more_token_without_a_position():
    model, plain = make_model(**DISTILLED), make_model()
    tokens, class_position = torch.randn(2, 9, 32), torch.randn(1, 1, 32)
    token = model.dart.distillation_token
    assert token.shape == (1, 1, 32) and token.std() > 0
    plain.dart.load_state_dict(model.dart.state_dict(), strict=False)
    found = model.dart.encode(tokens, class_position)
    expected = plain.dart.encode(torch.cat([token.expand(2, -1, -1), tokens], dim=1), class_position)
    torch.testing.assert_close(found, expected)
    assert model.dart.tokenizer.position_embeddings.shape == plain.dart.tokenizer.position_embeddings.shape


def test_a_distillation_token_may_have_no_head():
    model = make_model(distillation_token=True)
    out = model(pixels())
    assert model.distillation_classifier is None and out.distillation_logits is None
    torch.testing.assert_close(out.logits, model.classifier(model.dart(pixels()).pooler_output))
    with pytest.raises(ValueError, match="distillation_head=True needs distillation_token=True"):
        make_config(distillation_head=True)


def test_a_distilled_model_saves_and_loads(tmp_path):
    model = make_model(**DISTILLED)
    model.save_pretrained(tmp_path)
    loaded = DartForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)
    fresh = DartForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert fresh(pixels()).distillation_logits.shape == (3, 3)


def test_the_trainers_predictions_of_a_distilled_model_are_its_logits(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    model = DartForImageClassification(make_config(**DISTILLED, num_labels=4))
    assert Trainer(model, arguments).predict(Corners()).predictions.shape == (16, 4)


@pytest.mark.slow
def test_a_distilled_model_compiles_as_one_graph():
    torch.compiler.reset()
    model = make_model(**DISTILLED)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels()).logits, model(pixels()).logits, rtol=1e-3, atol=1e-3)
