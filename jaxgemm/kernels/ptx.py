"""What kernels need to write PTX where Pallas has no name for it."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

LANES = 32
"""Threads of a warp."""

BARRIER_WORDS = 2
"""32-bit words of a barrier."""

BUFFER = plgpu.RefType()
"""Type of a buffer that is given to inlined code."""

SCALAR = plgpu.Layout.WG_SPLAT(())
"""Type of a number that is given to inlined code."""


def constant(value: int) -> ir.Value:
    """A 32-bit integer."""
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def flag(predicate: ir.Value) -> ir.Value:
    """A truth value as a 32-bit integer."""
    return arith.extui(ir.IntegerType.get_signless(32), predicate)


def address(ref: ir.Value) -> ir.Value:
    """The address of a buffer in this block's shared memory.

    NOTE: all 32 bits of it: the upper ones hold the block's number in its cluster.
    """
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def in_block(place: ir.Value, block: ir.Value) -> ir.Value:
    """The same place in the shared memory of this block of the cluster."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [place, block], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", asm_dialect=0)


def lane() -> ir.Value:
    """This thread's number in its warp."""
    return arith.andi(mgpu.utils.thread_idx(), constant(LANES - 1))


def if_set(instruction: str) -> str:
    """An instruction that is done where the first operand is not zero."""
    return f"{{ .reg .pred p; setp.ne.b32 p, $0, 0; @p {instruction} }}"


def wait_for_phase(barrier: ir.Value, parity: ir.Value, scope: str = "cta") -> None:
    """Waits until a barrier has completed its last phase of this parity, and sees what was done before it."""
    wait = f"mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 p, [$0], $1;"
    asm(f"{{ .reg .pred p; again${{:uid}}: {wait} @!p bra again${{:uid}}; }}", [barrier, parity])


def asm(text: str, operands: list[ir.Value]) -> None:
    """Instructions with effects on memory: the compiler moves no access to it across."""
    constraints = [_register(operand.type) for operand in operands]
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, text, ",".join([*constraints, "~{memory}"]), asm_dialect=0, has_side_effects=True)


def _register(kind: ir.Type) -> str:
    """The constraint of an operand: in which registers PTX has its type."""
    return "f" if isinstance(kind, ir.F32Type) else {16: "h", 32: "r", 64: "l"}[ir.IntegerType(kind).width]
