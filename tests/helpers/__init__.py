"""What several tests share: tiny models, tiny trainings, a local Hub, and a script that runs without dart_hf."""
