"""Metrics, intervals, overlays and reports from label maps (numpy only)."""
