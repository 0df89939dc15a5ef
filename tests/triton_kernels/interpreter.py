"""Triton's interpreter at a bearable speed, for tests alone: nothing of it is part of fastkd.

What it does otherwise than a GPU, and why the kernels may not care:

- exp2 and log2 are numpy's, to an ulp; ex2.approx and lg2.approx are off by two, and flush
  subnormals. The bounds of bounds.py leave room for both; no kernel takes a value for exact.
- a * b + c is rounded twice. Where a GPU rounds once it is better, so no kernel needs that it does.
- float32 to bfloat16 truncates, and subnormal bfloat16 reads as 0: to_stored and to_float in
  load.py go by the bits, to_stored in the interpreter alone.
- max and maximum: whether a NaN survives differs by version and by target. No kernel finds a NaN
  by a maximum; sums carry it.
- A program runs as one thread: no race inside of it and no missing barrier shows. Kernels read what
  they overwrite (the label's logit, the tiles of inplace=True) before a reduction or in the thread
  that writes it.
- Programs run one after another, so that one that waits for a later one would wait for ever: fastkd
  splits no rows in the interpreter. Here `taking_turns` runs them by turns, which change at atomic
  operations only: an order of memory operations weaker than the program's does not show.
- Nothing is specialised: an int of 1 stays a tensor here, and is a Python int in a compiled kernel
  unless do_not_specialize names it. test_aot.py compiles such calls.
- It accepts code that does not compile; and before 3.7, with numpy >= 2.4, no loop at all.
"""

import contextlib
import dataclasses
import inspect
import random
import threading
from collections.abc import Iterator

from triton.runtime import interpreter

from fastkd.kernels.triton import plan as triton_plan


def patch_once() -> None:
    """Every call of one jitted function by another patches the modules of triton.language that it
    sees anew, and that is nine tenths of the interpreter's time. Once per launch suffices. A third
    of what is left looks for overflow in sums of integers: `checking_overflow`.
    """
    _sanitize(False)
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


def _sanitize(on: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)


@contextlib.contextmanager
def checking_overflow() -> Iterator[None]:
    _sanitize(True)
    try:
        yield
    finally:
        _sanitize(False)


class _Program:
    """One program of a launch, on a thread that runs while `resume` waits, and then not."""

    def __init__(self, fn, arguments: dict, index: tuple[int, int, int]) -> None:
        self.index, self.done, self.error = index, False, None
        self.turn, self.yielded = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(fn, arguments), daemon=True)
        self.thread.start()

    def _run(self, fn, arguments: dict) -> None:
        self.turn.acquire()
        try:
            fn(**arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        self.yielded.release()

    def resume(self) -> None:
        interpreter.interpreter_builder.set_grid_idx(*self.index)
        self.turn.release()
        self.yielded.acquire()
        if self.error is not None:
            raise self.error

    def pause(self) -> None:
        self.yielded.release()
        self.turn.acquire()


class _Turns:
    """A kernel as the interpreter's loop over programs calls it: no more than `room` run at a time,
    as on a GPU, and at every atomic operation it is anyone's turn."""

    def __init__(self, fn, room: int, seed: int) -> None:
        self.fn, self.room, self.chance = fn, room, random.Random(seed)
        self.running: list[_Program] = []
        self.current: _Program | None = None
        self.turns = 0
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__
        self.__signature__ = inspect.signature(fn)

    def __call__(self, **arguments) -> None:
        builder = interpreter.interpreter_builder
        index = tuple(builder.grid_idx)
        self.running.append(_Program(self.fn, arguments, index))
        last = all(i + 1 == n for i, n in zip(index, builder.grid_dim, strict=True))
        while len(self.running) >= (1 if last else self.room):
            self.turns += 1
            if self.turns > 20_000:
                raise RuntimeError("the programs wait for each other")
            self.current = self.chance.choice(self.running)
            self.current.resume()
            if self.current.done:
                self.running.remove(self.current)

    def yield_turn(self) -> None:
        if self.current is not None:
            self.current.pause()


@contextlib.contextmanager
def taking_turns(room: int = 0, seed: int = 0) -> Iterator[list[int]]:
    """Rows are split, into some three slices of two tiles, and `room` programs run at a time, by
    default as many as one row has. Yields the number of turns of each launch."""
    executor, split = interpreter.GridExecutor, triton_plan.slice_columns
    atomic, config = interpreter.InterpreterBuilder.create_atomic_rmw, triton_plan.SLICE
    launches: list[int] = []
    active: list[_Turns] = []

    class Executor(executor):
        def __call__(self, *arguments, **options):
            if options.get("PARTS", 1) == 1:
                return super().__call__(*arguments, **options)
            parts = arguments[self.arg_names.index("parts")]
            self.fn = _Turns(self.fn, room or parts, seed + len(launches))
            active.append(self.fn)
            try:
                super().__call__(*arguments, **options)
            finally:
                launches.append(active.pop().turns)

    def create_atomic_rmw(self, *arguments):
        active[-1].yield_turn()
        return atomic(self, *arguments)

    def slice_columns(device, V: int, pair: int) -> int:
        block = max(16, 1 << max(V // 4, 1).bit_length() - 1)
        triton_plan.SLICE = triton_plan.Config(block // triton_plan.COLUMNS, 0)
        return min(2 * block, V)

    interpreter.GridExecutor, triton_plan.slice_columns = Executor, slice_columns
    interpreter.InterpreterBuilder.create_atomic_rmw = create_atomic_rmw
    triton_plan.plan.cache_clear()
    try:
        yield launches
    finally:
        interpreter.GridExecutor, triton_plan.slice_columns = executor, split
        interpreter.InterpreterBuilder.create_atomic_rmw = atomic
        triton_plan.SLICE = config
        triton_plan.plan.cache_clear()
