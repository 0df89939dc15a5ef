"""What a pair costs the other losses beside kd_loss: instructions issued, from the machine code.

Of aligned bfloat16 rows without a hard term, by a CTA of kThreads threads whose registers are full;
a sparse teacher's of 64 classes at V = 32768. Of a plain row less is counted than it issues (loads,
the gradient and its stores, but not the exchange); of the others every instruction there is that
their row may come to: code is counted, not runs. So the ratio of the two is at most what comes out.

What one warp does counts by one in so many as a CTA has; so do, by the warps that have any, the
classes that a sparse teacher names. Of two exclusive cases the longer one counts.
"""

from collections.abc import Callable

from compile_gate import KERNELS, Figures, Instruction, Part, constant, vectors

NAMED, V = 64, 32768
LANES = 32

Code = list[Instruction]


def at(code: Code, file: str, *texts: str) -> Code:
    """From the lines with one of these texts, and from what they call."""
    numbers = set()
    for text in texts:
        found = {
            n
            for n, line in enumerate((KERNELS / file).read_text().splitlines(), start=1)
            if text in line
        }
        assert found, f"{file} has no {text!r}"
        numbers |= found
    return [i for i in code if any(f == file and n in numbers for f, n in i.lines)]


def less(code: Code, *others: Code) -> Code:
    gone = {id(i) for other in others for i in other}
    return [i for i in code if id(i) not in gone]


def part(code: Code) -> Callable[..., Code]:
    return lambda file, function: Part(code, file, function).code


def issued(code: Code) -> int:
    """Less what ptxas adds beside each shuffle for a warp that has not come together."""
    reductions = part(code)("machine.h", "warp_sum") + part(code)("machine.h", "warp_max")
    shuffles = Part(reductions).count("SHFL") - Part(reductions).count("WARPSYNC.COLLECTIVE")
    return len(less(code, reductions)) + 2 * shuffles  # each with what it is for


UNPACKED = ("= as_float(a[j] << 16)", "= as_float(a[j] & 0xffff0000u)")  # bfloat16
FOUND = "fn(n, static_cast<int>(id))"
STORED = "store_whole(dstudent, step, pack_gradient("  # the gradient of a whole step


def packed(code: Code) -> Code:
    return at(part(code)("columns.h", "pack"), "columns.h", "pack_bfloat16(")


def dense(name: str, target: str, code: Code) -> Figures:
    """Per pair of kd_rows, forward: a plain row, one with probabilities, a decoupled one."""
    pairs = vectors(name, target) * constant("kPerLane")
    warps = constant("kThreads") // LANES
    run = part(Part(code, "registers.h", "run").code)
    stored = at(run("registers.h", "write_gradient"), "registers.h", STORED)
    loads = at(run("slice.h", "load"), "slice.h", "load_all(Is<Source::kAligned>(")
    plain = (
        issued(run("registers.h", "sum_soft"))
        + len(at(loads, "slice.h", "[i].first = load_inside"))
        + len(at(run("slice.h", "unpack_all"), "columns.h", *UNPACKED))
        + len(part(stored)("sums.h", r"operator\(\)"))
        + len(packed(stored))
        + len(at(part(stored)("columns.h", "store_aligned"), "columns.h", "packed.first"))
    )
    logarithms = Part(run("registers.h", "take_logarithms"))
    every = run("registers.h", "leave_out_label")
    label = [run("registers.h", "leave_out"), part(every)("row.h", "left_out")]
    add_label = part(stored)("row.h", "add_label")
    term = run("registers.h", "set_target")
    near, far = (part(term)("decoupled.h", f"{x}_divergence") for x in ("near", "far"))
    by_all = (
        len(less(every, *label))
        + len(run("row.h", "target_factor"))
        + len(less(add_label, part(add_label)("columns.h", "index"),
                   at(add_label, "row.h", "gradient[j] += fresh(a.at_label)")))
    )  # fmt: skip
    by_one = sum(map(len, label)) / vectors(name, target) + len(term) - min(len(near), len(far))
    return {
        "issued_per_pair": round(plain / pairs, 2),
        "issued_per_pair_of_probabilities": round((plain + len(logarithms.code)) / pairs, 2),
        "issued_per_pair_decoupled": round((plain + by_all + by_one / warps) / pairs, 2),
        "special_functions_per_pair_of_probabilities": round(
            (Part(run("registers.h", "sum_soft")).count(r"MUFU") + logarithms.count(r"MUFU"))
            / pairs, 2),
    }  # fmt: skip


def restricted(name: str, target: str, code: Code) -> Figures:
    """Per column of topk_rows, both sides restricted to the teacher's classes."""
    file = "topk_row.h"
    columns = vectors(name, target) * constant("kPerLane")
    warps = constant("kThreads") // LANES
    run = part(at(code, "kd_rows.cu", "TopkRow<Exchange, true>(row, teacher).run()"))

    # Over the columns: without exponentials, which are of the hard term and of other teachers.
    sums = run(file, "sum_classes")
    sums = less(
        sums,
        part(sums)(file, "named"),
        at(sums, file, "const float e = exp2_approx", "few += named", "sum += few"),
    )
    stored = run(file, "write_classes")
    put_back = at(stored, file, "if (named >> j & 1u) gradient[j]", "dstudent.first(step) + j")
    column = part(put_back)("row.h", "at")
    in_step = less(put_back, column)
    gradient = less(
        stored, put_back,
        *(part(stored)("columns.h", f"store_{how}") for how in ("aligned", "shifted", "ragged")),
        less(part(stored)("columns.h", "pack"), packed(stored)),
        at(stored, file, "scale, -base)) * factor", "hard_base)), hard, gradient[j])"),
        part(stored)("row.h", "add_label"),
    )  # fmt: skip
    share = NAMED * LANES / V  # of the columns in one place of all lanes
    count = len(at(run("slice.h", "unpack_all"), "columns.h", *UNPACKED))
    count += issued(sums) + len(gradient)
    count += len(in_step) * min(1, share * constant("kPerLane")) + len(column) * share

    # Over the classes named: every warp looks for them and takes part in their sums.
    count += len(run(file, "mark"))
    for function in ("sum_named", "sum_pairs", "write_named"):
        whole = run(file, function)
        sums = [part(whole)("machine.h", f"warp_{how}") for how in ("sum", "max")]
        every = part(whole)(file, "each_named")
        every = less(every, at(every, file, FOUND))
        some = less(whole, every, *sums)
        count += issued(sums[0] + sums[1]) + len(every) + len(some) * min(1, NAMED / LANES / warps)
    # And one warp has an exchange more.
    one = [run(file, "normalise"), run(file, "finish")]
    count += (sum(map(len, one)) + len(run("row.h", "total")) / 2) / warps
    return {"issued_per_column_restricted": round(count / columns, 2)}
