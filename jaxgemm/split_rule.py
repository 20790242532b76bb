"""Which letters of a product may be split over a mesh, and over which mesh axes they are.

Every axis of every operand belongs to a *letter* of the product (m, n, k, g, ...) and covers it in single elements
(values, bias, result) or in blocks of 128 (scales). A letter may be split over mesh axes if each device's share of it
is whole: a multiple of 128 where blocks would be cut, of the stored rows' alignment elsewhere.

| product | letters that may be split |
|---|---|
| dense | m (data parallel), n (columns), k (rows: partial sums) |
| grouped | m, n, k; g never: rows of a group may lie anywhere |
| masked | g (expert parallel), m, n, k |
| k_grouped | m, n, k (partial sums) |
| k_masked | g (expert parallel), m, n, k (partial sums) |
| quantize | leading axes, rows, columns; but for an axis that shares one scale, and columns that are joined |
| row sums | rows (partial sums), 128 a device at least; columns of either side, any number |
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from jax.sharding import PartitionSpec

from jaxgemm.layout import SCALE_BLOCK, VALUE_ROW_ALIGNMENT
from jaxgemm.problem import GemmProblem, QuantizeProblem, RowSums
from jaxgemm.scaled_array import SQUARE_BLOCK, is_mn_major, transposed_block_shape

Dims = tuple[str, ...]
"""Labels of an array's axes: a letter, with "/" behind it if the axis counts blocks of 128."""

LHS_VALUES, RHS_VALUES = 0, 2
"""Places of these among the operands of a product."""

Axes = tuple[Any, ...]
"""Names of mesh axes, the major one first."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Over which mesh axes each letter is split.

    Attributes:
        mesh: the mesh.
        letters: of the operands, and of the product that each device computes.
        scattered: of the result, in addition: what a partial sum leaves split as it is added up over these axes.
    """

    mesh: Any
    letters: dict[str, Axes]
    scattered: dict[str, Axes]

    def shares(self, letter: str) -> int:
        """Returns into how many parts the operands are cut along a letter."""
        return _num_devices(self.mesh, self.letters.get(letter, ()))

    def operand_spec(self, dims: Dims) -> PartitionSpec:
        """Returns how an operand with these labels is split."""
        return PartitionSpec(*(_entry(self.letters.get(letter, ())) for letter in map(_letter, dims)))

    def result_spec(self, dims: Dims) -> PartitionSpec:
        """Returns how a result with these labels is split, or an operand that meets it after the sum."""
        return PartitionSpec(*(_entry(self.letters.get(x, ()) + self.scattered.get(x, ())) for x in map(_letter, dims)))


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How a primitive's arrays may be split.

    Attributes:
        operands: labels of each operand's axes.
        results: labels of each result's axes.
        units: for each letter that may be split, what each device's share must be a multiple of.
        lengths: the (stored) length of each of these letters.
        summed: the letter that the product contracts, if it may be split: partial products are then summed.
        epilogue: how many of the last operands are needed after that sum only.
        least: how much of that letter each device must have.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    units: dict[str, int]
    lengths: dict[str, int]
    summed: str | None = None
    epilogue: int = 0
    least: int = 0

    def sharding_rule(self) -> SdyShardingRule:
        """Returns the rule that propagates shardings through the primitive."""
        blocked = {dim[:-1] for dims in (*self.operands, *self.results) for dim in dims if dim.endswith("/")}
        unique: list[str] = []
        sizes: dict[str, int] = {}

        def factor(dim: str) -> Any:
            letter = _letter(dim)
            if letter not in self.units:  # an axis that stays whole has a factor of its own
                unique.append(f"whole{len(unique)}")
                return unique[-1]
            if dim.endswith("/") or letter not in blocked:
                return letter
            sizes[f"{letter}block"] = SCALE_BLOCK
            return CompoundFactor(letter, f"{letter}block")

        operands, results = (
            tuple(ArrayMapping(*map(factor, dims)) for dims in arrays) for arrays in (self.operands, self.results)
        )
        return SdyShardingRule(
            operands,
            results,
            reduction_factors=(self.summed,) if self.summed else (),
            need_replication_factors=tuple(unique),
            **sizes,  # type: ignore[arg-type]  # its stub has no factor sizes
        )

    def split_product(self, mesh: Any, operand_specs: Sequence[Any], result_specs: Sequence[Any]) -> Split:
        """Chooses the split of a product: the sum that both operands are cut for, then the result, then operands.

        A sum that both operands are cut for stays cut, also where the result is to be split over the same mesh axes:
        then the sum scatters it. Otherwise the mesh axes serve the result first, so that of rows and weights split
        over one mesh axis (FSDP), the weights are gathered.
        """
        operands = list(_wishes(self.operands, operand_specs))
        results = list(_wishes(self.results, result_specs))
        letters: dict[str, Axes] = {}
        if self.summed:
            lhs, rhs = (
                dict(_wishes([self.operands[i]], [operand_specs[i]])).get(self.summed, ())
                for i in (LHS_VALUES, RHS_VALUES)
            )
            self._take(letters, mesh, [(self.summed, _common_prefix(lhs, rhs))])
        self._take(letters, mesh, results)
        self._take(letters, mesh, operands)
        return Split(mesh, letters, self._scatter(letters, mesh, results))

    def split_pass(self, mesh: Any, operand_specs: Sequence[Any], result_specs: Sequence[Any]) -> Split:
        """Chooses the split of a quantising pass: as the operand is, since moving FP8 is cheaper than moving floats.

        Where that would cut a block, another letter is split over the same mesh axes: exchanging parts is cheaper
        than gathering the whole.
        """
        operands = list(_wishes(self.operands, operand_specs))
        letters: dict[str, Axes] = {}
        self._take(letters, mesh, operands)
        self._take(letters, mesh, list(_wishes(self.results, result_specs)))
        self._take(letters, mesh, [(letter, axes) for _, axes in operands for letter in self.units])
        return Split(mesh, letters, {})

    def split_row_sums(self, mesh: Any, operand_specs: Sequence[Any], result_specs: Sequence[Any]) -> Split:
        """Chooses the split of sums over rows: rows as they lie, which shall not move, then results, then columns."""
        operands = list(_wishes(self.operands, operand_specs))
        results = list(_wishes(self.results, result_specs))
        letters: dict[str, Axes] = {}
        self._take(letters, mesh, [(letter, axes) for letter, axes in operands if letter == self.summed])
        self._take(letters, mesh, results)
        self._take(letters, mesh, operands)
        return Split(mesh, letters, self._scatter(letters, mesh, results))

    def _take(self, letters: dict[str, Axes], mesh: Any, wishes: Sequence[tuple[str, Axes]]) -> None:
        """Fulfils wishes in order, each with as many of its mesh axes as are free and leave the shares whole."""
        for letter, wanted in wishes:
            taken = {axis for axes in letters.values() for axis in axes}
            axes = tuple(axis for axis in wanted if axis not in taken)
            while axes and not self._is_whole(letter, mesh, axes):
                axes = axes[:-1]
            if axes and letter not in letters:
                letters[letter] = axes

    def _is_whole(self, letter: str, mesh: Any, axes: Axes) -> bool:
        if letter not in self.units or self.lengths[letter] % (self.units[letter] * _num_devices(mesh, axes)):
            return False
        return letter != self.summed or self.lengths[letter] // _num_devices(mesh, axes) >= self.least

    def _scatter(self, letters: dict[str, Axes], mesh: Any, results: Sequence[tuple[str, Axes]]) -> dict[str, Axes]:
        """Returns the letters that the sum over the mesh shall leave split, m or n, over all axes of the sum."""
        for letter, wanted in results:
            kept, axes = letters.get(letter, ()), letters.get(self.summed or "", ())
            shares = _num_devices(mesh, kept + axes)
            if axes and wanted == kept + axes and letter in ("m", "n") and self.lengths[letter] % shares == 0:
                return {letter: axes}
        return {}


def gemm_rule(problem: GemmProblem, shapes: Sequence[tuple[int, ...]]) -> SplitRule:
    """Returns how a product may be split; `shapes` are those of its operands as stored."""
    lead = tuple("g" if has_groups else "" for has_groups in problem.operands_have_groups)
    lhs = _operand_dims(lead[0], "m", "k", problem.lhs_block_shape)
    rhs = _operand_dims(lead[1], "n", "k", problem.rhs_block_shape)
    result: Dims = ("m", "n") if problem.kind in ("dense", "grouped") else ("g", "m", "n")
    epilogue: list[Dims] = []
    if problem.has_bias:
        epilogue.append(("n",) if problem.kind == "dense" else ("g", "n"))
    if problem.accumulate:
        epilogue.append(result)
    if problem.kind != "dense":
        epilogue.append(("g",))

    units = {"m": _row_unit(problem.lhs_block_shape), "n": _row_unit(problem.rhs_block_shape)}
    if problem.kind in ("masked", "k_masked"):
        units["g"] = 1
    if problem.lhs_block_shape[1] == problem.rhs_block_shape[1] == SCALE_BLOCK:
        units["k"] = SCALE_BLOCK
    lengths = {"m": problem.m, "n": problem.n, "k": shapes[0][-1], "g": problem.num_groups}
    return _split_rule([*lhs, *rhs, *epilogue], [result], units, lengths, summed="k", epilogue=len(epilogue))


def quantize_rule(problem: QuantizeProblem, shapes: Sequence[tuple[int, ...]]) -> SplitRule:
    """Returns how a quantising pass over arrays of these shapes may be split."""
    arrays, sizes = problem.split_inputs(shapes)
    results = problem.results(arrays)
    *lead_shape, rows, cols = shapes[0]
    lead = tuple(f"l{i}" for i in range(len(lead_shape)))
    columns = "joined" if problem.joined else "c"  # no share of half the columns of one array is one of all of another
    dims: list[Dims] = []
    for plain, shape in results:
        if plain.natural:
            dims += _operand_dims(lead, "r", columns, plain.block_shape)
        if plain.transposed:
            across = "segments" if problem.rows == "segments" else "r"
            dims += _operand_dims(lead, columns, across, transposed_block_shape(plain.block_shape, rows, shape[-1]))
        if plain.column_sum:
            dims.append(("groups", columns) if problem.rows == "segments" else (*lead, columns))

    whole_scales = problem.block_shape[1] != SCALE_BLOCK
    scaled_rows = any(plain.transposed for plain, _ in results) or problem.block_shape[0] > 1
    scaled_cols = any(plain.natural for plain, _ in results) or problem.block_shape[0] > 1
    units = dict.fromkeys(lead, 1)
    if not (whole_scales and scaled_rows) and problem.rows != "segments":
        units["r"] = SCALE_BLOCK if scaled_rows else VALUE_ROW_ALIGNMENT
    if not whole_scales and not problem.joined:
        units["c"] = SCALE_BLOCK if scaled_cols else VALUE_ROW_ALIGNMENT
    lengths = {**dict(zip(lead, lead_shape, strict=True)), "r": rows, "c": cols}
    operands: list[Dims] = [(*lead, "r", columns)] * len(arrays)
    if sizes is not None:
        operands.append(("groups",) if problem.rows == "segments" else lead)
    return _split_rule(operands, dims, units, lengths)


def row_sums_rule(problem: RowSums, shapes: Sequence[tuple[int, ...]]) -> SplitRule:
    """Returns how sums over rows may be split; `shapes` are those of lhs, rhs, sizes and the sums, as in `RowSums`."""
    del problem
    (rows, m), (_, n), (num_groups,), *sums = shapes
    results: list[Dims] = [("g", "m", "n") if len(shape) == 3 else ("g", "n") for shape in sums]
    lengths = {"k": rows, "m": m, "n": n, "g": num_groups}
    operands: list[Dims] = [("k", "m"), ("k", "n"), ("g",), *results]
    rule = _split_rule(operands, results, {"k": 1, "m": 1, "n": 1}, lengths, summed="k", epilogue=len(results))
    return dataclasses.replace(rule, least=SCALE_BLOCK)  # a block that is cut has its end on the next device


def _split_rule(
    operands: Sequence[Dims],
    results: Sequence[Dims],
    units: dict[str, int],
    lengths: dict[str, int],
    summed: str | None = None,
    epilogue: int = 0,
) -> SplitRule:
    """Drops the letters that no mesh could split: padded ones, and those of a single unit."""
    units = {a: unit for a, unit in units.items() if unit and lengths[a] % unit == 0 and lengths[a] > unit}
    summed = summed if summed in units else None
    return SplitRule(tuple(operands), tuple(results), units, lengths, summed, epilogue)


def _operand_dims(lead: Sequence[str], rows: str, cols: str, block_shape: tuple[int, int]) -> list[Dims]:
    """Returns the labels of the stored values and scales of a quantised array."""
    lead = tuple(lead)
    col_blocks = f"{cols}/" if block_shape[1] == SCALE_BLOCK else "one"
    if is_mn_major(block_shape):
        return [(*lead, rows, cols), (*lead, col_blocks, rows)]
    row_blocks = f"{rows}/" if block_shape[0] == SCALE_BLOCK else "one"
    return [(*lead, rows, cols), (*lead, row_blocks, col_blocks)]


def _row_unit(block_shape: tuple[int, int]) -> int:
    """Returns what shares of an operand's rows must be a multiple of; 0 if its rows cannot be split."""
    if block_shape == SQUARE_BLOCK:
        return SCALE_BLOCK
    return VALUE_ROW_ALIGNMENT if is_mn_major(block_shape) else 0


def _wishes(arrays: Sequence[Dims], specs: Sequence[Sequence[Axes]]) -> Iterator[tuple[str, Axes]]:
    """Yields the letters of arrays that are split, and over which mesh axes."""
    for dims, spec in zip(arrays, specs, strict=True):
        for dim, axes in zip(dims, spec, strict=True):
            if axes:
                yield _letter(dim), axes


def _common_prefix(a: Axes, b: Axes) -> Axes:
    return tuple(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _letter(dim: str) -> str:
    return dim.removesuffix("/")


def _entry(axes: Axes) -> Any:
    return axes or None


def _num_devices(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
