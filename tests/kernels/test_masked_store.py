"""Where the lanes of a storing warp read and write: arithmetic that the interpreter cannot run, done on Python's numbers."""

import itertools
import types

import pytest
from kernel_support import lowered

from jaxgemm.kernels import masked_store
from jaxgemm.kernels.masked_store import LOADS_IN_FLIGHT, Limits

STAGED, OUT = 1 << 20, 1 << 40
"""Addresses of both buffers."""

ROWS, LANES = 64, 32


class Machine:
    """Stands in for what the copier builds its code with, and does it: numbers for values."""

    def __init__(self, bits):
        self.lane, self.stores = 0, []
        same = lambda kind, value: value  # noqa: E731
        self.arith = types.SimpleNamespace(
            addi=lambda a, b: a + b, subi=lambda a, b: a - b, muli=lambda a, b: a * b, divui=lambda a, b: a // b,
            remui=lambda a, b: a % b, andi=lambda a, b: a & b, xori=lambda a, b: a ^ b, shrui=lambda a, b: a >> b,
            extsi=same, constant=same, CmpIPredicate=types.SimpleNamespace(slt="<"), cmpi=self.compare,
        )  # fmt: skip
        self.ir = types.SimpleNamespace(
            IntegerType=types.SimpleNamespace(get_signless=lambda size: size),
            IntegerAttr=types.SimpleNamespace(get=same),
            MemRefType=lambda kind: types.SimpleNamespace(element_type=bits),
        )
        self.mgpu = types.SimpleNamespace(
            utils=types.SimpleNamespace(
                memref_ptr=lambda ref: ref.address, bitwidth=lambda kind: kind,
                getelementptr=lambda base, offsets, kind: base + offsets[0],
            )
        )  # fmt: skip
        self.llvm = types.SimpleNamespace(
            ptrtoint=lambda kind, value: value, load=lambda kind, place: (place, kind // 8)
        )
        self.ptx = types.SimpleNamespace(
            LANES=LANES, lane=lambda: self.lane, if_set=lambda text: text, flag=int, asm=self.store
        )

    def compare(self, predicate, a, b):
        assert predicate == "<"
        return a < b

    def store(self, text, operands):
        is_within, address, (place, size) = operands
        assert f"st.global.b{8 * size} " in text
        if is_within:
            self.stores.append((address, place, size))


def copied(monkeypatch, itemsize, columns, pitch, width, chunk, limits):
    """What a warp stores of a chunk: where, from where, how many bytes."""
    machine = Machine(8 * itemsize)
    for name in ("arith", "ir", "mgpu", "llvm", "ptx"):
        monkeypatch.setattr(masked_store, name, getattr(machine, name))
    staged, out = (types.SimpleNamespace(address=address, type=None) for address in (STAGED, OUT))
    units = columns * itemsize // width
    for lane in range(LANES):
        machine.lane = lane
        copier = masked_store._Copier(staged, out, width, units, columns * itemsize, pitch * itemsize)
        for step in range(0, ROWS * units // LANES, LOADS_IN_FLIGHT[width]):
            copier.copy(chunk, step, limits)
    return machine.stores


def swizzled(row, byte, row_bytes):
    """Where the TMA expects a byte of a chunk: 16 bytes are exchanged within a row, by the 128 bytes they lie in."""
    exchange = row * row_bytes // 128 % (row_bytes // 16)
    return row * row_bytes + (byte // 16 ^ exchange) * 16 + byte % 16


@lowered
@pytest.mark.parametrize("row_bytes", [32, 64, 128])
@pytest.mark.parametrize(
    "itemsize, pitch, width", [(2, 4101, 2), (2, 4102, 4), (2, 4100, 8), (4, 4101, 4), (4, 4102, 8)]
)
def test_every_element_goes_where_it_belongs(monkeypatch, row_bytes, itemsize, pitch, width):
    columns = row_bytes // itemsize
    for chunk, rows_left, columns_left in itertools.product((0, 3), (-2, 17, 99), (-8, 8, 999)):
        limits = Limits(1000, 256, rows_left, columns_left)
        stores = copied(monkeypatch, itemsize, columns, pitch, width, chunk, limits)
        found = {address + i: place + i for address, place, size in stores for i in range(size)}
        assert len(found) == sum(size for *_, size in stores)  # nothing is stored twice
        expected = {
            OUT + ((1000 + row) * pitch + 256) * itemsize + byte: (
                STAGED + chunk * ROWS * row_bytes + swizzled(row, byte, row_bytes)
            )
            for row in range(min(ROWS, max(rows_left, 0)))
            for byte in range(min(row_bytes, max(columns_left, 0) * itemsize))
        }
        assert found == expected
