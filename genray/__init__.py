"""genray: classifiers that are accurate and robust. Generalist and Generalist++ on Ray.

    import genray
    results = genray.train("configs/digits.yaml")       # or: python -m genray.train
    model = genray.load_model("runs/digits")            # a torch.nn.Module, images in [0, 1] -> logits

Importing genray starts nothing heavy: torch and ray are imported by what uses them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genray.api import evaluate, export, label, load_images, load_model, report, test_images, train, tune
    from genray.config.schema import RunConfig

__version__ = "0.1.0"
__all__ = [
    "RunConfig",
    "__version__",
    "evaluate",
    "export",
    "label",
    "load_images",
    "load_model",
    "report",
    "test_images",
    "train",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    where = "genray.config.schema" if name == "RunConfig" else "genray.api"
    globals()[name] = getattr(import_module(where), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
