"""Triton tests where there is no GPU: each is run by Triton's interpreter, in a child process, and reported as itself.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own library included, so the interpreter needs a process in
which the variable is set from the start. `interpreted` marks a test; the first one starts a child that lives as long as
this process, and each runs there by its own node id, so selection, parameters, workers of xdist and reports stay pytest's.
To debug one: TRITON_INTERPRET=1 python -m pytest tests/test_triton.py -k name

As a program this file is that child: a node id and a seed on stdin, one a line; one JSON object on stdout for each.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parent.parent


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test in the interpreter's process."""
    if INTERPRETING:
        return test

    @functools.wraps(test)
    def there(**_: Any) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        node = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]
        # Node ids are relative to pytest's root, which need not be ours.
        answer = _child().run(f"tests/{node.rsplit('/', 1)[-1]}", seed=torch.initial_seed())
        if answer["exit"] != pytest.ExitCode.OK:
            pytest.fail(answer["text"], pytrace=False)

    return there


class _Child:
    def __init__(self) -> None:
        hidden = ("PYTEST_", "COV_CORE_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KVKERN_DEBUG": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def run(self, node: str, *, seed: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(node, seed, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            _child.cache_clear()
            return {"exit": -1, "text": f"the interpreter's process died with {self.process.wait()} in {node}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _child() -> _Child:
    return _Child()


def _serve() -> None:
    # The pipe is for answers alone; what tests print goes into their reports.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        report = io.StringIO()
        with contextlib.redirect_stdout(report):
            node, seed = line.rsplit(" ", 1)
            # The parent has chosen the test: its marks choose nothing here.
            options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", "-m", ""]
            code = pytest.main([*options, f"--seed={int(seed)}", node])
        print(json.dumps({"exit": int(code), "text": report.getvalue()}), file=answers, flush=True)


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round as hardware does, where triton 3.6 to 3.9 do not.

    It keeps bf16 as raw 16-bit integers: tl.dot multiplies those, and a cast from fp32 cuts where hardware rounds to
    nearest even. Its tl.dot is one BLAS call, which rounds a row by its place in the tile; here each row is a product of
    its own. And its tl.fma rounds twice, so that it cannot tell fma(a, b, c * d) from fma(c, d, a * b); here the product is
    exact. The methods are private; if they move, this names what to look for.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    names = ("create_dot", "create_fma", "cast_impl")
    if builder is None or not all(hasattr(builder, name) for name in names):
        pytest.fail(
            f"triton.runtime.interpreter.InterpreterBuilder has no {' or no '.join(names)}: find their new names"
        )
    cast, handle = builder.cast_impl, interpreter.TensorHandle

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        rows = np.matmul(np.ascontiguousarray(widened(a))[:, None, :], widened(b))
        return handle(rows[:, 0] + d.data, d.dtype.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # 24 bits times 24 are exact in fp64. The sum is rounded to fp64 first, which shows in fp32 once in some 2**29.
        total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return handle(total.astype(np.float32), z.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return handle(np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    # Without this an assertion of a kernel is left out, and KVKERN_DEBUG=1 would check nothing.
    made = interpreter.interpreter_builder
    monkeypatch.setattr(made, "options", dataclasses.replace(made.options, debug=True))
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "create_fma", create_fma)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


if __name__ == "__main__":
    _serve()
