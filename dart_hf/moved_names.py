"""Modules of version 0.1 that have moved into rooms. Their names work for one release, with a DeprecationWarning.

`import dart_hf` puts a finder at the end of `sys.meta_path`. Python asks it only for modules that it does not find
otherwise, so it costs nothing until somebody imports an old module.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> name -> module that has it now.
MOVED = {
    "dart_hf.augmentation": {
        "EpochCallback": "dart_hf.training",
        "MixImages": "dart_hf.data",
        "SeededRows": "dart_hf.data",
        "training_transform": "dart_hf.data",
    },
    "dart_hf.averaging": {"load_average": "dart_hf.training"},
    "dart_hf.calibration": {
        "calibrate_model": "dart_hf.evaluation",
        "calibrate_scores": "dart_hf.evaluation",
    },
    "dart_hf.checkpoints": {"latest_complete_checkpoint": "dart_hf.training"},
    "dart_hf.digits_on_photos": {"digits_on_photos": "dart_hf.data.digits_on_photos"},
    "dart_hf.distillation": {"DistillationLoss": "dart_hf.training"},
    "dart_hf.labels": {"match_labels": "dart_hf.data"},
    "dart_hf.losses": {"soft_target_cross_entropy": "dart_hf.training"},
    "dart_hf.metrics": {"classification_accuracy": "dart_hf.evaluation"},
    "dart_hf.optimization": {"parameter_groups": "dart_hf.training"},
    "dart_hf.pictures": {"draw_regions": "dart_hf.visualization", "save_figure": "dart_hf.visualization"},
    "dart_hf.prediction": {
        "load_model": "dart_hf.hub",
        "predict": "dart_hf.evaluation",
    },
    "dart_hf.publishing": {"publish": "dart_hf.hub"},
    "dart_hf.region_statistics": {"count_regions_on_boxes": "dart_hf.evaluation"},
}
# Old name -> what to use now. DartTrainer and Recipe are in dart_hf.training.
GONE = {
    "dart_hf.averaging.EmaCallback": "DartTrainer averages the weights with Recipe(ema_decay=…)",
    "dart_hf.checkpoints.CompleteCheckpointCallback": "DartTrainer writes complete checkpoints",
    "dart_hf.checkpoints.RandomStateCallback": "DartTrainer saves and loads the state of all random generators",
    "dart_hf.checkpoints.resume_training": "use DartTrainer.train(resume_from_checkpoint=…)",
    "dart_hf.optimization.layerwise_optimizer": "DartTrainer takes Recipe(layer_decay=…)",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the old modules, and makes each one as a module that looks its names up in their new places."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        old, names = module.__name__, MOVED[module.__name__]

        def moved(name: str) -> Any:
            if (gone := f"{old}.{name}") in GONE:
                raise ImportError(f"{gone} is no longer there: {GONE[gone]}.")
            if name not in names:
                raise AttributeError(f"module {old!r} has no attribute {name!r}")
            warnings.warn(
                f"{old}.{name} has moved: import it from {names[name]}. The old name goes with the next release.",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(names[name]), name)

        module.__getattr__ = moved
        module.__all__ = list(names)


def keep_old_modules() -> None:
    """Let the modules of version 0.1 be imported by their old names."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
