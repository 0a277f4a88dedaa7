"""What was run, and what came of it.

  README.md            every table, and how each number was measured
  runs.jsonl           a line for each run: configuration, result, versions, commit
  laws.py              the power law of a learning curve
  tables.py            runs to tables
  report.py            the command that writes them: python -m results.report
  pictures.py          the pictures of the front page
  plot.py              the picture of one run (--plot)
  compare_solvers.py   the solver beside others

Only --plot needs this folder.
"""
