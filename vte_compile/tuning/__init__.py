"""Tuning: where a model's visual tokens may leave, and what is promised of the answers."""
