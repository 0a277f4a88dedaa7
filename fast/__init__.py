"""The same kernels as kernel.py, about a hundred times faster.

  fused.py   K[p, q] cut into sheets: read its docstring with the README's picture beside it
  gpu.py     one layer of that in one pass of a GPU, in Pallas

Either file, or the whole folder, may be deleted: kernel.py computes the same, slowly. Read last.
"""
