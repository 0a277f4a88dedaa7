"""K larger than memory, and more than one machine. In reading order:

  store.py        tiles in a folder (--store): a killed run loses only the tiles in progress, damaged tiles are detected
  on_the_fly.py   a kernel matrix that every product computes again (--store none)
  on_device.py    a kernel matrix in the memory of GPUs, multiplied there
  places.py       which of these holds the tiles of a run
  processes.py    several processes: how they meet, and their one collective operation, the sum
  container.py    what a container leaves to its processes: cores and memory
  one_pass.py     solves for all ridges at once, and of a large K tries few
  rank.py         chooses the rank of the preconditioner that saves most time
  cifar5m.py      CIFAR-5m's six files, read block by block
  blocks.py       the published Myrtle-10 kernel of CIFAR-10's 60,000 images: K from files that others computed
  plan.py         predicts the hours and bytes of a run before it starts (--plan)
  rates.py        what one machine takes for each piece of a run's work
  simulate.py     8 to 1,024 hosts, tile by tile, from these rates: where more hosts stop helping

Without this folder everything runs in memory, in one process, ridge by ridge; the rank is a simple guess, and the limits of a
container are not seen.
"""
