"""What tiles of csrc/cuda/finish.cu take: data, written by ``python -m bench tiles --write``.

Measured on an NVIDIA H200, float16.
"""

#: Microseconds of a tile beside its jobs, and of a job, by rows and columns of the tile.
FIXED_US = 5.3
JOB_US = {
    (8, 64): 0.98,
    (8, 128): 1.08,
    (8, 192): 1.16,
    (8, 256): 1.31,
    (16, 128): 1.66,
    (16, 192): 1.95,
}
