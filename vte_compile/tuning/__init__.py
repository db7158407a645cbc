"""Tuning: train gates, choose thresholds and skips, measure plans."""
