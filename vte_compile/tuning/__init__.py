"""Tuning: train gates, choose thresholds and skips, measure plans, and what is promised of the answers."""
