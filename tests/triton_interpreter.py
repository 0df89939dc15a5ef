"""Triton's interpreter at a bearable speed, for tests alone: nothing of it is part of fastkd."""

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
