"""How Numba compiles kernels: what it leaves out that nobody needs.

Numba makes machine code of every function that it compiles. Nobody runs that of a function that is
only called by kernels, and those take in its intermediate code and optimise it together with their
own: it is compiled as far as LLVM's intermediate code, no further. Loops are not unrolled: their
bodies work on whole vectors, and what is called seldom stays apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite.binding import create_new_function_pass_manager
from numba import njit
from numba.core import typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.lowering import Lower
from numba.extending import overload

from torchpool.kernels.cpu.shares import add_entry


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


def _shorten(library: Any, module: Any) -> None:
    """Brings variables into registers and drops what is then idle: most of what Numba writes. A
    part is shortened once, however many kernels it becomes a part of."""
    codegen = library._codegen
    module.data_layout = codegen._data_layout
    builder = codegen._pass_builder(opt=1)
    passes = create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


class _NoMachine:
    """Stands for the machine that holds the code of a library: this one has none."""

    def set_env(self, name: str, env: Any) -> None:
        """Objects of Python that a function uses; these use none."""


class _Part(JITCodeLibrary):
    """Intermediate code of one function, for the kernels that call it. What it calls is linked by
    each kernel, once for all its parts."""

    codegen = _NoMachine()

    def add_ir_module(self, module: Any) -> None:
        _keep_short(module)
        super().add_ir_module(module)

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _optimize_functions(self, module: Any) -> None:
        _shorten(self, module)

    def finalize(self) -> None:
        self._raise_if_finalized()
        for function in self._final_module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"
        self._shared_module = self._final_module
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

    def _optimize_functions(self, module: Any) -> None:
        _shorten(self, module)

    def finalize(self) -> None:
        self._linking_libraries = _with_parts(self._linking_libraries)
        super().finalize()

    def _optimize_final_module(self) -> None:
        options = {"loop_vectorize": False, "slp_vectorize": False}
        passes, builder = self._codegen._module_pass_manager(**options)
        with self._recorded_timings.record("Module passes", builder):
            passes.run(self._final_module, builder)


def _with_parts(libraries: list[Any]) -> list[Any]:
    """Libraries and what their parts call, and so on; each after all that call it, since LLVM links
    what has been asked for."""
    called_first: dict[Any, None] = {}

    def add(library: Any) -> None:
        if library not in called_first:
            for each in library._linking_libraries if isinstance(library, _Part) else ():
                add(each)
            called_first[library] = None

    for library in libraries:
        add(library)
    return list(reversed(called_first))


_STEPS = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.IRLegalization,
    typed_passes.AnnotateTypes,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
)
"""Numba's steps from byte code to LLVM's intermediate code, but for those that are about what
kernels are not written with: expressions of whole arrays, closures, lists made by one expression,
functions that Numba itself inlines, loops over tuples, blocks of `with`."""


class _EnteredByWords(Lower):  # type: ignore[misc]
    """Intermediate code of a kernel, with an entry for arrays of words instead of Python's objects,
    which would take much code."""

    def create_cpython_wrapper(self, release_gil: bool = False) -> None:
        add_entry(self.context, self.library, self.fndesc)


@register_pass(mutates_CFG=True, analysis_only=False)
class _KernelLowering(typed_passes.BaseNativeLowering):  # type: ignore[misc]
    _name: Any = "kernel_lowering"

    @property
    def lowering_class(self) -> Any:
        return _EnteredByWords


def _steps(lowering: Any = typed_passes.NativeLowering) -> list[Any]:
    manager = PassManager("kernels")
    for step in _STEPS:
        step = lowering if step is typed_passes.NativeLowering else step
        manager.add_pass(step, step.__name__)
    manager.finalize()
    return [manager]


class PartCompiler(CompilerBase):
    """Numba's usual compiler, with another end."""

    library: Any = _Part

    def define_pipelines(self) -> list[Any]:
        self.state.library = self.library(self.state.targetctx.codegen(), "part")
        return _steps()


class ApartCompiler(PartCompiler):
    """The same for functions that stay apart."""

    library = _Apart


class KernelCompiler(CompilerBase):
    """Numba's usual compiler, for kernels of explicit vectors: no two of their arrays share memory
    that they write."""

    lowering: Any = _KernelLowering

    def define_pipelines(self) -> list[Any]:
        self.state.flags.noalias = True
        name = self.state.func_id.func_qualname
        self.state.library = _Kernel(self.state.targetctx.codegen(), name)
        self.state.library.enable_object_caching()
        return _steps(self.lowering)


class RaisingCompiler(KernelCompiler):
    """The same for kernels that Python calls, to see what they raise."""

    lowering = typed_passes.NativeLowering


_COMMON: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

INNER: dict[str, Any] = {
    **_COMMON,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
    "_nrt": False,
    "pipeline_class": PartCompiler,
}
"""Options of functions that become a part of the kernels that call them: what is cached on disk is
the kernel that holds them. They allocate nothing, so that arrays need not be counted."""

APART: dict[str, Any] = {**INNER, "forceinline": False}
"""The same for long functions that are called seldom, or from several places."""

SELDOM: dict[str, Any] = {**APART, "pipeline_class": ApartCompiler}
"""The same for functions that are hardly ever called: no copies are made of them."""

COPYING: dict[str, Any] = {**APART, "_nrt": True}
"""The same for functions that copy parts of arrays or return one: Numba counts references."""

JIT: dict[str, Any] = {
    **_COMMON,
    "cache": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": KernelCompiler,
}
"""Options of kernels."""


def raising(kernel: Any) -> Any:
    """A kernel as a function of Python's objects, which raises what it fails with."""
    return njit(**{**JIT, "cache": False, "pipeline_class": RaisingCompiler})(kernel.py_func)


inlined: Any = partial(overload, jit_options=INNER)  # type: ignore[arg-type]
"""`numba.extending.overload` for implementations that become a part of the kernels."""
