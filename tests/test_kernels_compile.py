"""Every shipped kernel and tile compiles for every supported GPU, without one, to what its module claims of it.

The gate and its limits: compile_gate.py. What a case claims: lowbit_kernels/cases.py. A cold run compiles for minutes;
a warm one reads .compile_cache/.
"""

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

import gate_examples  # noqa: E402
from compile_gate import cases, compile_all, compile_one, complaints, planned  # noqa: E402
from lowbit_kernels.cases import ARCHITECTURES  # noqa: E402
from sass_figures import before_wait, instructions, loop_figures, macs, main_loop  # noqa: E402

CASES = cases()
PLAN = planned(CASES)


@pytest.fixture(scope="module")
def compiled():
    return compile_all(PLAN)


@pytest.mark.parametrize("key", PLAN, ids=lambda key: f"{key[0]}: {key[1]} sm_{key[2]}".replace("::", ":"))
def test_keeps_what_its_module_claims(key, compiled):
    module, name, arch = key
    figures, case = compiled[key], CASES[module, name]
    assert not isinstance(figures, str), f"{module}, {name}, sm_{arch} does not compile: {figures}"
    found = complaints(case, arch, figures)
    assert not found, f"{module}, {name}, {dict(case.extra)}, sm_{arch}: {'; '.join(found)} (all figures: {figures})"


def test_every_kind_is_compiled_for_every_architecture_it_allows():
    for (module, _), case in CASES.items():
        of_kind = {c.name for (m, _), c in CASES.items() if (m, c.kind) == (module, case.kind)}
        done = {arch for m, name, arch in PLAN if m == module and name in of_kind}
        assert done >= set(case.archs) and set(case.archs) <= set(ARCHITECTURES), (module, case.kind, done)
    assert {key[:2] for key in PLAN} == set(CASES)


# --- what the gate reads is not always fine


def faults(case, arch):
    return " ".join(complaints(case, arch, compile_one(case, arch)))


def test_a_spill_is_seen():
    assert "bytes of spills" in faults(gate_examples.spilling(), 80)


def test_too_much_shared_memory_is_seen():
    case = gate_examples.spilling()
    figures = replace(compile_one(case, 90), shared=101_377)
    assert "101377 bytes of shared memory, sm_86 has 101376" in " ".join(complaints(case, 86, figures))
    case = replace(case, extra={"shared_bound": 100})
    assert "promises at most 100" in " ".join(complaints(case, 90, figures))


def test_weights_that_go_through_shared_memory_are_seen():
    case = gate_examples.copied_words()
    figures = compile_one(case, 80)
    assert figures.loop.sts_bytes == 2.0  # one bf16 per weight
    assert "2.00 bytes per weight stored" in " ".join(complaints(case, 80, figures))
    budget = replace(case, registers_only=False, integer_budget=1.0)
    assert "integer instructions per weight, allowed 1.000" in " ".join(complaints(budget, 80, figures))


def test_serialised_wgmma_is_seen():
    case = gate_examples.serialised_wgmma()
    figures = compile_one(case, 90)
    assert figures.loop.wgmma_a == "registers"
    assert "C7515" in " ".join(complaints(case, 90, figures))
    other = replace(case, wgmma="shared")
    assert "takes the weights from registers, claimed shared" in " ".join(complaints(other, 90, figures))


def test_what_touches_memory_before_the_kernel_before_has_ended_is_seen():
    case = gate_examples.narrow_copies()
    early = replace(case, constexprs={**case.constexprs, "PDL": True})
    figures = compile_one(case, 90)
    assert figures.before_wait is None and "does not wait" in " ".join(complaints(early, 90, figures))
    code = ("CCTL.E.PF2 [R2]", "LDG.E R0, [R2.64]", "ACQBULK", "PREEXIT", "STG.E [R2.64], R0", "EXIT")
    sass = "".join(f"        /*{16 * i:04x}*/                   {text} ;  /* 0x00 */\n" for i, text in enumerate(code))
    assert before_wait(sass) == 1 and before_wait(sass.replace("LDG.E R0", "LDS R0")) == 0
    assert before_wait(sass.replace("PREEXIT", "NOP")) is before_wait(sass.replace("ACQBULK", "NOP")) is None
    found = complaints(early, 90, replace(figures, before_wait=1))
    assert "1 accesses to global memory before it waits" in " ".join(found)


def test_narrow_copies_are_seen():
    assert "in copies below 16 bytes" in faults(gate_examples.narrow_copies(), 80)


# --- reading machine code

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R2, RZ ;   /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], [R6.64] ;    /* 0x00 */
        /*0030*/                   LOP3.LUT R8, R9, 0xf000f, R10, 0xea, !PT ;  /* 0x00 */
        /*0040*/                   IMAD.MOV.U32 R3, RZ, RZ, R4 ;          /* 0x00 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, RZ ;   /* 0x00 */
        /*0060*/              @!P0 BRA 0x20 ;                             /* 0x00 */
        /*0070*/              @P1  BRA 0x0 ;                              /* 0x00 */
        /*0080*/                   BRA 0x80;                              /* 0x00 */
"""


def test_the_main_loop_is_the_innermost_one_with_matrix_work():
    code = instructions(SASS)
    assert [i.base for i in code].count("HMMA") == 2 and len(code) == 9
    assert [i.address for i in main_loop(code)] == [0x20, 0x30, 0x40, 0x50, 0x60], "not the one around it"
    outer = [i for i in code if i.address != 0x60]
    assert [i.address for i in main_loop(outer)] == [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x70]
    idle = instructions(SASS.replace("HMMA", "MOV"))
    assert main_loop(idle) == main_loop(code[-1:]) == []


def test_instructions_are_counted_per_weight():
    """8 warps, 8 tokens: an HMMA is 16 x 16 weights of each warp by 8 tokens."""
    figures = loop_figures(SASS, tokens=8, warps=8)
    assert figures.weights == 8 * 256
    assert figures.lop3 == 8 * 32 / figures.weights == figures.integer
    assert figures.total == 5 * figures.lop3 and figures.wide == "LDGSTS.128" and figures.narrow_bytes == 0
    assert loop_figures(SASS, tokens=8, warps=8, weights=1024).lop3 == 2 * figures.lop3


def test_tensor_core_instructions_are_sized():
    for text, size in (
        ("HMMA.16816.F32", 2048),
        ("HMMA.1688.F32.BF16", 1024),
        ("IMMA.16832.S8.S8", 4096),
        ("HGMMA.64x16x16.F32.BF16", 16384),
        ("IGMMA.64x8x32.S8.S8", 16384),
        ("LOP3.LUT", 0),
    ):
        (instruction,) = instructions(f"        /*0010*/                   {text} R4, R8, R2, RZ ;  /* 0x00 */")
        assert macs(instruction) == size
