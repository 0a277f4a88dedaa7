"""Kernel regression on small molecules. In reading order:

  layers.py   layers of graphs, added to kernel.py's language
  smiles.py   files to checked molecules, graphs and fingerprints (RDKit)
  graphs.py   the kernels of graph networks, fast
  missing.py  many tasks with missing labels on one kernel
  train.py    the experiment: python -m molecules.train

Nothing else needs this folder.
"""
