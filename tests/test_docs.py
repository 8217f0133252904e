"""The commands and Python blocks of README.md and docs/ run, in the order of their page.

A block does not run if the line before it is `<!-- not run: REASON -->`. The others find in their working folder:
`quickstart`, made with few steps; `examples` and `benchmarks` of the project; and, unless the page makes them itself,
`photos`, the DART models `dart-tiny` and `flowers`, and the authors' file `darvit-sm-ft392p.pth`. The Hub is local.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
from helpers.hub_server import WRITE_TOKEN, HubServer
from helpers.tiny_models import tiny_classifier
from timm.models import save_for_hf

from dart_hf import DartImageProcessor
from dart_hf.quickstart import run_quickstart

PROJECT = Path(__file__).parents[1]
RUN_BLOCKS = Path(__file__).parent / "helpers" / "run_blocks.py"
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
RUN, SHOWN = {"python", "bash"}, {"", "text", "bibtex", "yaml", "json"}
TIMM_MODEL = "timm/deit_tiny_patch16_224.fb_in1k"


def blocks_of(page: Path) -> Iterator[tuple[str, str, str]]:
    """Place, language and code of each block that runs."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] in RUN and not found["reason"]:
            yield f"{page.name}:{text.count(chr(10), 0, found.start('code'))}", found["language"], found["code"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "quickstart"
    small = {"batch_size": 8, "image_size": 32, "digit_sizes": (16, 24), "num_patches": 16}
    run_quickstart(folder, steps=2, **small, train_placements=1, test_placements=1)
    return folder


@pytest.fixture(scope="module")
def docs_hub(stand_in: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with the authors' repository and a ViT of timm."""
    vit = tmp_path_factory.mktemp("timm")
    save_for_hf(
        timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=2),
        vit,
        model_args={"depth": 1, "num_classes": 2},
    )
    with HubServer() as hub:
        hub.add("yinkx3/DART", {"darvit-tiny.pth": stand_in("darvit-tiny").read_bytes()})
        hub.add(TIMM_MODEL, vit)
        yield hub


def make_photos(folder: Path, images: list[Path]) -> None:
    for split, digit in ((split, digit) for split in ("train", "test") for digit in range(10)):
        (folder / split / str(digit)).mkdir(parents=True)
        shutil.copy(images[digit % len(images)], folder / split / str(digit) / "0.png")


def save_tiny_model(folder: Path) -> None:
    tiny_classifier(["cup", "cat"]).save_pretrained(folder)
    DartImageProcessor(size=32, crop_size=32).save_pretrained(folder)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.name == "README.md" else pytest.mark.slow, id=page.name) for page in PAGES],
)
def test_blocks_of_a_page_run_in_order(page, quickstart, docs_hub, stand_in, tmp_path):
    folder, text = tmp_path / "work", page.read_text(encoding="utf-8")
    shutil.copytree(quickstart, folder / "quickstart")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(PROJECT / name)
    makers = {
        "photos": lambda path: make_photos(path, sorted((quickstart / "images").iterdir())),
        "dart-tiny": save_tiny_model,
        "flowers": lambda path: shutil.copytree(quickstart / "model", path),
        "darvit-sm-ft392p.pth": lambda path: shutil.copy(stand_in("darvit-sm-ft392p"), path),
    }
    for name, make in makers.items():
        if name in text and not re.search(rf"--output {name}\b(?!/)|Path\(\"{name}\"", text):
            make(folder / name)
    done = subprocess.run(
        [sys.executable, RUN_BLOCKS],
        input=json.dumps(list(blocks_of(page))),
        cwd=folder,
        env={**docs_hub.environment(tmp_path / "home", WRITE_TOKEN), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_known_language(page):
    text = page.read_text(encoding="utf-8")
    found = [match["language"] for match in BLOCK.finditer(text)]
    assert set(found) <= RUN | SHOWN
    assert 2 * len(found) == len(re.findall("^```", text, re.M))
