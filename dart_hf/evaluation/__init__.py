"""Evaluate models: predictions, metrics over token budgets, and calibration of scores."""

from dart_hf.evaluation.calibration import Calibration, calibrate_model, calibrate_scores
from dart_hf.evaluation.classification import BudgetResult, Evaluation, evaluate_classifier
from dart_hf.evaluation.metrics import Accuracy, TopKAccuracy, classification_accuracy, compute_metrics_for
from dart_hf.evaluation.prediction import Answer, Estimate, Prediction, image_files, predict
from dart_hf.evaluation.region_statistics import count_regions_on_boxes, regions_on_boxes
from dart_hf.evaluation.run import run_evaluation

__all__ = [
    "Accuracy",
    "Answer",
    "BudgetResult",
    "Calibration",
    "Estimate",
    "Evaluation",
    "Prediction",
    "TopKAccuracy",
    "calibrate_model",
    "calibrate_scores",
    "classification_accuracy",
    "compute_metrics_for",
    "count_regions_on_boxes",
    "evaluate_classifier",
    "image_files",
    "predict",
    "regions_on_boxes",
    "run_evaluation",
]
