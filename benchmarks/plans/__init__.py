"""Whole plans of replays: what to run, cells that are kept, workers here or elsewhere, and what came out."""
