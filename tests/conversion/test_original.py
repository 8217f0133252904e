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
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.cli import app
from dart_hf.conversion import original
from dart_hf.conversion.original import VARIANTS, convert_checkpoint, convert_state_dict, read_checkpoint

SCORER = "patch_embed.spn.spn.spn."
VIT_VARIANTS = [name for name, variant in VARIANTS.items() if variant.encoder == "vit"]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Stand-in weights of darvit-tiny by the authors' names. Copy before changing."""
    return {name: torch.from_numpy(value) for name, value in golden.original_state_dict("darvit-tiny").items()}


def named(model: str) -> argparse.Namespace:
    return argparse.Namespace(model=model)


def num_patches(folder: Path) -> int:
    return DartConfig.from_pretrained(folder).num_patches


def first_weight(folder: Path) -> torch.Tensor:
    return DartForImageClassification.from_pretrained(folder).dart.cls_token.detach()


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


def test_tiny_is_the_preset_with_the_published_normalisation_and_labels(converted):
    config = DartConfig.from_pretrained(converted("darvit-tiny"))
    preset = DartConfig.preset("tiny", score_normalization="batch")
    differs = {"architectures", "auto_map", "dtype", "id2label", "label2id", "transformers_version", "_name_or_path"}
    ours, theirs = config.to_dict(), preset.to_dict()
    assert {k: v for k, v in ours.items() if k not in differs} == {k: v for k, v in theirs.items() if k not in differs}
    assert config.architectures == ["DartForImageClassification"]


def test_labels_are_imagenet_in_words_and_distinct(converted):
    config = DartConfig.from_pretrained(converted("darvit-tiny"))
    assert config.num_labels == len(config.id2label) == len(config.label2id) == 1000
    assert config.id2label[0].startswith("tench") and config.id2label[999].startswith("toilet tissue")
    assert config.id2label[134].startswith("crane") and config.id2label[517].startswith("crane")
    assert all(config.label2id[label] == index for index, label in config.id2label.items())


def test_the_scorer_is_alive_and_the_image_processor_is_saved(converted):
    model = DartForImageClassification.from_pretrained(converted("darvit-tiny"))
    assert model.scorer.trunk_loaded.item()
    assert not model.scorer.is_dead
    assert DartImageProcessor.from_pretrained(converted("darvit-tiny")).crop_size["height"] == 448


def test_qkv_is_split_in_order(weights):
    _, state = convert_state_dict(weights, "darvit-tiny")
    parts = [state[f"dart.layers.3.attention.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), weights["blocks.3.attn.qkv.weight"])


def test_the_state_dict_is_complete_and_owns_its_memory(weights):
    config, state = convert_state_dict(weights, "darvit-tiny")
    DartForImageClassification(config).load_state_dict(state)
    state["dart.cls_token"].zero_()
    assert weights["cls_token"].any()


def test_a_fine_tuned_number_of_labels_is_read_without_imagenet_names(weights):
    weights = {**weights, "head.weight": torch.ones(7, 192), "head.bias": torch.ones(7)}
    config, state = convert_state_dict(weights, "darvit-tiny")
    assert config.num_labels == 7
    assert config.id2label[0] == "LABEL_0"
    assert state["classifier.weight"].shape == (7, 192)


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
    assert all(name in message for name in VIT_VARIANTS)
    assert "darvim" not in message


def test_an_unknown_args_model_is_not_overruled_by_the_file_name(weights, tmp_path):
    torch.save({"model": weights, "args": named("darvit_tiny_100p")}, tmp_path / "darvit-tiny.pth")
    message = stops("darvit_tiny_100p", tmp_path / "darvit-tiny.pth", tmp_path)
    assert "darvit-tiny-ft121p" in message


def test_an_unknown_variant_stops_with_the_list(stand_in, tmp_path):
    message = stops("'darvit-huge' is unknown", stand_in("darvit-tiny"), tmp_path, variant="darvit-huge")
    assert all(name in message for name in VIT_VARIANTS)


@pytest.mark.parametrize(
    ("variant", "difference"),
    [
        ("darvit-sm", "hidden_size=192.*'cls_token'.*instead of 384"),
        ("darvit-tiny-v2", "scorer_head='v1'.*mlp.net.2.weight.*instead of 'v2'"),
    ],
)
def test_a_variant_that_contradicts_the_tensors_stops(variant, difference, stand_in, tmp_path):
    stops(f"not '{variant}'.*{difference}", stand_in("darvit-tiny"), tmp_path, variant=variant)


def test_a_file_name_that_contradicts_the_tensors_stops(weights, tmp_path):
    torch.save(weights, tmp_path / "darvit-sm.pth")
    stops("not 'darvit-sm'.*scorer='mobilenet_v3_small'", tmp_path / "darvit-sm.pth", tmp_path)


@pytest.mark.parametrize(("variant", "title"), [("darvim-tiny", "DART-Vim"), ("darmt-L6", "DART-RMT")])
def test_other_encoders_are_named_as_not_yet_supported(variant, title, stand_in, tmp_path):
    stops(f"{variant}.*{title}.*not yet supported", stand_in("darvit-tiny"), tmp_path, variant=variant)
    names = {"darvim-tiny": "layers.0.mixer.A_log", "darmt-L6": "layers.0.blocks.0.retention.q_proj.weight"}
    torch.save({"model": {names[variant]: torch.ones(1)}}, tmp_path / "file.pth")
    stops(f"{title}.*not yet supported", tmp_path / "file.pth", tmp_path, variant="darvit-tiny")
    torch.save({"model": {names[variant]: torch.ones(1)}}, tmp_path / f"{variant}.pth")
    stops(f"{title}.*not yet supported", tmp_path / f"{variant}.pth", tmp_path)


def test_the_variants_are_those_of_the_reference(weights):
    for variant in VIT_VARIANTS:
        manifest, config = golden.manifest(variant), VARIANTS[variant].config()
        for setting in ("num_patches", "image_size", "scorer", "scorer_head"):
            assert getattr(config, setting) == manifest[setting]
        assert [1, 1, config.hidden_size] == manifest["tensors"]["cls_token"]["shape"]


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


def test_ema_takes_the_averaged_weights(weights, tmp_path):
    averaged = {**weights, "cls_token": weights["cls_token"] + 1}
    torch.save({"model": weights, "model_ema": averaged, "args": named("darvit_tiny")}, tmp_path / "file.pth")
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
    "name",
    [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.bias",
        f"{SCORER}features.4.block.1.0.weight",
        f"{SCORER}features.0.1.num_batches_tracked",
        f"{SCORER}mlp.net.2.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.11.attn.qkv.bias",
        "norm.weight",
        "head.weight",
        "head.bias",
    ],
)
class TestTensors:
    """One tensor of the checkpoint is not as it should be: the message has its original name, nothing is written."""

    @staticmethod
    def stops(weights: dict[str, torch.Tensor], name: str, folder: Path) -> None:
        torch.save({"model": weights, "args": named("darvit_tiny")}, folder / "file.pth")
        stops(re.escape(name), folder / "file.pth", folder)

    def test_missing(self, name, weights, tmp_path):
        self.stops({key: value for key, value in weights.items() if key != name}, name, tmp_path)

    def test_renamed(self, name, weights, tmp_path):
        renamed = {(f"{key}_2" if key == name else key): value for key, value in weights.items()}
        self.stops(renamed, name, tmp_path)

    def test_with_a_dimension_more(self, name, weights, tmp_path):
        self.stops({**weights, name: weights[name][None]}, name, tmp_path)

    def test_of_another_size(self, name, weights, tmp_path):
        value = weights[name]
        other = torch.cat([value, value[:1]]) if value.ndim else torch.zeros(2, dtype=value.dtype)
        if name == "head.weight":
            name = "head.bias"
        self.stops({**weights, name: other}, name, tmp_path)


def test_extra_tensors_stop(weights, tmp_path):
    extra = {f"blocks.3.extra_{index}": torch.ones(1) for index in range(5)}
    with pytest.raises(ValueError, match=r"unexpected blocks.3.extra_0, .* and 2 more"):
        convert_state_dict({**weights, **extra}, "darvit-tiny")


def test_a_whole_missing_block_stops(weights):
    shallow = {name: value for name, value in weights.items() if not name.startswith("blocks.11.")}
    with pytest.raises(ValueError, match=r"num_hidden_layers=11.*instead of 12"):
        convert_state_dict(shallow, "darvit-tiny")


def test_an_unknown_trunk_stops(weights):
    renamed = {name.replace(".block.", ".layer."): value for name, value in weights.items()}
    with pytest.raises(ValueError, match="none of the trunks mobilenet_v3_small"):
        convert_state_dict(renamed, "darvit-tiny")


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
    assert all(name in message for name in VIT_VARIANTS)


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

for repository, variant in zip(("yinkx3/DART", "yinkx3/DART", "no/body"), sys.argv[2:]):
    try:
        print("written", convert_checkpoint(repository, sys.argv[1], variant=variant))
    except OSError as error:
        print("stopped", error)
    sys.argv[1] += "-2"
"""


def test_download_from_the_hub(stand_in, tmp_path):
    """huggingface_hub as it is, against a server that answers like the Hub."""
    variant = "darvit-tiny-ft121p"
    content = stand_in(variant).read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            found = self.path == f"/yinkx3/DART/resolve/main/{variant}.pth"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound" if "yinkx3" in self.path else "RepoNotFound")
            self.end_headers()
            return found

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = subprocess.run(
            [sys.executable, "-c", CONVERT_FROM_HUB, str(tmp_path / "output"), variant, "darvit-sm", "darvit-sm"],
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
    written, no_file, no_repository = run.stdout.splitlines() or [run.stderr] * 3
    assert written == f"written {tmp_path / 'output'}"
    assert num_patches(tmp_path / "output") == 121
    assert no_file.startswith("stopped") and "darvit-sm.pth" in no_file and "has no such file" in no_file
    assert no_repository.startswith("stopped") and "no such repository" in no_repository
