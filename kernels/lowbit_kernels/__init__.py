"""Triton kernels of lowbit: one operator per file, torch and triton only (kernels/README.md).

Nothing is imported here: layout.py and tiles.py work where there is no triton.
"""
