"""How Numba compiles kernels: what it leaves out that nobody needs.

Numba makes machine code of every function that it compiles. Nobody runs that of a function that is
only called by kernels, and those take in its intermediate code and optimise it together with their
own: it is compiled as far as LLVM's intermediate code, no further. Loops are not unrolled: their
bodies work on whole vectors, and what is called seldom stays apart.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder


def _keep_short(module: Any) -> None:
    """Asks LLVM not to unroll the loops of a module."""
    once = module.add_metadata(["llvm.loop.unroll.disable"])
    loop = module.add_metadata([once])
    loop.operands = (loop, once)  # LLVM knows the names of loops by their naming themselves
    for function in module.functions:
        order = {block: i for i, block in enumerate(function.blocks)}
        for block, i in order.items():
            branch = block.terminator
            if any(order.get(target, i + 1) <= i for target in getattr(branch, "operands", ())):
                branch.set_metadata("llvm.loop", loop)


class _NoMachine:
    """Stands for the machine that holds the code of a library: this one has none."""

    def set_env(self, name: str, env: Any) -> None:
        """Objects of Python that a function uses; these use none."""


class _Part(JITCodeLibrary):
    """Intermediate code, with that of the functions that it calls, for the kernels that call it."""

    codegen = _NoMachine()

    def add_ir_module(self, module: Any) -> None:
        _keep_short(module)
        super().add_ir_module(module)

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _optimize_functions(self, module: Any) -> None:
        """The kernel does."""
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        """The kernel does."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Apart(_Part):
    """The same, of which no copies are made in the functions that call it."""

    def add_ir_module(self, module: Any) -> None:
        for function in module.functions:
            if function.blocks:
                function.attributes.add("noinline")
        super().add_ir_module(module)


class _Kernel(JITCodeLibrary):
    """What runs, optimised once: Numba does it twice to save counts of references, of which kernels
    have but a handful."""

    def add_ir_module(self, module: Any) -> None:
        _keep_short(module)
        super().add_ir_module(module)

    def _optimize_final_module(self) -> None:
        options = {"loop_vectorize": False, "slp_vectorize": False}
        passes, builder = self._codegen._module_pass_manager(**options)
        with self._recorded_timings.record("Module passes", builder):
            passes.run(self._final_module, builder)


class PartCompiler(CompilerBase):
    """Numba's usual compiler, with another end."""

    library: Any = _Part

    def define_pipelines(self) -> list[Any]:
        self.state.library = self.library(self.state.targetctx.codegen(), "part")
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class ApartCompiler(PartCompiler):
    """The same for functions that stay apart."""

    library = _Apart


class KernelCompiler(CompilerBase):
    """Numba's usual compiler, for kernels of explicit vectors: no two of their arrays share memory
    that they write."""

    def define_pipelines(self) -> list[Any]:
        self.state.flags.noalias = True
        name = self.state.func_id.func_qualname
        self.state.library = _Kernel(self.state.targetctx.codegen(), name)
        self.state.library.enable_object_caching()
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]
