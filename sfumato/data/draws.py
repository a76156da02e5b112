"""A sample's own random numbers: counter-based, so that they depend on nothing but what names them.

Philox4x64-10 (Salmon et al., SC 2011) turns a key of 128 and a counter of 256 bits into random bits. Seed
and stream are the key; sample and visit are the upper half of the counter, so that no two of these
generators can meet before 2**128 blocks. No state is kept, hence none is saved.
"""

import numpy as np

# The streams of a sample. A number, once given, is never given to another purpose: a new stream then
# changes no older one, and an old run can be repeated.
CROP, FLIP, CAPTION, DROPOUT, POSTERIOR, NOISE, TIMESTEP, OFFSET, PERTURBATION, TAGS, MODEL = range(1, 12)
HELD = 12  # the noise of a record that is held out, whose visit is a noise level
# The stream of the whole data set: the order of an epoch.
ORDER = 64
BATCHES = 65  # which bucket a step takes
MIXED = 66  # the parts of a bucket, one among the other


def bits(seed: int, sample: int, visit: int, stream: int) -> np.random.Philox:
    """The raw generator of one sample's visit and one purpose; all four are in [0, 2**64)."""
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, 0, visit, sample], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def generator(seed: int, sample: int, visit: int, stream: int) -> np.random.Generator:
    """Random numbers of one sample's visit and one purpose; equal arguments give equal numbers."""
    return np.random.Generator(bits(seed, sample, visit, stream))


def uniform(seed: int, sample: int, visit: int, stream: int) -> float:
    """One number in [0, 1), of 53 bits."""
    return generator(seed, sample, visit, stream).random()


def normal(seed: int, sample: int, visit: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) in fp32, of the given shape."""
    return generator(seed, sample, visit, stream).standard_normal(shape, np.float32)


def torch_seed(seed: int, sample: int, visit: int) -> int:
    """What torch's own generator starts from in a forward pass (dropout), named by its first sample."""
    return int(bits(seed, sample, visit, MODEL).random_raw()) >> 1  # torch takes 63 bits


def pick(u: float, count: int) -> int:
    """One of range(count), each as likely, from u in [0, 1)."""
    return min(int(u * count), count - 1)
