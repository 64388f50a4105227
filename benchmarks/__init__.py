"""Measurements of speed and memory, side by side with what else there is. Nothing here is a test; nothing asserts a time.

python -m benchmarks            # or: nox -s bench
"""
