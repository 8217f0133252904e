"""Conversion of the DART authors' checkpoints."""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageClassification
from typer.testing import CliRunner

from dart_hf import DartConfig, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.conversion import original
from dart_hf.conversion.original import VARIANTS, convert_checkpoint, convert_state_dict
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig

SCORER = "patch_embed.spn.spn.spn."
RMT_SCORER = "pre_image.spn.spn.spn."
EACH_ENCODER = pytest.mark.parametrize("variant", ["darvit-tiny", "darvim-tiny", "darmt-L6"])


def empty_weights(variant: str) -> dict[str, torch.Tensor]:
    """Make tensors of the right names and shapes that take no memory: zeros, except those that the settings fix."""
    return dict(_empty_weights(variant))


@functools.cache
def _empty_weights(variant: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(spec["value"])
        if "value" in spec
        else torch.zeros((), dtype=getattr(torch, spec["dtype"])).expand(spec["shape"])
        for name, spec in golden.manifest(variant)["tensors"].items()
    }


def save_checkpoint(path: Path, weights: dict[str, torch.Tensor], args_model: str | None = None, **content) -> Path:
    if args_model:
        content["args"] = argparse.Namespace(model=args_model)
    torch.save({"model": weights, **content}, path)
    return path


def check_refused(
    message: str, checkpoint: object, folder: Path, error: type[Exception] = ValueError, **options: object
) -> str:
    """Converting raises one sentence with `message`, and writes nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert_checkpoint(checkpoint, folder / "output", **options)
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(*parts: str) -> Callable[[dict], dict]:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


# --- what a converted checkpoint is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("darvit-tiny", DartConfig.preset("tiny")),
        ("darvim-tiny-ft2seq", DartVimConfig.preset("tiny", num_patches=392)),
        ("darvim-sm", DartVimConfig.preset("small")),
        ("darmt-L6", DartRmtConfig.preset("L6", first_strip_edge=2)),
    ],
)
def test_configuration_is_the_preset_with_published_normalisation_and_imagenet_labels(variant, published):
    weights = empty_weights(variant)
    config, state = convert_state_dict(weights, variant)
    model = VARIANTS[variant].encoder.model_class(config)
    model.load_state_dict(state)
    assert model.scorer.trunk_loaded.item() and not model.scorer.is_dead
    given = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert given.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in state.values())

    assert type(config) is type(published)
    differs = {"architectures", "dtype", "id2label", "label2id", "transformers_version"}
    expected = {**published.to_dict(), "score_normalization": "batch"}
    assert {k: v for k, v in config.to_dict().items() if k not in differs} == {
        k: v for k, v in expected.items() if k not in differs
    }
    assert config.num_labels == len(config.id2label) == len(config.label2id) == 1000
    assert config.id2label[0].startswith("tench") and config.id2label[999].startswith("toilet tissue")
    assert config.id2label[134].startswith("crane") and config.id2label[517].startswith("crane")
    assert all(config.label2id[label] == index for index, label in config.id2label.items())


def test_rmt_weights_are_converted_to_their_places():
    """The exactness tests of RMT, which cover this too, are slow."""
    places = {
        "stem.convolutions.2.conv.bias": "patch_embed.proj.6.bias",
        "stem.convolutions.3.norm.bias": "patch_embed.proj.10.bias",
        "stages.1.layers.3.layernorm_before.weight": "layers.1.blocks.3.retention_layer_norm.weight",
        "stages.1.layers.3.retention.k_proj.bias": "layers.1.blocks.3.retention.k_proj.bias",
        "stages.1.layers.3.retention.local_conv.bias": "layers.1.blocks.3.retention.lepe.conv.bias",
        "stages.1.layers.3.layernorm_after.weight": "layers.1.blocks.3.final_layer_norm.weight",
        "stages.1.layers.3.mlp.conv.bias": "layers.1.blocks.3.ffn.dwconv.conv.bias",
        "stages.2.layers.24.layer_scale2": "layers.2.blocks.24.gamma_2",
        "stages.1.downsample.norm.running_var": "layers.1.downsample.norm.running_var",
        "pooler.norm.bias": "norm.bias",
    }
    weights = empty_weights("darmt-L6")
    for value, source in enumerate(places.values(), start=1):
        weights[source] = torch.full((), float(value)).expand(weights[source].shape)
    _, state = convert_state_dict(weights, "darmt-L6")
    assert [state[f"dart_rmt.{name}"].unique().tolist() for name in places] == [[i + 1.0] for i in range(len(places))]


@EACH_ENCODER
def test_fine_tuned_number_of_labels_gets_no_imagenet_names(variant):
    weights = empty_weights(variant)
    features = weights["head.weight"].shape[1]
    weights |= {"head.weight": torch.ones(7, features), "head.bias": torch.ones(7)}
    config, state = convert_state_dict(weights, variant)
    assert (config.num_labels, config.id2label[0]) == (7, "LABEL_0")
    assert torch.equal(state["classifier.weight"], torch.ones(7, features))


# --- which variant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args_model", "variant", "num_patches"),
    [
        ("darvit-tiny", "darvit_tiny_121p", None, 121),
        ("darvit-tiny", "darvit_tiny", "darvit-tiny-ft121p", 121),
        ("darvit-tiny-ft121p", None, None, 121),
    ],
)
def test_variant_comes_from_the_argument_the_pickle_or_the_name(name, args_model, variant, num_patches, tmp_path):
    path = save_checkpoint(tmp_path / f"{name}.pth", empty_weights("darvit-tiny"), args_model)
    folder = convert_checkpoint(path, tmp_path / "output", variant)
    assert AutoConfig.from_pretrained(folder).num_patches == num_patches
    assert DartImageProcessor.from_pretrained(folder).crop_size["height"] == 448


@pytest.mark.parametrize(
    ("name", "args_model", "variant", "message"),
    [
        ("best_darvit-tiny", None, None, "variant: neither the content nor the name of"),
        ("darvit-tiny", "darvit_tiny_100p", None, "'darvit_tiny_100p', which is not a published model"),
        ("darvit-tiny", None, "darvit-huge", "'darvit-huge' is unknown"),
    ],
)
def test_variant_is_never_guessed(name, args_model, variant, message, tmp_path):
    path = save_checkpoint(tmp_path / f"{name}.pth", empty_weights("darvit-tiny"), args_model)
    message = check_refused(message, path, tmp_path, variant=variant)
    assert all(name in message for name in VARIANTS)


@pytest.mark.parametrize(
    ("file", "variant", "difference"),
    [
        ("darvit-tiny", "darvit-sm", "hidden_size=192.*'cls_token'.*instead of 384"),
        ("darvit-tiny", "darvit-tiny-v2", "scorer_head='v1'.*mlp.net.2.weight.*instead of 'v2'"),
        ("darvim-sm", "darvim-tiny-ft2seq", "time_step_rank=24.*'layers.0.mixer.dt_proj.weight'.*instead of 12"),
        ("darvim-tiny", "darvit-tiny", "a DART-.* model: its tensors are those of a DART-Vim"),
        ("darvit-tiny", "darvim-tiny", "a DART-.* model: its tensors are those of a DART-DeiT"),
        ("darmt-L6", "darvit-sm", "a DART-.* model: its tensors are those of a DART-RMT"),
    ],
)
def test_variant_that_contradicts_the_tensors_is_refused(file, variant, difference):
    with pytest.raises(ValueError, match=f"not '{variant}'.*{difference}"):
        convert_state_dict(empty_weights(file), variant)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (without(".gamma_"), r"layer_scale=\[False, False, False, False\].*instead of \[False, False, True, True\]"),
        (without("layers.2.blocks.24."), r"depths=\[4, 8, 24, 8\].*layers\.\*\.blocks.*instead of \[4, 8, 25, 8\]"),
        (without("layers.3."), r"hidden_sizes=\[112, 224, 448\].*instead of \[112, 224, 448, 640\]"),
        (
            lambda weights: {**weights, "layers.0.Relpos.decay": torch.ones(8)},
            r"num_attention_heads=\[8, 7, 14, 20\].*layers\.\*\.Relpos\.decay.*instead of",
        ),
        (
            lambda weights: {**weights, "layers.3.blocks.0.ffn.fc1.weight": torch.ones(2560, 640)},
            r"mlp_ratios=\[4, 4, 3, 4\].*layers\.\*\.blocks\.0\.ffn\.fc1\.weight.*instead of",
        ),
        (lambda weights: {**weights, "proj.weight": torch.ones(512, 640)}, "projection_size=512 .*instead of 1024"),
    ],
)
def test_rmt_with_other_settings_is_refused(changed, difference):
    with pytest.raises(ValueError, match=f"not 'darmt-L6': it has .*{difference}"):
        convert_state_dict(changed(empty_weights("darmt-L6")), "darmt-L6")


@pytest.mark.parametrize("name", ["layers.0.Relpos.decay", "layers.3.Relpos.decay", "layers.1.Relpos.angle"])
@pytest.mark.parametrize("changed", [lambda value: value * 1.001, lambda value: value.flip(0), lambda value: value / 0])
def test_rmt_with_other_relative_positions_is_refused(name, changed):
    weights = empty_weights("darmt-L6")
    with pytest.raises(ValueError, match=f"{name}.*decay_ranges=\\[6, 6, 6, 6\\].*other settings"):
        convert_state_dict({**weights, name: changed(weights[name])}, "darmt-L6")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "darmt-L6"])
def test_variants_have_the_settings_of_the_reference(variant):
    manifest, config = golden.manifest(variant), VARIANTS[variant].config()
    for setting in ("num_patches", "image_size", "scorer", "scorer_head"):
        assert getattr(config, setting) == manifest[setting]
    assert [1, 1, config.hidden_size] == manifest["tensors"]["cls_token"]["shape"]


def test_rmt_has_the_settings_of_the_reference():
    manifest, config = golden.manifest("darmt-L6"), VARIANTS["darmt-L6"].config()
    names = {
        **{name: name for name in ("image_size", "scorer", "scorer_head", "depths", "mlp_ratios")},
        **{name: name for name in ("drop_path_rate", "chunkwise", "layer_scale")},
        "hidden_sizes": "embed_dims",
        "num_attention_heads": "num_heads",
        "decay_starts": "init_values",
        "decay_ranges": "heads_ranges",
        "layer_scale_init_value": "layer_scale_init",
        "projection_size": "projection_dim",
    }
    assert {ours: getattr(config, ours) for ours in names} == {ours: manifest[name] for ours, name in names.items()}
    assert (config.partition, config.num_patches, config.first_strip_edge) == ("grid", 14 * 14, 2)


# --- missing, extra and wrongly shaped tensors ------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["missing", "renamed", "one more dimension", "another size"])
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("darvit-tiny", "cls_token"),
        ("darvit-tiny", "pos_embed"),
        ("darvit-tiny", f"{SCORER}features.4.block.1.0.weight"),
        ("darvit-tiny", f"{SCORER}features.0.1.num_batches_tracked"),
        ("darvit-tiny", f"{SCORER}mlp.net.2.weight"),
        ("darvit-tiny", "blocks.0.mlp.fc1.weight"),
        ("darvit-tiny", "blocks.11.attn.qkv.bias"),
        ("darvit-tiny", "head.weight"),
        ("darvit-tiny", "head.bias"),
        ("darvim-tiny", "layers.0.mixer.A_log"),
        ("darvim-tiny", "layers.0.mixer.conv1d.weight"),
        ("darvim-tiny", "layers.5.mixer.A_b_log"),
        ("darvim-tiny", "layers.5.mixer.D_b"),
        ("darvim-tiny", "layers.23.norm.weight"),
        ("darmt-L6", f"{RMT_SCORER}features.8.0.weight"),
        ("darmt-L6", "layers.0.Relpos.angle"),
        ("darmt-L6", "layers.1.blocks.7.ffn.dwconv.conv.bias"),
        ("darmt-L6", "layers.2.blocks.0.gamma_1"),
        ("darmt-L6", "proj.weight"),
    ],
)
def test_tensor_that_does_not_fit_is_named(variant, name, problem):
    weights = empty_weights(variant)
    value = weights[name]
    if problem == "missing":
        del weights[name]
    elif problem == "renamed":
        weights = {(f"{key}_2" if key == name else key): value for key, value in weights.items()}
    elif problem == "one more dimension":
        weights[name] = value[None]
    else:
        weights[name] = torch.cat([value, value[:1]]) if value.ndim else torch.zeros(2, dtype=value.dtype)
        if name == "head.weight":
            name = "head.bias"
    with pytest.raises(ValueError, match=rf"{re.escape(name)}\b") as caught:
        convert_state_dict(weights, variant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "changed", "message"),
    [
        ("darvit-tiny", without("blocks.11."), "num_hidden_layers=11.*instead of 12"),
        ("darvim-tiny", without("layers.23."), "num_hidden_layers=23.*instead of 24"),
        *(
            (
                variant,
                lambda weights: {name.replace(".block.", ".layer."): value for name, value in weights.items()},
                "none of the trunks mobilenet_v3_small",
            )
            for variant in ("darvit-tiny", "darmt-L6")
        ),
        *(
            (
                variant,
                lambda weights, prefix=prefix: {**weights, **{f"{prefix}_{i}": torch.ones(1) for i in range(5)}},
                rf"unexpected {prefix}_0, .* and 2 more",
            )
            for variant, prefix in [
                ("darvit-tiny", "blocks.3.extra"),
                ("darvim-tiny", "layers.3.mixer.extra"),
                ("darmt-L6", "layers.3.blocks.7.extra"),
            ]
        ),
        ("darmt-L6", lambda weights: {**weights, "layers.4.Relpos.decay": torch.ones(1)}, "unexpected layers.4.Relpos"),
        ("darvit-tiny", lambda weights: {"encoder.weight": torch.ones(1)}, "not a DART model.*'encoder.weight'"),
    ],
)
def test_other_networks_are_refused(variant, changed, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(changed(empty_weights(variant)), variant)


# --- where from, where to ---------------------------------------------------------------------------------------------


def test_command_converts_averaged_weights_and_explains_mistakes(tmp_path):
    weights = empty_weights("darvit-tiny")
    averaged = {**weights, "cls_token": weights["cls_token"] + 1}
    path = save_checkpoint(tmp_path / "file.pth", weights, model_ema=averaged)

    def run(*options: str):
        return CliRunner().invoke(app, ["convert", str(path), "--output", str(tmp_path / "output"), *options])

    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and "darvit-tiny-ft121p" in result.stderr
    assert not (tmp_path / "output").exists()
    result = run("--variant", "darvit-tiny-ft121p", "--ema")
    assert result.exit_code == 0 and str(tmp_path / "output") in result.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "output")
    assert model.config.num_patches == 121 and torch.equal(model.dart.cls_token, averaged["cls_token"])


def test_existing_output_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "darvit-tiny.safetensors"
    save_file({name: tensor.clone() for name, tensor in empty_weights("darvit-tiny").items()}, path)
    output = tmp_path / "output"
    output.mkdir()

    def full_disk(self, folder):
        assert any(Path(folder).iterdir())
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DartImageProcessor, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            convert_checkpoint(path, output)
    assert sorted(tmp_path.iterdir()) == [path, output]
    assert convert_checkpoint(path, output) == output
    written = sorted(output.iterdir())
    with pytest.raises(FileExistsError, match=r"output.*is not empty"):
        convert_checkpoint(path, output)
    assert sorted(output.iterdir()) == written


def test_missing_files_and_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "checkpoints/darvit-tiny.pth"
    check_refused(f"no file '{name}'", name, tmp_path, FileNotFoundError)
    check_refused("no file 'darvit-tiny'", "darvit-tiny", tmp_path, FileNotFoundError)
    check_refused("is a folder", tmp_path, tmp_path, IsADirectoryError)
    message = check_refused("variant.*yinkx3/DART", "yinkx3/DART", tmp_path)
    assert all(name in message for name in VARIANTS)
    monkeypatch.setattr(original.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "darvit-tiny.pth could not be downloaded"
    check_refused(message, "yinkx3/DART", tmp_path, OSError, variant="darvit-tiny")


def test_file_wins_over_a_hub_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yinkx3").mkdir()
    save_checkpoint(tmp_path / "yinkx3" / "DART", empty_weights("darvit-tiny"))
    assert convert_checkpoint("yinkx3/DART", "output", variant="darvit-tiny") == Path("output")
