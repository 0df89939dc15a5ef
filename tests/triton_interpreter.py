"""Triton's interpreter at a bearable speed, for tests alone: nothing of it is part of fastkd.

What it does otherwise than a GPU, and why the kernels may not care:

- exp2 and log2 are numpy's, to an ulp; ex2.approx and lg2.approx are off by two, and flush
  subnormals. The bounds of bounds.py leave room for both; no kernel takes a value for exact.
- a * b + c is rounded twice. Where a GPU rounds once it is better, so no kernel needs that it does.
- float32 to bfloat16 truncates, and subnormal bfloat16 reads as 0: to_stored and to_float in
  triton_math.py go by the bits, to_stored in the interpreter alone.
- max and maximum: whether a NaN survives differs by version and by target. No kernel finds a NaN
  by a maximum; sums carry it.
- Programs run one after another and a program as one thread: no race and no missing barrier shows.
  Kernels read what they overwrite (the label's logit, the tiles of inplace=True) before a reduction
  or in the thread that writes it.
- Nothing is specialised: an int of 1 stays a tensor here, and is a Python int in a compiled kernel
  unless do_not_specialize names it. test_triton_compile.py compiles such calls.
- It accepts code that does not compile; and before 3.7, with numpy >= 2.4, no loop at all.
"""

from triton.runtime import interpreter


def patch_once() -> None:
    """Every call of one jitted function by another patches the modules of triton.language that it
    sees anew, and that is nine tenths of the interpreter's time. Once per launch suffices.
    """
    patch = interpreter._patch_lang
    patched = set()

    def patch_lang(fn):
        seen = id(fn.__globals__)
        if seen in patched:
            return None
        scope = patch(fn)
        if not patched:  # the kernel's own call, which restores what it patched
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(seen)
        return scope

    interpreter._patch_lang = patch_lang
