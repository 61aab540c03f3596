"""Puts the compiled CPU kernels into a wheel, one library for each family of processors.

Flags, families and file names are those of daq_lightning/numerics/backends/compiling.py. Where there is no
compiler, or the system is not Linux, the wheel is pure Python and builds the library on its first use. An
editable install does that anyway.
"""

import importlib.util
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BACKENDS = "daq_lightning/numerics/backends"


class CompiledKernels(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory(prefix="daq_wheel_")
        libraries = self._compile(Path(self._folder.name))
        if libraries:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
            build_data["force_include"] |= {str(path): f"{BACKENDS}/lib/{path.name}" for path in libraries}

    def finalize(self, version, build_data, artifact_path):
        if version != "editable":
            self._folder.cleanup()

    def _compile(self, folder):
        compiling = load(Path(self.root, BACKENDS, "compiling.py"))
        system, _, machine = sysconfig.get_platform().partition("-")
        levels = compiling.LEVELS.get(machine, ()) if system == "linux" else ()
        if not levels:
            self.app.display_warning(
                f"No CPU kernels are compiled for {system} {machine}: a pure Python wheel."
            )
            return []
        try:
            commands = compiling.compilers()
        except compiling.CompilerMissingError as error:
            self.app.display_warning(f"{error} This wheel is pure Python and has no compiled CPU kernels.")
            return []
        libraries = []
        for level in levels:
            path = folder / level.file
            if self._compile_one(compiling, commands, level, path):
                libraries.append(path)
        return libraries

    def _compile_one(self, compiling, commands, level, path):
        problem = ""
        for compiler in commands:
            try:
                command = [*compiler, *compiling.FLAGS, *compiling.SHIPPED_FLAGS, *level.flags]
                compiling.compile_library(command, path)
            except (OSError, compiling.CompilerError) as error:
                problem = str(error)
            else:
                path.chmod(0o755)
                self.app.display_info(f"{path.name}: {path.stat().st_size:,} bytes, by {compiler[0]}")
                return True
        self.app.display_warning(
            f"{path.name} could not be compiled and is not in this wheel: {problem[-500:]}"
        )
        return False


def load(path):
    """A module from its file, without the package around it, which would need torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
