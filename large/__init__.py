"""K larger than memory, and more than one machine. In reading order:

  store.py        tiles in a folder (--store): a killed run loses only the tiles in progress, damaged tiles are detected
  on_the_fly.py   a kernel matrix that every product computes again (--store none)
  processes.py    several processes: who they are, and their sum
  rank.py         how large a rank of the preconditioner saves time
  cifar5m.py      CIFAR-5m's six files, read block by block
  plan.py         hours and bytes of a run before it is begun (--plan)

Without this folder runs are in memory, in one process, and the rank is a simple guess.
"""
