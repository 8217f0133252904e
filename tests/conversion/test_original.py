"""Conversion of the authors' checkpoints: what is read, from where, and every way in which it stops."""

import argparse
import builtins
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageClassification
from typer.testing import CliRunner

from dart_hf import DartConfig, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.conversion import original
from dart_hf.conversion.original import VARIANTS, convert_checkpoint, convert_state_dict, read_checkpoint
from dart_hf.modeling.configuration_dart_rmt import DartRmtConfig
from dart_hf.modeling.configuration_dart_vim import DartVimConfig

SCORER = "patch_embed.spn.spn.spn."
RMT_SCORER = "pre_image.spn.spn.spn."
TOKEN_VARIANTS = [name for name in VARIANTS if name != "darmt-L6"]
ONE_OF_EACH_ENCODER = pytest.mark.parametrize("variant", ["darvit-tiny", "darvim-tiny", "darmt-L6"])


def stand_in_weights(variant: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in golden.original_state_dict(variant).items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Stand-in weights of darvit-tiny by the authors' names. Copy before changing."""
    return stand_in_weights("darvit-tiny")


def hollow_weights(variant: str) -> dict[str, torch.Tensor]:
    """Tensors of the right names and shapes that take no memory: zeros, but for those that the settings determine."""
    return {
        name: torch.tensor(spec["value"]) if "value" in spec else hollow(spec)
        for name, spec in golden.manifest(variant)["tensors"].items()
    }


def hollow(spec: dict) -> torch.Tensor:
    return torch.zeros((), dtype=getattr(torch, spec["dtype"])).expand(spec["shape"])


def named(model: str) -> argparse.Namespace:
    return argparse.Namespace(model=model)


def num_patches(folder: Path) -> int:
    return AutoConfig.from_pretrained(folder).num_patches


def first_weight(folder: Path) -> torch.Tensor:
    return AutoModelForImageClassification.from_pretrained(folder).base_model.cls_token.detach()


def stops(
    message: str, checkpoint: object, folder: Path, error: type[Exception] = ValueError, **options: object
) -> str:
    """Converting `checkpoint` to a new folder in `folder` raises one sentence with `message` and writes nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert_checkpoint(checkpoint, folder / "output", **options)
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a converted checkpoint is


VIM_PLACES = {
    "dart_vim.cls_token": "cls_token",
    "dart_vim.tokenizer.projection.bias": "patch_embed.proj.bias",
    "dart_vim.tokenizer.scorer.head.fc2.bias": f"{SCORER}mlp.net.2.bias",
    "dart_vim.layers.7.norm.weight": "layers.7.norm.weight",
    "dart_vim.layers.7.mixer.in_proj.weight": "layers.7.mixer.in_proj.weight",
    "dart_vim.layers.23.mixer.out_proj.weight": "layers.23.mixer.out_proj.weight",
    "dart_vim.layers.7.mixer.forward_scan.A_log": "layers.7.mixer.A_log",
    "dart_vim.layers.7.mixer.forward_scan.D": "layers.7.mixer.D",
    "dart_vim.layers.7.mixer.forward_scan.conv1d.bias": "layers.7.mixer.conv1d.bias",
    "dart_vim.layers.7.mixer.forward_scan.x_proj.weight": "layers.7.mixer.x_proj.weight",
    "dart_vim.layers.7.mixer.forward_scan.dt_proj.bias": "layers.7.mixer.dt_proj.bias",
    "dart_vim.layers.7.mixer.backward_scan.A_log": "layers.7.mixer.A_b_log",
    "dart_vim.layers.7.mixer.backward_scan.D": "layers.7.mixer.D_b",
    "dart_vim.layers.7.mixer.backward_scan.conv1d.bias": "layers.7.mixer.conv1d_b.bias",
    "dart_vim.layers.7.mixer.backward_scan.x_proj.weight": "layers.7.mixer.x_proj_b.weight",
    "dart_vim.layers.7.mixer.backward_scan.dt_proj.bias": "layers.7.mixer.dt_proj_b.bias",
    "dart_vim.norm.weight": "norm_f.weight",
    "classifier.bias": "head.bias",
}
RMT_PLACES = {
    "dart_rmt.tokenizer.scorer.head.fc2.weight": f"{RMT_SCORER}mlp.net.2.weight",
    "dart_rmt.stem.convolutions.2.conv.bias": "patch_embed.proj.6.bias",
    "dart_rmt.stem.convolutions.3.norm.bias": "patch_embed.proj.10.bias",
    "dart_rmt.stages.1.layers.3.position_conv.bias": "layers.1.blocks.3.pos.conv.bias",
    "dart_rmt.stages.1.layers.3.layernorm_before.weight": "layers.1.blocks.3.retention_layer_norm.weight",
    "dart_rmt.stages.1.layers.3.retention.q_proj.bias": "layers.1.blocks.3.retention.q_proj.bias",
    "dart_rmt.stages.1.layers.3.retention.k_proj.bias": "layers.1.blocks.3.retention.k_proj.bias",
    "dart_rmt.stages.1.layers.3.retention.v_proj.bias": "layers.1.blocks.3.retention.v_proj.bias",
    "dart_rmt.stages.1.layers.3.retention.local_conv.bias": "layers.1.blocks.3.retention.lepe.conv.bias",
    "dart_rmt.stages.1.layers.3.retention.o_proj.bias": "layers.1.blocks.3.retention.out_proj.bias",
    "dart_rmt.stages.1.layers.3.layernorm_after.weight": "layers.1.blocks.3.final_layer_norm.weight",
    "dart_rmt.stages.1.layers.3.mlp.fc1.bias": "layers.1.blocks.3.ffn.fc1.bias",
    "dart_rmt.stages.1.layers.3.mlp.conv.bias": "layers.1.blocks.3.ffn.dwconv.conv.bias",
    "dart_rmt.stages.1.layers.3.mlp.fc2.bias": "layers.1.blocks.3.ffn.fc2.bias",
    "dart_rmt.stages.2.layers.24.layer_scale1": "layers.2.blocks.24.gamma_1",
    "dart_rmt.stages.2.layers.24.layer_scale2": "layers.2.blocks.24.gamma_2",
    "dart_rmt.stages.1.downsample.conv.bias": "layers.1.downsample.reduction.bias",
    "dart_rmt.stages.1.downsample.norm.running_var": "layers.1.downsample.norm.running_var",
    "dart_rmt.pooler.projection.bias": "proj.bias",
    "dart_rmt.pooler.norm.bias": "norm.bias",
    "classifier.bias": "head.bias",
}


@pytest.mark.parametrize("variant", ["darvim-tiny", "darvim-tiny-ft2seq", "darvim-sm", "darvim-sm-ft2seq", "darmt-L6"])
def test_saved_and_loaded_every_number_is_there_and_at_its_place(variant, stand_in, converted):
    theirs, _ = read_checkpoint(stand_in(variant))
    model, info = AutoModelForImageClassification.from_pretrained(converted(variant), output_loading_info=True)
    assert not any(info.values())
    ours = model.state_dict()

    computed = {name for name in theirs if ".Relpos." in name}
    added = {name for name in ours if ".scorer.statistics." in name or name.endswith(".scorer.trunk_loaded")}
    assert extremes(theirs, without=computed) == extremes(ours, without=added)
    places = RMT_PLACES if variant == "darmt-L6" else VIM_PLACES
    assert not [
        name for name, source in places.items() if not torch.equal(ours[name], theirs[source].view_as(ours[name]))
    ]


def extremes(tensors: dict[str, torch.Tensor], without: set[str]) -> list[tuple[int, float, float]]:
    """How many numbers every tensor has, and the range that they span: the same whatever the names and the order."""
    kept = [tensor for name, tensor in tensors.items() if name not in without]
    return sorted((tensor.numel(), tensor.min().item(), tensor.max().item()) for tensor in kept)


def test_vims_class_token_has_the_first_row_of_the_position_table(stand_in, converted):
    theirs = read_checkpoint(stand_in("darvim-tiny"))[0]["pos_embed"][0]
    model = AutoModelForImageClassification.from_pretrained(converted("darvim-tiny"))
    ours = model.dart_vim.tokenizer.position_embeddings[0]
    assert torch.equal(ours[0], theirs[98])
    assert torch.equal(ours[1:99], theirs[:98]) and torch.equal(ours[99:], theirs[99:])


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("darvit-tiny", DartConfig.preset("tiny")),
        ("darvim-tiny", DartVimConfig.preset("tiny")),
        ("darvim-tiny-ft2seq", DartVimConfig.preset("tiny", num_patches=392)),
        ("darvim-sm", DartVimConfig.preset("small")),
        ("darvim-sm-ft2seq", DartVimConfig.preset("small", num_patches=392)),
        ("darmt-L6", DartRmtConfig.preset("L6", first_strip_edge=2)),
    ],
)
def test_it_is_the_preset_with_the_published_normalisation_and_labels(variant, published, converted):
    config = AutoConfig.from_pretrained(converted(variant))
    model = VARIANTS[variant].encoder.model_class
    assert type(config) is type(published)
    assert config.architectures == [model.__name__]
    differs = {"architectures", "auto_map", "dtype", "id2label", "label2id", "transformers_version", "_name_or_path"}
    expected = {**published.to_dict(), "score_normalization": "batch"}
    assert {k: v for k, v in config.to_dict().items() if k not in differs} == {
        k: v for k, v in expected.items() if k not in differs
    }


@ONE_OF_EACH_ENCODER
def test_labels_are_imagenet_in_words_and_distinct(variant, converted):
    config = AutoConfig.from_pretrained(converted(variant))
    assert config.num_labels == len(config.id2label) == len(config.label2id) == 1000
    assert config.id2label[0].startswith("tench") and config.id2label[999].startswith("toilet tissue")
    assert config.id2label[134].startswith("crane") and config.id2label[517].startswith("crane")
    assert all(config.label2id[label] == index for index, label in config.id2label.items())


@ONE_OF_EACH_ENCODER
def test_the_scorer_is_alive_and_the_image_processor_is_saved(variant, converted):
    model = AutoModelForImageClassification.from_pretrained(converted(variant))
    assert model.scorer.trunk_loaded.item()
    assert not model.scorer.is_dead
    assert DartImageProcessor.from_pretrained(converted(variant)).crop_size["height"] == 448


def test_qkv_is_split_in_order(weights):
    _, state = convert_state_dict(weights, "darvit-tiny")
    parts = [state[f"dart.layers.3.attention.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), weights["blocks.3.attn.qkv.weight"])


@ONE_OF_EACH_ENCODER
def test_the_state_dict_is_complete_and_owns_its_memory(variant):
    weights = hollow_weights(variant)
    config, state = convert_state_dict(weights, variant)
    VARIANTS[variant].encoder.model_class(config).load_state_dict(state)
    given = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert given.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in state.values())


@ONE_OF_EACH_ENCODER
def test_a_fine_tuned_number_of_labels_is_read_without_imagenet_names(variant):
    weights = hollow_weights(variant)
    features = weights["head.weight"].shape[1]
    weights |= {"head.weight": torch.ones(7, features), "head.bias": torch.ones(7)}
    config, state = convert_state_dict(weights, variant)
    assert config.num_labels == 7
    assert config.id2label[0] == "LABEL_0"
    assert torch.equal(state["classifier.weight"], torch.ones(7, features))


# Which variant


def test_args_model_wins_over_the_file_name(weights, tmp_path):
    torch.save({"model": weights, "args": named("darvit_tiny_121p")}, tmp_path / "darvit-tiny.pth")
    assert num_patches(convert_checkpoint(tmp_path / "darvit-tiny.pth", tmp_path / "output")) == 121


def test_variant_wins_over_args_model(weights, tmp_path):
    torch.save({"model": weights, "args": named("darvit_tiny")}, tmp_path / "darvit-tiny.pth")
    folder = convert_checkpoint(tmp_path / "darvit-tiny.pth", tmp_path / "output", variant="darvit-tiny-ft121p")
    assert num_patches(folder) == 121


def test_the_file_name_is_used_where_nothing_else_is_known(weights, tmp_path):
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "darvit-tiny-ft121p.pth")
    assert num_patches(convert_checkpoint(tmp_path / "darvit-tiny-ft121p.pth", tmp_path / "output")) == 121


def test_the_budget_is_never_guessed(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "best_darvit-tiny.pth")
    message = stops("variant", tmp_path / "best_darvit-tiny.pth", tmp_path)
    assert all(name in message for name in VARIANTS)


def test_an_unknown_args_model_is_not_overruled_by_the_file_name(weights, tmp_path):
    torch.save({"model": weights, "args": named("darvit_tiny_100p")}, tmp_path / "darvit-tiny.pth")
    message = stops("darvit_tiny_100p", tmp_path / "darvit-tiny.pth", tmp_path)
    assert "darvit-tiny-ft121p" in message


def test_an_unknown_variant_stops_with_the_list(stand_in, tmp_path):
    message = stops("'darvit-huge' is unknown", stand_in("darvit-tiny"), tmp_path, variant="darvit-huge")
    assert all(name in message for name in VARIANTS)


@pytest.mark.parametrize(
    ("file", "variant", "difference"),
    [
        ("darvit-tiny", "darvit-sm", "hidden_size=192.*'cls_token'.*instead of 384"),
        ("darvit-tiny", "darvit-tiny-v2", "scorer_head='v1'.*mlp.net.2.weight.*instead of 'v2'"),
        ("darvim-tiny", "darvim-sm", "hidden_size=192.*'cls_token'.*instead of 384"),
        ("darvim-sm", "darvim-tiny-ft2seq", "time_step_rank=24.*'layers.0.mixer.dt_proj.weight'.*instead of 12"),
    ],
)
def test_a_variant_that_contradicts_the_tensors_stops(file, variant, difference, stand_in, tmp_path):
    stops(f"not '{variant}'.*{difference}", stand_in(file), tmp_path, variant=variant)


@pytest.mark.parametrize(
    ("file", "title", "variant"),
    [
        ("darvim-tiny", "DART-Vim", "darvit-tiny"),
        ("darvit-tiny", "DART-DeiT", "darvim-tiny"),
        ("darmt-L6", "DART-RMT", "darvit-sm"),
        ("darvim-sm", "DART-Vim", "darmt-L6"),
    ],
)
def test_a_variant_of_another_encoder_stops(file, title, variant, tmp_path):
    torch.save({"model": hollow_weights(file)}, tmp_path / "file.pth")
    message = f"not '{variant}', a DART-.* model: its tensors are those of a {title}"
    stops(message, tmp_path / "file.pth", tmp_path, variant=variant)


def without(*parts: str) -> Callable[[dict], dict]:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


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
def test_an_rmt_of_other_settings_stops(changed, difference):
    with pytest.raises(ValueError, match=f"not 'darmt-L6': it has .*{difference}"):
        convert_state_dict(changed(hollow_weights("darmt-L6")), "darmt-L6")


@pytest.mark.parametrize("name", ["layers.0.Relpos.decay", "layers.3.Relpos.decay", "layers.1.Relpos.angle"])
@pytest.mark.parametrize("changed", [lambda value: value * 1.001, lambda value: value.flip(0), lambda value: value / 0])
def test_relative_positions_of_other_settings_stop(name, changed):
    weights = hollow_weights("darmt-L6")
    with pytest.raises(ValueError, match=f"{name}.*decay_ranges=\\[6, 6, 6, 6\\].*other settings"):
        convert_state_dict({**weights, name: changed(weights[name])}, "darmt-L6")


def test_a_file_name_that_contradicts_the_tensors_stops(weights, tmp_path):
    torch.save(weights, tmp_path / "darvit-sm.pth")
    stops("not 'darvit-sm'.*scorer='mobilenet_v3_small'", tmp_path / "darvit-sm.pth", tmp_path)


@pytest.mark.parametrize("variant", TOKEN_VARIANTS)
def test_the_variants_are_those_of_the_reference(variant):
    manifest, config = golden.manifest(variant), VARIANTS[variant].config()
    for setting in ("num_patches", "image_size", "scorer", "scorer_head"):
        assert getattr(config, setting) == manifest[setting]
    assert [1, 1, config.hidden_size] == manifest["tensors"]["cls_token"]["shape"]


def test_the_rmt_is_that_of_the_reference():
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


def test_the_training_script_calls_them_so():
    assert {name: variant.args_model for name, variant in VARIANTS.items()} == {
        "darvit-tiny": "darvit_tiny",
        "darvit-tiny-v2": "darvit_tiny_v2",
        "darvit-tiny-ft121p": "darvit_tiny_121p",
        "darvit-sm": "darvit_sm",
        "darvit-sm-ft144p": "darvit_sm_144p",
        "darvit-sm-ft288p": "darvit_sm_288p",
        "darvit-sm-ft392p": "darvit_sm_392p",
        "darvim-tiny": "darvim_tiny",
        "darvim-tiny-ft2seq": "darvim_tiny_2seq",
        "darvim-sm": "darvim_sm",
        "darvim-sm-ft2seq": "darvim_sm_2seq",
        "darmt-L6": "DARMT_L6",
    }


# What a file may be


def test_safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "darvit-tiny-ft121p.safetensors")
    folder = convert_checkpoint(tmp_path / "darvit-tiny-ft121p.safetensors", str(tmp_path / "output"))
    assert num_patches(folder) == 121
    assert torch.equal(first_weight(folder), weights["cls_token"])


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_state_dict_and_legacy_pickles(weights, tmp_path, legacy):
    file = tmp_path / "darvit-tiny.pth"
    torch.save(OrderedDict(weights), file, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(first_weight(convert_checkpoint(file, tmp_path / "output")), weights["cls_token"])


@pytest.mark.parametrize("variant", ["darvit-tiny", "darvim-tiny"])
def test_ema_takes_the_averaged_weights(variant, tmp_path):
    weights = hollow_weights(variant)
    averaged = {**weights, "cls_token": weights["cls_token"] + 1}
    torch.save(
        {"model": weights, "model_ema": averaged, "args": named(VARIANTS[variant].args_model)}, tmp_path / "file.pth"
    )
    assert torch.equal(first_weight(convert_checkpoint(tmp_path / "file.pth", tmp_path / "a")), weights["cls_token"])
    folder = convert_checkpoint(tmp_path / "file.pth", tmp_path / "b", ema=True)
    assert torch.equal(first_weight(folder), averaged["cls_token"])


@pytest.mark.parametrize("extra", [{}, {"model_ema": None}])
def test_missing_averaged_weights_stop(weights, extra, tmp_path):
    torch.save({"model": weights, "args": named("darvit_tiny"), **extra}, tmp_path / "file.pth")
    stops("ema.*no averaged weights", tmp_path / "file.pth", tmp_path, ema=True)


def test_ema_of_a_bare_state_dict_stops(weights, tmp_path):
    save_file(weights, tmp_path / "darvit-tiny.safetensors")
    stops("ema.*no averaged weights", tmp_path / "darvit-tiny.safetensors", tmp_path, ema=True)


def test_what_training_scripts_put_beside_the_weights_is_read(tmp_path):
    args = named("darvit_tiny")
    args.output_dir, args.device, args.betas, args.resume = pathlib.PurePosixPath("/runs/1"), "cuda", (0.9, 0.99), None
    args.data_path, args.best = Path("data"), np.float64(73.8)
    content = {
        "model": {"a": torch.ones(2)},
        "epoch": np.int64(3),
        "optimizer": {"state": {0: {"step": 1}}},
        "args": args,
    }
    torch.save(content, tmp_path / "file.pth")
    tensors, args_model = read_checkpoint(tmp_path / "file.pth")
    assert torch.equal(tensors["a"], torch.ones(2))
    assert args_model == "darvit_tiny"


@pytest.mark.parametrize("name", ["pathlib\nWindowsPath", "pathlib._local\nPosixPath", "numpy.core.multiarray\nscalar"])
def test_names_of_other_systems_and_versions_are_read(name, tmp_path):
    args = named("darvit_tiny")
    args.best = np.float32(73.8) if "numpy" in name else pathlib.PurePosixPath("data")
    file = tmp_path / "file.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": args}, file, _use_new_zipfile_serialization=False)
    written = rb"numpy\._?core\.multiarray\nscalar" if "numpy" in name else rb"pathlib(\._local)?\nPurePosixPath"
    content, replaced = re.subn(written, name.encode(), file.read_bytes())
    assert replaced == 1
    file.write_bytes(content)
    assert read_checkpoint(file)[1] == "darvit_tiny"


# What a file must not be


class Malicious:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "shown"),
    [(os.system, "system"), (builtins.exec, "exec"), (pathlib.Path.touch, "getattr|touch"), (os.mkdir, "mkdir")],
)
def test_a_pickle_that_executes_code_stops_with_its_name(function, shown, legacy, weights, tmp_path):
    trace = tmp_path / "trace"
    arguments = {os.system: f"touch {trace}", builtins.exec: f"open({str(trace)!r}, 'w')"}.get(function, str(trace))
    content = {"model": weights, "args": Malicious(function, arguments)}
    torch.save(content, tmp_path / "darvit-tiny.pth", _use_new_zipfile_serialization=not legacy)
    stops(f"asks to run '.*({shown})'.*nothing of it was executed", tmp_path / "darvit-tiny.pth", tmp_path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_that_executes_code_stops(protocol, tmp_path):
    trace = tmp_path / "trace"
    with open(tmp_path / "darvit-tiny.pth", "wb") as file:
        pickle.dump(Malicious(os.mkdir, str(trace)), file, protocol=protocol)
    stops("checkpoint: .*darvit-tiny.pth.*execut", tmp_path / "darvit-tiny.pth", tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("present", [[], [argparse.Namespace]])
def test_reading_leaves_the_allowed_globals_of_the_process_alone(present, stand_in):
    torch.serialization.add_safe_globals(present)
    try:
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(stand_in("darvit-tiny"))
        assert set(torch.serialization.get_safe_globals()) == before
        assert set(present) <= before
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_pickles_stop(share, legacy, weights, tmp_path):
    file = tmp_path / "darvit-tiny.pth"
    torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    os.truncate(file, int(share * file.stat().st_size))
    stops("darvit-tiny.pth is not a PyTorch checkpoint, or is incomplete", file, tmp_path)


def test_truncated_safetensors_stop(weights, tmp_path):
    file = tmp_path / "darvit-tiny.safetensors"
    save_file(weights, file)
    os.truncate(file, file.stat().st_size // 2)
    stops("darvit-tiny.safetensors is not a safetensors file, or is incomplete", file, tmp_path)


def test_text_files_stop(tmp_path):
    (tmp_path / "darvit-tiny.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    stops("darvit-tiny.pth is no PyTorch checkpoint", tmp_path / "darvit-tiny.pth", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "it is empty"),
        ({"model": {}}, "it is empty"),
        ({"epoch": 3, "weights": {}}, "'epoch' is a int"),
        ({"encoder.weight": torch.ones(1)}, "no DART model.*'encoder.weight'"),
    ],
)
def test_files_without_a_model_stop(content, message, tmp_path):
    torch.save(content, tmp_path / "darvit-tiny.pth")
    stops(message, tmp_path / "darvit-tiny.pth", tmp_path)


# Missing, extra and wrong-shaped tensors


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("darvit-tiny", "cls_token"),
        ("darvit-tiny", "pos_embed"),
        ("darvit-tiny", "patch_embed.proj.bias"),
        ("darvit-tiny", f"{SCORER}features.4.block.1.0.weight"),
        ("darvit-tiny", f"{SCORER}features.0.1.num_batches_tracked"),
        ("darvit-tiny", f"{SCORER}mlp.net.2.weight"),
        ("darvit-tiny", "blocks.0.mlp.fc1.weight"),
        ("darvit-tiny", "blocks.11.attn.qkv.bias"),
        ("darvit-tiny", "norm.weight"),
        ("darvit-tiny", "head.weight"),
        ("darvit-tiny", "head.bias"),
        ("darvim-tiny", "pos_embed"),
        ("darvim-tiny", f"{SCORER}features.12.0.weight"),
        ("darvim-tiny", "layers.0.mixer.A_log"),
        ("darvim-tiny", "layers.0.mixer.conv1d.weight"),
        ("darvim-tiny", "layers.5.mixer.A_b_log"),
        ("darvim-tiny", "layers.5.mixer.D_b"),
        ("darvim-tiny", "layers.5.mixer.x_proj_b.weight"),
        ("darvim-tiny", "layers.23.norm.weight"),
        ("darvim-tiny", "head.weight"),
        ("darmt-L6", "patch_embed.proj.9.weight"),
        ("darmt-L6", f"{RMT_SCORER}features.8.0.weight"),
        ("darmt-L6", "layers.0.Relpos.angle"),
        ("darmt-L6", "layers.0.blocks.0.pos.conv.weight"),
        ("darmt-L6", "layers.1.blocks.7.ffn.dwconv.conv.bias"),
        ("darmt-L6", "layers.2.blocks.0.gamma_1"),
        ("darmt-L6", "layers.3.blocks.7.retention.lepe.conv.weight"),
        ("darmt-L6", "proj.weight"),
        ("darmt-L6", "head.weight"),
    ],
)
class TestTensors:
    """One tensor of the checkpoint is not as it should be: the message has its original name, nothing is written."""

    @staticmethod
    def stops(variant: str, weights: dict[str, torch.Tensor], name: str, folder: Path) -> None:
        torch.save({"model": weights, "args": named(VARIANTS[variant].args_model)}, folder / "file.pth")
        stops(rf"{re.escape(name)}\b", folder / "file.pth", folder)

    def test_missing(self, variant, name, tmp_path):
        weights = hollow_weights(variant)
        self.stops(variant, {key: value for key, value in weights.items() if key != name}, name, tmp_path)

    def test_renamed(self, variant, name, tmp_path):
        renamed = {(f"{key}_2" if key == name else key): value for key, value in hollow_weights(variant).items()}
        self.stops(variant, renamed, name, tmp_path)

    def test_with_a_dimension_more(self, variant, name, tmp_path):
        weights = hollow_weights(variant)
        self.stops(variant, {**weights, name: weights[name][None]}, name, tmp_path)

    def test_of_another_size(self, variant, name, tmp_path):
        weights = hollow_weights(variant)
        value = weights[name]
        other = torch.cat([value, value[:1]]) if value.ndim else torch.zeros(2, dtype=value.dtype)
        if name == "head.weight":
            name = "head.bias"
        self.stops(variant, {**weights, name: other}, name, tmp_path)


@pytest.mark.parametrize(
    ("variant", "prefix"),
    [
        ("darvit-tiny", "blocks.3.extra"),
        ("darvim-tiny", "layers.3.mixer.extra"),
        ("darmt-L6", "layers.3.blocks.7.extra"),
        ("darmt-L6", "layers.4.Relpos.decay"),
    ],
)
def test_extra_tensors_stop(variant, prefix):
    extra = {f"{prefix}_{index}": torch.ones(1) for index in range(5)}
    with pytest.raises(ValueError, match=rf"unexpected {prefix}_0, .* and 2 more"):
        convert_state_dict({**hollow_weights(variant), **extra}, variant)


@pytest.mark.parametrize(
    ("variant", "last", "number"), [("darvit-tiny", "blocks.11.", 12), ("darvim-tiny", "layers.23.", 24)]
)
def test_a_whole_missing_block_stops(variant, last, number):
    with pytest.raises(ValueError, match=rf"num_hidden_layers={number - 1}.*instead of {number}"):
        convert_state_dict(without(last)(hollow_weights(variant)), variant)


@ONE_OF_EACH_ENCODER
def test_an_unknown_trunk_stops(variant):
    renamed = {name.replace(".block.", ".layer."): value for name, value in hollow_weights(variant).items()}
    with pytest.raises(ValueError, match="none of the trunks mobilenet_v3_small"):
        convert_state_dict(renamed, variant)


# The command line


def test_the_command_passes_its_options_on(weights, tmp_path):
    averaged = {**weights, "cls_token": weights["cls_token"] + 1}
    torch.save({"model": weights, "model_ema": averaged}, tmp_path / "file.pth")
    options = ["--output", str(tmp_path / "output"), "--variant", "darvit-tiny-ft121p", "--ema"]
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "file.pth"), *options])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "output") in result.stdout
    assert num_patches(tmp_path / "output") == 121
    assert torch.equal(first_weight(tmp_path / "output"), averaged["cls_token"])


def test_a_mistake_is_one_line_and_exit_code_2(weights, tmp_path):
    torch.save(weights, tmp_path / "file.pth")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "file.pth"), "--output", str(tmp_path / "output")])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "darvit-tiny-ft121p" in result.stderr
    assert not (tmp_path / "output").exists()


# Where from, where to


def test_an_existing_output_is_not_overwritten(stand_in, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    assert convert_checkpoint(stand_in("darvit-tiny"), output) == output
    written = sorted(output.iterdir())
    with pytest.raises(FileExistsError, match=r"output.*is not empty"):
        convert_checkpoint(stand_in("darvit-tiny"), output)
    assert sorted(output.iterdir()) == written
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"output.*is a file"):
        convert_checkpoint(stand_in("darvit-tiny"), tmp_path / "file")


def test_nothing_stays_behind_when_saving_fails(stand_in, tmp_path, monkeypatch):
    def full_disk(self, folder):
        assert any(Path(folder).iterdir())
        raise OSError("No space left on device")

    monkeypatch.setattr(DartImageProcessor, "save_pretrained", full_disk)
    stops("No space left", stand_in("darvit-tiny"), tmp_path, OSError)


def test_missing_files_and_folders_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stops("no file 'checkpoints/darvit-tiny.pth'", "checkpoints/darvit-tiny.pth", tmp_path, FileNotFoundError)
    stops("no file 'darvit-tiny'", "darvit-tiny", tmp_path, FileNotFoundError)
    stops("is a folder", tmp_path, tmp_path, IsADirectoryError)


def test_a_hub_repository_needs_a_variant(tmp_path):
    message = stops("variant.*yinkx3/DART", "yinkx3/DART", tmp_path)
    assert all(name in message for name in VARIANTS)


def test_a_hub_repository_offline_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(original.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    stops("darvit-tiny.pth could not be downloaded", "yinkx3/DART", tmp_path, OSError, variant="darvit-tiny")


def test_a_file_wins_over_a_hub_repository(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yinkx3").mkdir()
    torch.save(weights, tmp_path / "yinkx3" / "DART")
    folder = convert_checkpoint("yinkx3/DART", "output", variant="darvit-tiny")
    assert torch.equal(first_weight(folder), weights["cls_token"])


CONVERT_FROM_HUB = """
import sys
from dart_hf.conversion.original import convert_checkpoint

for number, checkpoint in enumerate(sys.argv[2:]):
    repository, variant = checkpoint.split(":")
    try:
        print("written", convert_checkpoint(repository, f"{sys.argv[1]}/{number}", variant=variant))
    except OSError as error:
        print("stopped", error)
"""


def test_download_from_the_hub(stand_in, tmp_path):
    """huggingface_hub as it is, against a server that answers like the Hub."""
    variants = {"darvit-tiny-ft121p": 121, "darvim-tiny-ft2seq": 392}
    files = {f"/yinkx3/DART/resolve/main/{variant}.pth": stand_in(variant).read_bytes() for variant in variants}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{zlib.crc32(content or b"")}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound" if "yinkx3" in self.path else "RepoNotFound")
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")

        def log_message(self, *args):
            pass

    checkpoints = [*(f"yinkx3/DART:{variant}" for variant in variants), "yinkx3/DART:darvit-sm", "no/body:darvit-sm"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = subprocess.run(
            [sys.executable, "-c", CONVERT_FROM_HUB, str(tmp_path), *checkpoints],
            env={
                **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    *written, no_file, no_repository = run.stdout.splitlines() or [run.stderr] * 4
    assert written == [f"written {tmp_path / number}" for number in "01"]
    assert [num_patches(tmp_path / number) for number in "01"] == list(variants.values())
    assert no_file.startswith("stopped") and "darvit-sm.pth" in no_file and "has no such file" in no_file
    assert no_repository.startswith("stopped") and "no such repository" in no_repository
