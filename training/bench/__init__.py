"""Ratios against naive forms, measured side by side in one process: ``python -m training.bench [NAME ...]``."""
