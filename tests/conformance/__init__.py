"""Conformance with the real scheduler on fresh random cases, and a check that wrong rules are caught.

See docs/conformance.md. `python -m tests.conformance` is the driver; `python -m tests.conformance.mutations` the check.
"""
