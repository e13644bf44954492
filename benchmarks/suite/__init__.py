"""Benchmarks of kvsim, run by asv; README.md beside this folder says how, and how to read them."""
