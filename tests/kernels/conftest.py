import os

# The interpreter runs each warpgroup as a task of XLA's CPU thread pool, and tasks that wait for one another hang if
# the pool is smaller than a kernel. XLA sizes the pool by this variable, when the CPU client starts.
os.environ.setdefault("NPROC", "16")
