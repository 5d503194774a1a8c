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


def _keep_short(module: Any, apart: bool) -> None:
    """Asks LLVM not to unroll the loops of a module, and with `apart` not to copy its functions
    into others."""
    once = module.add_metadata(["llvm.loop.unroll.disable"])
    loop = module.add_metadata([once])
    loop.operands = (loop, once)  # LLVM knows the names of loops by their naming themselves
    for function in module.functions:
        if apart and function.blocks and "alwaysinline" not in function.attributes:
            function.attributes.add("noinline")
        order = {block: i for i, block in enumerate(function.blocks)}
        for block, i in order.items():
            branch = block.terminator
            if any(order.get(target, i + 1) <= i for target in getattr(branch, "operands", ())):
                branch.set_metadata("llvm.loop", loop)


class _Kernel(JITCodeLibrary):
    def add_ir_module(self, module: Any) -> None:
        _keep_short(module, apart=False)
        super().add_ir_module(module)

    def _optimize_final_module(self) -> None:
        options = {"loop_vectorize": False, "slp_vectorize": False}
        passes, builder = self._codegen._module_pass_manager(**options)
        with self._recorded_timings.record("Module passes", builder):
            passes.run(self._final_module, builder)


class _NoMachine:
    """Stands for the machine that holds the code of a library: this one has none."""

    def set_env(self, name: str, env: Any) -> None:
        """Objects of Python that a function uses; these use none."""


class _Part(JITCodeLibrary):
    """Intermediate code, with that of the functions that it calls, for the kernels that call it."""

    codegen = _NoMachine()

    def add_ir_module(self, module: Any) -> None:
        _keep_short(module, apart=True)
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


class PartCompiler(CompilerBase):
    """Numba's usual compiler, with another end."""

    def define_pipelines(self) -> list[Any]:
        self.state.library = _Part(self.state.targetctx.codegen(), "part")
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class KernelCompiler(CompilerBase):
    """Numba's usual compiler, of short loops."""

    def define_pipelines(self) -> list[Any]:
        self.state.flags.noalias = True  # no two arrays of a kernel share memory that it writes
        name = self.state.func_id.func_qualname
        self.state.library = _Kernel(self.state.targetctx.codegen(), name)
        self.state.library.enable_object_caching()
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]
