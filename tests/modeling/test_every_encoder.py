"""Every encoder's classifier: outputs, gradients, loading, sharding, precision, compilation."""

import functools
from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload
from helpers.tiny_models import ENCODERS as ALL_ENCODERS
from helpers.tiny_models import tiny_classifier
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

# A dartified model holds an encoder of transformers, see test_modeling_dartified.
ENCODERS = {name: settings for name, settings in ALL_ENCODERS.items() if name != "dartified"}
LABELS = tuple("abcde")
SIDE = 32
# A ViT's classifier runs its last layer for the class token only, so two layers are needed.
LAYERS = {"dart": {"num_hidden_layers": 2}, "dart_vim": {"num_hidden_layers": 2}, "dart_rmt": {"drop_path_rate": 0.0}}
# Deep enough that some layers can be on disk and others in memory.
DEEP = {"dart": {"num_hidden_layers": 8}, "dart_vim": {"num_hidden_layers": 8}, "dart_rmt": {"depths": [1, 8]}}
# The scorers without a trunk go through the tests of one model each.
MODELS = [
    *((model_type, {}) for model_type in ENCODERS),
    ("dart", {"scorer": "detail"}),
    *((model_type, {"scorer": "encoder", "scorer_layers": 1}) for model_type in ENCODERS),
]
PARTITIONS = [("dart", "flow"), ("dart", "grid"), ("dart_vim", "flow"), ("dart_vim", "grid"), ("dart_rmt", "grid")]


def pixels(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).to(dtype)


BATCH = {"pixel_values": pixels(4), "labels": torch.tensor([0, 1, 2, 3])}


@pytest.fixture(params=ENCODERS)
def model_type(request) -> str:
    return request.param


@pytest.fixture(params=MODELS, ids=lambda entry: "-".join(map(str, (entry[0], *entry[1].values()))))
def model(request) -> RegionPreTrainedModel:
    model_type, settings = request.param
    return make_model(model_type, **settings)


def make_model(model_type: str, **settings) -> RegionPreTrainedModel:
    """A tiny classifier whose running statistics of scores are not the initial ones."""
    settings = {**LAYERS[model_type], "score_normalization": "running", **settings}
    # With 16 regions an RMT's last map has four positions. On a single one queries and keys would have no effect.
    model = tiny_classifier(LABELS, model_type, num_patches=16, **settings)
    with torch.no_grad():
        model.scorer.statistics.train()(torch.randn(4, 4, 4), "running")
    return model.eval()


def layers(model: RegionPreTrainedModel) -> dict[str, GradientCheckpointingLayer]:
    found = {name: part for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)}
    assert found
    return found


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """A process group of this process only."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("other", ENCODERS)
def test_a_configuration_of_another_encoder_is_refused(model_type, other):
    model_class = type(tiny_classifier(LABELS, model_type))
    config = AutoConfig.for_model(other, **ENCODERS[other], scorer="conv")
    if other == model_type:
        assert model_class(config).config is config
        return
    with pytest.raises(ValueError, match=f"takes a {model_class.config_class.__name__}, got a {type(config).__name__}"):
        model_class(config)


@torch.no_grad()
def test_outputs(model):
    out = model(**BATCH)
    assert out.logits.shape == (4, 5)
    assert out.regions is None and out.hidden_states is None
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, BATCH["labels"]))
    pooled = model.base_model(BATCH["pixel_values"]).pooler_output
    torch.testing.assert_close(model.classifier(pooled), out.logits, rtol=1e-4, atol=1e-4)

    regions = model(**BATCH, num_patches=4, output_regions=True).regions
    assert (regions.scores.shape, regions.row_edges.shape, regions.strip_edges.shape) == ((4, 4, 4), (4, 3), (4, 5))
    assert (regions.row_edges[:, -1] == SIDE).all() and (regions.strip_edges[:, -1] == 2 * SIDE).all()


def test_building_a_model_with_a_dead_scorer_warns_once(model_type, warnings_of, tmp_path):
    config = AutoConfig.for_model(model_type, **ENCODERS[model_type], scorer="mobilenet_v3_small")
    model = AutoModelForImageClassification.from_config(config)
    assert sum("The scorer is dead: its trunk 'mobilenet_v3_small'" in text for text in warnings_of()) == 1
    type(model)(config)
    type(model.base_model)(config)
    assert sum("The scorer is dead" in text for text in warnings_of()) == 3
    model.scorer.trunk_loaded.fill_(1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not loaded.scorer.is_dead
    for settings in ({"scorer": "conv"}, {"scorer_frozen": False}, {"partition": "uniform"}):
        AutoModelForImageClassification.from_config(
            AutoConfig.for_model(model_type, **{**ENCODERS[model_type], "scorer": "mobilenet_v3_small", **settings})
        )
    with torch.device("meta"):
        type(model)(config)
    assert sum("The scorer is dead" in text for text in warnings_of()) == 3


def test_class_token_only_does_not_change_the_logits(model):
    """It is an argument of `DartModel`, and every classifier passes it on."""
    with torch.no_grad():
        expected = model(pixels()).logits
        for given in (True, False):
            found = model(**{**BATCH, "pixel_values": pixels(4)}, class_token_only=given)
            torch.testing.assert_close(found.logits[:3], expected, rtol=1e-4, atol=1e-4)
            assert found.loss.isfinite()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize(("model_type", "partition"), PARTITIONS)
def test_logits_are_the_same_alone_and_in_a_batch(model_type, partition, dtype, tolerance):
    images = pixels(7, dtype)
    model = make_model(model_type, partition=partition).to(dtype)
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    assert together.std(dim=0).min() > 0
    assert (alone - together).abs().max() / together.abs().max() < tolerance


def gradients(model: RegionPreTrainedModel) -> list[torch.Tensor]:
    """They leave the statistics as they were: the scorer "encoder" looks through RMT's."""
    model.zero_grad()
    before = [buffer.clone() for buffer in model.buffers()]
    model(**BATCH).loss.backward()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_every_parameter_gets_the_same_gradient_with_and_without_checkpointing(model):
    calls = []
    for layer in layers(model).values():
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    expected, plainly = gradients(model.train()), len(calls)
    model.gradient_checkpointing_enable()
    for (name, _), plain, found in zip(model.named_parameters(), expected, gradients(model), strict=True):
        assert plain.isfinite().all() and plain.abs().sum() > 0, name
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * plainly + len(layers(model))


def test_save_and_load_is_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    for device_map in (None, "cpu"):
        loaded, info = AutoModelForImageClassification.from_pretrained(
            tmp_path, device_map=device_map, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits)
        assert loaded.scorer.statistics.num_batches_tracked == 1
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(pixels()).pooler_output, model.base_model(pixels()).pooler_output)


def test_inference_works_with_offloaded_weights(model):
    images = pixels(dtype=torch.float64)
    expected = model.double()(images).logits
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(images).logits, expected)


def test_inference_works_with_some_weights_on_disk(model_type, tmp_path):
    model, images = make_model(model_type, **DEEP[model_type]).double(), pixels(dtype=torch.float64)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model",
        dtype=torch.float64,
        device_map="auto",
        max_memory={"cpu": int(0.8 * model.get_memory_footprint())},
        offload_folder=tmp_path / "offloaded",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    # No layer is divided.
    inside = tuple(f"{name}." for name in layers(model))
    assert not [name for name in loaded.hf_device_map if name.startswith(inside)]
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def fsdp_units(model: RegionPreTrainedModel) -> list[torch.nn.Module]:
    """The modules that FSDP gathers at once; every kind that the model names exists."""
    found = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert {type(unit).__name__ for unit in found} == set(model._no_split_modules)
    return found


def test_a_half_precision_model_trains_under_fsdp_1(model, process_group):
    """FSDP requires one precision in a unit. The scorer's differs from that of the modules around it."""
    model.train().bfloat16()
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=set(map(type, fsdp_units(model))))
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    loss = sharded(**BATCH).loss
    loss.backward()
    assert loss.isfinite()


def test_trains_under_fsdp_2(model, process_group):
    """FSDP 2 frees a unit's weights as soon as the unit has run."""
    expected = gradients(model.train())
    # Inner modules come first.
    for module in [*reversed(fsdp_units(model)), model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    loss = model(**BATCH).loss
    loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("dart", "sdpa"), ("dart_vim", None), ("dart_rmt", "sdpa"), ("dart_rmt", "eager")],
)
def test_half_precision_keeps_the_regions(model_type, implementation, dtype, noise, mode, tmp_path):
    model = make_model(model_type, initializer_range=0.1, attn_implementation=implementation)
    expected = model(pixels(), output_regions=True)
    if mode == "weights":
        model.save_pretrained(tmp_path)
        model = AutoModelForImageClassification.from_pretrained(
            tmp_path, dtype=dtype, attn_implementation=implementation
        )
        assert model.classifier.weight.dtype == dtype
        assert {parameter.dtype for parameter in model.scorer.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        found = model(pixels(), output_regions=True)
    assert torch.equal(found.regions.row_edges, expected.regions.row_edges)
    assert torch.equal(found.regions.strip_edges, expected.regions.strip_edges)
    assert found.logits.dtype == dtype
    assert 0 < (found.logits - expected.logits).abs().max() / expected.logits.abs().max() < noise


@pytest.mark.parametrize("scorer", ["conv", "mobilenet_v3_small", "detail", "encoder"])
@pytest.mark.parametrize("normalization", ["running", "image", "batch"])
@pytest.mark.parametrize(("model_type", "partition"), [*PARTITIONS, ("dart", "uniform"), ("dart_rmt", "uniform")])
def test_no_value_is_read_on_the_host(model_type, partition, normalization, scorer):
    """On `meta` tensors, code that reads a value, or makes a tensor on the host, fails."""
    settings = {"partition": partition, "score_normalization": normalization, "scorer": scorer}
    with torch.device("meta"):
        model = make_model(model_type, **settings)
        images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    for training in (True, False):
        out = model.train(training)(images, labels=labels, output_regions=True)
        out.loss.backward()
        assert out.logits.is_meta and out.regions.strip_edges.is_meta
        assert all(parameter.grad.is_meta for layer in layers(model).values() for parameter in layer.parameters())


def test_compiles_as_one_graph_forward_and_backward(model):
    torch.compiler.reset()
    batch = {**BATCH, "pixel_values": BATCH["pixel_values"].double()}
    model.double()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(**batch)
        out.loss.backward()
        results.append((out.logits, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_an_eager_call_causes_no_new_compilation(model):
    """A compiled model does not depend on what an eager call remembers, such as that it has warned."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(pixels())
    graphs = counter.frame_count
    model(pixels())
    compiled(pixels())
    assert counter.frame_count == graphs > 0


def test_exports_for_any_number_of_images(model):
    program = torch.export.export(
        model,
        (pixels(),),
        {"num_patches": 9},
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}, "num_patches": None},
    ).module()
    for count in (2, 5):
        found = program(pixels(count), num_patches=9).logits
        torch.testing.assert_close(found, model(pixels(count), num_patches=9).logits, rtol=1e-4, atol=1e-4)
