"""`DartTrainer` on dartified models, whose weights transformers saves under older names."""

from helpers.tiny_training import KEEP_WORST, same_tensors, tiny_trainer

from dart_hf import DartifiedForImageClassification


def test_the_best_weights_are_loaded_at_the_end(classifier, make_student, tmp_path):
    steps = {"max_steps": 4, "eval_steps": 1, "save_steps": 1}
    trainer = tiny_trainer(tmp_path, model=make_student(classifier), **steps, **KEEP_WORST)
    trainer.train()
    assert trainer.state.best_global_step < 4
    best = DartifiedForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_tensors(trainer.model.state_dict(), best.state_dict())
