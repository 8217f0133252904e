"""Conversion of the DART authors' checkpoints."""

import argparse
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


def empty_weights(variant: str) -> dict[str, torch.Tensor]:
    """Make tensors of the right names and shapes that take no memory: zeros, except those that the settings fix."""
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


def plus(name: str, *shape: int) -> Callable[[dict], dict]:
    return lambda weights: {**weights, name: torch.ones(shape)}


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

    assert type(config) is type(published) and config.score_normalization == "batch"
    differs = ("architectures", "dtype", "id2label", "label2id", "transformers_version", "score_normalization")
    found, expected = config.to_dict(), published.to_dict()
    assert {**found, **dict.fromkeys(differs)} == {**expected, **dict.fromkeys(differs)}
    assert config.num_labels == len(config.id2label) == len(config.label2id) == 1000
    for index, start in {0: "tench", 134: "crane", 517: "crane", 999: "toilet tissue"}.items():
        assert config.id2label[index].startswith(start)
    assert all(config.label2id[label] == index for index, label in config.id2label.items())


@pytest.mark.parametrize("variant", ["darvit-tiny", "darvim-tiny", "darmt-L6"])
def test_fine_tuned_number_of_labels_gets_no_imagenet_names(variant):
    weights = empty_weights(variant)
    classifier = torch.ones(7, weights["head.weight"].shape[1])
    config, state = convert_state_dict({**weights, "head.weight": classifier, "head.bias": torch.ones(7)}, variant)
    assert (config.num_labels, config.id2label[0]) == (7, "LABEL_0")
    assert torch.equal(state["classifier.weight"], classifier)


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


@pytest.mark.parametrize("name", ["layers.0.Relpos.decay", "layers.3.Relpos.decay", "layers.1.Relpos.angle"])
def test_rmt_with_other_relative_positions_is_refused(name):
    weights = empty_weights("darmt-L6")
    for changed in (weights[name] * 1.001, weights[name].flip(0), weights[name] / 0):
        with pytest.raises(ValueError, match=f"{name}.*decay_ranges=\\[6, 6, 6, 6\\].*other settings"):
            convert_state_dict({**weights, name: changed}, "darmt-L6")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "darmt-L6"])
def test_variants_have_the_settings_of_the_reference(variant):
    manifest, config = golden.manifest(variant), VARIANTS[variant].config()
    for setting in ("num_patches", "image_size", "scorer", "scorer_head"):
        assert getattr(config, setting) == manifest[setting]
    assert [1, 1, config.hidden_size] == manifest["tensors"]["cls_token"]["shape"]


@pytest.mark.parametrize("problem", ["missing", "renamed", "one more dimension", "another size"])
@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("darvit-tiny", ["cls_token", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.11.attn.qkv.bias"]),
        ("darvit-tiny", ["head.weight", "head.bias", f"{SCORER}mlp.net.2.weight"]),
        ("darvit-tiny", [f"{SCORER}features.4.block.1.0.weight", f"{SCORER}features.0.1.num_batches_tracked"]),
        ("darvim-tiny", ["layers.0.mixer.A_log", "layers.0.mixer.conv1d.weight", "layers.23.norm.weight"]),
        ("darvim-tiny", ["layers.5.mixer.A_b_log", "layers.5.mixer.D_b"]),
        ("darmt-L6", ["pre_image.spn.spn.spn.features.8.0.weight", "layers.1.blocks.7.ffn.dwconv.conv.bias"]),
        ("darmt-L6", ["layers.0.Relpos.angle", "layers.2.blocks.0.gamma_1", "proj.weight"]),
    ],
)
def test_tensor_that_does_not_fit_is_named(variant, names, problem):
    for name in names:
        weights = empty_weights(variant)
        value = weights.pop(name)
        if problem == "renamed":
            weights[f"{name}_2"] = value
        elif problem == "one more dimension":
            weights[name] = value[None]
        elif problem == "another size":
            weights[name] = torch.cat([value, value[:1]]) if value.ndim else torch.zeros(2, dtype=value.dtype)
            name = "head.bias" if name == "head.weight" else name
        with pytest.raises(ValueError, match=rf"{re.escape(name)}\b") as caught:
            convert_state_dict(weights, variant)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "changed", "variant", "message"),
    [
        ("darvit-tiny", None, "darvit-sm", "not 'darvit-sm'.*hidden_size=192.*'cls_token'.*instead of 384"),
        ("darvit-tiny", None, "darvit-tiny-v2", "scorer_head='v1'.*mlp.net.2.weight.*instead of 'v2'"),
        ("darvim-sm", None, "darvim-tiny", "time_step_rank=24.*'layers.0.mixer.dt_proj.weight'.*instead of 12"),
        ("darvim-tiny", None, "darvit-tiny", "not 'darvit-tiny', a DART-.* model: .* those of a DART-Vim"),
        ("darvit-tiny", None, "darvim-tiny", "a DART-.* model: its tensors are those of a DART-DeiT"),
        ("darmt-L6", None, "darvit-sm", "a DART-.* model: its tensors are those of a DART-RMT"),
        ("darmt-L6", without(".gamma_"), None, r"layer_scale=\[False, F.*instead of \[False, False, True, True\]"),
        ("darmt-L6", without("layers.2.blocks.24."), None, r"depths=\[4, 8, 24, 8\].*layers\.\*\.blocks.*instead of"),
        ("darmt-L6", without("layers.3."), None, r"hidden_sizes=\[112, 224, 448\].*instead of \[112, 224, 448, 640\]"),
        ("darmt-L6", plus("layers.0.Relpos.decay", 8), None, r"num_attention_heads=\[8, 7, 14, 20\].*decay.*instead"),
        ("darmt-L6", plus("layers.3.blocks.0.ffn.fc1.weight", 2560, 640), None, r"mlp_ratios=\[4, 4, 3, 4\].*fc1"),
        ("darmt-L6", plus("proj.weight", 512, 640), None, "not 'darmt-L6': .*projection_size=512 .*instead of 1024"),
        ("darvit-tiny", without("blocks.11."), None, "num_hidden_layers=11.*instead of 12"),
        ("darvim-tiny", without("layers.23."), None, "num_hidden_layers=23.*instead of 24"),
        ("darvit-tiny", without(".block."), None, "none of the trunks mobilenet_v3_small"),
        ("darmt-L6", without(".block."), None, "none of the trunks mobilenet_v3_small"),
        ("darvim-tiny", plus("layers.3.mixer.extra", 1), None, "unexpected layers.3.mixer.extra"),
        ("darmt-L6", plus("layers.3.blocks.7.extra", 1), None, "unexpected layers.3.blocks.7.extra"),
        ("darmt-L6", plus("layers.4.Relpos.decay", 1), None, "unexpected layers.4.Relpos"),
        ("darvit-tiny", lambda weights: {"encoder.weight": torch.ones(1)}, None, "not a DART model.*'encoder.weight'"),
    ],
)
def test_tensors_of_another_model_are_refused(weights, changed, variant, message):
    tensors = empty_weights(weights)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(changed(tensors) if changed else tensors, variant or weights)


def test_a_long_list_of_tensors_is_shortened():
    extra = {f"blocks.3.extra_{i}": torch.ones(1) for i in range(5)}
    with pytest.raises(ValueError, match=r"unexpected blocks.3.extra_0, .* and 2 more"):
        convert_state_dict({**empty_weights("darvit-tiny"), **extra}, "darvit-tiny")


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
    path, output = tmp_path / "darvit-tiny.safetensors", tmp_path / "output"
    save_file({name: tensor.clone() for name, tensor in empty_weights("darvit-tiny").items()}, path)
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
    for name in ("checkpoints/darvit-tiny.pth", "darvit-tiny"):
        check_refused(f"no file '{name}'", name, tmp_path, FileNotFoundError)
    check_refused("is a folder", tmp_path, tmp_path, IsADirectoryError)
    message = check_refused("variant.*yinkx3/DART", "yinkx3/DART", tmp_path)
    assert all(name in message for name in VARIANTS)
    monkeypatch.setattr(original.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "darvit-tiny.pth could not be downloaded"
    check_refused(message, "yinkx3/DART", tmp_path, OSError, variant="darvit-tiny")


def test_file_wins_over_a_hub_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("yinkx3").mkdir()
    save_checkpoint(Path("yinkx3/DART"), empty_weights("darvit-tiny"))
    assert convert_checkpoint("yinkx3/DART", "output", variant="darvit-tiny") == Path("output")
