"""Benchmarks: cases, one timing loop, a limit, charts. In the checkout: ``python -m bench run``."""
