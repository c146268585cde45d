"""What PyTorch compiles with on the CPU."""

from __future__ import annotations

from apt.errors import UserError


def check_compiler(option: str) -> None:
    """Raise `UserError` where there is no C++ compiler; `option` is what asked for one."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            f"{option}: needs a C++ compiler, and none is found; install one, such as g++, or name it in the environment's CXX"
        ) from error
