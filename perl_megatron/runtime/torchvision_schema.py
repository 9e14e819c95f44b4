"""Lets PyPI's torchvision (built for CUDA) be imported beside a CPU torch.

Its Python files register fake kernels for two operators that its C++ library would have declared; where that library
cannot be loaded (it needs libcudart), the import dies with "operator torchvision::nms does not exist". Declaring the
two schemas first is enough: transforms then work, and the detection operators stay unusable (nothing here calls
them). Where the library does load, nothing is done.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_libraries: list[object] = []
"""Keeps the declared schemas alive: torch forgets them with the Library object."""


class _DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Runs once, just before torchvision is first imported; finds no module itself."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing_schemas()


def _declare_missing_schemas() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None or torch.version.hip is not None:
        return
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    for library in (Path(spec.origin).with_name(f"_C{suffix}") for suffix in suffixes):
        if library.exists():
            try:
                torch.ops.load_library(str(library))  # torchvision does the same on import; a second load is harmless
                return
            except OSError:
                break
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(declared)


def install() -> None:
    """Arrange it for the first import of torchvision; idempotent, and no import of torch or torchvision itself."""
    already = any(isinstance(finder, _DeclareBeforeImport) for finder in sys.meta_path)
    # A finder is also asked by importlib.util.find_spec, which imports nothing: declared is declared all the same.
    if not already and not _libraries and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _DeclareBeforeImport())
