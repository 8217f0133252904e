"""DART with a ViT: settings, attention, freezing, loading, class token, compilation, distillation."""

import copy

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import dart_hf
from dart_hf import DartForImageClassification, DartModel
from dart_hf.modeling.scorer_trunk import build_trunk


def make_model(**settings) -> DartForImageClassification:
    """A tiny classifier with weights of order one, so that the tokens affect the logits."""
    defaults = {"num_hidden_layers": 2, "score_normalization": "running", "initializer_range": 0.2}
    return tiny_classifier("abcde", **{**defaults, **settings})


def pixels(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 32, 40, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_changed_settings_take_effect_in_the_next_call():
    model = make_model()
    flow = model(pixels(), output_regions=True)
    model.config.partition = "uniform"
    uniform = model(pixels(), output_regions=True)
    assert (uniform.regions.scores == 1).all()
    assert not torch.allclose(flow.logits, uniform.logits)
    model.config.num_patches = 4
    assert model(pixels(), output_regions=True).regions.strip_edges.shape == (3, 5)


def test_a_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match=r"one entry per image, got shape \(2,\) for 3 images"):
        make_model()(pixels(), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    model = make_model()
    expected = model(pixels()).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(pixels()).logits, expected, rtol=1e-4, atol=1e-4)


def test_under_the_published_rule_logits_depend_on_the_batch():
    model = make_model(score_normalization="batch").double()
    images = pixels(2, torch.float64)
    assert (model(images).logits[0] - model(images[:1]).logits[0]).abs().max() > 1e-3


class RandomImages(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels(16)[index], "labels": torch.tensor(index % 4)}


def make_trainer(folder, model, **settings) -> Trainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    return Trainer(model, arguments, train_dataset=RandomImages())


def frozen_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.scorer.trunk.state_dict().items()}


def assert_frozen(model, state) -> None:
    assert not any(parameter.requires_grad for parameter in model.scorer.trunk.parameters())
    assert not any(module.training for module in model.scorer.trunk.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.scorer.trunk.state_dict().items())


def test_a_frozen_trunk_stays_frozen_through_loading_training_and_resuming(tmp_path):
    model = make_model(scorer="mobilenet_v3_small", scorer_frozen=True)
    model.scorer.trunk_loaded.fill_(True)
    state = frozen_state(model)
    assert_frozen(model.train(), state)
    model.save_pretrained(tmp_path / "saved")
    assert_frozen(DartModel.from_pretrained(tmp_path / "saved").train(), state)
    for steps in (2, 4):
        loaded = DartForImageClassification.from_pretrained(tmp_path / "saved")
        assert_frozen(loaded.train(), state)
        before = loaded.classifier.weight.clone()
        trainer = make_trainer(tmp_path / "run", loaded, max_steps=steps, save_steps=2, learning_rate=1e-2)
        trainer.train(resume_from_checkpoint=steps == 4)
        assert_frozen(loaded, state)
        assert not torch.equal(loaded.classifier.weight, before)


def test_freeze_scorer_freezes_and_unfreezes_the_trunk():
    model = make_model().train()
    assert model.scorer.trunk.training
    model.freeze_scorer()
    assert_frozen(model, frozen_state(model))
    assert model.config.scorer_frozen
    model.freeze_scorer(False)
    assert model.scorer.trunk.training and all(p.requires_grad for p in model.scorer.trunk.parameters())


def test_a_frozen_scorer_without_weights_is_refused_until_it_gets_them(tmp_path):
    def load(**settings) -> DartForImageClassification:
        return DartForImageClassification.from_pretrained(tmp_path, **settings)

    model = make_model(scorer="mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"The scorer is dead: its trunk 'mobilenet_v3_small' is frozen"):
        model.require_scorer_weights()
    # A checkpoint records that its trunk never got weights.
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The scorer is dead"):
        load().require_scorer_weights()
    torch.save(model.scorer.trunk.state_dict(), tmp_path / "trunk.pth")
    model.load_pretrained_scorer(tmp_path / "trunk.pth")
    model.require_scorer_weights()
    model.save_pretrained(tmp_path)
    load().require_scorer_weights()
    # Another trunk finds only some of its weights in the checkpoint.
    with pytest.raises(ValueError, match="The scorer is dead"):
        load(scorer="mobilenet_v3_large", ignore_mismatched_sizes=True).require_scorer_weights()
    make_model(scorer="mobilenet_v3_small", partition="uniform").require_scorer_weights()


@pytest.mark.parametrize("scorer", ["mobilenet_v3_small", "conv", "timm/resnet10t"])
def test_a_new_trunk_has_its_librarys_initial_weights(scorer):
    config = make_model(scorer=scorer).config
    torch.manual_seed(5)
    expected, _ = build_trunk(config)
    torch.manual_seed(5)
    model = DartModel(config)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.scorer.trunk.state_dict()[name], value), name


def test_trunk_weights_missing_from_a_checkpoint_are_initialised_by_the_library(tmp_path):
    model = make_model(scorer="mobilenet_v3_small")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = "dart.tokenizer.scorer.trunk.1.block.0.0.weight"
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = DartForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) == (name != dropped)
    # Kaiming initialisation over 9·16 outgoing connections, not transformers' 0.02.
    assert loaded.state_dict()[dropped].std() > 0.05


def test_a_model_built_in_half_precision_computes_its_regions_in_float32():
    """Half-precision numbers above 2,048 cannot distinguish neighbouring columns of the strip."""
    config = make_model(scorer="mobilenet_v3_small", image_size=224, num_patches=196).config
    model = DartForImageClassification._from_config(config, dtype=torch.bfloat16).eval()
    outputs = model(torch.randn(1, 3, 224, 224), output_regions=True)
    assert model.classifier.weight.dtype == outputs.logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.scorer.parameters()} == {torch.float32}
    assert {value.dtype for value in outputs.regions.values()} == {torch.float32}
    # FSDP's mixed precision converts the parameters without the module's knowledge.
    for parameter in model.scorer.parameters():
        parameter.data = parameter.data.bfloat16()
    outputs = model(torch.randn(1, 3, 224, 224), output_regions=True)
    assert {value.dtype for value in outputs.regions.values()} == {torch.float32}
    assert (outputs.regions.strip_edges.diff(dim=1) >= 0).all()


def test_the_classifier_runs_the_last_layer_for_the_class_token_only():
    """Logits and gradients are the same as with all tokens."""
    model = make_model().double()
    batch = {"pixel_values": pixels(4, torch.float64), "labels": torch.arange(4)}
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


@pytest.mark.parametrize("given_as", ["argument", "setting"])
def test_requested_hidden_states_and_attentions_have_all_tokens(given_as):
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model = make_model(attn_implementation="eager", **(wanted if given_as == "setting" else {}))
    outputs = model(pixels(), **(wanted if given_as == "argument" else {}))
    assert [state.shape for state in outputs.hidden_states] == [(3, 10, 32)] * 3
    assert [attention.shape for attention in outputs.attentions] == [(3, 2, 10, 10)] * 2


@pytest.mark.parametrize("num_hidden_layers", [1, 2])
@pytest.mark.parametrize("distilled", [False, True])
def test_class_token_only_gives_the_same_class_token(num_hidden_layers, distilled):
    model = make_model(num_hidden_layers=num_hidden_layers, distillation_token=distilled).dart
    all_tokens, alone = model(pixels()), model(pixels(), class_token_only=True)
    assert torch.equal(all_tokens.pooler_output, all_tokens.last_hidden_state[:, 0])
    torch.testing.assert_close(all_tokens.pooler_output.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.pooler_output, all_tokens.pooler_output)
    expected = all_tokens.last_hidden_state[:, : 1 + distilled]
    torch.testing.assert_close(alone.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


DISTILLED = {"distillation_token": True, "distillation_head": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "grid", "score_normalization": "image"},
        {"partition": "flow", "score_normalization": "batch"},
        {"partition": "uniform", "score_normalization": "running"},
        DISTILLED,
    ],
)
def test_every_setting_compiles_as_one_graph(settings):
    torch.compiler.reset()
    model = make_model(**settings).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = compiled(pixels()).logits, model(pixels()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.sum().backward()
    assert compiled.dart.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_graph_has_no_tensor_on_the_host(training):
    """CUDA graphs cannot contain operations on the host. Here `meta` is the device."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = make_model(scorer="mobilenet_v3_small").train(training)
        images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    devices = set()

    def collect_devices(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    devices.add(tensor.device.type)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=collect_devices)(images, labels=labels)
    assert devices == {"meta"}


@pytest.mark.parametrize("rate", ["drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_and_stochastic_depth_act_in_training_only(rate):
    model = make_model(**{rate: 0.5, "scorer_frozen": True, "score_normalization": "image"})
    rates = [layer.drop_path.drop_prob for layer in model.dart.layers]
    assert rates == ([0.0, 0.5] if rate == "drop_path_rate" else [0.0, 0.0])
    images = pixels(8)
    assert torch.equal(model(images).logits, model(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)


def test_public_names_exist():
    for name in dart_hf.__all__:
        assert hasattr(dart_hf, name)


def test_loading_keeps_computed_buffers_of_a_trunk(tmp_path):
    model = make_model(scorer="timm/swin_tiny_patch4_window7_224", image_size=56)
    model.save_pretrained(tmp_path)
    loaded = DartForImageClassification.from_pretrained(tmp_path)
    expected, found = dict(model.scorer.trunk.named_buffers()), dict(loaded.scorer.trunk.named_buffers())
    assert any("relative_position_index" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("training", [True, False])
def test_a_distilled_model_averages_the_logits_of_its_two_tokens(training):
    model, labels = make_model(**DISTILLED, score_normalization="image").train(training), torch.tensor([0, 1, 4])
    hidden = model.dart(pixels()).last_hidden_state
    out = model(pixels(), labels=labels)
    assert hidden.shape == (3, 1 + 1 + 9, 32)
    torch.testing.assert_close(out.cls_logits, model.classifier(hidden[:, 0]))
    torch.testing.assert_close(out.distillation_logits, model.distillation_classifier(hidden[:, 1]))
    assert not torch.allclose(out.cls_logits, out.distillation_logits, atol=1e-2)
    torch.testing.assert_close(out.logits, (out.cls_logits + out.distillation_logits) / 2)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


def test_the_distillation_token_gets_no_position():
    model, plain = make_model(**DISTILLED), make_model()
    tokens, class_position = torch.randn(2, 9, 32), torch.randn(1, 1, 32)
    token = model.dart.distillation_token
    assert token.std() > 0
    plain.dart.load_state_dict(model.dart.state_dict(), strict=False)
    found = model.dart.encode(tokens, class_position).last_hidden_state
    expected = plain.dart.encode(torch.cat([token.expand(2, -1, -1), tokens], dim=1), class_position)
    torch.testing.assert_close(found, expected.last_hidden_state)
    assert model.dart.tokenizer.position_embeddings.shape == plain.dart.tokenizer.position_embeddings.shape


def test_a_distillation_token_works_without_a_head():
    model = make_model(distillation_token=True)
    out = model(pixels())
    assert model.distillation_classifier is None and out.cls_logits is None and out.distillation_logits is None
    torch.testing.assert_close(out.logits, model.classifier(model.dart(pixels()).pooler_output))


def test_a_distilled_model_loads_with_the_same_or_another_number_of_labels(tmp_path):
    model = make_model(**DISTILLED)
    model.save_pretrained(tmp_path)
    loaded = DartForImageClassification.from_pretrained(tmp_path).eval()
    # Loaded weights can lie differently in memory, which changes the last bits of a product.
    torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes"):
        DartForImageClassification.from_pretrained(tmp_path, num_labels=7)
    fresh = DartForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert fresh(pixels()).logits.shape == fresh(pixels()).distillation_logits.shape == (3, 3)


class WithRegionsForImageClassification(DartForImageClassification):
    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values, labels, output_regions=True)


@pytest.mark.parametrize("model_class", [DartForImageClassification, WithRegionsForImageClassification])
def test_predictions_of_the_trainer_are_the_logits_only(tmp_path, model_class):
    trainer = make_trainer(tmp_path, model_class(make_model(**DISTILLED).config))
    assert trainer.predict(RandomImages()).predictions.shape == (16, 5)
