"""The solvers as a directory of Hugging Face's kernel hub, which its ``kernels`` package loads.

    python -m publish.hub OUT

OUT gets ``build/torch-universal``: the kernels and the operators in front of them, with relative
imports, as a hub's kernel must be loadable beside another version of itself. "Universal" says that
nothing is compiled before it is loaded: Triton does that on a GPU. The C++ kernels are left out, so
that on a CPU the hub's solvers are the plain PyTorch reference.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import dotresize
from dotresize.checkpoint import write_whole

VARIANT = "torch-universal"
ROOT = Path(__file__).parent.parent
ROOMS = {"ops": ROOT / "dotresize" / "ops", "kernels": ROOT / "kernels"}
# The oldest release of the `kernels` package that this was loaded by.
OLDEST = "0.17.2"
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# dotresize

Log-domain Sinkhorn, L1 and other costs between activations, batched, in Triton.

```python
from kernels import get_kernel

dotresize = get_kernel("OWNER/dotresize", version=1, trust_remote_code=["OWNER/dotresize"])
result = dotresize.sinkhorn(cost, reg=0.1)
```
"""
PUBLIC = {
    "ops.activation_cost": ("activation_cost",),
    "ops.cost_accumulator": ("ActivationCostAccumulator", "L1CostAccumulator"),
    "ops.l1_cost": ("l1_cost",),
    "ops.sinkhorn": ("sinkhorn",),
    "ops.sinkhorn_result": ("SinkhornResult",),
    "ops.transport_map": ("factorize", "transport_map"),
}
_IMPORT = re.compile(r"^( *)from dotresize((?:\.\w+)*) import ", re.MULTILINE)


def write(out: Path, version: int = 1) -> Path:
    """Write the layout of a hub's repository; return the directory that is loaded.

    Args:
        out: must not be there yet, and is there whole or not at all.
        version: of the hub's kernel, which its users ask for by number.

    Raises:
        FileExistsError: out is there.
        ValueError: version is below 1.
    """
    if version < 1:
        raise ValueError(f"version {version}: must be at least 1")
    if out.exists():
        raise FileExistsError(f"{out}: is there already; give a directory that is not")
    write_whole(out, lambda folder: _fill(folder, version))
    return out / "build" / VARIANT


def _fill(whole: Path, version: int) -> None:
    folder = whole / "build" / VARIANT
    for name, room in ROOMS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f'"""{name} of dotresize."""\n')
        for path in sorted(room.glob("*.py")):
            if path.name != "__init__.py":
                text = _relative(path.read_text(encoding="utf-8"))
                (folder / name / path.name).write_text(text, encoding="utf-8")
    lines = [f"from .{module} import {', '.join(names)}" for module, names in PUBLIC.items()]
    names = sorted(name for found in PUBLIC.values() for name in found)
    about = (dotresize.__doc__ or "").strip()
    lines = [f'"""{about}"""', "", *lines, "", f'__version__ = "{dotresize.__version__}"']
    (folder / "__init__.py").write_text("\n".join([*lines, f"__all__ = {names}", ""]))
    metadata = {
        "id": f"_dotresize_universal_{version}",
        "name": "dotresize",
        "version": version,
        "kernels-minver": OLDEST,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (whole / "README.md").write_text(CARD.replace("version=1", f"version={version}"))


def _relative(text: str) -> str:
    """Return a module of a room with its imports of the package relative to the package."""

    def one(found: re.Match) -> str:
        return f"{found[1]}from .{found[2] or '.'} import "

    return _IMPORT.sub(one, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory, which must not be there")
    parser.add_argument("--version", type=int, default=1, help="of the hub's kernel (1)")
    args = parser.parse_args()
    try:
        sys.stdout.write(f"{write(args.out, args.version)}\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
