"""Reproduction of ADPretrain: pretraining on Real-IAD, evaluation, publishing.

Run from a checkout: ``python -m training.<entry>``.
"""
