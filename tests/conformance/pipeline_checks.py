"""The checks that transformers' pipeline suite makes of a pipeline, for the two tasks of image classifiers.

The suite loads model and image processor, and batches; what a pipeline returns is checked by classes that the source
distribution leaves out. These take their place, under the names and with the methods by which the suite knows them.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, Pipeline


def example_pictures() -> list[Image.Image]:
    """A wide colour picture, a high one, a grey one and a transparent one."""
    values = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 4), dtype=np.uint8)
    return [
        Image.fromarray(values[0, :32, :, :3]),
        Image.fromarray(values[1, :, :36, :3]),
        Image.fromarray(values[2, ..., 0]),
        Image.fromarray(values[3]),
    ]


class _ImagePipelineTests:
    pipeline_class: type[Pipeline]

    def get_test_pipeline(
        self, model: Any, tokenizer: None = None, image_processor: Any = None, *, dtype: str = "float32", **others: Any
    ) -> tuple[Pipeline, list[Any]]:
        """A pipeline and examples that it must be able to read, alone and in batches."""
        model = model.to(getattr(torch, dtype))
        pipeline = self.pipeline_class(model=model, image_processor=image_processor)
        assert pipeline.dtype == getattr(torch, dtype)
        return pipeline, example_pictures()


class ImageClassificationPipelineTests(_ImagePipelineTests):
    pipeline_class = ImageClassificationPipeline

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[Any]) -> None:
        labels = set(pipeline.model.config.id2label.values())
        every = pipeline(examples[0], top_k=len(labels))
        assert {entry["label"] for entry in every} == labels
        scores = [entry["score"] for entry in every]
        assert scores == sorted(scores, reverse=True)
        assert abs(sum(scores) - 1) < 1e-3
        assert pipeline(examples[0], top_k=1) == every[:1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture.png")
            examples[0].save(path)
            assert pipeline(str(path), top_k=1) == every[:1]
        answers = pipeline(examples, batch_size=2, top_k=2)
        assert [len(answer) for answer in answers] == [2] * len(examples)


class ImageFeatureExtractionPipelineTests(_ImagePipelineTests):
    pipeline_class = ImageFeatureExtractionPipeline

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[Any]) -> None:
        inputs = pipeline.image_processor(examples[0], return_tensors="pt").to(pipeline.dtype)
        with torch.no_grad():
            expected = pipeline.model(**inputs)
        features = pipeline(examples[0], return_tensors=True)
        assert features.isfinite().all()
        assert torch.equal(features, expected.last_hidden_state)
        assert torch.equal(pipeline(examples[0], pool=True, return_tensors=True), expected.pooler_output)
        nested = pipeline(examples, batch_size=2)
        assert [np.shape(answer) for answer in nested] == [tuple(features.shape)] * len(examples)
