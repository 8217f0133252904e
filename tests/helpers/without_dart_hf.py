"""Load a model by its own code where dart_hf cannot be imported, and print what it computes, as JSON.

python -P without_dart_hf.py FOLDER_OR_ID RESAVED [REVISION]; it saves model and image processor again, to RESAVED.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


class Absent:
    """Finds no dart_hf, as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dart_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
source, resaved, *revision = sys.argv[1:]
settings = {"revision": revision[0] if revision else None, "trust_remote_code": True}

model = AutoModelForImageClassification.from_pretrained(source, **settings)
processor = AutoImageProcessor.from_pretrained(source, **settings)
bare = AutoModel.from_pretrained(source, **settings)
classify = pipeline("image-classification", model=source, **settings)
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
again = AutoModelForImageClassification.from_pretrained(resaved, trust_remote_code=True)

pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
image = np.zeros((40, 50, 3), dtype=np.uint8)
with torch.no_grad():
    found = {
        "classes": [type(each).__module__.split(".")[0] for each in (model, processor, bare)],
        "logits": model(pixels).logits[0].tolist(),
        "again": again(pixels).logits[0].tolist(),
        "pooled": bare(pixels).pooler_output[0].tolist(),
        "processed": list(processor(image, return_tensors="pt")["pixel_values"].shape),
        "labels": len(classify(Image.fromarray(image))),
        "dart_hf": "dart_hf" in sys.modules,
    }
print(json.dumps(found))
