"""Grids of whole runs on Ray Tune."""

from importlib.util import find_spec

from genray.errors import PlacementError


def require_ray():
    """Raises:
    PlacementError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise PlacementError("genray.tune: ray is not installed; pip install 'ray[train,tune]'")
