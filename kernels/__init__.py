"""Triton kernels, importable as ``dotresize.kernels``.

This folder lies at the repository root, where it would shadow Hugging Face's ``kernels``
package for every program started from there; transformers imports that package if it finds one.
So when imported under the bare name, this module hands over to the real package, or, where none
is installed, reports version "0", which transformers takes for "not usable".
"""

if __name__ == "kernels":

    def _hand_over() -> None:
        import importlib.machinery
        import importlib.util
        import sys
        from pathlib import Path

        here = Path(__file__).resolve().parent.parent
        elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
        spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
        if spec is None or spec.loader is None:
            globals()["__version__"] = "0"
            return
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)

    _hand_over()
