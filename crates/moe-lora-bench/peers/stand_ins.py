"""Runs single files of unpacked packages without their servers: what they import from the rest of a package are stand-ins."""

import contextlib
import importlib.util
import os
import pathlib
import sys
import types

# Where prepare.py has put the packages, one folder for each; these two are libraries that others import.
FOLDER = pathlib.Path(os.environ["PEERS"]).resolve()
sys.path[:0] = [str(FOLDER / "site"), str(FOLDER / "cutedsl/nvidia_cutlass_dsl/dsl_packages")]


class Package:
    """The package unpacked in FOLDER/name, whose modules are called `tops`. Several can have modules of the same name: imports
    find this one's within `alone`."""

    def __init__(self, name, *tops):
        self.folder = FOLDER / name
        self.tops = tops
        self.modules = {}

    @contextlib.contextmanager
    def alone(self):
        """Imports under our names find our modules, and nobody else's."""
        ours = lambda: [name for name in sys.modules if name.partition(".")[0] in self.tops]
        others = {name: sys.modules.pop(name) for name in ours()}
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            self.modules = {name: sys.modules.pop(name) for name in ours()}
            sys.modules.update(others)

    def stand_in(self, name, **contents):
        """Puts a module with these contents, and empty parents, where imports find it."""
        module = sys.modules.get(name) or types.ModuleType(name)
        module.__path__ = getattr(module, "__path__", [])
        vars(module).update(contents)
        self.place(name, module)
        return module

    def folders(self, *names):
        """Makes folders of the package importable without running their `__init__`."""
        for name in names:
            self.stand_in(name).__path__ = [str(self.folder / name.replace(".", "/"))]

    def place(self, name, module):
        """Makes a module importable by name."""
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules.get(parent) or self.stand_in(parent), child, module)

    def real(self, name):
        """Runs the package's own file."""
        path = self.folder / (name.replace(".", "/") + ".py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        self.place(name, module)
        spec.loader.exec_module(module)
        return module
