"""Timing: harness, workloads, results."""
