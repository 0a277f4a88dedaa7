"""All runs, and the tables and pictures made from them.

  README.md            every table, and how each number was measured
  runs.jsonl           one line for each run: configuration, result, versions, commit
  laws.py              the laws of a learning curve, and what they predict
  tables.py            from runs to tables
  report.py            the command that writes the tables: python -m results.report
  pictures.py          the pictures of the front page
  plot.py              the picture of one run (--plot)
  speed.py             kernel entries a second, beside neural_tangents and the floor: speed.jsonl
  compare_solvers.py   our solver compared with others
  compare_sklearn.py   our estimator compared with scikit-learn's KernelRidge

No other folder needs this one; only --plot (also that of large/simulate.py) and lesson.ipynb do.
"""
