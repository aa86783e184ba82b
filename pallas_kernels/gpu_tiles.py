"""How a product is cut for a Hopper GPU: what a thread block computes, and in which steps."""

import dataclasses

WARPGROUPS = 2  # of a thread block that compute; a third one copies
WIDTH = 64  # columns of W a warpgroup decodes: 128 bytes of 16-bit numbers, the widest swizzle

_PROCESSORS = 132  # of an H100 SXM and an H200; a block takes a whole one (all its registers)
_SHARED = 220 << 10  # bytes of the 227 KiB a block may have: the rest is for barriers and padding
_ACCUMULATOR = 128 * 128  # fp32 numbers a warpgroup sums: 128 registers a thread, as many are left
_STAGES = 6  # more in flight than memory latency asks for


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. All in elements.

    m: rows of x a thread block takes. rows: rows of W (along K) a warpgroup decodes in a step.
    transposed: whether W's rows are outputs, not summed over. splits: parts of the contraction that
    different blocks sum. steps: of each part. stages: steps whose operands fit in shared memory.
    """

    m: int
    rows: int
    transposed: bool
    splits: int
    steps: int
    stages: int

    @property
    def step_k(self) -> int:
        """Rows of W a thread block decodes in a step; with W^T its warpgroups share the outputs."""
        return self.rows * (WARPGROUPS if self.transposed else 1)

    @property
    def step_n(self) -> int:
        """Columns of W a thread block decodes in a step."""
        return WIDTH * (1 if self.transposed else WARPGROUPS)

    @property
    def contraction(self) -> int:
        """What a step sums over."""
        return self.step_n if self.transposed else self.step_k

    @property
    def outputs(self) -> int:
        """Outputs of a warpgroup."""
        return self.rows if self.transposed else WIDTH

    def shared(self, block: int) -> tuple[int, int]:
        """Bytes of shared memory: once, and for each stage."""
        decoded = WARPGROUPS * 2 * self.rows * WIDTH * 2
        leaving = WARPGROUPS * min(self.m, 64) * self.outputs * 4
        codes, scales = self.step_k // 2 * self.step_n, self.step_k // block * self.step_n * 4
        return decoded + leaving, 2 * self.m * self.contraction + codes + scales


def choose(m: int, k: int, n: int, block: int, transposed: bool) -> Tiles:
    """Tiles for x [m, k] times W [k, n] in blocks of `block`; transposed: x [m, n] times W^T.

    | m       | rows of x | rows of W | why                                                       |
    | ------- | --------- | --------- | --------------------------------------------------------- |
    | 1..64   | all, in   | 128       | Reading and decoding W is all the work: once, in deep      |
    |         | 8..64     |           | steps that amortize their barriers, by every processor.    |
    | over 64 | 256, 128  | 64        | A decoded tile serves as many rows as the registers can    |
    |         | or 64     |           | sum, but rather fewer than leave processors idle.          |

    A block of W is decoded whole: blocks of 128 and 256 make steps deeper and leave less memory
    for rows of x.
    """
    small = m <= 64
    rows = max(block, 128 if small else 64)
    if small:
        # The shortest that takes all rows, else the tallest that fits.
        heights = [h for h in (8, 16, 32, 64) if h >= m] + [32, 16, 8]
    else:
        heights = [256, 128, 64, 32, 16, 8]
    options = [t for h in heights if (t := _cut(h, m, k, n, rows, block, transposed))]
    if small:
        return options[0]
    full = [t for t in options if _blocks(t, m, k, n) >= 0.9 * _PROCESSORS]
    least = [t for t in options if t.m >= 64] or options
    return full[0] if full and full[0].m >= least[-1].m else least[-1]


def _cut(
    m: int, size: int, k: int, n: int, rows: int, block: int, transposed: bool
) -> Tiles | None:
    """m of `size` rows at a time, if registers and shared memory allow it."""
    tiles = Tiles(m, rows, transposed, 1, 1, 1)
    once, each = tiles.shared(block)
    stages = (_SHARED - once) // each
    # One step is multiplied and one decoded at any time.
    if stages < 2 or m * tiles.outputs > _ACCUMULATOR:
        return None
    depth = n if transposed else k
    steps = -(-depth // tiles.contraction)
    splits = _splits(_blocks(tiles, size, k, n), steps, size, depth)
    steps = -(-steps // splits)
    splits = -(-depth // (tiles.contraction * steps))
    return dataclasses.replace(
        tiles, splits=splits, steps=steps, stages=min(stages, _STAGES, max(steps, 2))
    )


def _splits(blocks: int, steps: int, m: int, depth: int) -> int:
    """Into how many parts, of four steps or more, to cut each block's sum over `depth`.

    The time is that of the rounds in which the processors take the parts, relative to none of them
    ever idle, and that of writing and reading each part's sums. Against decoding (about 20 values
    a cycle and processor) that is 9 m / depth, against multiplying (at 600 Tflop/s) 500 / depth.
    These are makers' numbers at 4.8 TB/s; nothing here was measured.
    """

    def cost(splits: int) -> float:
        rounds = -(-blocks * splits // _PROCESSORS)
        idle = rounds * _PROCESSORS / (blocks * splits)
        return idle + (splits > 1) * splits * min(9 * m, 500) / depth

    return min(range(1, max(1, min(16, steps // 4)) + 1), key=cost)


def _blocks(tiles: Tiles, m: int, k: int, n: int) -> int:
    """Thread blocks without splitting sums."""
    outputs = WARPGROUPS * tiles.outputs
    return -(-m // tiles.m) * -(-(k if tiles.transposed else n) // outputs)
