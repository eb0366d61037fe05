"""Benchmarks of a trained model: generations, two graders, estimates with intervals, reports."""
