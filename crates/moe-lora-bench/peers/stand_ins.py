"""Runs single files of an unpacked package without its server: what they import from the rest of it are stand-ins."""
import importlib.util
import pathlib
import sys
import types


class Package:
    """A package unpacked in `folder`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)

    def stand_in(self, name, **contents):
        """Puts a module with these contents, and empty parents, where imports find it."""
        module = sys.modules.get(name) or types.ModuleType(name)
        module.__path__ = getattr(module, "__path__", [])
        vars(module).update(contents)
        self.place(name, module)
        return module

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
