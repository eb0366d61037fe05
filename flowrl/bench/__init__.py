"""Benchmarks that the installed package can run; `flowrl bench kernels` is `kernels.py`."""
