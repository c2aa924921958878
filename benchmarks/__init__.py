"""Measurements: python -m benchmarks.<quality|loading> --help. Nothing here is asserted in a test."""
