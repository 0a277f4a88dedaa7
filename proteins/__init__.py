"""Kernel regression on protein sequences. In reading order:

  layers.py      layers of sequences, added to kernel.py's language
  sequences.py   files to checked sequences; encodings of residues, functions of the target
  train.py       the experiment: python -m proteins.train

Nothing else needs this folder.
"""
