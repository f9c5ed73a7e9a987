"""What Triton demands of a backend's driver; never asked, but for whether it is there."""

from __future__ import annotations

from triton.backends.driver import DriverBase  # pyright: ignore[reportMissingImports]

from interpreted_cpu.compiler import refuse


class NoDriver(DriverBase):
    map_python_to_cpp_type = get_current_target = get_active_torch_device = get_benchmarker = refuse

    @classmethod
    def is_active(cls) -> bool:
        return False
