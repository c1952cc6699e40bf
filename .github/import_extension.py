"""Import the compiled module of an installed wheel without torch, which alone is gigabytes."""

import importlib.util
import sysconfig
from pathlib import Path

[path] = Path(sysconfig.get_path("platlib"), "dotresize").glob("_cpp.*.so")
spec = importlib.util.spec_from_file_location("_cpp", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(path.name, module.simd_level())
