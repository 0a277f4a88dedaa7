"""The same kernels as kernel.py, about a hundred times faster. Read this room last.

  fused.py   K[p, q] cut into sheets: read its docstring with the README's picture of the sheets at hand
  gpu.py     one conv and one relu of fused.py in a single pass on a GPU, in Pallas

gpu.py alone, or the whole folder, may be deleted: kernel.py computes the same, slowly.
"""
